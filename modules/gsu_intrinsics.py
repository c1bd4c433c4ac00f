"""Machine operations that numba lacks: dot products of a search vector in half or byte precision, bit counts, prefetch.

Written as LLVM instructions on vectors of 16 lanes, which become whatever the processor has: AVX-512, AVX2 or NEON.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES = 16
"""Values that are summed side by side; the width of search vectors is a multiple of it."""

CACHE_LINE = 64
"""Bytes that memory hands over at a time."""

_FLOAT, _INT32, _INT64, _BYTE, _HALF = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(8), ir.HalfType()
_FLOATS, _INT32S = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT32, LANES)


@intrinsic
def dot_half(context: Any, row: Any, query: Any, blocks: Any) -> tuple[Any, Callable]:
    """``dot_half(row, query, blocks) -> float32``: addresses of float16 and of float32 values, 16 ``blocks`` each.

    Lane l sums the products ``l, l + 16, ...`` in order; then lanes l and l + 8 are added, l and l + 4, and so on.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        def step(total: Any, block: Any) -> Any:
            values = _load(builder, row_address, block, ir.VectorType(_HALF, LANES), 2)
            weights = _load(builder, query_address, block, _FLOATS, 4)
            return builder.fadd(total, builder.fmul(builder.fpext(values, _FLOATS), weights))

        row_address, query_address, count = arguments
        lanes = _loop(builder, count, ir.Constant(_FLOATS, [0.0] * LANES), step)
        return _join_lanes(builder, lanes, builder.fadd)

    return types.float32(types.uintp, types.uintp, types.intp), generate


@intrinsic
def dot_byte(context: Any, row: Any, query: Any, blocks: Any) -> tuple[Any, Callable]:
    """``dot_byte(row, query, blocks) -> int32``, exact: addresses of int8 values, 16 ``blocks`` each."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        def step(total: Any, block: Any) -> Any:
            bytes_ = ir.VectorType(_BYTE, LANES)
            pair = [
                builder.sext(_load(builder, address, block, bytes_, 1), _INT32S)
                for address in (row_address, query_address)
            ]
            return builder.add(total, builder.mul(*pair))

        row_address, query_address, count = arguments
        lanes = _loop(builder, count, ir.Constant(_INT32S, [0] * LANES), step)
        return _join_lanes(builder, lanes, builder.add)

    return types.int32(types.uintp, types.uintp, types.intp), generate


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
        # To be read, to be kept near, data.
        flags = [ir.Constant(_INT32, flag) for flag in (0, 3, 1)]
        builder.call(function, [builder.inttoptr(arguments[0], pointer), *flags])
        return context.get_dummy_value()

    return types.void(types.uintp), generate


def _load(builder: ir.IRBuilder, address: Any, block: Any, kind: ir.VectorType, item_bytes: int) -> Any:
    offset = builder.mul(block, ir.Constant(_INT64, LANES * item_bytes))
    value = builder.load(builder.inttoptr(builder.add(address, offset), kind.as_pointer()))
    value.align = item_bytes
    return value


def _loop(builder: ir.IRBuilder, count: Any, start: Any, step: Callable[[Any, Any], Any]) -> Any:
    """``for block in range(count): total = step(total, block)``, at least once."""
    before, body, after = builder.block, builder.append_basic_block("block"), builder.append_basic_block("joined")
    builder.branch(body)
    builder.position_at_end(body)
    block, total = builder.phi(_INT64), builder.phi(start.type)
    block.add_incoming(ir.Constant(_INT64, 0), before)
    total.add_incoming(start, before)
    result = step(total, block)
    following = builder.add(block, ir.Constant(_INT64, 1))
    block.add_incoming(following, builder.block)
    total.add_incoming(result, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), body, after)
    builder.position_at_end(after)
    return result


def _join_lanes(builder: ir.IRBuilder, lanes: Any, add: Callable[[Any, Any], Any]) -> Any:
    width = LANES
    while width > 1:
        width //= 2
        halves = [
            builder.shuffle_vector(
                lanes,
                ir.Constant(lanes.type, ir.Undefined),
                ir.Constant(ir.VectorType(_INT32, width), list(range(begin, begin + width))),
            )
            for begin in (0, width)
        ]
        lanes = add(*halves)
    return builder.extract_element(lanes, ir.Constant(_INT32, 0))
