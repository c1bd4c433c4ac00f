"""Search for the nearest centroids on a CPU: a fused product and minimum, then a comparison by the definition.

Vectors and centroids are moved by the mean of the centroids and rounded: to bfloat16 where the processor multiplies
pairs of these (AVX-512 BF16), else to float32. A tile of the product, :data:`ROWS` vectors by one panel of centroids,
stays in registers, and one number for each lane leaves it: the smallest score ``|c|^2 / 2 - x c`` of the lane's
:data:`VECTORS` centroids. A row's candidates are the centroids of all lanes whose smallest score lies within twice an
error bound of the row's smallest score. They are compared in float64 by the definition of ``modules/codebook.py``, so
the rounding of the product decides nothing.

The bound is Cauchy and Schwarz' inequality on the rounding errors themselves: with x, c rounded to x', c',
``|x c - x' c'| <= |x - x'| |c| + |x'| |c - c'|``, and the rounding of float32 additions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic
from torch import Tensor

from modules.compiled import compiled
from modules.search.cpu_intrinsics import lowest_bit
from modules.threads import each_part

_FEATURES = (get_host_cpu_features() if numba.config.CPU_FEATURES is None else numba.config.CPU_FEATURES).split(",")
WIDE = "+avx512f" in _FEATURES
PAIRS = WIDE and "+avx512bf16" in _FEATURES
"""True if the processor multiplies pairs of bfloat16 values."""

LANES = 16 if WIDE else 8
"""Scores of one vector register."""
VECTORS = 4 if WIDE else 2
ROWS = 6
"""A tile's accumulators, the registers of one step of a panel and one of a row fit in 32 registers (AVX2: 16)."""
PANEL = LANES * VECTORS
"""Centroids of a panel."""

TILES_AT_ONCE = 20
"""Tiles of vectors that read a panel while it is in the cache."""
VECTORS_AT_ONCE = 1 << 15
"""Vectors that are divided among the threads; float16 vectors are converted in parts of this size."""
LEAST_BYTES = 1 << 24
"""Bytes of the smallest scores of a thread's block of vectors, unless a single tile needs more."""
CANDIDATES = 1 / 40
"""Largest share of the centroids that may be candidates after a product of pairs; beyond it, float32 is faster."""

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(_FLOAT, LANES)


class _Bfloat(ir.Type):
    """LLVM's type bfloat, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"


_TILE = types.void(types.uintp, types.uintp, types.uintp, types.intp, types.uintp, types.intp)


@intrinsic
def tile_of_floats(
    context: Any, vectors: Any, panel: Any, halves: Any, steps: Any, out: Any, stride: Any
) -> tuple[Any, Callable]:
    """Score a tile of float32 values: ``tile_of_floats(vectors, panel, halves, steps, out, stride)``.

    Each of ``steps`` steps has :data:`ROWS` values at ``vectors`` and :data:`PANEL` at ``panel``. Scores begin with the
    :data:`PANEL` float32 numbers at ``halves``. The smallest of each lane is written to ``out``, ``stride`` bytes from
    row to row.
    """
    return _TILE, _tile(in_pairs=False)


@intrinsic
def tile_of_pairs(
    context: Any, vectors: Any, panel: Any, halves: Any, steps: Any, out: Any, stride: Any
) -> tuple[Any, Callable]:
    """Score a tile as :func:`tile_of_floats` does, with pairs of bfloat16 values in place of float32 values."""
    return _TILE, _tile(in_pairs=True)


def _tile(in_pairs: bool) -> Callable:
    """Return the generator of a tile's code."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        vectors, panel, halves, steps, out, stride = arguments
        values = ir.VectorType(_Bfloat(), 2 * LANES) if in_pairs else _FLOATS
        name = "llvm.x86.avx512bf16.dpbf16ps.512" if in_pairs else f"llvm.fma.v{LANES}f32"
        order = [_FLOATS, values, values] if in_pairs else [_FLOATS] * 3
        multiply = get_or_insert_function(builder.module, ir.FunctionType(_FLOATS, order), name)

        def step(total: Any, word: Any, weights: Any) -> Any:
            return builder.call(multiply, [total, word, weights] if in_pairs else [word, weights, total])

        begin = [load(builder, halves, _FLOATS, 4 * LANES * part) for part in range(VECTORS)]
        before, body, after = builder.block, builder.append_basic_block("step"), builder.append_basic_block("least")
        builder.branch(body)
        builder.position_at_end(body)
        number, place, weight_place = builder.phi(_INT64), builder.phi(_INT64), builder.phi(_INT64)
        totals = [[builder.phi(_FLOATS) for _ in range(VECTORS)] for _ in range(ROWS)]
        weights = [load(builder, weight_place, values, 4 * LANES * part) for part in range(VECTORS)]
        sums = []
        for row in range(ROWS):
            word = splat(builder, load(builder, place, _INT32, 4 * row), values)
            sums.append([step(totals[row][part], word, weights[part]) for part in range(VECTORS)])
        following = builder.add(number, ir.Constant(_INT64, 1))
        for phi, first, next_ in (
            (number, ir.Constant(_INT64, 0), following),
            (place, vectors, builder.add(place, ir.Constant(_INT64, 4 * ROWS))),
            (weight_place, panel, builder.add(weight_place, ir.Constant(_INT64, 4 * PANEL))),
        ):
            phi.add_incoming(first, before)
            phi.add_incoming(next_, body)
        for row in range(ROWS):
            for part in range(VECTORS):
                totals[row][part].add_incoming(begin[part], before)
                totals[row][part].add_incoming(sums[row][part], body)
        builder.cbranch(builder.icmp_signed("<", following, steps), body, after)
        builder.position_at_end(after)
        for row in range(ROWS):
            least = sums[row][0]
            for part in range(1, VECTORS):
                least = smaller(builder, least, sums[row][part])
            address = builder.add(out, builder.mul(stride, ir.Constant(_INT64, row)))
            builder.store(least, builder.inttoptr(address, _FLOATS.as_pointer())).align = 4
        return context.get_dummy_value()

    return generate


