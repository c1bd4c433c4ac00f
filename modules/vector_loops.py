"""Loops over the vectors of compiled attention and experts: copies, sums, a softmax, conversions to bfloat16 and back.

Addresses are integers, and there is at least one vector. Sums have a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from modules.vector_code import FLOAT, FLOATS, INT32S, INT64, LANES, SHORTS, VECTOR, ZEROS, VectorBuilder


def _make_loop(step: Callable[[VectorBuilder, list[Any], Any], Any]) -> Any:
    """Return the intrinsic ``loop(target, source, third, fourth, vectors, value) -> float32``.

    ``step(code, addresses, value)`` emits the work on one vector: the addresses are those in the first four arguments,
    and ``value`` is in every lane. The result is the sum of all lanes of the vectors that it returns, or 0.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        code = VectorBuilder(builder)
        value = code.splat(arguments[5])

        def one(state: list[Any]) -> list[Any]:
            offset, total = state
            result = step(code, [builder.add(address, offset) for address in arguments[:4]], value)
            return [code.at(offset, VECTOR), total if result is None else builder.fadd(total, result)]

        return code.sum_of(code.repeat(arguments[4], [ir.Constant(INT64, 0), ZEROS], one)[1])

    @intrinsic
    def loop(
        context: Any, target: Any, source: Any, third: Any, fourth: Any, vectors: Any, value: Any
    ) -> tuple[Any, Callable]:
        return types.float32(*[types.intp] * 5, types.float32), generate

    return loop


def _copy(code: VectorBuilder, at: list[Any], value: Any) -> None:
    code.store(code.load(at[1]), at[0])


def _copy_masked(code: VectorBuilder, at: list[Any], value: Any) -> None:
    gradients = code.masked(code.load(at[1]), code.load(at[2]))
    code.store(gradients, at[0])
    code.add_at(at[3], gradients)


def _fill(code: VectorBuilder, at: list[Any], value: Any) -> None:
    code.store(value, at[0])


def _add_vectors(code: VectorBuilder, at: list[Any], value: Any) -> None:
    code.add_at(at[0], code.load(at[1]))


def _add_scaled(code: VectorBuilder, at: list[Any], value: Any) -> None:
    code.store(code.multiply_add(value, code.load(at[2]), code.load(at[1])), at[0])


def _add_product(code: VectorBuilder, at: list[Any], value: Any) -> None:
    code.store(code.multiply_add(code.load(at[3]), code.load(at[2]), code.load(at[1])), at[0])


def _dot(code: VectorBuilder, at: list[Any], value: Any) -> Any:
    return code.builder.fmul(code.load(at[0]), code.load(at[1]))


def _divide(code: VectorBuilder, at: list[Any], value: Any) -> None:
    code.store(code.builder.fdiv(code.load(at[0]), value), at[0])


def _softmax_backward(code: VectorBuilder, at: list[Any], value: Any) -> None:
    code.store(code.builder.fmul(code.load(at[1]), code.builder.fsub(code.load(at[0]), value)), at[0])


def _exponential(code: VectorBuilder, at: list[Any], value: Any) -> Any:
    builder = code.builder

    def same(number: float) -> Any:
        return ir.Constant(FLOATS, [float(np.float32(number))] * LANES)

    power = builder.fsub(code.load(at[0]), value)
    # Adding 1.5 * 2^23 rounds to a whole number, which is then in the low bits of the float.
    shift = same(1.5 * 2**23)
    shifted = code.multiply_add(power, same(1 / np.log(2)), shift)
    whole = builder.fsub(shifted, shift)
    # The logarithm of 2 in two parts. The first has few bits, so its product with a whole number is exact.
    rest = code.multiply_add(whole, same(-0.693359375), power)
    rest = code.multiply_add(whole, same(0.693359375 - np.log(2)), rest)
    result = same(1 / 5040)
    for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1, 1):
        result = code.multiply_add(result, rest, same(factor))
    exponent = builder.shl(builder.bitcast(shifted, INT32S), ir.Constant(INT32S, [23] * LANES))
    result = builder.bitcast(builder.add(builder.bitcast(result, INT32S), exponent), FLOATS)
    # Below, the power is no normal float. NaN is not below.
    result = builder.select(builder.fcmp_ordered("<", power, same(-87)), ZEROS, result)
    code.store(result, at[0])
    return result


copy = _make_loop(_copy)
"""``target = source``."""
copy_masked = _make_loop(_copy_masked)
"""``target = source`` where ``third``, a ReLU's outputs, is positive, else 0; ``fourth += target``."""
fill = _make_loop(_fill)
"""``target = value``."""
add_vectors = _make_loop(_add_vectors)
"""``target += source``."""
add_scaled = _make_loop(_add_scaled)
"""``target = source + value * third``."""
add_product = _make_loop(_add_product)
"""``target = source + third * fourth``."""
dot = _make_loop(_dot)
"""Return the dot product of target and source."""
divide = _make_loop(_divide)
"""``target /= value``."""
softmax_backward = _make_loop(_softmax_backward)
"""``target = source * (target - value)``."""
exponential = _make_loop(_exponential)
"""``target = exp(target - value)`` for differences of at most 0, within two units in the last place; return the sum."""


