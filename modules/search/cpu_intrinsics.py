"""Machine operations that numba lacks: dot products of half- or byte-precision vectors, bit counts, prefetch.

They are LLVM instructions on vectors of 16 lanes, which LLVM compiles for the processor: AVX-512, AVX2 or NEON.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.core.errors import TypingError
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
def push_above(context: Any, scores: Any, floor: Any, place: Any, keys: Any) -> tuple[Any, Callable]:
    """Append the keys of a group's good scores to a list: ``push_above(scores, floor, place, keys) -> int64``.

    The scores at address ``scores``, float32 or int32 as ``floor`` is, belong to the entries ``place``, ``place - 1``
    and so on. Of those that are larger than ``floor`` and have no negative place, the 64-bit keys (score in the upper
    half, in the order of unsigned numbers, then the place) are written to address ``keys`` one after another; what lies
    behind them, up to :data:`GROUP` keys in all, is overwritten. Returns the number of keys.

    There is no branch: one that is mispredicted would stop the work on the scores of the following groups.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        scores, least, place, keys = arguments
        words, numbers = ir.VectorType(_INT32, GROUP), ir.VectorType(_INT64, GROUP)
        values = _load(builder, scores, ir.VectorType(least.type, GROUP))
        bits = builder.bitcast(values, words)
        top = ir.Constant(words, [1 << 31] * GROUP)
        if isinstance(floor, types.Float):
            good = builder.fcmp_ordered(">", values, _splat(builder, least))
            # All bits of a negative number are reversed, the highest of any other.
            bits = builder.xor(bits, builder.or_(builder.ashr(bits, ir.Constant(words, [31] * GROUP)), top))
        else:
            good = builder.icmp_signed(">", values, _splat(builder, least))
            bits = builder.xor(bits, top)
        places = builder.sub(_splat(builder, place), ir.Constant(numbers, [*range(GROUP)]))
        good = builder.and_(good, builder.icmp_signed(">=", places, ir.Constant(numbers, None)))
        upper = builder.shl(builder.zext(bits, numbers), ir.Constant(numbers, [32] * GROUP))
        kind = ir.FunctionType(numbers, [numbers, good.type, numbers])
        compress = get_or_insert_function(builder.module, kind, f"llvm.experimental.vector.compress.v{GROUP}i64")
        packed = builder.call(compress, [builder.or_(upper, places), good, ir.Constant(numbers, ir.Undefined)])
        builder.store(packed, builder.inttoptr(keys, numbers.as_pointer())).align = 8
        return builder.zext(builder.ctpop(builder.bitcast(good, ir.IntType(GROUP))), _INT64)

    return types.int64(types.uintp, floor, types.int64, types.uintp), generate


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
        _prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.uintp), generate


@intrinsic
def request(
    context: Any, column: Any, latest: Any, shift: Any, rows: Any, base: Any, row_bytes: Any, offsets: Any
) -> tuple[Any, Callable]:
    """Find and prefetch the vectors of a group: ``request(column, latest, shift, rows, base, row_bytes, offsets)``.

    The group is entry ``latest`` of an int64 or int32 array ``column`` and the :data:`GROUP` - 1 before it. An entry's
    row is its id plus ``shift``, or 0 if the table of ``rows`` rows has no such row. The rows' offsets from ``base``,
    the latest entry's first, are written as int64 numbers to address ``offsets``.
    """
    if column.layout != "C" or column.dtype not in (types.int64, types.int32):
        raise TypingError(f"a column of ids must be contiguous int64 or int32, not {column}")
    long = column.dtype == types.int64

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        column, latest, shift, rows, base, row_bytes, offsets = arguments
        data = context.make_array(signature.args[0])(context, builder, column).data
        kind, numbers = (_INT64 if long else _INT32), ir.VectorType(_INT64, GROUP)
        oldest = builder.mul(builder.sub(latest, ir.Constant(_INT64, GROUP - 1)), ir.Constant(_INT64, kind.width // 8))
        ids = _load(builder, builder.add(builder.ptrtoint(data, _INT64), oldest), ir.VectorType(kind, GROUP))
        found = builder.add(ids if long else builder.sext(ids, numbers), _splat(builder, shift))
        # Unsigned: a negative row counts as beyond the table.
        known = builder.icmp_unsigned("<", found, _splat(builder, rows))
        # Both factors have 32 bits: their product is one instruction, that of 64 bits is several.
        low = ir.Constant(numbers, [0xFFFFFFFF] * GROUP)
        found = builder.and_(builder.select(known, found, ir.Constant(numbers, None)), low)
        found = builder.mul(found, builder.and_(_splat(builder, row_bytes), low))
        found = _shuffle(builder, found, found, [*reversed(range(GROUP))])
        builder.store(found, builder.inttoptr(offsets, numbers.as_pointer())).align = 8
        addresses = builder.add(found, _splat(builder, base))
        each = [builder.extract_element(addresses, ir.Constant(_INT32, i)) for i in range(GROUP)]
        before, body, after = builder.block, builder.append_basic_block("line"), builder.append_basic_block("requested")
        builder.branch(body)
        builder.position_at_end(body)
        line = builder.phi(_INT64)
        for address in each:
            _prefetch(builder, builder.add(address, line))
        following = builder.add(line, ir.Constant(_INT64, CACHE_LINE))
        line.add_incoming(ir.Constant(_INT64, 0), before)
        line.add_incoming(following, body)
        builder.cbranch(builder.icmp_signed("<", following, row_bytes), body, after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    numbers = [types.intp] * 5
    return types.void(column, *numbers, types.uintp), generate


def _prefetch(builder: ir.IRBuilder, address: Any) -> None:
    """Emit the prefetch of the cache line at an address."""
    pointer = _BYTE.as_pointer()
    function = builder.module.declare_intrinsic(
        "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, _INT32, _INT32, _INT32])
    )
    # Read access, data, second-level cache: it can have more outstanding requests than the first-level cache.
    flags = [ir.Constant(_INT32, flag) for flag in (0, 2, 1)]
    builder.call(function, [builder.inttoptr(address, pointer), *flags])


def _splat(builder: ir.IRBuilder, value: Any) -> Any:
    """Return a vector of :data:`GROUP` lanes with a value in each."""
    one = builder.insert_element(
        ir.Constant(ir.VectorType(value.type, GROUP), ir.Undefined), value, ir.Constant(_INT32, 0)
    )
    return _shuffle(builder, one, one, [0] * GROUP)


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