@intrinsic
def least_of(context: Any, address: Any, count: Any) -> tuple[Any, Callable]:
    """Return the smallest of ``count`` registers of float32 values: ``least_of(address, count)``."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        address, count = arguments
        first = load(builder, address, _FLOATS, 0)
        before, body, after = builder.block, builder.append_basic_block("least"), builder.append_basic_block("lanes")
        builder.branch(body)
        builder.position_at_end(body)
        number, place, best = builder.phi(_INT64), builder.phi(_INT64), builder.phi(_FLOATS)
        result = smaller(builder, best, load(builder, place, _FLOATS, 0))
        following = builder.add(number, ir.Constant(_INT64, 1))
        for phi, begin, next_ in (
            (number, ir.Constant(_INT64, 0), following),
            (place, address, builder.add(place, ir.Constant(_INT64, 4 * LANES))),
            (best, first, result),
        ):
            phi.add_incoming(begin, before)
            phi.add_incoming(next_, body)
        builder.cbranch(builder.icmp_signed("<", following, count), body, after)
        builder.position_at_end(after)
        lanes = [builder.extract_element(result, ir.Constant(_INT32, lane)) for lane in range(LANES)]
        while len(lanes) > 1:
            lanes = [smaller(builder, *lanes[at : at + 2]) for at in range(0, len(lanes), 2)]
        return lanes[0]

    return types.float32(types.uintp, types.intp), generate


@intrinsic
def not_above(context: Any, address: Any, limit: Any) -> tuple[Any, Callable]:
    """Compare a register: ``not_above(address, limit) -> int64`` sets bit i if value i is at most ``limit``."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[Any, ...]) -> Any:
        address, limit = arguments
        limits = splat(builder, builder.bitcast(limit, _INT32), _FLOATS)
        found = builder.fcmp_ordered("<=", load(builder, address, _FLOATS, 0), limits)
        return builder.zext(builder.bitcast(found, ir.IntType(LANES)), _INT64)

    return types.int64(types.uintp, types.float32), generate


def load(builder: ir.IRBuilder, address: Any, kind: Any, offset: int) -> Any:
    """Load a value from an address of any alignment of 4."""
    value = builder.load(builder.inttoptr(builder.add(address, ir.Constant(_INT64, offset)), kind.as_pointer()))
    value.align = 4
    return value


def splat(builder: ir.IRBuilder, word: Any, kind: Any) -> Any:
    """Return a register with a word of 32 bits in every lane, as ``kind``."""
    words = ir.VectorType(_INT32, LANES)
    one = builder.insert_element(ir.Constant(words, ir.Undefined), word, ir.Constant(_INT32, 0))
    all_ = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_INT32, LANES), [0] * LANES))
    return builder.bitcast(all_, kind)


def smaller(builder: ir.IRBuilder, one: Any, other: Any) -> Any:
    """Return the smaller of two values or registers without NaN."""
    return builder.select(builder.fcmp_ordered("<", one, other), one, other)


