"""Compiled target attention for CPUs: the function of ``modules/din.py`` by the loops of ``modules/din_loops.py``.

A batch is padded and packed for the loops, which run over parts of it in threads. Gradients of parameters are summed
over each part, and then over the parts in their order; the parts depend only on the number of rows. So no bit depends
on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from modules.din_loops import (
    LAYERS,
    OF_KEY,
    OF_PRODUCT,
    DinArguments,
    DinLayout,
    backward_rows,
    compile_loops,
    forward_rows,
    padded,
)
from modules.threads import each_part
from modules.vector_code import LANES

PART_ROWS = 64
"""Rows of a part of the batch, unless there would be too many parts."""
MOST_PARTS = 64
"""Largest number of parts."""


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
