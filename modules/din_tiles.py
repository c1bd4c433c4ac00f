"""Machine code of the compiled attention and experts: tiles of matrix products, and loops over vectors.

They are LLVM instructions on vectors of :data:`LANES` float32 values. All arguments are integers: addresses, strides in
bytes from row to row, and numbers of rows, vectors or steps, which are at least 1. Products are fused multiply-adds in
the order of the steps, so the size of a tile does not change a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

_FEATURES = (get_host_cpu_features() if numba.config.CPU_FEATURES is None else numba.config.CPU_FEATURES).split(",")

INSTRUCTIONS = "AVX-512" if "+avx512f" in _FEATURES else "AVX2" if {"+avx2", "+fma"} <= set(_FEATURES) else None
"""Instructions that the tiles are made for; None if the processor has neither."""

LANES = 16 if INSTRUCTIONS == "AVX-512" else 8
"""Values of one vector register."""
TILES = ((4, 6), (4, 2), (1, 12), (1, 4)) if INSTRUCTIONS == "AVX-512" else ((2, 6), (2, 2), (1, 12), (1, 4))
"""Vectors and rows of a tile, a large and a small one of each width; its sums fit in 32 registers (AVX2: 16)."""
STEPS = 4
"""Steps between two jumps of a product, and the unit of all numbers of rows and steps."""
VECTOR = 4 * LANES
"""Bytes of a vector."""

_FLOAT, _INT32, _INT64, _SHORT = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(16)
_FLOATS, _INT32S, _SHORTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT32, LANES), ir.VectorType(_SHORT, LANES)
_ZEROS = ir.Constant(_FLOATS, None)


class VectorBuilder:
    """LLVM's builder with the operations that tiles and loops have in common; addresses are 64-bit integers."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def at(self, address: Any, offset: int) -> Any:
        """Return an address ``offset`` bytes further."""
        return self.builder.add(address, ir.Constant(_INT64, offset)) if offset else address

    def load(self, address: Any, kind: Any = _FLOATS, align: int = 4) -> Any:
        """Load a value."""
        value = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        value.align = align
        return value

    def store(self, value: Any, address: Any, align: int = 4) -> None:
        """Store a value."""
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer())).align = align

    def splat(self, value: Any) -> Any:
        """Return a vector with a float in every lane."""
        one = self.builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, ir.Constant(_INT32, 0))
        return self.builder.shuffle_vector(one, one, ir.Constant(_INT32S, [0] * LANES))

    def splat_at(self, address: Any, offset: int = 0) -> Any:
        """Return a vector with the float at an address in every lane."""
        return self.splat(self.load(self.at(address, offset), _FLOAT))

    def multiply_add(self, one: Any, other: Any, total: Any) -> Any:
        """Return ``one * other + total``, rounded once."""
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        function = get_or_insert_function(self.builder.module, kind, f"llvm.fma.v{LANES}f32")
        return self.builder.call(function, [one, other, total])

    def add_at(self, address: Any, value: Any) -> None:
        """Add a value to the one at an address."""
        self.store(self.builder.fadd(self.load(address, value.type), value), address)

    def positive(self, values: Any) -> Any:
        """Return the ReLU of a vector; NaN stays NaN."""
        return self.builder.select(self.builder.fcmp_ordered(">", _ZEROS, values), _ZEROS, values)

    def masked(self, gradients: Any, outputs: Any) -> Any:
        """Return the gradients of a ReLU's input, given those of its output, and the output."""
        return self.builder.select(self.builder.fcmp_ordered("<=", outputs, _ZEROS), _ZEROS, gradients)

    def sum_of(self, values: Any) -> Any:
        """Return the sum of the lanes: the upper half is added to the lower half until one lane is left."""
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            kind = ir.VectorType(_INT32, lanes)
            halves = [ir.Constant(kind, [*range(first, first + lanes)]) for first in (0, lanes)]
            values = self.builder.fadd(*(self.builder.shuffle_vector(values, values, half) for half in halves))
        return self.builder.extract_element(values, ir.Constant(_INT32, 0))

    def repeat(self, count: Any, begin: Sequence[Any], step: Callable[[list[Any]], Sequence[Any]]) -> list[Any]:
        """Emit a loop of at least one pass over some values, and return the values after the last pass."""
        builder = self.builder
        before, body, after = builder.block, builder.append_basic_block("repeat"), builder.append_basic_block("after")
        builder.branch(body)
        builder.position_at_end(body)
        number = builder.phi(_INT64)
        state = [builder.phi(value.type) for value in begin]
        results = list(step(list(state)))
        following = self.at(number, 1)
        values = zip([number, *state], [ir.Constant(_INT64, 0), *begin], [following, *results], strict=True)
        for phi, first, next_ in values:
            phi.add_incoming(first, before)
            phi.add_incoming(next_, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, count), body, after)
        builder.position_at_end(after)
        return results