@intrinsic
def widen(context: Any, target: Any, source: Any, vectors: Any) -> tuple[Any, Callable]:
    """Turn bfloat16 values into float32 values: ``widen(target, source, vectors)``."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        code = VectorBuilder(builder)

        def one(state: list[Any]) -> list[Any]:
            bits = builder.zext(code.load(state[1], SHORTS, 2), INT32S)
            bits = builder.shl(bits, ir.Constant(INT32S, [16] * LANES))
            code.store(builder.bitcast(bits, FLOATS), state[0])
            return [code.at(state[0], VECTOR), code.at(state[1], VECTOR // 2)]

        code.repeat(arguments[2], arguments[:2], one)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


@intrinsic
def narrow(context: Any, target: Any, source: Any, vectors: Any) -> tuple[Any, Callable]:
    """Round float32 values to the nearest bfloat16 values, ties to even: ``narrow(target, source, vectors)``."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        code = VectorBuilder(builder)

        def same(value: int) -> Any:
            return ir.Constant(INT32S, [value] * LANES)

        def one(state: list[Any]) -> list[Any]:
            values = code.load(state[1])
            bits = builder.bitcast(values, INT32S)
            odd = builder.and_(builder.lshr(bits, same(16)), same(1))
            rounded = builder.lshr(builder.add(bits, builder.add(odd, same(0x7FFF))), same(16))
            # The addition could carry a NaN over to another number.
            rounded = builder.select(builder.fcmp_unordered("uno", values, values), same(0x7FC0), rounded)
            code.store(builder.trunc(rounded, SHORTS), state[0], 2)
            return [code.at(state[0], VECTOR // 2), code.at(state[1], VECTOR)]

        code.repeat(arguments[2], arguments[:2], one)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


@intrinsic
def dots(context: Any, target: Any, rows: Any, stride: Any, values: Any, vectors: Any) -> tuple[Any, Callable]:
    """Write the dot products of :data:`LANES` rows and a vector: ``dots(target, rows, stride, values, vectors)``.

    Each is the result of :func:`dot`; to sum the lanes of all rows together takes a third of the instructions.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        code = VectorBuilder(builder)
        target, rows, stride, values, vectors = arguments
        places = [builder.add(rows, builder.mul(stride, ir.Constant(INT64, row))) for row in range(LANES)]

        def one(state: list[Any]) -> list[Any]:
            offset, *totals = state
            factor = code.load(builder.add(values, offset))
            for row, place in enumerate(places):
                product = builder.fmul(code.load(builder.add(place, offset)), factor)
                totals[row] = builder.fadd(totals[row], product)
            return [code.at(offset, VECTOR), *totals]

        totals = code.repeat(vectors, [ir.Constant(INT64, 0), *[ZEROS] * LANES], one)[1:]
        code.store(code.sums_of(totals), target)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


@intrinsic
def weighted_sum(context: Any, target: Any, weights: Any, vectors: Any, stride: Any, rows: Any) -> tuple[Any, Callable]:
    """Write the weighted sum of a vector of each row: ``weighted_sum(target, weights, vectors, stride, rows)``."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        code = VectorBuilder(builder)
        target, weights, vectors, stride, rows = arguments

        def one(state: list[Any]) -> list[Any]:
            total = code.multiply_add(code.splat_at(state[0]), code.load(state[1]), state[2])
            return [code.at(state[0], 4), builder.add(state[1], stride), total]

        code.store(code.repeat(rows, [weights, vectors, ZEROS], one)[2], target)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


@intrinsic
def scores_backward(
    context: Any, outputs: Any, stride: Any, rows: Any, grads: Any, score: Any, grad_score: Any, grad_bias: Any
) -> tuple[Any, Callable]:
    """Go back through the scores ``outputs . score`` and the ReLU before them, for one vector of each row.

    ``scores_backward(outputs, stride, rows, grads, score, grad_score, grad_bias)``: ``grads`` are the gradients of the
    scores, one for each row. The ReLU's outputs are replaced by the gradients of its inputs, whose sum over the rows is
    added to ``grad_bias``.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        code = VectorBuilder(builder)
        outputs, stride, rows, grads, score, grad_score, grad_bias = arguments
        weights = code.load(score)

        def one(state: list[Any]) -> list[Any]:
            values, grad = code.load(state[0]), code.splat_at(state[1])
            before = code.masked(builder.fmul(grad, weights), values)
            code.store(before, state[0])
            sums = [code.multiply_add(grad, values, state[2]), builder.fadd(state[3], before)]
            return [builder.add(state[0], stride), code.at(state[1], 4), *sums]

        sums = code.repeat(rows, [outputs, grads, ZEROS, ZEROS], one)[2:]
        code.add_at(grad_score, sums[0])
        code.add_at(grad_bias, sums[1])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), generate


@intrinsic
def value_at(context: Any, address: Any) -> tuple[Any, Callable]:
    """Return the float32 value at an address."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        return VectorBuilder(builder).load(arguments[0], FLOAT)

    return types.float32(types.intp), generate


@intrinsic
def put(context: Any, address: Any, value: Any) -> tuple[Any, Callable]:
    """Write a float32 value to an address: ``put(address, value)``."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        VectorBuilder(builder).store(arguments[1], arguments[0])
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), generate
