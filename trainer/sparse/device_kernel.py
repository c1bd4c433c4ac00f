"""Kernel of any device that reads and trains all tables of one fbgemm kernel as if they were one table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding

from trainer.runtime.host_copy import to_device

BAG_ROWS = 32
"""Rows of a bag. fbgemm's GPU kernel for unpooled rows reads a bag with one warp, so one large bag would take long."""


class DeviceKernel:
    """Looks up rows by their number in TorchRec's own kernel; its backward pass trains them with the fused optimizer.

    fbgemm wants the rows sorted by table, in bags of each table. The rows that :class:`FlatExchange` receives are
    sorted by sender. So they are sorted by number, cut into bags of :data:`BAG_ROWS`, and brought back into their
    order. All sizes are known on the host without waiting for the device.

    Args:
        kernel: TorchRec's kernel; all its tables are in the memory of the device.

    Attributes:
        first_row: lookup name -> number of the first row of its table.
        dim: width of the rows.
    """

    def __init__(self, kernel: BatchedFusedEmbedding, device: torch.device) -> None:
        self._owner = kernel.emb_module
        heights = [rows for rows, _, _, _ in self._owner.embedding_specs]
        first = [0, *accumulate(heights)]
        tables = list(self._owner.feature_table_map)
        self.first_row = {name: first[table] for name, table in zip(kernel.config.feature_names(), tables, strict=True)}
        self.dim = self._owner.embedding_specs[0][1]
        # The last feature of each table has all its rows, and the others have none.
        stops = [first[table + (table not in tables[place + 1 :])] for place, table in enumerate(tables)]
        self._starts = torch.tensor([first[table] for table in tables], device=device)
        self._stops = torch.tensor(stops, device=device)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return rows ``[n, dim]`` float32, whose backward pass trains them, for ``[n]`` int64 row numbers, n > 0."""
        numbers, order = rows.sort(stable=True)
        start, stop = torch.searchsorted(numbers, torch.stack([self._starts, self._stops]))
        bags = torch.arange(0, len(rows), BAG_ROWS, device=rows.device)
        offsets = torch.minimum(start[:, None] + bags, stop[:, None]).flatten()
        offsets = torch.cat([offsets, offsets.new_full((1,), len(rows))])
        table = torch.searchsorted(self._starts, numbers, right=True) - 1
        found: Tensor = self._owner(numbers - self._starts[table], offsets)
        return found.index_select(0, inverse(order))

    def number_rows(self, ids: Tensor, counts: Tensor, keys: Sequence[str]) -> Tensor:
        """Turn row numbers within this rank's shards into those of the kernel; see :meth:`CpuKernel.number_rows`."""
        # A table without rows on this rank has no ids either.
        first = torch.tensor([self.first_row.get(key, 0) for key in keys] * len(counts))
        return ids + spread(first, counts.flatten(), len(ids), ids.device)


def inverse(order: Tensor) -> Tensor:
    """Return the place of each number ``0 ... n - 1`` in a permutation ``[n]`` int64."""
    return torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))


def spread(values: Tensor, counts: Tensor, total: int, device: torch.device) -> Tensor:
    """Return each value as often as its count says, ``[total]`` on a device; the host does not wait for it."""
    moved, times = (to_device(tensor, device) for tensor in (values, counts))
    return moved.repeat_interleave(times, output_size=total)
