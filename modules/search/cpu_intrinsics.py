"""Machine operations that numba lacks: dot products of half- or byte-precision vectors, bit counts, prefetch.

They are LLVM instructions on vectors of 16 lanes, which LLVM compiles for the processor: AVX-512, AVX2 or NEON.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

LANES = 16
"""Values that are summed in parallel; the width of search vectors is a multiple of it."""

GROUP = LANES // 2
"""Vectors that are scored together: after their lanes are added, their sums fill one register."""

CACHE_LINE = 64
"""Bytes of a cache line, the unit that is read from memory."""

_FLOAT, _INT32, _INT64, _BYTE, _HALF = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(8), ir.HalfType()
_FLOATS, _INT32S = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT32, LANES)


@intrinsic
def dots_half(context: Any, base: Any, offsets: Any, query: Any, blocks: Any, scores: Any) -> tuple[Any, Callable]:
    """Write the dot products of :data:`GROUP` float16 vectors with one float32 vector.

    ``dots_half(base, offsets, query, blocks, scores)``: the vectors have ``16 * blocks`` values and are at address
    ``base`` plus each of the int64 numbers at address ``offsets``; the float32 results are written to address
    ``scores``. In each product, lane l sums the products ``l, l + 16, ...`` in order; then lanes l and l + 8 are added,
    then l and l + 4, and so on.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        def step(total: Any, values: Any, weights: Any) -> Any:
            # The product of two halves is exact in float32, so a fused multiply-add rounds as a separate addition.
            return builder.call(multiply_add, [builder.fpext(values, _FLOATS), weights, total])

        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        multiply_add = get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
        _dots(builder, arguments, ir.VectorType(_HALF, LANES), _FLOATS, step, builder.fadd)
        return context.get_dummy_value()

    return types.void(types.intp, types.uintp, types.uintp, types.intp, types.uintp), generate


@intrinsic
def dots_byte(context: Any, base: Any, offsets: Any, query: Any, blocks: Any, scores: Any) -> tuple[Any, Callable]:
    """Write dot products as :func:`dots_half` does, of int8 vectors and an int8 query; int32 results are exact."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        def step(total: Any, values: Any, weights: Any) -> Any:
            return builder.add(total, builder.mul(builder.sext(values, _INT32S), builder.sext(weights, _INT32S)))

        bytes_ = ir.VectorType(_BYTE, LANES)
        _dots(builder, arguments, bytes_, bytes_, step, builder.add)
        return context.get_dummy_value()

    return types.void(types.intp, types.uintp, types.uintp, types.intp, types.uintp), generate


@intrinsic
def above(context: Any, scores: Any, floor: Any) -> tuple[Any, Callable]:
    """Compare a group of scores: ``above(scores, floor) -> int64`` sets bit i if score i at ``scores`` is larger."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        address, least = arguments
        group = ir.VectorType(least.type, GROUP)
        values = _load(builder, address, group)
        least = builder.insert_element(ir.Constant(group, ir.Undefined), least, ir.Constant(_INT32, 0))
        least = _shuffle(builder, least, least, [0] * GROUP)
        compare = builder.fcmp_ordered if isinstance(floor, types.Float) else builder.icmp_signed
        return builder.zext(builder.bitcast(compare(">", values, least), ir.IntType(GROUP)), _INT64)

    return types.int64(types.uintp, floor), generate


@intrinsic
def lowest_bit(context: Any, mask: Any) -> tuple[Any, Callable]:
    """Find a bit: ``lowest_bit(mask) -> int64`` is the place of the lowest 1 in an int64 that is not 0."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


@intrinsic
def bits_set(context: Any, word: Any) -> tuple[Any, Callable]:
    """Count bits: ``bits_set(word) -> int64`` is the number of ones in a uint64."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@intrinsic
