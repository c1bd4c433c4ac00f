"""The tables that one fbgemm kernel holds on a CPU, read and trained as if they were one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding
from torchrec.distributed.embedding import ShardedEmbeddingCollection

_MOST_THREADS = 8
"""Beyond these, cutting the rows costs more than it saves."""


class FlatKernel:
    """Looks rows up by their number in the kernel, and trains them in the backward pass, fused as before.

    fbgemm's CPU kernel for unpooled rows takes 130 to 300 ms to train 110,000 rows of width 16, the one for pooled
    rows 7 to 16 ms. A row is its own sum, so this is a second, pooling kernel over the same memory: weights, optimizer
    state and learning rate are those of TorchRec's kernel, which goes on to own and to save them.

    Either kernel works on one thread. Where torch may use more, each of them has a pooling kernel of its own and does
    those rows whose number modulo the number of threads is its own: every row is trained by one thread, on the
    gradients that it would have got otherwise, so that no bit depends on the threads.

    Args:
        kernel: TorchRec's, on a CPU; its tables lie one after the other.

    Attributes:
        first_row: name of each lookup -> number of its table's first row.
    """

    def __init__(self, kernel: BatchedFusedEmbedding) -> None:
        owner = kernel.emb_module
        heights = [rows for rows, _, _, _ in owner.embedding_specs]
        first = [0, *accumulate(heights)]
        table_of = zip(kernel.config.feature_names(), owner.feature_table_map, strict=True)
        self.first_row = {name: first[table] for name, table in table_of}
        self.dim = owner.embedding_specs[0][1]
        threads = min(torch.get_num_threads(), _MOST_THREADS)
        self._lanes = [_pooling_kernel(owner, first[-1], self.dim) for _ in range(threads)]
        self._map: Callable[..., Iterator[Any]] = ThreadPoolExecutor(threads).map if threads > 1 else map
        self._bounds = torch.arange(1)

    def __call__(self, rows: Tensor) -> HeldRows:
        """Look up ``[n]`` int64 row numbers, at least one."""
        if len(self._bounds) <= len(rows):
            self._bounds = torch.arange(2 * len(rows) + 1)
        if len(self._lanes) == 1:
            return HeldRows([self._look_up(self._lanes[0], rows)], None, self._map)
        lane = rows % len(self._lanes)
        order = [torch.nonzero(lane == number)[:, 0] for number in range(len(self._lanes))]
        held = self._map(self._look_up, self._lanes, [rows[part] for part in order])
        return HeldRows(list(held), order, self._map)

    def _look_up(self, lane: SplitTableBatchedEmbeddingBagsCodegen, rows: Tensor) -> Tensor:
        if not len(rows):
            return torch.empty(0, self.dim)
        with torch.enable_grad():
            return lane(rows, self._bounds[: len(rows) + 1])

    def number_rows(self, ids: Tensor, counts: Tensor, keys: Sequence[str]) -> Tensor:
        """Row numbers of ids of this rank's parts of the tables.

        Args:
            ids: ``[n]`` int64, sorted by sender, then by lookup.
            counts: ``[senders, lookups]`` int64, how many there are of each.
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


class HeldRows:
    """Rows that were looked up, and can be trained once.

    Args:
        parts: ``[n of the part, dim]`` each, whose backward passes train the rows.
        order: of each part, the places of its rows; None where there is one part, in order.
        map_: ``map``, over as many parts at a time as there are threads.

    Attributes:
        values: ``[n, dim]`` float32, outside of autograd.
    """

    def __init__(
        self, parts: Sequence[Tensor], order: Sequence[Tensor] | None, map_: Callable[..., Iterator[Any]]
    ) -> None:
        self._parts, self._order, self._map = parts, order, map_
        self.values = parts[0].detach()
        if order is not None:
            back = torch.ops.fbgemm.invert_permute(torch.cat(list(order)))
            self.values = torch.cat([part.detach() for part in parts]).index_select(0, back)

    def train(self, gradients: Tensor) -> None:
        """Train the rows on their gradients ``[n, dim]``."""
        given = [gradients] if self._order is None else [gradients.index_select(0, part) for part in self._order]
        list(self._map(_backward, self._parts, given))


def _backward(rows: Tensor, gradients: Tensor) -> None:
    if len(rows):
        rows.backward(gradients)


def _pooling_kernel(
    owner: SplitTableBatchedEmbeddingBagsCodegen, rows: int, dim: int
) -> SplitTableBatchedEmbeddingBagsCodegen:
    """A kernel over the memory of another, whose tables are to it one table of so many rows."""
    shared = {"weights": owner.weights_host.data}
    if owner.optimizer != EmbOptimType.EXACT_SGD:
        shared["momentum1"] = owner.momentum1_host.data
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=owner.optimizer,
        eps=owner.optimizer_args.eps,
        pooling_mode=PoolingMode.SUM,
        device=torch.device("cpu"),
        preallocated_host_buffers=shared,
    )
    kernel.learning_rate_tensor = owner.learning_rate_tensor
    return kernel


def flat_kernel(collection: ShardedEmbeddingCollection, sharding: str) -> FlatKernel | None:
    """The kernel of this rank's parts of a collection's tables with one sharding; None if it has none of them."""
    lookup = collection._lookups[collection._sharding_types.index(sharding)]
    kernels = [module for module in lookup.modules() if isinstance(module, BatchedFusedEmbedding)]
    if len(kernels) > 1:
        raise RuntimeError(f"TorchRec made {len(kernels)} kernels for the {sharding} tables of one collection, not one")
    return FlatKernel(kernels[0]) if kernels else None