class Tile(NamedTuple):
    """A tile ``a [rows, steps] b [steps, vectors]`` of a product while its code is emitted.

    Attributes:
        code: builder.
        rows, vectors: size.
        c: address of the tile in the result.
        stride: bytes from row to row of the result, and of matrices that are read in the same way.
        x, y: addresses of vectors with the tile's columns, or of the tile in other matrices.
        r, s: addresses of one value for each of the tile's rows.
    """

    code: VectorBuilder
    rows: int
    vectors: int
    c: Any
    stride: Any
    x: Any
    y: Any
    r: Any
    s: Any

    def place(self, matrix: Any, row: int, vector: int) -> Any:
        """Return the address of a vector of a matrix, given the address of the tile in it."""
        builder = self.code.builder
        row_start = builder.add(matrix, builder.mul(self.stride, ir.Constant(_INT64, row))) if row else matrix
        return self.code.at(row_start, VECTOR * vector)


Sums = list[list[Any]]
"""Vectors of a tile, row by row."""


def from_zeros(tile: Tile) -> Sums:
    """Begin a product with zeros."""
    return [[_ZEROS] * tile.vectors for _ in range(tile.rows)]


def from_bias(tile: Tile) -> Sums:
    """Begin each row of a product with the vectors at ``x``."""
    return [[tile.code.load(tile.code.at(tile.x, VECTOR * v)) for v in range(tile.vectors)]] * tile.rows


def from_outer(tile: Tile) -> Sums:
    """Begin each row of a product with its value at ``r``, times the vectors at ``x``."""
    code = tile.code
    vectors = [code.load(code.at(tile.x, VECTOR * v)) for v in range(tile.vectors)]
    factors = [code.splat_at(tile.r, 4 * row) for row in range(tile.rows)]
    return [[code.builder.fmul(factor, vector) for vector in vectors] for factor in factors]


def store(tile: Tile, sums: Sums) -> None:
    """Store the sums."""
    for row, of_row in enumerate(sums):
        for v, value in enumerate(of_row):
            tile.code.store(value, tile.place(tile.c, row, v))


def store_positive(tile: Tile, sums: Sums) -> None:
    """Store the ReLU of the sums."""
    store(tile, [[tile.code.positive(value) for value in of_row] for of_row in sums])


def store_masked(tile: Tile, sums: Sums) -> None:
    """Replace a ReLU's outputs by the gradients of its inputs, and add these of all rows to the vectors at ``x``."""
    code = tile.code
    sums = [
        [code.masked(value, code.load(tile.place(tile.c, row, v))) for v, value in enumerate(of_row)]
        for row, of_row in enumerate(sums)
    ]
    store(tile, sums)
    for v, total in enumerate(sums[0]):
        for of_row in sums[1:]:
            total = code.builder.fadd(total, of_row[v])
        code.add_at(code.at(tile.x, VECTOR * v), total)


def add(tile: Tile, sums: Sums) -> None:
    """Add the sums to the result."""
    for row, of_row in enumerate(sums):
        for v, value in enumerate(of_row):
            tile.code.add_at(tile.place(tile.c, row, v), value)


def add_own(tile: Tile, sums: Sums) -> None:
    """Add the gradient of ``of_key + diag(query) of_product`` to those of its parts.

    ``c`` is the gradient of ``of_key``, ``x`` that of ``of_product``, ``y`` is ``of_product``, ``r`` the query and
    ``s`` its gradient.
    """
    code = tile.code
    add(tile, sums)
    for row, of_row in enumerate(sums):
        query, total = code.splat_at(tile.r, 4 * row), _ZEROS
        for v, value in enumerate(of_row):
            place = tile.place(tile.x, row, v)
            code.store(code.multiply_add(query, value, code.load(place)), place)
            total = code.multiply_add(code.load(tile.place(tile.y, row, v)), value, total)
        code.add_at(code.at(tile.s, 4 * row), code.sum_of(total))


