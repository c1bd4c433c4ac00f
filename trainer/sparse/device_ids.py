"""Dynamic ids on the device of their table: the same map as on a CPU, as operations on whole tensors.

:class:`trainer.sparse.dynamic_ids.DynamicIds` works through the new ids of a bucket one after the other, and the result
depends on this order: an id that gets a row takes it from the next id's choice. Buckets are independent. So the new ids
are sorted by bucket and then by value. On a GPU a Triton kernel takes each bucket with one warp
(``trainer/sparse/admission_kernel.py``), and the host never waits. Anywhere else they are taken in *rounds* of one id
from each bucket: round ``k`` has the ``k``-th new id of every bucket that has so many. In a round no two ids touch the
same memory, so it is one batch of tensor operations, and the rounds in order do in each bucket exactly what the loop
does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple

import numpy as np
import torch
from torch import Tensor

from modules.embeddings import Table
from trainer.data.features.id_map import HASH_STEPS, hash_salt
from trainer.runtime.compilers import triton_compiles
from trainer.sparse import dynamic_ids
from trainer.sparse.dynamic_ids import CANDIDATES, SERVED, IdCounts, make_columns

_IDS_AT_A_TIME = 1 << 16
"""Ids whose buckets are read at a time: 34 MB for each column of 64 places."""


class DeviceIds:
    """Ids of the rows of a dynamic table, in the memory of any device.

    It has the methods, columns and results of :class:`trainer.sparse.dynamic_ids.DynamicIds`.

    Args:
        table, first_row, rows: see :class:`trainer.sparse.dynamic_ids.DynamicIds`.
        device: device of the table's rows.
        kernel: admit ids in the Triton kernel; None: on a GPU where Triton can compile it.

    Attributes:
        first_row: as given.
        columns: see :class:`trainer.sparse.dynamic_ids.DynamicIds`.
    """

    def __init__(
        self, table: Table, first_row: int, rows: int, device: torch.device, *, kernel: bool | None = None
    ) -> None:
        assert table.dynamic is not None
        self._kernel = triton_compiles(device) if kernel is None else kernel
        self.first_row, self._rows = first_row, rows
        self._rules, self._salt, self._table_rows = table.dynamic, hash_salt(table.name), table.rows
        self._width = dynamic_ids.BUCKET_ROWS
        # Whole buckets, so that a bucket is a row of a matrix; the last one of a table may have fewer rows.
        self._bucket_count = -(-rows // self._width)
        padded = make_columns(self._bucket_count * self._width, device)
        self.columns = {name: column[:rows] for name, column in padded.items()}
        self._buckets = {name: column.view(-1, self._width) for name, column in padded.items()}
        self._places = torch.arange(self._width, device=device)
        self._counted = torch.zeros(len(astuple(IdCounts())), dtype=torch.int64, device=device)

    @property
    def counts(self) -> IdCounts:
        """Counts of this rank since the job started or loaded a checkpoint; on a GPU this waits for the device."""
        return IdCounts.of(self._counted)

    @counts.setter
    def counts(self, counts: IdCounts) -> None:
        self._counted.copy_(torch.tensor(astuple(counts)))

    def find(self, ids: Tensor) -> Tensor:
        """Return the current row of each id, counted from ``first_row``; -1 if it has none. ``[n] -> [n]`` int64."""
        return self._find(ids, self._bucket_of(ids))

    def learn(self, ids: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Count the ids of a training step, admit new ids and evict old ones.

        Without the Triton kernel the host waits for the device, for the numbers of ids of the rounds.

        Args:
            ids, step: see :meth:`trainer.sparse.dynamic_ids.DynamicIds.learn`.

        Returns:
            The row of each id from this step on; and ``[n]`` int64, the rows that have a new id, and -1 elsewhere.
        """
        if not len(ids):
            return ids, ids
        values, order = ids.sort()
        buckets = self._bucket_of(values)
        rows = self._find(values, buckets)
        once = torch.ones_like(values, dtype=torch.bool)
        once[1:] = values[1:] != values[:-1]
        served = once & (rows >= 0)
        self._sight(rows, served, step)

        # New ids first, by bucket; a stable sort leaves the ids of a bucket in ascending order.
        missing = once & (rows < 0)
        by_bucket, at = torch.where(missing, buckets, self._bucket_count).sort(stable=True)
        admit = self._admit_by_kernel if self._kernel else self._admit_in_rounds
        new, evicted = admit(values[at], by_bucket, step)

        admitted, looked_up = (new >= 0).sum(), once.sum()
        self._counted += torch.stack([looked_up, missing.sum() - admitted, admitted, evicted])
        rows[at] = torch.where(by_bucket < self._bucket_count, new, rows[at])
        # Repetitions of an id have the row of its first occurrence.
        return torch.empty_like(rows).index_copy_(0, order, rows[torch.searchsorted(values, values)]), new

    def _admit_by_kernel(self, ids: Tensor, buckets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Do the same as :meth:`_admit_in_rounds` in one Triton kernel."""
        # Triton is on machines with a GPU only.
        from trainer.sparse.admission_kernel import admit

        return admit(
            ids,
            buckets,
            step,
            tuple(self._flat(name) for name in (*SERVED, *CANDIDATES)),
            rows=self._rows,
            first_row=self.first_row,
            width=self._width,
            admit_after=self._rules.admit_after,
            evict=self._rules.evict,
        )

    def _admit_in_rounds(self, ids: Tensor, buckets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Give rows to the new ids of a step, and count those that get none.

        Args:
            ids: ``[n]`` int64; within a bucket unique, and in the order in which they are admitted.
            buckets: ``[n]`` int64, ascending; ids whose bucket is the number of buckets are not new.
            step: number of the step.

        Returns:
            ``[n]`` int64, the new row of each id, -1 if it got none or is not new; and the number of evicted ids, a
            scalar.
        """
        number = torch.arange(1, len(ids) + 1, device=ids.device) - torch.searchsorted(buckets, buckets)
        sizes = torch.bincount(torch.where(buckets < self._bucket_count, number, 0)).tolist()[1:]
        # The new ids are the first ones.
        rounds = number[: sum(sizes)].argsort(stable=True)
        new, evicted = torch.full_like(ids, -1), torch.zeros_like(self._counted[0])
        for members in _parts(rounds, sizes):
            new[members], of_part = self._admit(ids[members], buckets[members], step)
            evicted += of_part
        return new, evicted

    def _bucket_of(self, ids: Tensor) -> Tensor:
        """Return the number of each id's bucket, counted from ``first_row``."""
        return hash_tensor(ids, self._salt, self._table_rows) // self._width - self.first_row // self._width

    def _find(self, ids: Tensor, buckets: Tensor) -> Tensor:
        """Return the row of each id in its bucket, -1 if it is not there."""
        rows = torch.empty_like(ids)
        for into, values, numbers in zip(*(t.split(_IDS_AT_A_TIME) for t in (rows, ids, buckets)), strict=True):
            place = self._place_of(values, *(self._buckets[name][numbers] for name in SERVED[:2]))
            into.copy_(torch.where(place < self._width, numbers * self._width + place, -1))
        return rows

    def _place_of(self, ids: Tensor, id_of: Tensor, seen: Tensor) -> Tensor:
        """Return the place of each id among those of its bucket, ``[n]``; the bucket's size if it is not there.

        Rows outside of the table, and row 0, never have an id.
        """
        return self._first(id_of.eq(ids[:, None]).logical_and_(seen > 0))

    def _first(self, mask: Tensor) -> Tensor:
        """Return the first place of each bucket where a mask ``[n, places]`` is True, ``[n]``; its size if none is."""
        return torch.where(mask, self._places, self._width).amin(1)

    def _sight(self, rows: Tensor, mask: Tensor, step: int) -> None:
        """Count a sighting of each row in ``rows`` where the mask is True."""
        seen, sightings = self.columns["seen"], self.columns["sightings"]
        write_where(sightings, rows, sightings[rows.clamp(min=0)] + 1, mask)
        write_where(seen, rows, seen.new_full((len(rows),), step), mask)

    def _admit(self, ids: Tensor, buckets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Count sightings of ids that have no row, and give a row to each one that has enough.

        Args:
            ids: ``[n]`` int64.
            buckets: ``[n]`` int64, their buckets, all different.
            step: number of the training step.

        Returns:
            ``[n]`` int64, the new row, -1 if an id got none; and the number of ids that were evicted, a scalar.
        """
        first = buckets * self._width
        place = first[:, None] + self._places
        # Row 0 serves all ids that have no row of their own, so no id may take it.
        inside = (place < self._rows) & (place + self.first_row > 0)
        of_candidates, seen, sightings = (self._buckets[name][buckets] for name in CANDIDATES)
        known = self._place_of(ids, of_candidates, seen)
        held = known < self._width
        counts = torch.where(held, sightings.gather(1, known.clamp(max=self._width - 1)[:, None])[:, 0], 0) + 1

        row, free = self._row_for(counts, buckets, inside, step)
        admitted = (counts >= self._rules.admit_after) & (row < self._width)
        # An id that gets no row writes what is there. Another id of the round cannot write to its bucket.
        self._write(SERVED, first + row.clamp(max=self._width - 1), admitted, ids, step, counts)

        oldest_seen = torch.where(inside, seen, _NEVER).amin(1)
        oldest = self._first(inside & (seen == oldest_seen[:, None]))
        candidate = first + torch.where(held, known, oldest)
        # If all candidates of the bucket were seen in this step, a new id is not counted.
        counted = ~admitted & (held | (oldest_seen != step))
        self._write(CANDIDATES, candidate, counted, ids, step, counts)
        freed = self._flat("candidate_seen")
        freed[candidate] = torch.where(admitted & held, 0, freed[candidate])
        return torch.where(admitted, first + row, -1), (admitted & ~free).sum()

    def _row_for(self, counts: Tensor, buckets: Tensor, inside: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return the place of a free row or else of the least valuable id, ``[n]``, and whether it is free, ``[n]``.

        The place is the bucket's size if every id was seen in this step, or if the least valuable one is worth more
        than the new id.
        """
        seen, sightings = (self._buckets[name][buckets].double() for name in SERVED[1:])
        if self._rules.evict == "recency":
            worth, among_equals = seen, sightings
        elif self._rules.evict == "frequency":
            worth, among_equals = sightings, seen
        else:
            worth, among_equals = sightings / (1.0 + step - seen), seen
        free = inside & (seen == 0)
        worth = torch.where(inside & (seen < step), worth, torch.inf)
        # A free row is taken before any other, and the first of them first.
        worth, among_equals = (torch.where(free, -1.0, value) for value in (worth, among_equals))
        least = worth.amin(1, keepdim=True)
        equal = worth == least
        tie = torch.where(equal, among_equals, torch.inf).amin(1, keepdim=True)
        place = self._first(equal & (among_equals == tie))
        own = float(step) if self._rules.evict == "recency" else counts.double()
        return torch.where(least[:, 0] <= own, place, self._width), least[:, 0] < 0

    def _write(
        self, names: tuple[str, str, str], places: Tensor, mask: Tensor, ids: Tensor, step: int, counts: Tensor
    ) -> None:
        """Write ids that were seen in this step to places, all different, where the mask is True."""
        for name, values in zip(names, (ids, torch.full_like(ids, step), counts), strict=True):
            column = self._flat(name)
            column[places] = torch.where(mask, values, column[places]).to(column.dtype)

    def _flat(self, name: str) -> Tensor:
        """Return a column with the places of the last bucket that are outside of the table."""
        return self._buckets[name].view(-1)


_NEVER = torch.iinfo(torch.int32).max
"""A step after every other one."""


def hash_tensor(ids: Tensor, salt: np.uint64, rows: int) -> Tensor:
    """Return the row of each id, as :func:`trainer.data.features.id_map.hash_rows` does: ``[n] -> [n]`` int64.

    Products of int64 wrap around, and masks make the shifts logical.
    """
    mixed = ids ^ _signed(int(salt))
    for shift, factor in HASH_STEPS:
        mixed = (mixed ^ (mixed >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return ((mixed >> 32 & 0xFFFFFFFF) * (rows - 1) >> 32 & 0xFFFFFFFF) + 1


def write_where(target: Tensor, places: Tensor, values: Tensor, mask: Tensor) -> None:
    """Set ``target[places] = values`` where the mask is True; the host does not wait for the number of these places.

    Args:
        target: ``[rows, ...]``, at least one row; changed.
        places: ``[n]`` int64, n > 0; those where the mask is True are all different.
        values: ``[n, ...]``.
        mask: ``[n]`` bool.
    """
    # The other ones repeat the first write. If there is none, they write what is in row 0.
    first = mask.to(torch.int8).argmax()
    source = torch.where(mask, torch.arange(len(mask), device=mask.device), first)
    places, values = places[source].clamp(min=0), values[source]
    target.index_copy_(0, places, torch.where(mask.any(), values, target[places]))


def _signed(word: int) -> int:
    """Return the int64 that has the bits of an unsigned 64-bit integer."""
    return word - (1 << 64) if word >> 63 else word


def _parts(members: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """Yield the members of each round, at most :data:`_IDS_AT_A_TIME` at once."""
    for of_round in members.split(sizes):
        yield from of_round.split(_IDS_AT_A_TIME)
