"""Inner loops of compiled SiLU attention on a CPU: a matrix product in registers, and the SiLU.

SiLU(x) = x / (1 + e^-x). With z = -x log2(e) it is -ln 2 * z / (1 + 2^z), and the two constants are
left to factors that are there anyway. 2^z is a whole power, made by shifting an integer into the
exponent of a float, times a polynomial on [-1/2, 1/2].
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

_FEATURES = binding.get_host_cpu_features()
# A row of a product has two vectors of sums. With two vectors of the right factor and a broadcast
# number they fill the registers: 32 with AVX-512, 16 before.
_AVX512, _AVX2 = (bool(_FEATURES.get(name)) for name in ("avx512f", "avx2"))
LANES, ROWS = (16, 14) if _AVX512 else (8, 6) if _AVX2 else (4, 6)
COLUMNS = 2 * LANES
"""Columns of a product, as `ROWS` are its rows."""

SCORE_FACTOR = -1.0 / math.log(2.0)
"""z of a score."""
WEIGHT_FACTOR = -math.log(2.0)
"""SiLU of z / (1 + 2^z)."""

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

_INT, _FLAG = ir.IntType(64), ir.IntType(32)
_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_FUSED = ("contract",)  # A product and a sum may be one instruction.


def compiled(function: Any) -> Any:
    """Compiles a function together with the kernel that calls it."""
    # Only what keeps NaN and the order of sums: reassociation would fold the rounding of z away.
    fast = {"contract", "nsz"}
    return njit(nogil=True, fastmath=fast, error_model="numpy")(function)


def emitted(function: Any) -> Any:
    """A function that compiled ones call, whose code is written instruction by instruction."""
    return intrinsic(function)


@emitted
def use_wide_vectors(_context: Any) -> Any:
    """Asks for 512-bit registers where there are some: LLVM takes 256 by itself, a fifth slower."""

    def generate(context: Any, builder: Any, _signature: Any, _values: Any) -> Any:
        # llvmlite's own `add` refuses attributes that have a value.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


@emitted
def prefetch(_context: Any, array: Any, place: Any) -> Any:
    """Brings a number of a flat array nearer; the place may be outside of it."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, values[0])
        pointer = builder.bitcast(builder.gep(view.data, [values[1]]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _FLAG, _FLAG, _FLAG])
        function = builder.module.declare_intrinsic("llvm.prefetch.p0", fnty=kind)
        # For reading; into the first cache; data.
        builder.call(function, [pointer, _FLAG(0), _FLAG(3), _FLAG(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@emitted
def block_product(
    _context: Any,
    a: Any,
    a_at: Any,
    a_row: Any,
    a_column: Any,
    b: Any,
    b_at: Any,
    b_row: Any,
    c: Any,
    c_at: Any,
    c_row: Any,
    depth: Any,
    adds: Any,
) -> Any:
    """Puts a [ROWS, depth] b [depth, COLUMNS] into c, or adds it with `adds`; depth is positive.

    Of each matrix the flat float32 array is given, where the matrix begins in it, and the distance
    of its rows; of a, the distance of its columns too. LLVM would not keep the sums in registers
    if this were written as loops: here it reaches 97 % of what the processor can do.
    """
    of_a, of_b, of_c = (a, *[types.int64] * 3), (b, *[types.int64] * 2), (c, *[types.int64] * 2)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        def begin(place: int) -> Any:
            view = context.make_array(signature.args[place])(context, builder, values[place])
            return builder.gep(view.data, [values[place + 1]])

        left, right, sums = (begin(0), *values[2:4]), (begin(4), values[6]), (begin(7), values[9])
        _emit_product(builder, left, right, sums, *values[10:])
        return context.get_dummy_value()

    return types.void(*of_a, *of_b, *of_c, types.int64, types.boolean), generate


def _emit_product(builder: Any, a: Any, b: Any, c: Any, depth: Any, adds: Any) -> None:
    """Writes the loop over the depth; a, b and c are pointers and distances."""

    def vectors(matrix: Any, row: Any) -> list[Any]:
        """Where the vectors of a row are."""
        start = builder.gep(matrix[0], [builder.mul(row, matrix[1])])
        places = [builder.gep(start, [_INT(column)]) for column in range(0, COLUMNS, LANES)]
        return [builder.bitcast(place, _VECTOR.as_pointer()) for place in places]

    targets = [place for row in range(ROWS) for place in vectors(c, _INT(row))]
    before = builder.block
    load, loop, store = (builder.append_basic_block(name) for name in ("load", "loop", "store"))
    builder.cbranch(adds, load, loop)

    builder.position_at_end(load)
    held = [builder.load(place, align=4) for place in targets]
    builder.branch(loop)

    builder.position_at_end(loop)
    step = builder.phi(_INT)
    sums = [builder.phi(_VECTOR) for _ in targets]
    right = [builder.load(place, align=4) for place in vectors(b, step)]
    new: list[Any] = []
    for row in range(ROWS):
        offset = builder.add(builder.mul(_INT(row), a[1]), builder.mul(step, a[2]))
        left = _broadcast(builder, builder.load(builder.gep(a[0], [offset])))
        for vector in right:
            product = builder.fmul(left, vector, flags=_FUSED)
            new.append(builder.fadd(product, sums[len(new)], flags=_FUSED))
    next_step = builder.add(step, _INT(1))
    step.add_incoming(next_step, loop)
    for block in (before, load):
        step.add_incoming(_INT(0), block)
    for phi, after, old in zip(sums, new, held, strict=True):
        phi.add_incoming(after, loop)
        phi.add_incoming(old, load)
        phi.add_incoming(_VECTOR([0.0] * LANES), before)
    builder.cbranch(builder.icmp_signed("<", next_step, depth), loop, store)

    builder.position_at_end(store)
    for place, vector in zip(targets, new, strict=True):
        builder.store(vector, place, align=4)


def _broadcast(builder: Any, number: Any) -> Any:
    """A vector of one number."""
    nothing = _VECTOR(ir.Undefined)
    first = builder.insert_element(nothing, number, _FLAG(0))
    return builder.shuffle_vector(first, nothing, ir.VectorType(_FLAG, LANES)([0] * LANES))


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


@compiled
def silu_pass(scores: Any, first: int, number: int) -> None:
    """Puts z / (1 + 2^z) in the place of each z.

    Args:
        scores: float32 [n], each times `SCORE_FACTOR`.
        first: the first to be replaced.
        number: how many are.
    """
    use_wide_vectors()
    for j in range(number):
        # Unsigned: a signed place would be looked at whether it counts from the end.
        place = np.uintp(first + j)
        scores[place] = silu(scores[place])


@compiled
def biased_silu_pass(scores: Any, first: int, number: int, bias: Any, first_bias: int) -> None:
    """`silu_pass` with something added to each score: bias, float32, from `first_bias` on."""
    use_wide_vectors()
    for j in range(number):
        place, added = np.uintp(first + j), bias[np.uintp(first_bias + j)]
        scores[place] = silu(np.float32(scores[place] + added * _BIAS_FACTOR))
