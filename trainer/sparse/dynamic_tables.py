"""Dynamic tables of a model: this rank's rows of them, and their state in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from modules.embeddings import Table, initial_values
from trainer.sparse.device_ids import DeviceIds, write_where
from trainer.sparse.dynamic_ids import COUNTS, DynamicIds, IdCounts


class DynamicRows:
    """This rank's rows of a dynamic table.

    Args:
        table: declaration of the whole table.
        first_row: first row of this rank.
        values: ``[rows, dim]``, live memory.
        optimizer: states of the optimizer, ``[rows]`` or ``[rows, dim]``, live memory.
        seed: seed of the initial values.
        device_form: keep the ids in the memory of the values, whatever their device is; False: on the CPU.

    Attributes:
        values: as given.
        ids: ids of the rows.
    """

    def __init__(
        self,
        table: Table,
        first_row: int,
        values: Tensor,
        optimizer: Sequence[Tensor],
        seed: int,
        *,
        device_form: bool = False,
    ) -> None:
        self.values, self._optimizer = values, optimizer
        self.ids: DynamicIds | DeviceIds
        if device_form:
            self.ids = DeviceIds(table, first_row, len(values), values.device)
        else:
            self.ids = DynamicIds(table, first_row, len(values))
        self._table, self._seed = table, seed

    @torch.no_grad()
    def look_up(self, ids: Tensor, step: int | None) -> Tensor:
        """Return the index of each id's row in ``values``, -1 if it has none. ``[n]`` int64 -> ``[n]`` int64.

        Args:
            ids: all ids of a step whose buckets are in this shard.
            step: number of the training step, which may give rows to new ids. Such a row starts from the initial values
                of that row and from an empty optimizer state. None changes nothing.
        """
        if step is None:
            return self.ids.find(ids)
        rows, new = self.ids.learn(ids, step)
        if len(new):
            # On a device, -1 stands for each new id that got no row, since the host does not know their number.
            admitted, numbers = new >= 0, new.clamp(min=0) + self.ids.first_row
            initial = initial_values(self._table, self._seed, numbers, 0, self._table.dim)
            write_where(self.values, new, initial, admitted)
            for state in self._optimizer:
                write_where(state, new, state.new_zeros(len(new), *state.shape[1:]), admitted)
        return rows


class DynamicTables:
    """All dynamic tables of a model.

    Args:
        tables: all tables of the model.
        held: table name -> first row, values and states of the optimizer of this rank's shard, if it has one.
        seed: seed of the initial values.
        control: a gloo group of all ranks.
        device_form: see :class:`DynamicRows`.

    Attributes:
        names: names of the dynamic tables.
        rows: table name -> this rank's rows.
    """

    def __init__(
        self,
        tables: Iterable[Table],
        held: Mapping[str, tuple[int, Tensor, Sequence[Tensor]]],
        seed: int,
        control: dist.ProcessGroup,
        *,
        device_form: bool = False,
    ) -> None:
        declared = {table.name: table for table in tables if table.dynamic}
        self.names = tuple(declared)
        self._control = control
        self.rows = {
            name: DynamicRows(declared[name], *held[name], seed, device_form=device_form)
            for name in self.names
            if name in held
        }
        self._before = {name: IdCounts() for name in self.names}

    def counts(self) -> dict[str, IdCounts]:
        """Return the counts of each table since its first step, over all ranks. Collective if there is any table."""
        if not self.names:
            return {}
        of_rank = [
            [a + b for a, b in zip(astuple(self._own(name)), astuple(self._before[name]), strict=True)]
            for name in self.names
        ]
        summed = torch.tensor(of_rank, dtype=torch.int64)
        dist.all_reduce(summed, group=self._control)
        return {name: IdCounts(*values) for name, values in zip(self.names, summed.tolist(), strict=True)}

    def state(self, tables: Mapping[str, DTensor]) -> dict[str, dict[str, Tensor]]:
        """Return table name -> its columns as DTensors over the live memory, and its counts. Collective.

        Args:
            tables: table name -> its values; the columns are sharded in the same way.
        """
        counts = self.counts()
        state: dict[str, dict[str, Tensor]] = {}
        for name in self.names:
            columns = self.rows[name].ids.columns if name in self.rows else {}
            state[name] = {column: _beside(tables[name], values) for column, values in columns.items()}
            state[name][COUNTS] = torch.tensor(astuple(counts[name]), dtype=torch.int64)
        return state

    def loaded(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over the counts of a state that was filled from a checkpoint; the columns are filled in place.

        The first rank goes on from the counts of all ranks, and the others start from zero.
        """
        for name in self.names:
            first = dist.get_rank(self._control) == 0
            self._before[name] = IdCounts.of(state[name][COUNTS]) if first else IdCounts()
            if name in self.rows:
                self.rows[name].ids.counts = IdCounts()

    def _own(self, name: str) -> IdCounts:
        """Return this rank's counts of a table since the job started or loaded a checkpoint."""
        return self.rows[name].ids.counts if name in self.rows else IdCounts()


def _beside(table: DTensor, column: Tensor) -> DTensor:
    """Return a column as a DTensor that is sharded like the rows of the table."""
    held: Any = table.to_local()
    offsets: list[tuple[int, ...]] = [(offset[0],) for offset in held.local_offsets()]
    return DTensor.from_local(
        LocalShardsWrapper([column], offsets[:1]),
        table.device_mesh,
        table.placements,
        run_check=False,
        shape=table.shape[:1],
        stride=(1,),
    )