@numba.njit(nogil=True)
def squared_distance(vector: np.ndarray, centroid: np.ndarray, terms: np.ndarray) -> float:
    """Return a squared distance by the definition, in the order of ``row_sums``; ``terms`` is scratch of d float64."""
    width = len(terms)
    for i in range(width):
        difference = np.float64(vector[i]) - np.float64(centroid[i])
        terms[i] = difference * difference
    while width > 1:
        half = width >> 1
        shift = width - half
        for i in range(half):
            terms[i] += terms[shift + i]
        width = shift
    return terms[0]


@numba.njit(nogil=True)
def round_to_pairs(moved: np.ndarray, rounded: np.ndarray, words: np.ndarray) -> None:
    """Round float32 values to the nearest bfloat16 values, ties to even, and write two of them into each word."""
    bits, kept = moved.view(np.uint32), rounded.view(np.uint32)
    for i in range(len(bits)):
        kept[i] = (bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    for i in range(len(words)):
        words[i] = (kept[2 * i] >> np.uint32(16)) | kept[2 * i + 1]


@numba.njit(nogil=True, fastmath={"reassoc", "nsz"})
def squares_of(moved: np.ndarray, rounded: np.ndarray) -> tuple[float, float, float]:
    """Return sums of squares: of the values, of the rounded values, and of their differences. In any order."""
    of_moved = of_rounded = of_errors = np.float32(0)
    for i in range(len(moved)):
        of_moved += moved[i] * moved[i]
        of_rounded += rounded[i] * rounded[i]
        of_errors += (moved[i] - rounded[i]) * (moved[i] - rounded[i])
    return float(of_moved), float(of_rounded), float(of_errors)


@numba.njit(nogil=True)
def score_bound(norm: float, error: float, largest: float, largest_error: float, dim: int) -> float:
    """Return a bound of the error of a vector's scores.

    It has the rounding of values, of half norms, of ``dim`` products and additions (two roundings each for pairs),
    values that are too small for float32, and the rounding of the definition itself in float64.

    Args:
        norm: norm of the rounded vector.
        error: norm of its rounding error.
        largest: largest norm of a rounded centroid.
        largest_error: largest norm of a centroid's rounding error.
        dim: elements of a vector.
    """
    length = norm + error
    of_values = error * (largest + largest_error) + (length + largest) * largest_error
    # Where a value that is lost for float32 is multiplied by a norm above 1, of_definition is larger.
    of_sums = 2.0**-23 * (largest * largest / 2 + length * largest) + 2.0**-126
    of_definition = 2.0**-52 * (length + largest + largest_error) ** 2
    return 1.01 * (of_values + (dim + 4) * (of_sums + of_definition))


def _search_with(tile: Callable, in_pairs: bool) -> Callable:
    """Return the search loop for one kind of tile."""

    @compiled("finding nearest centroids", nogil=True, keep=False)
    def search(
        vectors: np.ndarray,
        first: int,
        last: int,
        centroids: np.ndarray,
        centre: np.ndarray,
        panels: np.ndarray,
        halves: np.ndarray,
        largest: float,
        largest_error: float,
        least: np.ndarray,
        codes: np.ndarray,
        distances: np.ndarray,
    ) -> int:
        """Find the nearest centroids of vectors ``first`` to ``last``, and return the number of candidates.

        Args:
            vectors: ``[n, d] float32``.
            first: number of the first vector.
            last: number after the last one.
            centroids: ``[k, d] float32``.
            centre: point that vectors and centroids are moved by, ``[d] float32``.
            panels: moved and rounded centroids, negative, ``[panels, steps, PANEL]`` words.
            halves: half of the squared norms of the moved centroids, ``[panels, PANEL]``; infinite beyond the last one.
            largest: largest norm of a rounded centroid.
            largest_error: largest norm of a centroid's rounding error.
            least: scratch, ``[rows, panels, LANES] float32``; ``rows`` is a multiple of ROWS.
            codes: result, ``[n] int32``.
            distances: result, ``[n] float32``.
        """
        count, steps, dim = panels.shape[0], panels.shape[1], vectors.shape[1]
        rows, candidates = least.shape[0], 0
        words = np.zeros((rows // ROWS, steps, ROWS), np.uint32)
        moved = np.zeros(2 * steps if in_pairs else steps, np.float32)
        rounded, terms, limits = moved.copy(), np.empty(dim), np.empty(rows)
        tile_bytes, panel_bytes = 4 * ROWS * steps, 4 * PANEL * steps
        line, row_bytes = 4 * LANES, 4 * LANES * count
        out = np.uintp(least.ctypes.data)
        for begin in range(first, last, rows):
            here = min(rows, last - begin)
            for row in range(here):
                for i in range(dim):
                    moved[i] = vectors[begin + row, i] - centre[i]
                target = words[row // ROWS, :, row % ROWS]
                if in_pairs:
                    round_to_pairs(moved, rounded, target)
                else:
                    rounded[:] = moved
                    target[:] = moved.view(np.uint32)
                of_moved, of_rounded, of_errors = squares_of(moved, rounded)
                # The subtraction of the centre itself rounds, too.
                error = np.sqrt(of_errors) + 2.0**-23 * np.sqrt(of_moved)
                limits[row] = 2 * score_bound(np.sqrt(of_rounded), error, largest, largest_error, dim)
            for panel in range(count):
                weights = np.uintp(panels.ctypes.data + panel * panel_bytes)
                half = np.uintp(halves.ctypes.data + panel * 4 * PANEL)
                for number in range((here + ROWS - 1) // ROWS):
                    place = np.uintp(out + number * ROWS * row_bytes + panel * line)
                    tile(np.uintp(words.ctypes.data + number * tile_bytes), weights, half, steps, place, row_bytes)
            for row in range(here):
                scores = np.uintp(out + row * row_bytes)
                limit = np.float32(least_of(scores, count) + limits[row])
                best, code = np.inf, np.int64(0)
                for panel in range(count):
                    found = not_above(np.uintp(scores + panel * line), limit)
                    while found:
                        lane = lowest_bit(found)
                        found &= found - 1
                        for part in range(VECTORS):
                            candidate = panel * PANEL + part * LANES + lane
                            if candidate < len(centroids):
                                candidates += 1
                                distance = squared_distance(vectors[begin + row], centroids[candidate], terms)
                                if distance < best or (distance == best and candidate < code):
                                    best, code = distance, candidate
                codes[begin + row] = code
                distances[begin + row] = np.float32(best)
        return candidates

    return search


search_floats, search_pairs = _search_with(tile_of_floats, False), _search_with(tile_of_pairs, True)
"""Search loops for the two kinds of tiles; each is compiled when it is first called."""


def nearest_on_cpu(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest centroid of each vector: codes ``[n] int32`` and squared distances ``[n] float32``.

    Args:
        vectors: ``[n, d]``, float32 or float16, ``d > 0``.
        centroids: ``[k, d] float32``, ``k > 0``.
    """
    n = len(vectors)
    centroids = centroids.contiguous()
    codes, distances = np.zeros(n, np.int32), np.full(n, np.inf, np.float32)
    prepared = _Panels.of(centroids, PAIRS)
    tiles = max(1, min(TILES_AT_ONCE, LEAST_BYTES // (4 * LANES * ROWS * len(prepared.words))))
    for first in range(0, n, VECTORS_AT_ONCE):
        part = vectors[first : first + VECTORS_AT_ONCE].float().contiguous().numpy()
        last, found = first + len(part), []
        result, panels = (codes[first:last], distances[first:last]), prepared

        def work(begin: int, end: int, part: Any = part, result: Any = result, panels: _Panels = panels) -> None:
            rows = ROWS * min(tiles, -(-(end - begin) // ROWS))
            least = np.empty((rows, len(panels.words), LANES), np.float32)
            loop = search_pairs if panels.pairs else search_floats
            found.append(loop(part, begin, end, centroids.numpy(), *panels[1:], least, *result))  # noqa: B023

        each_part(work, len(part))
        if prepared.pairs and sum(found) > CANDIDATES * len(part) * len(centroids):
            prepared = _Panels.of(centroids, False)
    return torch.from_numpy(codes), torch.from_numpy(distances)


class _Panels(NamedTuple):
    """Centroids, moved by their mean, rounded and packed; the fields after the first are arguments of a search."""

    pairs: bool
    centre: np.ndarray
    words: np.ndarray
    halves: np.ndarray
    largest: float
    largest_error: float

    @staticmethod
    def of(centroids: Tensor, pairs: bool) -> _Panels:
        """Prepare centroids for a search."""
        k, dim = centroids.shape
        centre = centroids.mean(0)
        moved = centroids - centre
        padded = torch.zeros(-(-k // PANEL) * PANEL, dim + dim % 2 if pairs else dim)
        padded[:k, :dim] = -moved
        rounded = padded.bfloat16() if pairs else padded
        words = rounded.view(torch.int32).view(-1, PANEL, rounded.shape[1] // (2 if pairs else 1)).mT.contiguous()
        halves = torch.full((len(padded),), torch.inf)
        halves[:k] = (moved.double() ** 2).sum(1).float() / 2
        # The subtraction itself rounds, too.
        errors = (padded - rounded.float()).norm(dim=1).max() + 2.0**-23 * moved.norm(dim=1).max()
        largest = float(rounded.float().norm(dim=1).max())
        return _Panels(pairs, centre.numpy(), words.numpy(), halves.view(-1, PANEL).numpy(), largest, float(errors))
