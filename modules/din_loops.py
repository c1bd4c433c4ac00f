"""Compiled loops of target attention for CPUs, one for each pass, and the places of what they read and write.

A row's own first layer ``of_key + diag(query) of_product`` is made once, and the entries are multiplied by it. Products
are tiles whose sums stay in registers, where they get the bias and the ReLU before they are stored. Only the weights of
the softmax are kept for the backward pass, which computes the hidden layers again: that takes less time than to read
them from memory.

All sums have a fixed order, and a row is computed alone. So its result does not depend on the rows beside it. The
gradients of the parameters are summed over each part of the batch.

All matrices are padded with zeros to multiples of :data:`LANES`, and computed in float32. The tensors behind the
addresses are those of ``modules/din_kernel.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from modules import product_tiles, vector_code, vector_loops
from modules.compiled import compiled
from modules.product_tiles import STEPS, make_product
from modules.vector_code import LANES, VECTOR
from modules.vector_loops import (
    add_product,
    add_scaled,
    add_vectors,
    copy,
    divide,
    dot,
    dots,
    exponential,
    fill,
    narrow,
    put,
    scores_backward,
    softmax_backward,
    value_at,
    weighted_sum,
    widen,
)

OF_KEY, OF_PRODUCT, SCORE, LAYERS = range(4)
"""Places of the parameters in :attr:`DinLayout.at`; weight and bias of each further layer follow."""
OWN, KEYS, SHARES, GRADS, SUMS, HIDDEN = range(6)
"""Places in :attr:`DinLayout.place`: a row's own first layer, its entries, the weights of its softmax, the gradients of
its scores, the sum of a layer's gradients, and the outputs of the hidden layers."""

ZERO, LEAST = np.float32(0), np.float32(-np.inf)

layer_forward = make_product(False, product_tiles.from_bias, product_tiles.store_positive)
"""``c = relu(a b + x)``."""
layer_backward = make_product(False, product_tiles.from_zeros, product_tiles.store_masked)
"""``c = a b`` where ``c`` was positive, else 0; ``x`` gets the sum over the rows."""
weight_backward = make_product(True, product_tiles.from_zeros, product_tiles.add)
"""``c += a^T b``."""
own_backward = make_product(True, product_tiles.from_zeros, product_tiles.add_own)
"""Add ``a^T b``, the gradient of a row's own first layer, to those of its parts."""
entries_backward = make_product(False, product_tiles.from_outer, product_tiles.store)
"""``c = r x^T + a b``."""


class DinArguments(NamedTuple):
    """Arguments of the two loops; all are whole numbers, and most are addresses.

    Attributes:
        keys, grad_keys: entries of the batch, one after another, and their gradients.
        half: 1 if these are bfloat16 values, and 0 for float32 values.
        dim: width of an entry, a multiple of ``LANES`` for bfloat16 values.
        row_bytes: bytes of a padded float32 entry, and of the rows of ``query`` and ``out``.
        query, bias, out, grad_out, grad_query, grad_bias: padded rows of the batch.
        shares: weights of the softmax of all entries.
        weights: parameters, in the places of a :class:`DinLayout`.
        scratch: memory of this thread.
        part_rows: rows of a part of the batch.
        grads: gradients of the parameters for each part of the batch.
        grad_bytes: bytes of those of one part.
    """

    keys: int
    half: int
    dim: int
    row_bytes: int
    query: int
    bias: int
    shares: int
    weights: int
    scratch: int
    part_rows: int
    out: int = 0
    grad_out: int = 0
    grad_keys: int = 0
    grad_query: int = 0
    grad_bias: int = 0
    grads: int = 0
    grad_bytes: int = 0


@njit(nogil=True)
def padded(count: int, unit: int) -> int:
    """Return the next multiple of a power of two."""
    return (count + unit - 1) & -unit


