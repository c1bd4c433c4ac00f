"""Machine operations on one row of a table: a copy, and one update by each optimizer of the tables.

They are LLVM instructions on vectors of four float32 values, the unit of a row's width. Their roundings are those of
fbgemm's kernels on x86-64, so that rows and states of the optimizers are the same bits: which products are added by a
fused multiply-add, what is float64, and in which order squares are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once, for_range, get_or_insert_function
from numba.extending import intrinsic

LANES = 4
"""Values of a vector; see :data:`trainer.sparse.planner.COLUMN_MULTIPLE`."""

_FLOAT, _DOUBLE, _INT32, _INT64 = ir.FloatType(), ir.DoubleType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _DOUBLES = ir.VectorType(_FLOAT, LANES), ir.VectorType(_DOUBLE, LANES)


@intrinsic
def copy_row(context: Any, source: Any, target: Any, vectors: Any) -> tuple[Any, Callable]:
    """Copy a row: ``copy_row(source, target, vectors)`` with two addresses and the number of vectors of a row."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        source, target, vectors = arguments
        with _vectors(builder, vectors) as (_, offset):
            _store(builder, _load(builder, source, offset), target, offset)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.intp), generate


@intrinsic
def add_row(context: Any, target: Any, source: Any, vectors: Any, scale: Any) -> tuple[Any, Callable]:
    """Add ``scale``, a float32, times a row to another: ``add_row(target, source, vectors, scale)``.

    The product is rounded before it is added.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        target, source, vectors, scale = arguments
        scales = _splat(builder, scale, _FLOATS)
        with _vectors(builder, vectors) as (_, offset):
            product = builder.fmul(_load(builder, source, offset), scales)
            _store(builder, builder.fadd(_load(builder, target, offset), product), target, offset)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.intp, types.float32), generate


@intrinsic
def train_sgd(context: Any, row: Any, gradient: Any, vectors: Any, rate: Any, scale: Any) -> tuple[Any, Callable]:
    """Train a row by SGD: ``train_sgd(row, gradient, vectors, rate, scale)`` with two addresses and two float32.

    The gradient is multiplied by ``scale``. The product of rate and gradient is subtracted by a fused multiply-add.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        row, gradient, vectors, rate, scale = arguments
        falling, scales = _splat(builder, builder.fneg(rate), _FLOATS), _splat(builder, scale, _FLOATS)
        with _vectors(builder, vectors) as (_, offset):
            slope = _gradient(builder, gradient, offset, scales)
            _store(builder, _multiply_add(builder, falling, slope, _load(builder, row, offset)), row, offset)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.intp, types.float32, types.float32), generate


