"""Matrix products of compiled attention and experts: tiles whose sums stay in registers until they are used.

All arguments are integers: addresses, strides in bytes from row to row, and numbers of rows, vectors or steps, at least
1. Products are fused multiply-adds in the order of the steps, so the size of a tile does not change a result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from modules.vector_code import INSTRUCTIONS, INT64, VECTOR, ZEROS, VectorBuilder

TILES = ((4, 6), (4, 2), (1, 12), (1, 4)) if INSTRUCTIONS == "AVX-512" else ((2, 6), (2, 2), (1, 12), (1, 4))
"""Vectors and rows of a tile, a large and a small one of each width; its sums fit in 32 registers (AVX2: 16)."""
STEPS = 4
"""Steps between two jumps of a product, and the unit of all numbers of rows and steps."""


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
        row_start = builder.add(matrix, builder.mul(self.stride, ir.Constant(INT64, row))) if row else matrix
        return self.code.at(row_start, VECTOR * vector)


Sums = list[list[Any]]
"""Vectors of a tile, row by row."""


def from_zeros(tile: Tile) -> Sums:
    """Begin a product with zeros."""
    return [[ZEROS] * tile.vectors for _ in range(tile.rows)]


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
        query, total = code.splat_at(tile.r, 4 * row), ZEROS
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
            a if transposed else builder.add(a, builder.mul(a_stride, ir.Constant(INT64, i))) for i in range(rows)
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
        passes = builder.ashr(steps, ir.Constant(INT64, STEPS.bit_length() - 1))
        sums = code.repeat(passes, [ir.Constant(INT64, 0), b, *sums], multiply)[2:]
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
