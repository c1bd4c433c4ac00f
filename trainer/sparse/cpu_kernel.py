"""CPU kernel that reads and trains all tables of one fbgemm kernel as if they were one table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding


class CpuKernel:
    """Looks up rows by their number in the kernel; its backward pass trains them with the fused optimizer.

    fbgemm's CPU kernel for unpooled rows takes 130 to 300 ms to train 110,000 rows of width 16; the kernel for pooled
    rows takes 7 to 16 ms. The sum over one row is the row itself, so this is a second kernel, a pooling one, over the
    same memory: weights, optimizer state and learning rate are those of TorchRec's kernel, which still owns and saves
    them.

    Args:
        kernel: TorchRec's kernel on a CPU; its tables are contiguous.

    Attributes:
        first_row: lookup name -> number of the first row of its table.
        dim: width of the rows.
    """

    def __init__(self, kernel: BatchedFusedEmbedding) -> None:
        owner = kernel.emb_module
        heights = [rows for rows, _, _, _ in owner.embedding_specs]
        first = [0, *accumulate(heights)]
        table_of = zip(kernel.config.feature_names(), owner.feature_table_map, strict=True)
        self.first_row = {name: first[table] for name, table in table_of}
        self.dim = owner.embedding_specs[0][1]
        shared = {"weights": owner.weights_host.data}
        if owner.optimizer != EmbOptimType.EXACT_SGD:
            shared["momentum1"] = owner.momentum1_host.data
        self._pooling = SplitTableBatchedEmbeddingBagsCodegen(
            [(first[-1], self.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
            optimizer=owner.optimizer,
            eps=owner.optimizer_args.eps,
            pooling_mode=PoolingMode.SUM,
            device=torch.device("cpu"),
            preallocated_host_buffers=shared,
        )
        self._pooling.learning_rate_tensor = owner.learning_rate_tensor
        self._bounds = torch.arange(1)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return rows ``[n, dim]`` float32, whose backward pass trains them, for ``[n]`` int64 row numbers, n > 0."""
        if len(self._bounds) <= len(rows):
            self._bounds = torch.arange(2 * len(rows) + 1)
        return self._pooling(rows, self._bounds[: len(rows) + 1])

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
