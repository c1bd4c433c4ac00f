"""A batch of model inputs in TorchRec's types."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from modules.content import BatchVectors
from trainer.data.features.missing_inputs import MissingCounts
from trainer.data.features.packed_batch import BatchLayout, LeftSearches, PackedBatch
from trainer.data.loading.late_vectors import LateVectors

ReadPosition = dict[int, list[int]]
"""Partition -> ``[epoch, window, offset]``: the rows consumed so far. The keys are the partitions of one rank; the
union over all ranks is the position of the job (``trainer/data/loading/batch_plan.py``)."""


@dataclass(frozen=True)
class RankingBatch:
    """Inputs and labels of some exposures.

    Attributes:
        ids: rows of the tables, one ``KeyedJaggedTensor`` (int64 values and lengths) for each embedding dimension, in
            the order of ``modules.embeddings.group_lookups``.
        dense: ``[rows, n_dense]`` float32, standardised.
        label: ``[rows, behaviours]`` float32, 0 or 1; 0 if masked.
        mask: ``[rows, behaviours]`` float32, 1 if the label counts.
        user_id: ``[rows]`` int64.
        visit_id: ``[rows]`` int64.
        request_ms: ``[rows]`` int64, milliseconds UTC.
        rows: number of rows, possibly 0.
        position: position of this rank after the batch.
        skipped_rows: rows of corrupt records that would have been in this batch.
        left_out_rows: rows that were read for this batch and are not in it, such as those without a positive.
        beyond: numbers of direct ids beyond their tables, by table and for ``histories``; such an id reads row 0.
        missing: ``no_code/`` and a code set, ``no_vector/`` and a table of vectors -> numbers of candidates and past
            visits, and of those without a value.
        slow: ``[rows]`` bool, True for rows of kind ``slow``, which correct a negative label of an earlier row; None if
            the batch has no such rows.
        author_id: ``[rows]`` int64, author of each row; None if the layout has no pairs.
        log_q: ``[rows]`` float32, log of the probability that the author is in a batch; None as for ``author_id``.
        content: table of pre-trained vectors -> its vectors.
        left: searches that the batch's device must make before the ids are complete; None if none are left.
        searched_beyond: scalar int64 on the device, number of direct ids beyond their tables among the entries that
            these searches found; None if it is 0 in every batch.
        late: table of pre-trained vectors -> its vectors, whose number the device counts; :meth:`finished` reads them.
            Those in ``content`` are the candidates' until then.
        searched_missing: ``[inputs, 2]`` int64 on the device, for each input of ``missing`` the number of these entries
            without a value, and of all of them; None if no input has entries.
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
    beyond: dict[str, int] = field(default_factory=dict)
    missing: dict[str, MissingCounts] = field(default_factory=dict)
    slow: Tensor | None = None
    author_id: Tensor | None = None
    log_q: Tensor | None = None
    left_out_rows: int = 0
    content: dict[str, BatchVectors] = field(default_factory=dict)
    left: LeftSearches | None = None
    searched_beyond: Tensor | None = None
    searched_missing: Tensor | None = None
    late: dict[str, LateVectors] = field(default_factory=dict)

    def finished(self) -> RankingBatch:
        """Return the batch with all vectors; on a GPU this waits for the searches of a batch with ``late`` vectors."""
        if not self.late:
            return self
        return replace(self, content=self.content | {name: late.read() for name, late in self.late.items()}, late={})

    def missing_with(self, searched: Tensor | None) -> dict[str, MissingCounts]:
        """Return :attr:`missing` with the entries that the device has found.

        Args:
            searched: copy of :attr:`searched_missing` on the host.
        """
        if searched is None:
            return self.missing
        found = (MissingCounts(0, 0, *of_input) for of_input in searched.tolist())
        return {name: own + more for (name, own), more in zip(self.missing.items(), found, strict=True)}

    def _tensors(self) -> dict[str, Tensor]:
        """Return the attributes that are tensors, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device, non_blocking: bool = False) -> RankingBatch:
        """Return the batch on a device; with ``non_blocking``, copies of a pinned batch overlap with the host."""
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._tensors().items()
        }
        content = {
            name: of_table.changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))
            for name, of_table in self.content.items()
        }
        ids = [keyed.to(device, non_blocking=non_blocking) for keyed in self.ids]
        left = self.left
        if left is not None:
            left = left._replace(columns=left.columns.to(device, non_blocking=non_blocking))
        return replace(self, ids=ids, content=content, left=left, **moved)

    def pin_memory(self) -> RankingBatch:
        """Return the batch in page-locked memory."""
        pinned: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in self._tensors().items()}
        content = {name: of_table.changed(Tensor.pin_memory) for name, of_table in self.content.items()}
        left = None if self.left is None else self.left._replace(columns=self.left.columns.pin_memory())
        return replace(self, ids=[keyed.pin_memory() for keyed in self.ids], content=content, left=left, **pinned)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of the batch until the work that is queued on ``stream`` is done."""
        for keyed in self.ids:
            keyed.record_stream(stream)
        for tensor in self._tensors().values():
            tensor.record_stream(stream)
        for of_table in self.content.values():
            for tensor in of_table.tensors():
                tensor.record_stream(stream)
        if self.left is not None:
            self.left.columns.record_stream(stream)
        for late in self.late.values():
            for tensor in late.tensors():
                tensor.record_stream(stream)


def unpack(packed: PackedBatch, layout: BatchLayout, position: ReadPosition) -> RankingBatch:
    """Return a batch whose tensors are views of the packed buffers."""
    ids = [
        # Without the sizes of the keys, TorchRec would sum the lengths on the device and wait for the result.
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
    columns: dict[str, Any] = {**packed.columns(layout)}
    return RankingBatch(
        ids=ids,
        **columns,
        rows=packed.rows,
        position=position,
        skipped_rows=packed.skipped_rows,
        beyond=packed.beyond,
        left_out_rows=packed.left_out_rows,
        missing=packed.missing,
        content=packed.content(layout),
        left=packed.left(layout),
    )


def empty_batch(layout: BatchLayout) -> RankingBatch:
    """Return a batch without rows, for a rank that has no more rows while other ranks still have some."""
    no_ids = {key: 0 for keys in layout.keys for key in keys}
    return unpack(PackedBatch(torch.empty(0, dtype=torch.int64), torch.empty(0), 0, no_ids), layout, {})
