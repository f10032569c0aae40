"""The SiLU of vectors of scores, and of any number of them.

SiLU(x) = x / (1 + e^-x). With z = -x log2(e) it is -ln 2 * z / (1 + 2^z), and the two constants are
left to factors that are there anyway. 2^z is a whole power times a polynomial on [-1/2, 1/2] or
[0, 1].

AVX-512 has instructions for what else takes several, and which would wait for the same units as
products do: the fraction of z, and a number times a whole power of two, which becomes infinite or
0 as it should (VREDUCEPS and VSCALEFPS; Intel 64 and IA-32 Architectures Software Developer's
Manual, volume 2). All numbers are worked out alike, wherever in memory they are.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from model_executor.attention.silu_tile import (
    COLUMNS,
    FEATURES,
    LANES,
    compiled,
    emitted,
    use_wide_vectors,
)

SCORE_FACTOR = -1.0 / math.log(2.0)
"""z of a score."""
WEIGHT_FACTOR = -math.log(2.0)
"""SiLU of z / (1 + 2^z)."""
HAS_SCALING = {"avx512f", "avx512dq"} <= FEATURES
"""Whether the processor has these instructions."""

_BIAS_FACTOR = np.float32(SCORE_FACTOR)
_ONE = np.float32(1.0)
_Z_MIN = np.float32(-126.0)  # 2^z below it is no normal number, and nothing beside 1.
# Added to z it leaves round(z) + 127, the exponent field of 2^round(z), in the lowest bits. The
# field ends at 254; a larger z overflows the polynomial and the weight is 0, as it should be.
_ROUNDER = np.float32(1.5 * 2**23 + 127)
_ROUNDED_MAX = np.float32(1.5 * 2**23 + 254)
# Minimax for the relative error of 2^f on [-1/2, 1/2], which is 7.5e-8.
_C0 = np.float32(1.0000000716550386)
_C1 = np.float32(0.6931469670638859)
_C2 = np.float32(0.2402211972207933)
_C3 = np.float32(0.055507132740787696)
_C4 = np.float32(0.009675541430052755)
_C5 = np.float32(0.0013276472072678409)
# Likewise on [0, 1], from the highest power down: 9.4e-8.
_POWERS = (
    0.0018671301659196615,
    0.009017029777169228,
    0.05579991266131401,
    0.24016444385051727,
    0.6931512951850891,
    1.0,
)

_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_WORD, _MASK = ir.IntType(32), ir.IntType(16)
_TO_FLOOR = 1  # What VREDUCEPS takes away is the whole number below.
_AS_ALWAYS = 4  # Of rounding: the processor's mode, which is to the nearest.


@compiled
def silu(z: Any) -> Any:
    """Works out z / (1 + 2^z): without branches, and NaN for NaN."""
    clamped = z if z > _Z_MIN else _Z_MIN
    rounded = np.float32(clamped + _ROUNDER)
    rounded = np.float32(rounded if rounded < _ROUNDED_MAX else _ROUNDED_MAX)
    f = clamped - (rounded - _ROUNDER)
    power = np.int32(rounded.view(np.int32) << np.int32(23)).view(np.float32)
    poly = _C0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * _C5))))
    return z / (_ONE + poly * power)


@emitted
def _silu_columns(_context: Any, scores: Any, at: Any) -> Any:
    """Puts z / (1 + 2^z) in the place of each z of `COLUMNS`, with `HAS_SCALING`."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        for place in _vectors(context, builder, signature.args[0], *values):
            weights = _emit_silu(builder, builder.load(place, align=4))
            builder.store(weights, place, align=4)
        return context.get_dummy_value()

    return types.void(scores, types.int64), generate