class DinLayout(NamedTuple):
    """Places of the parameters and of the scratch memory, in bytes.

    Attributes:
        at: places of ``of_key``, ``of_product``, the score, and weight and bias of each further layer; and then, all of
            them transposed, of ``of_key``, ``of_product`` and the weight of each further layer.
        grad_bytes: bytes of the parameters that are not transposed, and so of their gradients.
        weight_bytes: bytes of all parameters.
        place: places in the scratch memory.
        scratch_bytes: bytes of it.
    """

    at: np.ndarray
    grad_bytes: int
    weight_bytes: int
    place: np.ndarray
    scratch_bytes: int

    @staticmethod
    def of(dim: int, widths: Sequence[int], longest: int) -> DinLayout:
        """Return the places for entries of ``dim`` values, hidden ``widths``, and at most ``longest`` entries a row."""
        columns = [4 * padded(width, LANES) for width in (dim, *widths)]
        # Padded in both directions, a matrix is as large as its transposed one.
        matrices = [padded(rows, LANES) * width for rows, width in zip((dim, *widths), columns[1:], strict=False)]
        parameters = [matrices[0], matrices[0], columns[-1]]
        for matrix, bias in zip(matrices[1:], columns[2:], strict=True):
            parameters += [matrix, bias]
        at = np.cumsum([0, *parameters, matrices[0], *matrices])
        places = padded(longest, LANES)
        scratch = [matrices[0], places * columns[0], 4 * places, 4 * places, max(columns)]
        place = np.cumsum([0, *scratch, *(places * width for width in columns[1:])])
        return DinLayout(at[:-1], int(at[len(parameters)]), int(at[-1]), place[:-1], int(place[-1]))


@njit(nogil=True)
def zero(target: int, vectors: int) -> None:
    """Write vectors of zeros, or none."""
    if vectors:
        fill(target, 0, 0, 0, vectors, ZERO)


@njit(nogil=True)
def copy_values(target: int, source: int, count: int) -> None:
    """Copy any number of float32 values."""
    whole = count // LANES
    if whole:
        copy(target, source, 0, 0, whole, ZERO)
    for i in range(whole * LANES, count):
        put(target + 4 * i, value_at(source + 4 * i))


