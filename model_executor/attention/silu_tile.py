"""What compiled SiLU attention is made for: the processor, its vectors, and a product in them."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

# What numba compiles for: the processor's features, or those of NUMBA_CPU_FEATURES.
_TARGET_FEATURES = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
FEATURES = {name[1:] for name in _TARGET_FEATURES if name.startswith("+")}
# A row of a product has two vectors of sums. With two vectors of the right factor and a broadcast
# number they fill the registers: 32 with AVX-512, 16 before.
LANES, ROWS = (16, 14) if "avx512f" in FEATURES else (8, 6) if "avx2" in FEATURES else (4, 6)
COLUMNS = 2 * LANES
"""Columns of a product, as `ROWS` are its rows."""
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