@intrinsic
def train_adagrad(
    context: Any, row: Any, state: Any, gradient: Any, vectors: Any, rate: Any, eps: Any, scale: Any
) -> tuple[Any, Callable]:
    """Train a row by Adagrad: ``train_adagrad(row, state, gradient, vectors, rate, eps, scale)``.

    ``row``, ``state`` and ``gradient`` are addresses of as many values, ``rate`` and ``scale`` are float32 and ``eps``
    float64. The gradient is multiplied by ``scale``. A square is added to the state by a fused multiply-add. The
    product of rate and gradient is rounded to float32; root, quotient and difference are float64.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        row, state, gradient, vectors, rate, eps, scale = arguments
        rates, epsilons = _splat(builder, rate, _FLOATS), _splat(builder, eps, _DOUBLES)
        scales = _splat(builder, scale, _FLOATS)
        with _vectors(builder, vectors) as (_, offset):
            slope = _gradient(builder, gradient, offset, scales)
            squares = _multiply_add(builder, slope, slope, _load(builder, state, offset))
            _store(builder, squares, state, offset)
            root = builder.fadd(_root(builder, builder.fpext(squares, _DOUBLES)), epsilons)
            step = builder.fdiv(builder.fpext(builder.fmul(rates, slope), _DOUBLES), root)
            trained = builder.fsub(builder.fpext(_load(builder, row, offset), _DOUBLES), step)
            _store(builder, builder.fptrunc(trained, _FLOATS), row, offset)
        return context.get_dummy_value()

    arguments = (types.uintp, types.uintp, types.uintp, types.intp, types.float32, types.float64, types.float32)
    return types.void(*arguments), generate


@intrinsic
def train_rowwise_adagrad(
    context: Any, row: Any, state: Any, gradient: Any, vectors: Any, rate: Any, eps: Any, scale: Any
) -> tuple[Any, Callable]:
    """Train a row by row-wise Adagrad: ``train_rowwise_adagrad(row, state, gradient, vectors, rate, eps, scale)``.

    ``state`` is the address of one float32, the sum of mean squares; ``rate``, ``eps`` and ``scale`` are float32. The
    gradient is multiplied by ``scale``. Lane l of eight sums the squares ``l, l + 8, ...``; then neighbouring lanes are
    added until one is left. No multiply-add is fused.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        row, state, gradient, vectors, rate, eps, scale = arguments
        scales = _splat(builder, scale, _FLOATS)
        sums = [alloca_once(builder, _FLOATS) for _ in range(2)]
        for place in sums:
            builder.store(ir.Constant(_FLOATS, None), place)
        # Vectors with even numbers are the lanes 0 to 3 of eight, the others the lanes 4 to 7.
        with _vectors(builder, vectors) as (number, offset):
            slope = _gradient(builder, gradient, offset, scales)
            is_odd, square = builder.trunc(number, ir.IntType(1)), builder.fmul(slope, slope)
            low, high = (builder.load(place) for place in sums)
            builder.store(builder.select(is_odd, low, builder.fadd(low, square)), sums[0])
            builder.store(builder.select(is_odd, builder.fadd(high, square), high), sums[1])
        halves = [_sum_of_lanes(builder, builder.load(place)) for place in sums]
        width = builder.sitofp(builder.mul(vectors, ir.Constant(_INT64, LANES)), _FLOAT)
        mean = builder.fdiv(builder.fadd(*halves), width)
        zero = ir.Constant(_INT64, 0)
        squares = builder.fadd(_load(builder, state, zero, _FLOAT), mean)
        _store(builder, squares, state, zero)
        step = _splat(builder, builder.fdiv(rate, builder.fadd(_root(builder, squares), eps)), _FLOATS)
        with _vectors(builder, vectors) as (_, offset):
            product = builder.fmul(step, _gradient(builder, gradient, offset, scales))
            _store(builder, builder.fsub(_load(builder, row, offset), product), row, offset)
        return context.get_dummy_value()

    arguments = (types.uintp, types.uintp, types.uintp, types.intp, types.float32, types.float32, types.float32)
    return types.void(*arguments), generate


@contextmanager
def _vectors(builder: ir.IRBuilder, vectors: Any) -> Iterator[tuple[Any, Any]]:
    """Emit a loop over the vectors of a row, whose body is emitted inside; give their number and offset in bytes."""
    with for_range(builder, vectors) as loop:
        yield loop.index, builder.mul(loop.index, ir.Constant(_INT64, 4 * LANES))


def _load(builder: ir.IRBuilder, address: Any, offset: Any, kind: Any = _FLOATS) -> Any:
    """Load a value of float32 numbers from an address and an offset."""
    value = builder.load(builder.inttoptr(builder.add(address, offset), kind.as_pointer()))
    value.align = 4
    return value


def _store(builder: ir.IRBuilder, value: Any, address: Any, offset: Any) -> None:
    """Store a value of float32 numbers at an address and an offset."""
    builder.store(value, builder.inttoptr(builder.add(address, offset), value.type.as_pointer())).align = 4


def _gradient(builder: ir.IRBuilder, address: Any, offset: Any, scales: Any) -> Any:
    """Load a vector of a gradient, times a scale, with +0 for -0: fbgemm adds gradients to +0."""
    return builder.fadd(builder.fmul(_load(builder, address, offset), scales), ir.Constant(_FLOATS, None))


def _splat(builder: ir.IRBuilder, value: Any, kind: ir.VectorType) -> Any:
    """Return a vector with a number in every lane."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_INT32, LANES), [0] * LANES))


def _multiply_add(builder: ir.IRBuilder, one: Any, other: Any, total: Any) -> Any:
    """Return ``one * other + total`` of float32 vectors, rounded once."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    return builder.call(get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32"), [one, other, total])


def _root(builder: ir.IRBuilder, value: Any) -> Any:
    """Return the square root of a float32 or of a vector of float64."""
    name = "llvm.sqrt.f32" if value.type == _FLOAT else f"llvm.sqrt.v{LANES}f64"
    kind = ir.FunctionType(value.type, [value.type])
    return builder.call(get_or_insert_function(builder.module, kind, name), [value])


def _sum_of_lanes(builder: ir.IRBuilder, vector: Any) -> Any:
    """Return ``(lane 0 + lane 1) + (lane 2 + lane 3)``."""
    lanes = [builder.extract_element(vector, ir.Constant(_INT32, lane)) for lane in range(LANES)]
    return builder.fadd(builder.fadd(lanes[0], lanes[1]), builder.fadd(lanes[2], lanes[3]))
