"""A batch of model inputs, as TorchRec takes them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.data.features.packed_batch import BatchLayout, PackedBatch

ReadPosition = dict[int, list[int]]
"""Partition -> ``[epoch, window, offset]``: rows consumed so far. The keys are the partitions of one rank; the union
over the ranks is the position of the job (plan.py)."""


@dataclass(frozen=True)
class RankingBatch:
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
        slow: ``[rows]`` bool, which rows are of kind ``slow`` and take back what an earlier one denied; None: none is.
    """

    ids: list[KeyedJaggedTensor]
    dense: Tensor
    label: Tensor
    mask: Tensor
    user_id: Tensor
    visit_id: Tensor
    request_ms: Tensor
    rows: int
    position: ReadPosition = field(default_factory=dict)
    skipped_rows: int = 0
    slow: Tensor | None = None

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device, non_blocking: bool = False) -> RankingBatch:
        """The batch on a device; ``non_blocking`` copies overlap with the host when the batch is pinned."""
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._tensors().items()
        }
        return replace(self, ids=[keyed.to(device, non_blocking=non_blocking) for keyed in self.ids], **moved)

    def pin_memory(self) -> RankingBatch:
        """The batch in page-locked memory."""
        pinned: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in self._tensors().items()}
        return replace(self, ids=[keyed.pin_memory() for keyed in self.ids], **pinned)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of the batch until the work queued on ``stream`` is done."""
        for keyed in self.ids:
            keyed.record_stream(stream)
        for tensor in self._tensors().values():
            tensor.record_stream(stream)


def unpack(packed: PackedBatch, layout: BatchLayout, position: ReadPosition) -> RankingBatch:
    """The batch as views of the two buffers."""
    ids = [
        # The sizes of the keys are known here; without them TorchRec would sum lengths on the device and wait.
        KeyedJaggedTensor(
            keys=list(group.keys),
            values=group.values,
            lengths=group.lengths,
            stride=packed.rows,
            length_per_key=[packed.ids_per_key[key] for key in group.keys],
            offset_per_key=group.offsets,
        )
        for group in packed.ids(layout)
    ]
    return RankingBatch(
        ids=ids,
        **packed.columns(layout),
        rows=packed.rows,
        position=position,
        skipped_rows=packed.skipped_rows,
    )


def empty_batch(layout: BatchLayout) -> RankingBatch:
    """A batch of no rows, for a rank that has run out while others go on."""
    no_ids = {key: 0 for keys in layout.keys for key in keys}
    return unpack(PackedBatch(torch.empty(0, dtype=torch.int64), torch.empty(0), 0, no_ids), layout, {})
