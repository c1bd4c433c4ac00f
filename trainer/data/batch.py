"""A batch of model inputs, and the two flat buffers in which it travels between processes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

Position = dict[int, list[int]]
"""Partition -> ``[epoch, window, offset]``: rows consumed so far. The keys are the partitions of one rank; the union
over the ranks is the position of the job (plan.py)."""


@dataclass(frozen=True)
class Batch:
    """Inputs and labels of some exposures.

    Attributes:
        ids: table rows, one ``KeyedJaggedTensor`` (int64 values and lengths) for each embedding dimension, in the
            order of ``modules.embeddings.group_lookups``.
        dense: ``[rows, n_dense]`` float32, standardised.
        label: ``[rows, behaviours]`` float32, 0 or 1; 0 where masked.
        mask: ``[rows, behaviours]`` float32, 1 where the label counts.
        user_id: ``[rows]`` int64.
        visit_id: ``[rows]`` int64.
        request_ms: ``[rows]`` int64, milliseconds UTC.
        rows: number of rows; 0 is allowed.
        position: where this rank stands after the batch.
        skipped_rows: rows of corrupt records that would have been in this batch.
    """

    ids: list[KeyedJaggedTensor]
    dense: Tensor
    label: Tensor
    mask: Tensor
    user_id: Tensor
    visit_id: Tensor
    request_ms: Tensor
    rows: int
    position: Position = field(default_factory=dict)
    skipped_rows: int = 0

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The batch on a device; ``non_blocking`` copies overlap with the host when the batch is pinned."""
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._tensors().items()
        }
        return replace(self, ids=[keyed.to(device, non_blocking=non_blocking) for keyed in self.ids], **moved)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory."""
        pinned: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in self._tensors().items()}
        return replace(self, ids=[keyed.pin_memory() for keyed in self.ids], **pinned)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of the batch until the work queued on ``stream`` is done."""
        for keyed in self.ids:
            keyed.record_stream(stream)
        for tensor in self._tensors().values():
            tensor.record_stream(stream)


@dataclass(frozen=True)
class BatchLayout:
    """What a batch is made of, known to its sender and to its receiver.

    Attributes:
        keys: names of the lookups of each embedding dimension.
        n_dense: columns of ``dense``.
        behaviours: columns of ``label`` and ``mask``.
    """

    keys: tuple[tuple[str, ...], ...]
    n_dense: int
    behaviours: int

    def integer_sizes(self, rows: int, ids_per_key: dict[str, int]) -> list[int]:
        """Lengths of the parts of :attr:`PackedBatch.integers`, in order."""
        sizes: list[int] = []
        for keys in self.keys:
            sizes += [ids_per_key[key] for key in keys]
            sizes.append(len(keys) * rows)
        return [*sizes, rows, rows, rows]

    def float_sizes(self, rows: int) -> list[int]:
        """Lengths of the parts of :attr:`PackedBatch.floats`, in order."""
        return [rows * self.n_dense, rows * self.behaviours, rows * self.behaviours]

    def empty(self) -> Batch:
        """A batch of no rows, for a rank that has run out while others go on."""
        packed = PackedBatch(torch.empty(0, dtype=torch.int64), torch.empty(0), 0, {k: 0 for g in self.keys for k in g})
        return packed.unpack(self, {})


@dataclass(frozen=True)
class PackedBatch:
    """A batch as two flat tensors: what crosses from a worker process costs two handles, whatever is in it.

    Attributes:
        integers: int64; for each embedding dimension the ids key by key and then the lengths key by key; then
            ``user_id``, ``visit_id`` and ``request_ms``.
        floats: float32; ``dense``, ``label`` and ``mask``, each row by row.
        rows: number of rows.
        ids_per_key: lookup name -> number of ids.
        skipped_rows: see :class:`Batch`.
    """

    integers: Tensor
    floats: Tensor
    rows: int
    ids_per_key: dict[str, int]
    skipped_rows: int = 0

    def pin_memory(self) -> PackedBatch:
        """The buffers in page-locked memory; ``DataLoader`` calls this."""
        return replace(self, integers=self.integers.pin_memory(), floats=self.floats.pin_memory())

    def unpack(self, layout: BatchLayout, position: Position) -> Batch:
        """The batch as views of the two buffers."""
        bounds = np.cumsum([0, *layout.integer_sizes(self.rows, self.ids_per_key)]).tolist()
        ids, at = [], 0
        for keys in layout.keys:
            offsets = [bound - bounds[at] for bound in bounds[at : at + len(keys) + 1]]
            values, lengths = bounds[at + len(keys)], bounds[at + len(keys) + 1]
            ids.append(
                # The sizes of the keys are known here; without them TorchRec would sum lengths on the device and wait.
                KeyedJaggedTensor(
                    keys=list(keys),
                    values=self.integers[bounds[at] : values],
                    lengths=self.integers[values:lengths],
                    stride=self.rows,
                    length_per_key=[self.ids_per_key[key] for key in keys],
                    offset_per_key=offsets,
                )
            )
            at += len(keys) + 1
        user_id, visit_id, request_ms = self.integers[bounds[at] :].view(3, self.rows)
        dense, label, mask = self.floats.split(layout.float_sizes(self.rows))
        return Batch(
            ids=ids,
            dense=dense.view(self.rows, layout.n_dense),
            label=label.view(self.rows, layout.behaviours),
            mask=mask.view(self.rows, layout.behaviours),
            user_id=user_id,
            visit_id=visit_id,
            request_ms=request_ms,
            rows=self.rows,
            position=position,
            skipped_rows=self.skipped_rows,
        )
