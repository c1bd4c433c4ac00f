"""The dynamic tables of a model: what this rank holds of them, and their state in a checkpoint."""

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
from trainer.sparse.dynamic_ids import COUNTS, DynamicIds, IdCounts


class DynamicRows:
    """This rank's rows of a dynamic table.

    Args:
        table: whole.
        first_row: of this rank.
        values: ``[rows, dim]``, live.
        optimizer: states of the optimizer, ``[rows]`` or ``[rows, dim]``, live.
        seed: of the initial values.

    Attributes:
        values: as given.
        ids: that the rows have.
    """

    def __init__(self, table: Table, first_row: int, values: Tensor, optimizer: Sequence[Tensor], seed: int) -> None:
        self.values, self._optimizer = values, optimizer
        self.ids = DynamicIds(table, first_row, len(values))
        self._table, self._seed = table, seed

    @torch.no_grad()
    def look_up(self, ids: Tensor, step: int | None) -> Tensor:
        """Where in ``values`` each id's row is, -1 where it has none. ``[n]`` int64 -> ``[n]`` int64.

        Args:
            ids: all of a step whose buckets are here.
            step: number of the training step, which may give ids new rows; these start with the values that the table
                had there in the beginning, and without a past of the optimizer. None changes nothing.
        """
        if step is None:
            return self.ids.find(ids)
        rows, new = self.ids.learn(ids, step)
        if len(new):
            numbers = new + self.ids.first_row
            self.values[new] = initial_values(self._table, self._seed, numbers, 0, self._table.dim)
            for state in self._optimizer:
                state[new] = 0
        return rows


class DynamicTables:
    """The dynamic tables of a model.

    Args:
        tables: all of the model.
        held: name -> first row, values, and states of the optimizer, of the tables that this rank has rows of.
        seed: of the initial values.
        control: a gloo group of all ranks.

    Attributes:
        names: of the dynamic tables.
        rows: name -> this rank's rows.
    """

    def __init__(
        self,
        tables: Iterable[Table],
        held: Mapping[str, tuple[int, Tensor, Sequence[Tensor]]],
        seed: int,
        control: dist.ProcessGroup,
    ) -> None:
        declared = {table.name: table for table in tables if table.dynamic}
        self.names = tuple(declared)
        self._control = control
        self.rows = {name: DynamicRows(declared[name], *held[name], seed) for name in self.names if name in held}
        self._before = {name: IdCounts() for name in self.names}

    def counts(self) -> dict[str, IdCounts]:
        """Counts of each table since its first step, over all ranks. Collective, where there are dynamic tables."""
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
        """Name of the table -> its columns as DTensors over the live memory, and its counts. Collective.

        Args:
            tables: name -> the table's values; its columns lie as they do.
        """
        counts = self.counts()
        state: dict[str, dict[str, Tensor]] = {}
        for name in self.names:
            columns = self.rows[name].ids.columns if name in self.rows else {}
            state[name] = {column: _beside(tables[name], values) for column, values in columns.items()}
            state[name][COUNTS] = torch.tensor(astuple(counts[name]), dtype=torch.int64)
        return state

    def loaded(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The state has been filled from a checkpoint: the first rank goes on from the counts of all."""
        for name in self.names:
            first = dist.get_rank(self._control) == 0
            self._before[name] = IdCounts.of(state[name][COUNTS]) if first else IdCounts()
            if name in self.rows:
                self.rows[name].ids.counts = IdCounts()

    def _own(self, name: str) -> IdCounts:
        return self.rows[name].ids.counts if name in self.rows else IdCounts()


def _beside(table: DTensor, column: Tensor) -> DTensor:
    """A column as a DTensor whose shards are rows of the table's."""
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
