"""Compiled target attention for CPUs: the function of ``modules/din.py``, one loop for each pass.

A row's own first layer ``of_key + diag(query) of_product`` is made once, and the entries are multiplied by it. Products
are tiles whose sums stay in registers, where they get the bias and the ReLU before they are stored. Only the weights of
the softmax are kept for the backward pass, which computes the hidden layers again: that takes less time than to read
them from memory.

All sums have a fixed order, and a row is computed alone. So its result depends neither on the rows beside it nor on
their number, and the same holds for threads. Gradients of parameters are summed over each part of the batch, and then
over the parts in their order; the parts depend only on the number of rows.

All matrices are padded with zeros to multiples of :data:`LANES`, and computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from modules import product_tiles, vector_code, vector_loops
from modules.compiled import compile_now, compiled
from modules.product_tiles import STEPS, make_product
from modules.threads import each_part
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

PART_ROWS = 64
"""Rows of a part of the batch, unless there would be too many parts."""
MOST_PARTS = 64
"""Largest number of parts."""

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


@compiled(vector_code, product_tiles, vector_loops, nogil=True)
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


@compiled(vector_code, product_tiles, vector_loops, nogil=True)
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


class DinBatch(NamedTuple):
    """A batch in the form that the loops read.

    Attributes:
        query, bias: float32 and padded.
        keys: float32, or bfloat16 if their width is a multiple of ``LANES``.
        shares: weights of the softmax, ``[entries]``; written by the forward pass.
        starts: first entry of each row, and the number of all entries.
        widths: widths of the hidden layers.
        weights: parameters, in the places of ``layout``.
        layout: places.
        shapes: shapes of the parameters.
    """

    query: Tensor
    keys: Tensor
    bias: Tensor
    shares: Tensor
    starts: np.ndarray
    widths: np.ndarray
    weights: np.ndarray
    layout: DinLayout
    shapes: list[tuple[int, ...]]

    @staticmethod
    def of(query: Tensor, keys: Tensor, bias: Tensor, parameters: Sequence[Tensor], lengths: Tensor) -> DinBatch:
        """Pad and pack a batch; the arguments are those of :class:`CompiledAttention`.

        Raises:
            ValueError: lengths or widths are not those of the entries; the loops would read beyond them.
        """
        dim, width = parameters[OF_KEY].shape
        widths = [width, *(weight.shape[1] for weight in parameters[LAYERS::2])]
        counts = lengths.numpy()
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        if len(counts) != len(query) or counts.min(initial=0) < 0 or starts[-1] != len(keys):
            raise ValueError(
                f"attention over {len(keys)} entries in {len(query)} rows, but {len(counts)} lengths, at least "
                f"{counts.min(initial=0)} and {starts[-1]} together"
            )
        if query.shape[1] != dim or keys.shape[1] != dim:
            raise ValueError(f"attention of width {dim}, but queries of {query.shape[1]}, entries of {keys.shape[1]}")
        layout = DinLayout.of(dim, widths, int(counts.max(initial=0)))
        arrays = [parameter.detach().float().numpy() for parameter in parameters]
        weights = _aligned(layout.weight_bytes)
        weights.fill(0)
        transposed = [array.T for array in (arrays[OF_KEY], arrays[OF_PRODUCT], *arrays[LAYERS::2])]
        for at, array in zip(layout.at.tolist(), [*arrays, *transposed], strict=True):
            _matrix(weights, at, array.shape)[...] = array
        return DinBatch(
            _padded_rows(query),
            # The loops read one row after another; float() alone would keep the strides of a transposed matrix.
            (keys if keys.dtype == torch.float32 or dim % LANES == 0 else keys.float()).contiguous(),
            _padded_rows(bias),
            torch.empty(len(keys)),
            starts,
            np.array(widths, np.int64),
            weights,
            layout,
            [array.shape for array in arrays],
        )

    def run(self, loop: Callable[..., None], **results: Tensor) -> list[Tensor]:
        """Run a loop over all rows, in as many threads as PyTorch uses.

        Args:
            loop: one of the two.
            results: further tensors that the loop reads and writes, as the fields of :class:`DinArguments`.

        Returns:
            Gradients of the parameters; empty without ``grad_out``.
        """
        part_rows = max(PART_ROWS, -(-len(self.query) // MOST_PARTS))
        parts = -(-len(self.query) // part_rows)
        grads = _aligned(0)
        if "grad_out" in results:
            grads = _aligned(parts * self.layout.grad_bytes)
            grads.fill(0)

        def work(begin: int, end: int) -> None:
            scratch = _aligned(self.layout.scratch_bytes)
            arguments = DinArguments(
                keys=self.keys.data_ptr(),
                half=int(self.keys.dtype == torch.bfloat16),
                dim=self.keys.shape[1],
                row_bytes=4 * self.query.shape[1],
                query=self.query.data_ptr(),
                bias=self.bias.data_ptr(),
                shares=self.shares.data_ptr(),
                weights=self.weights.ctypes.data,
                scratch=scratch.ctypes.data,
                part_rows=part_rows,
                grads=grads.ctypes.data,
                grad_bytes=self.layout.grad_bytes,
                **{name: tensor.data_ptr() for name, tensor in results.items()},
            )
            loop(begin, end, arguments, self.starts, self.widths, self.layout.at, self.layout.place)

        each_part(work, parts)
        if "grad_out" not in results:
            return []
        # NumPy adds one part after another, whatever the number of threads.
        total = grads.reshape(parts, self.layout.grad_bytes // 4).sum(0)
        places = zip(self.layout.at.tolist(), self.shapes, strict=False)
        return [torch.from_numpy(_matrix(total, at, shape).copy()) for at, shape in places]


class CompiledAttention(torch.autograd.Function):
    """Attention by the compiled loops, with the results of the plain operations in ``modules/din.py``."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        bias: Tensor,
        of_key: Tensor,
        of_product: Tensor,
        score: Tensor,
        lengths: Tensor,
        *layers: Tensor,
    ) -> Tensor:
        """Return the weighted sums; all tensors are float32, or all are bfloat16."""
        compile_loops()
        batch = DinBatch.of(query, keys, bias, [of_key, of_product, score, *layers], lengths)
        out = torch.zeros_like(batch.query)
        batch.run(forward_rows, out=out)
        ctx.save_for_backward(batch.query, batch.keys, batch.bias, batch.shares)
        ctx.others, ctx.dtype = batch[4:], query.dtype
        return out[:, : keys.shape[1]].to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the arguments of ``forward``."""
        batch = DinBatch(*ctx.saved_tensors, *ctx.others)
        grad_query, grad_bias = torch.zeros_like(batch.query), torch.zeros_like(batch.bias)
        grad_keys = torch.empty(batch.keys.shape, dtype=batch.keys.dtype)
        grads = batch.run(
            backward_rows,
            grad_out=_padded_rows(grad_out),
            grad_query=grad_query,
            grad_bias=grad_bias,
            grad_keys=grad_keys,
        )
        dim, width = batch.shapes[OF_KEY]
        of_key, of_product, score, *layers = (grad.to(ctx.dtype) for grad in grads)
        return (
            grad_query[:, :dim].to(ctx.dtype),
            grad_keys.to(ctx.dtype),
            grad_bias[:, :width].to(ctx.dtype),
            of_key,
            of_product,
            score,
            None,
            *layers,
        )


@cache
def compile_loops() -> None:
    """Compile the two loops in this process, or load them from numba's cache; log it if they are compiled."""
    whole, nothing = np.zeros(1, np.int64), DinArguments(*[0] * len(DinArguments._fields))
    arguments = (0, 0, nothing, *[whole] * 4)
    compile_now("the attention over histories", [(forward_rows, arguments), (backward_rows, arguments)])


def _aligned(bytes_: int) -> np.ndarray:
    """Return float32 memory that begins on a cache line."""
    memory = np.empty(bytes_ + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + bytes_].view(np.float32)


def _matrix(memory: np.ndarray, at: int, shape: Sequence[int]) -> np.ndarray:
    """Return a view of a padded matrix or vector without its padding; ``at`` is its place in bytes."""
    whole = [padded(size, LANES) for size in shape]
    values = memory[at // 4 : at // 4 + math.prod(whole)].reshape(whole)
    return values[tuple(slice(size) for size in shape)]


def _padded_rows(rows: Tensor) -> Tensor:
    """Return rows as contiguous float32 values of a padded width."""
    missing = -rows.shape[1] % LANES
    return functional.pad(rows.float(), (0, missing)) if missing else rows.float().contiguous()