def make_product(
    transposed: bool, begin: Callable[[Tile], Sums], finish: Callable[[Tile, Sums], None]
) -> Callable[..., None]:
    """Make the product of two matrices.

    Args:
        transposed: the first factor is stored as ``[steps, rows]`` and not as ``[rows, steps]``.
        begin: emits the values with which a tile's sums begin.
        finish: emits what is done with a tile's sums.

    Returns:
        ``product(a, a_stride, b, b_stride, steps, c, stride, rows, vectors, x, x_stride, y, r, s)``, compiled. Steps
        and rows are multiples of :data:`STEPS`. ``x_stride`` is the stride of ``x`` and ``y``: that of ``c``, or 0 if
        they are the same for all rows.
    """
    sizes = iter(TILES)
    many = TILES[0][0]
    wide, narrow = (_make_column(transposed, begin, finish, next(sizes), next(sizes)) for _ in range(2))

    def product(
        a: int,
        a_stride: int,
        b: int,
        b_stride: int,
        steps: int,
        c: int,
        stride: int,
        rows: int,
        vectors: int,
        x: int,
        x_stride: int,
        y: int,
        r: int,
        s: int,
    ) -> None:
        done = 0
        while done < vectors:
            right = done * VECTOR
            if vectors - done >= many:
                wide(
                    a,
                    a_stride,
                    b + right,
                    b_stride,
                    steps,
                    c + right,
                    stride,
                    rows,
                    x + right,
                    x_stride,
                    y + right,
                    r,
                    s,
                )
                done += many
            else:
                narrow(
                    a,
                    a_stride,
                    b + right,
                    b_stride,
                    steps,
                    c + right,
                    stride,
                    rows,
                    x + right,
                    x_stride,
                    y + right,
                    r,
                    s,
                )
                done += 1

    return _named(product, transposed, begin.__name__, finish.__name__)


def _make_column(
    transposed: bool,
    begin: Callable[[Tile], Sums],
    finish: Callable[[Tile, Sums], None],
    large_size: tuple[int, int],
    small_size: tuple[int, int],
) -> Callable[..., None]:
    """Make the part of a product that is as wide as a tile: large tiles, and small ones for the rows that are left."""
    large, small = (_make_tile(transposed, begin, finish, *size) for size in (large_size, small_size))
    more, fewer = large_size[1], small_size[1]

    def column(
        a: int,
        a_stride: int,
        b: int,
        b_stride: int,
        steps: int,
        c: int,
        stride: int,
        rows: int,
        x: int,
        x_stride: int,
        y: int,
        r: int,
        s: int,
    ) -> None:
        a_row = 4 if transposed else a_stride
        row = 0
        while row < rows:
            first, place, other = a + row * a_row, c + row * stride, row * x_stride
            if rows - row >= more:
                large(
                    first, a_stride, b, b_stride, steps, place, stride, x + other, y + other, r + 4 * row, s + 4 * row
                )
                row += more
            else:
                small(
                    first, a_stride, b, b_stride, steps, place, stride, x + other, y + other, r + 4 * row, s + 4 * row
                )
                row += fewer

    return _named(column, transposed, begin.__name__, finish.__name__, *large_size, *small_size)


def _named(function: Callable[..., None], *parts: object) -> Callable[..., None]:
    """Compile a function under a name that says all that its code depends on.

    numba tells functions of the same name apart by a number that counts in each process. Two loops from its cache that
    were compiled in two processes could have different functions under one name and number, and would call the wrong
    one.
    """
    function.__qualname__ = "_".join(map(str, (function.__name__, *parts)))
    compiled: Callable[..., None] = numba.njit(nogil=True)(function)
    return compiled


