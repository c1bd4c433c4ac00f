"""CPU kernel that reads and trains all tables of one fbgemm kernel as if they were one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding

from modules.threads import each_part
from trainer.runtime.unique import find_unique
from trainer.sparse.row_loops import adagrad, add_rows, read_rows, rowwise_adagrad, sgd

_LOOPS: dict[EmbOptimType, Callable[..., None]] = {
    EmbOptimType.EXACT_SGD: sgd,
    EmbOptimType.EXACT_ADAGRAD: adagrad,
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: rowwise_adagrad,
}


class CpuKernel:
    """Looks up rows by their number in the kernel; its backward pass trains them with the fused optimizer.

    fbgemm's CPU kernel for unpooled rows takes 130 to 300 ms to train 110,000 rows of width 16, and the one for pooled
    rows sorts the rows and trains them one value at a time in float64. The loops of
    :mod:`trainer.sparse.row_loops` do the same to the same memory, and on x86-64 all bits are the same, in any number
    of threads. TorchRec's kernel still owns and saves weights, optimizer state and learning rate.

    Args:
        kernel: TorchRec's kernel on a CPU; its tables are contiguous.
        unique: no call has a row more than once. False: the gradients of a row are summed in order first.

    Attributes:
        first_row: lookup name -> number of the first row of its table.
        dim: width of the rows.
    """

    def __init__(self, kernel: BatchedFusedEmbedding, *, unique: bool) -> None:
        owner = self._owner = kernel.emb_module
        heights = [rows for rows, _, _, _ in owner.embedding_specs]
        first = [0, *accumulate(heights)]
        table_of = zip(kernel.config.feature_names(), owner.feature_table_map, strict=True)
        self.first_row = {name: first[table] for name, table in table_of}
        self.dim = owner.embedding_specs[0][1]
        self._unique, self._train_rows = unique, _LOOPS[owner.optimizer]
        # Views of the live memory. Row-wise Adagrad has one number for each row.
        self._values = owner.weights_host.data[: first[-1] * self.dim].view(-1, self.dim).numpy()
        has_state = owner.optimizer != EmbOptimType.EXACT_SGD
        self._states = owner.momentum1_host.data.numpy() if has_state else np.empty(0, np.float32)
        # Autograd calls the backward pass only if something that the rows come from needs a gradient.
        self._anchor = torch.zeros(0, requires_grad=True)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return rows ``[n, dim]`` float32, whose backward pass trains them, for ``[n]`` int64 row numbers."""
        found: Tensor = _TrainedRows.apply(self._anchor, rows, self)
        return found

    def read(self, rows: Tensor) -> Tensor:
        """Return rows ``[n, dim]`` float32 for ``[n]`` int64 row numbers."""
        numbers, out = rows.numpy(), torch.empty(len(rows), self.dim)
        target = out.numpy()
        each_part(lambda begin, end: read_rows(begin, end, numbers, self._values, target), len(numbers))
        return out

    def train(self, rows: Tensor, gradients: Tensor, scale: float = 1.0) -> None:
        """Train rows ``[n]`` int64 on ``scale`` times their gradients ``[n, dim]`` float32."""
        numbers, slopes = rows.numpy(), gradients.contiguous().numpy()
        if not self._unique:
            numbers, places = find_unique(numbers)
            total = np.zeros((len(numbers), self.dim), np.float32)
            add_rows(total, places, slopes, scale)
            slopes, scale = total, 1.0
        # fbgemm keeps both in float32.
        rate, eps = float(self._owner.learning_rate_tensor), float(np.float32(self._owner.optimizer_args.eps))
        values, states = self._values, self._states
        each_part(
            lambda begin, end: self._train_rows(begin, end, numbers, slopes, values, states, rate, eps, scale),
            len(numbers),
        )

    def number_rows(self, ids: Tensor, counts: Tensor, keys: Sequence[str]) -> Tensor:
        """Turn row numbers within this rank's shards of the tables into row numbers of the kernel.

        Args:
            ids: ``[n]`` int64, sorted by sender, then by lookup.
            counts: ``[senders, lookups]`` int64, number of ids of each.
            keys: names of the lookups.

        Returns:
            ``[n]`` int64.
        """
        rows, at = torch.empty_like(ids), 0
        for sender in counts.tolist():
            for key, count in zip(keys, sender, strict=True):
                if count:
                    torch.add(ids[at : at + count], self.first_row[key], out=rows[at : at + count])
                    at += count
        return rows


class _TrainedRows(torch.autograd.Function):
    """Rows of a kernel, which are trained by their backward pass."""

    @staticmethod
    def forward(context: Any, anchor: Tensor, rows: Tensor, kernel: CpuKernel) -> Tensor:
        """Return the rows."""
        context.rows, context.kernel = rows, kernel
        return kernel.read(rows)

    @staticmethod
    def backward(context: Any, gradients: Tensor) -> tuple[None, None, None]:
        """Train the rows."""
        context.kernel.train(context.rows, gradients)
        return None, None, None