@emitted
def _biased_silu_columns(_context: Any, scores: Any, at: Any, bias: Any, bias_at: Any) -> Any:
    """The same with something added to each score."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        places = _vectors(context, builder, signature.args[0], *values[:2])
        biases = _vectors(context, builder, signature.args[2], *values[2:])
        for place, added in zip(places, biases, strict=True):
            score, more = (builder.load(one, align=4) for one in (place, added))
            z = _emit_fused(builder, more, _constant(_BIAS_FACTOR), score)
            builder.store(_emit_silu(builder, z), place, align=4)
        return context.get_dummy_value()

    return types.void(scores, types.int64, bias, types.int64), generate


def _vectors(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> list[Any]:
    """Where the vectors of `COLUMNS` numbers of an array are, from a place on."""
    start = builder.gep(context.make_array(kind)(context, builder, array).data, [at])
    places = [builder.gep(start, [_WORD(column)]) for column in range(0, COLUMNS, LANES)]
    return [builder.bitcast(place, _VECTOR.as_pointer()) for place in places]


@emitted
def _silu_alone(_context: Any, z: Any) -> Any:
    """The same of one number, with no less work."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        vector = builder.insert_element(_constant(0.0), values[0], _WORD(0))
        return builder.extract_element(_emit_silu(builder, vector), _WORD(0))

    return types.float32(types.float32), generate


def _emit_silu(builder: Any, z: Any) -> Any:
    """Writes z / (1 + 2^z)."""
    f = _call(builder, "mask.reduce", z, _WORD(_TO_FLOOR))
    power = _constant(_POWERS[0])
    for number in _POWERS[1:]:
        power = _emit_fused(builder, power, f, _constant(number))
    return builder.fdiv(z, builder.fadd(_call(builder, "mask.scalef", power, z), _constant(1.0)))


def _emit_fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Writes a b + c as one instruction."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    function = builder.module.declare_intrinsic(f"llvm.fma.v{LANES}f32", fnty=kind)
    return builder.call(function, [a, b, c])


def _call(builder: Any, name: str, *values: Any) -> Any:
    """Calls an instruction of AVX-512 for all lanes."""
    values = *values, _VECTOR(ir.Undefined), _MASK(-1), _WORD(_AS_ALWAYS)
    kind = ir.FunctionType(_VECTOR, [value.type for value in values])
    function = builder.module.declare_intrinsic(f"llvm.x86.avx512.{name}.ps.512", fnty=kind)
    return builder.call(function, values)


def _constant(number: Any) -> Any:
    return _VECTOR([float(number)] * LANES)


@compiled
def plain_silu_pass(scores: Any, first: int, number: int) -> None:
    """`silu_pass` on any processor."""
    use_wide_vectors()
    for j in range(number):
        # Unsigned: a signed place would be looked at whether it counts from the end.
        place = np.uintp(first + j)
        scores[place] = silu(scores[place])


@compiled
def _scaled_silu_pass(scores: Any, first: int, number: int) -> None:
    """`silu_pass` with `HAS_SCALING`."""
    use_wide_vectors()
    whole = number // COLUMNS * COLUMNS
    for j in range(0, whole, COLUMNS):
        _silu_columns(scores, first + j)
    for j in range(whole, number):
        place = np.uintp(first + j)
        scores[place] = _silu_alone(scores[place])


silu_pass = _scaled_silu_pass if HAS_SCALING else plain_silu_pass
"""Puts z / (1 + 2^z) in the place of each z.

Args:
    scores: float32 [n], each times `SCORE_FACTOR`.
    first: the first to be replaced.
    number: how many are.
"""


@compiled
def _plain_biased_pass(scores: Any, first: int, number: int, bias: Any, first_bias: int) -> None:
    """`biased_silu_pass` on any processor."""
    use_wide_vectors()
    for j in range(number):
        place, added = np.uintp(first + j), bias[np.uintp(first_bias + j)]
        scores[place] = silu(np.float32(scores[place] + added * _BIAS_FACTOR))


@compiled
def _scaled_biased_pass(scores: Any, first: int, number: int, bias: Any, first_bias: int) -> None:
    """`biased_silu_pass` with `HAS_SCALING`."""
    use_wide_vectors()
    whole = number // COLUMNS * COLUMNS
    for j in range(0, whole, COLUMNS):
        _biased_silu_columns(scores, first + j, bias, first_bias + j)
    for j in range(whole, number):
        place, added = np.uintp(first + j), bias[np.uintp(first_bias + j)]
        scores[place] = _silu_alone(np.float32(scores[place] + added * _BIAS_FACTOR))


biased_silu_pass = _scaled_biased_pass if HAS_SCALING else _plain_biased_pass
"""`silu_pass` with something added to each score: bias, float32, from `first_bias` on."""