def _make_tile(
    transposed: bool,
    begin: Callable[[Tile], Sums],
    finish: Callable[[Tile, Sums], None],
    vectors: int,
    rows: int,
) -> Any:
    """Return the intrinsic of a tile."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        a, a_stride, b, b_stride, steps, c, stride, x, y, r, s = arguments
        code = VectorBuilder(builder)
        tile = Tile(code, rows, vectors, c, stride, x, y, r, s)
        # Values of a that are multiplied in one step: neighbours, or one of each row.
        starts = [
            a if transposed else builder.add(a, builder.mul(a_stride, ir.Constant(_INT64, i))) for i in range(rows)
        ]

        def multiply(state: list[Any]) -> list[Any]:
            offset, weights_at, *sums = state
            for _ in range(STEPS):
                weights = [code.load(code.at(weights_at, VECTOR * v)) for v in range(vectors)]
                for row in range(rows):
                    place = code.at(builder.add(starts[row], offset), 4 * row if transposed else 0)
                    value = code.splat_at(place)
                    for v in range(vectors):
                        sums[row * vectors + v] = code.multiply_add(value, weights[v], sums[row * vectors + v])
                offset = builder.add(offset, a_stride) if transposed else code.at(offset, 4)
                weights_at = builder.add(weights_at, b_stride)
            return [offset, weights_at, *sums]

        sums = [value for of_row in begin(tile) for value in of_row]
        passes = builder.ashr(steps, ir.Constant(_INT64, STEPS.bit_length() - 1))
        sums = code.repeat(passes, [ir.Constant(_INT64, 0), b, *sums], multiply)[2:]
        finish(tile, [sums[row * vectors : (row + 1) * vectors] for row in range(rows)])
        return context.get_dummy_value()

    @intrinsic
    def tile(
        context: Any,
        a: Any,
        a_stride: Any,
        b: Any,
        b_stride: Any,
        steps: Any,
        c: Any,
        stride: Any,
        x: Any,
        y: Any,
        r: Any,
        s: Any,
    ) -> tuple[Any, Callable]:
        return types.void(*[types.intp] * 11), generate

    return tile


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

        return code.sum_of(code.repeat(arguments[4], [ir.Constant(_INT64, 0), _ZEROS], one)[1])

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
        return ir.Constant(_FLOATS, [float(np.float32(number))] * LANES)

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
    exponent = builder.shl(builder.bitcast(shifted, _INT32S), ir.Constant(_INT32S, [23] * LANES))
    result = builder.bitcast(builder.add(builder.bitcast(result, _INT32S), exponent), _FLOATS)
    # Below, the power is no normal float. NaN is not below.
    result = builder.select(builder.fcmp_ordered("<", power, same(-87)), _ZEROS, result)
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
            bits = builder.zext(code.load(state[1], _SHORTS, 2), _INT32S)
            bits = builder.shl(bits, ir.Constant(_INT32S, [16] * LANES))
            code.store(builder.bitcast(bits, _FLOATS), state[0])
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
            return ir.Constant(_INT32S, [value] * LANES)

        def one(state: list[Any]) -> list[Any]:
            values = code.load(state[1])
            bits = builder.bitcast(values, _INT32S)
            odd = builder.and_(builder.lshr(bits, same(16)), same(1))
            rounded = builder.lshr(builder.add(bits, builder.add(odd, same(0x7FFF))), same(16))
            # The addition could carry a NaN over to another number.
            rounded = builder.select(builder.fcmp_unordered("uno", values, values), same(0x7FC0), rounded)
            code.store(builder.trunc(rounded, _SHORTS), state[0], 2)
            return [code.at(state[0], VECTOR // 2), code.at(state[1], VECTOR)]

        code.repeat(arguments[2], arguments[:2], one)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


@intrinsic
def weighted_sum(context: Any, target: Any, weights: Any, vectors: Any, stride: Any, rows: Any) -> tuple[Any, Callable]:
    """Write the weighted sum of a vector of each row: ``weighted_sum(target, weights, vectors, stride, rows)``."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        code = VectorBuilder(builder)
        target, weights, vectors, stride, rows = arguments

        def one(state: list[Any]) -> list[Any]:
            total = code.multiply_add(code.splat_at(state[0]), code.load(state[1]), state[2])
            return [code.at(state[0], 4), builder.add(state[1], stride), total]

        code.store(code.repeat(rows, [weights, vectors, _ZEROS], one)[2], target)
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

        sums = code.repeat(rows, [outputs, grads, _ZEROS, _ZEROS], one)[2:]
        code.add_at(grad_score, sums[0])
        code.add_at(grad_bias, sums[1])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), generate


@intrinsic
def value_at(context: Any, address: Any) -> tuple[Any, Callable]:
    """Return the float32 value at an address."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        return VectorBuilder(builder).load(arguments[0], _FLOAT)

    return types.float32(types.intp), generate


@intrinsic
def put(context: Any, address: Any, value: Any) -> tuple[Any, Callable]:
    """Write a float32 value to an address: ``put(address, value)``."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        VectorBuilder(builder).store(arguments[1], arguments[0])
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), generate