def prefetch(context: Any, address: Any) -> tuple[Any, Callable]:
    """Prefetch memory: ``prefetch(address)`` requests the cache line at an address without waiting for it."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        pointer = _BYTE.as_pointer()
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, _INT32, _INT32, _INT32])
        )
        # Read access, data, second-level cache: it can have more outstanding requests than the first-level cache.
        flags = [ir.Constant(_INT32, flag) for flag in (0, 2, 1)]
        builder.call(function, [builder.inttoptr(arguments[0], pointer), *flags])
        return context.get_dummy_value()

    return types.void(types.uintp), generate


def _load(builder: ir.IRBuilder, address: Any, kind: ir.VectorType) -> Any:
    """Load a vector from an address of any alignment."""
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = 1
    return value


def _shuffle(builder: ir.IRBuilder, one: Any, other: Any, lanes: list[int]) -> Any:
    """Return the given lanes of two vectors; lanes of the second one are counted after those of the first."""
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(_INT32, len(lanes)), lanes))


def _dots(
    builder: ir.IRBuilder,
    arguments: tuple[Any, ...],
    value_kind: ir.VectorType,
    weight_kind: ir.VectorType,
    step: Callable[[Any, Any, Any], Any],
    add: Callable[[Any, Any], Any],
) -> None:
    """Emit a loop over the blocks that scores all vectors of a group, and then the sums of their lanes."""

    def place(offset: int) -> Any:
        return builder.inttoptr(builder.add(offsets, ir.Constant(_INT64, 8 * offset)), _INT64.as_pointer())

    def block_of(address: Any, kind: ir.VectorType) -> Any:
        return _load(builder, builder.add(address, builder.mul(block, ir.Constant(_INT64, _bytes_of(kind)))), kind)

    base, offsets, query, blocks, scores = arguments
    vectors = [builder.add(base, builder.load(place(i))) for i in range(GROUP)]
    zeros = ir.Constant(_FLOATS if weight_kind == _FLOATS else _INT32S, None)
    before, body, after = builder.block, builder.append_basic_block("block"), builder.append_basic_block("joined")
    builder.branch(body)
    builder.position_at_end(body)
    block, totals = builder.phi(_INT64), [builder.phi(zeros.type) for _ in vectors]
    weights = block_of(query, weight_kind)
    sums = [step(total, block_of(one, value_kind), weights) for total, one in zip(totals, vectors, strict=True)]
    following = builder.add(block, ir.Constant(_INT64, 1))
    state = zip([block, *totals], [ir.Constant(_INT64, 0), *[zeros] * GROUP], [following, *sums], strict=True)
    for phi, start, result in state:
        phi.add_incoming(start, before)
        phi.add_incoming(result, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, blocks), body, after)
    builder.position_at_end(after)
    result = _join_lanes(builder, sums, add)
    builder.store(result, builder.inttoptr(scores, result.type.as_pointer())).align = 4


def _bytes_of(kind: ir.VectorType) -> int:
    """Return the size of a vector in bytes."""
    return LANES * {_FLOAT: 4, _HALF: 2, _BYTE: 1}[kind.element]


def _join_lanes(builder: ir.IRBuilder, sums: list[Any], add: Callable[[Any, Any], Any]) -> Any:
    """Add the upper half of each vector's lanes to the lower half until one lane is left.

    After each addition, two half-filled vectors are joined into one register.
    """
    lanes, each = LANES // 2, 1
    sums = [
        add(_shuffle(builder, s, s, [*range(lanes)]), _shuffle(builder, s, s, [*range(lanes, LANES)])) for s in sums
    ]
    while len(sums) > 1:
        lanes //= 2
        begins = range(0, 4 * each * lanes, 2 * lanes)
        lower = [begin + lane for begin in begins for lane in range(lanes)]
        upper = [place + lanes for place in lower]
        sums = [
            add(_shuffle(builder, one, other, lower), _shuffle(builder, one, other, upper))
            for one, other in zip(sums[::2], sums[1::2], strict=True)
        ]
        each *= 2
    return sums[0]