@njit(nogil=True)
def row_dots(target: int, rows: int, stride: int, values: int, count: int, rest: float) -> None:
    """Write the dot products of rows and a vector, and ``rest`` up to a multiple of ``LANES`` of them.

    There is memory for as many rows as results.
    """
    for i in range(0, count, LANES):
        dots(target + 4 * i, rows + i * stride, stride, values, stride // VECTOR)
    for i in range(count, padded(count, LANES)):
        put(target + 4 * i, rest)


@njit(nogil=True)
def read_entries(job: DinArguments, first: int, entries: int, target: int) -> None:
    """Copy the entries of a row into padded rows; rows of zeros fill up their number."""
    vectors = job.row_bytes // VECTOR
    if job.half:
        widen(target, job.keys + first * job.dim * 2, entries * vectors)
    elif job.dim * 4 == job.row_bytes:
        copy(target, job.keys + first * job.dim * 4, 0, 0, entries * vectors, ZERO)
    else:
        zero(target, entries * vectors)
        for i in range(entries):
            copy_values(target + i * job.row_bytes, job.keys + (first + i) * job.dim * 4, job.dim)
    zero(target + entries * job.row_bytes, (padded(entries, STEPS) - entries) * vectors)


@njit(nogil=True)
def write_entries(job: DinArguments, first: int, entries: int, source: int) -> None:
    """Copy the gradients of a row's entries out of padded rows."""
    vectors = job.row_bytes // VECTOR
    if job.half:
        narrow(job.grad_keys + first * job.dim * 2, source, entries * vectors)
    elif job.dim * 4 == job.row_bytes:
        copy(job.grad_keys + first * job.dim * 4, source, 0, 0, entries * vectors, ZERO)
    else:
        for i in range(entries):
            copy_values(job.grad_keys + (first + i) * job.dim * 4, source + i * job.row_bytes, job.dim)


@njit(nogil=True)
def hidden_layers(
    job: DinArguments, row: int, keys: int, entries: int, widths: np.ndarray, at: np.ndarray, place: np.ndarray
) -> None:
    """Compute the outputs of all hidden layers for the entries of a row, which are padded rows at ``keys``."""
    own, query, width = job.scratch + place[OWN], job.query + row * job.row_bytes, 4 * padded(widths[0], LANES)
    for d in range(padded(job.dim, STEPS)):
        of_key, of_product = job.weights + at[OF_KEY] + d * width, job.weights + at[OF_PRODUCT] + d * width
        add_scaled(own + d * width, of_key, of_product, 0, width // VECTOR, value_at(query + 4 * d))
    places, steps = padded(entries, STEPS), padded(job.dim, STEPS)
    hidden, bias = job.scratch + place[HIDDEN], job.bias + row * width
    layer_forward(keys, job.row_bytes, own, width, steps, hidden, width, places, width // VECTOR, bias, 0, 0, 0, 0)
    for number in range(1, len(widths)):
        before, stride, steps = hidden, width, padded(widths[number - 1], STEPS)
        hidden, width = job.scratch + place[HIDDEN + number], 4 * padded(widths[number], LANES)
        weight = job.weights + at[LAYERS + 2 * number - 2]
        bias = job.weights + at[LAYERS + 2 * number - 1]
        layer_forward(before, stride, weight, width, steps, hidden, width, places, width // VECTOR, bias, 0, 0, 0, 0)


@compiled("attention over histories", vector_code, product_tiles, vector_loops, nogil=True)
def forward_rows(
    begin: int, end: int, job: DinArguments, starts: np.ndarray, widths: np.ndarray, at: np.ndarray, place: np.ndarray
) -> None:
    """Write ``out`` and ``shares`` for parts ``begin`` to ``end`` of the batch.

    Args:
        begin: first part.
        end: part after the last one.
        job: addresses and sizes.
        starts: first entry of each row, and the number of all entries.
        widths: widths of the hidden layers.
        at: places of the parameters.
        place: places in the scratch memory.
    """
    last, width = len(widths) - 1, 4 * padded(widths[-1], LANES)
    copied, shares, hidden = job.scratch + place[KEYS], job.scratch + place[SHARES], job.scratch + place[HIDDEN + last]
    readable = not job.half and 4 * job.dim == job.row_bytes
    for row in range(begin * job.part_rows, min(end * job.part_rows, len(starts) - 1)):
        first, entries = starts[row], starts[row + 1] - starts[row]
        if entries == 0:
            continue
        if readable and first + padded(entries, STEPS) <= starts[-1]:
            # The tiles read up to three entries of the next row as well, whose results nobody reads.
            keys = job.keys + first * job.row_bytes
        else:
            keys = copied
            read_entries(job, first, entries, keys)
        hidden_layers(job, row, keys, entries, widths, at, place)
        row_dots(shares, hidden, width, job.weights + at[SCORE], entries, LEAST)
        largest = LEAST
        for i in range(entries):
            largest = max(largest, value_at(shares + 4 * i))
        vectors = padded(entries, LANES) // LANES
        total = exponential(shares, 0, 0, 0, vectors, largest)
        divide(shares, 0, 0, 0, vectors, total)
        copy_values(job.shares + 4 * first, shares, entries)
        for column in range(0, job.row_bytes, VECTOR):
            out = job.out + row * job.row_bytes + column
            weighted_sum(out, shares, keys + column, job.row_bytes, entries)


@compiled("attention over histories", vector_code, product_tiles, vector_loops, nogil=True)
def backward_rows(
    begin: int, end: int, job: DinArguments, starts: np.ndarray, widths: np.ndarray, at: np.ndarray, place: np.ndarray
) -> None:
    """Write the gradients of parts ``begin`` to ``end`` of the batch; the arguments are those of the forward pass."""
    last, vectors_of_key = len(widths) - 1, job.row_bytes // VECTOR
    back = LAYERS + 2 * last
    keys, shares, grad_scores = job.scratch + place[KEYS], job.scratch + place[SHARES], job.scratch + place[GRADS]
    own, sums = job.scratch + place[OWN], job.scratch + place[SUMS]
    for row in range(begin * job.part_rows, min(end * job.part_rows, len(starts) - 1)):
        first, entries = starts[row], starts[row + 1] - starts[row]
        if entries == 0:
            continue
        places, vectors = padded(entries, STEPS), padded(entries, LANES) // LANES
        grads, offset = job.grads + row // job.part_rows * job.grad_bytes, row * job.row_bytes
        query, grad_out, grad_query = job.query + offset, job.grad_out + offset, job.grad_query + offset
        read_entries(job, first, entries, keys)
        hidden_layers(job, row, keys, entries, widths, at, place)

        zero(shares, vectors)
        copy_values(shares, job.shares + 4 * first, entries)
        row_dots(grad_scores, keys, job.row_bytes, grad_out, entries, ZERO)
        mean = dot(shares, grad_scores, 0, 0, vectors, ZERO)
        softmax_backward(grad_scores, shares, 0, 0, vectors, mean)

        # From here on, gradients replace the outputs of a layer when these have been read for the last time.
        hidden, width = job.scratch + place[HIDDEN + last], 4 * padded(widths[last], LANES)
        zero(sums, width // VECTOR)
        for column in range(0, width, VECTOR):
            score, grad_score = job.weights + at[SCORE] + column, grads + at[SCORE] + column
            scores_backward(hidden + column, width, places, grad_scores, score, grad_score, sums + column)
        for number in range(last, 0, -1):
            after, stride = hidden, width
            grad_weight, grad_bias = grads + at[LAYERS + 2 * number - 2], grads + at[LAYERS + 2 * number - 1]
            weight = job.weights + at[back + 1 + number]
            hidden, width = job.scratch + place[HIDDEN + number - 1], 4 * padded(widths[number - 1], LANES)
            rows = padded(widths[number - 1], STEPS)
            add_vectors(grad_bias, sums, 0, 0, stride // VECTOR, ZERO)
            weight_backward(
                hidden, width, after, stride, places, grad_weight, stride, rows, stride // VECTOR, 0, 0, 0, 0, 0
            )
            zero(sums, width // VECTOR)
            steps = padded(widths[number], STEPS)
            layer_backward(
                after, stride, weight, width, steps, hidden, width, places, width // VECTOR, sums, 0, 0, 0, 0
            )
        copy(job.grad_bias + row * width, sums, 0, 0, width // VECTOR, ZERO)

        of_product, grad_of_key, grad_of_product = (
            job.weights + at[OF_PRODUCT],
            grads + at[OF_KEY],
            grads + at[OF_PRODUCT],
        )
        rows = padded(job.dim, STEPS)
        own_backward(
            keys,
            job.row_bytes,
            hidden,
            width,
            places,
            grad_of_key,
            width,
            rows,
            width // VECTOR,
            grad_of_product,
            width,
            of_product,
            query,
            grad_query,
        )
        steps = padded(widths[0], STEPS)
        for unit in range(steps):
            line = unit * job.row_bytes
            of_key, of_product = job.weights + at[back] + line, job.weights + at[back + 1] + line
            add_product(own + line, of_key, of_product, query, vectors_of_key, ZERO)
        entries_backward(
            hidden,
            width,
            own,
            job.row_bytes,
            steps,
            keys,
            job.row_bytes,
            places,
            vectors_of_key,
            grad_out,
            0,
            0,
            shares,
            0,
        )
        write_entries(job, first, entries, keys)


@cache
def compile_loops() -> None:
    """Compile the loops in this process, or load them from numba's cache."""
    whole, nothing = np.zeros(1, np.int64), DinArguments(*[0] * len(DinArguments._fields))
    arguments: tuple[Any, ...] = (0, 0, nothing, *[whole] * 4)
    for loop in (forward_rows, backward_rows):
        loop(*arguments)
