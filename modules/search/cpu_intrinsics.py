"""Machine operations that numba lacks: dot products of a search vector in half or byte precision, bit counts, prefetch.

Written as LLVM instructions on vectors of 16 lanes, which become whatever the processor has: AVX-512, AVX2 or NEON.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

LANES = 16
"""Values that are summed side by side; the width of search vectors is a multiple of it."""

GROUP = LANES // 2
"""Vectors that are worked on side by side: when their lanes have been added, their sums fill a register."""

CACHE_LINE = 64
"""Bytes that memory hands over at a time."""

_FLOAT, _INT32, _INT64, _BYTE, _HALF = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(8), ir.HalfType()
_FLOATS, _INT32S = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT32, LANES)


@intrinsic
def dots_half(context: Any, base: Any, offsets: Any, query: Any, blocks: Any, scores: Any) -> tuple[Any, Callable]:
    """Dot products of :data:`GROUP` float16 vectors with one of float32, side by side.

    ``dots_half(base, offsets, query, blocks, scores)``: the vectors, 16 ``blocks`` wide, lie at address ``base`` plus
    each of the int64 at ``offsets``; ``scores`` is where the float32 results go. In each, lane l sums the products
    ``l, l + 16, ...`` in order; then lanes l and l + 8 are added, l and l + 4, and so on.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        def step(total: Any, values: Any, weights: Any) -> Any:
            # A product of halves is exact in float32, so fusing it with the sum changes nothing.
            return builder.call(multiply_add, [builder.fpext(values, _FLOATS), weights, total])

        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        multiply_add = get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
        _dots(builder, arguments, ir.VectorType(_HALF, LANES), _FLOATS, step, builder.fadd)
        return context.get_dummy_value()

    return types.void(types.intp, types.uintp, types.uintp, types.intp, types.uintp), generate


@intrinsic
def dots_byte(context: Any, base: Any, offsets: Any, query: Any, blocks: Any, scores: Any) -> tuple[Any, Callable]:
    """As :func:`dots_half`, of int8 vectors and query, with int32 results, which are exact."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        def step(total: Any, values: Any, weights: Any) -> Any:
            return builder.add(total, builder.mul(builder.sext(values, _INT32S), builder.sext(weights, _INT32S)))

        bytes_ = ir.VectorType(_BYTE, LANES)
        _dots(builder, arguments, bytes_, bytes_, step, builder.add)
        return context.get_dummy_value()

    return types.void(types.intp, types.uintp, types.uintp, types.intp, types.uintp), generate


@intrinsic
def above(context: Any, scores: Any, floor: Any) -> tuple[Any, Callable]:
    """``above(scores, floor) -> int64``: bit i is set if score i of the group at address ``scores`` is larger."""

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
    """``lowest_bit(mask) -> int64``: place of the lowest one in an int64 that is not 0."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


@intrinsic
def bits_set(context: Any, word: Any) -> tuple[Any, Callable]:
    """``bits_set(word) -> int64``: ones in a uint64."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@intrinsic
def prefetch(context: Any, address: Any) -> tuple[Any, Callable]:
    """``prefetch(address)``: have the cache line there brought, without waiting for it."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        pointer = _BYTE.as_pointer()
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, _INT32, _INT32, _INT32])
        )
        # To be read, as data; into the second cache: more can be on their way to it than to the first.
        flags = [ir.Constant(_INT32, flag) for flag in (0, 2, 1)]
        builder.call(function, [builder.inttoptr(arguments[0], pointer), *flags])
        return context.get_dummy_value()

    return types.void(types.uintp), generate


def _load(builder: ir.IRBuilder, address: Any, kind: ir.VectorType) -> Any:
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = 1
    return value


def _shuffle(builder: ir.IRBuilder, one: Any, other: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(_INT32, len(lanes)), lanes))


def _dots(
    builder: ir.IRBuilder,
    arguments: tuple[Any, ...],
    value_kind: ir.VectorType,
    weight_kind: ir.VectorType,
    step: Callable[[Any, Any, Any], Any],
    add: Callable[[Any, Any], Any],
) -> None:
    """A loop over the blocks, for all vectors of a group at once, then the sums of their lanes."""

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
    return LANES * {_FLOAT: 4, _HALF: 2, _BYTE: 1}[kind.element]


def _join_lanes(builder: ir.IRBuilder, sums: list[Any], add: Callable[[Any, Any], Any]) -> Any:
    """Add the upper half of each one's lanes to the lower, until one is left; two and two share a register."""
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
