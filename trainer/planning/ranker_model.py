"""Tables, network and inputs of a ranker's job, without a row of its dataset and without memory for its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modules.content import BatchVectors
from modules.embeddings import Lookup, Table
from modules.ranker import Ranker
from trainer.config.ranker import JobConfig
from trainer.console.errors import UserError
from trainer.data.features.declared_sizes import declared_features
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import ID_TABLES
from trainer.data.format.schema import DatasetSpec
from trainer.engine.build_ranker import build_ranker
from trainer.planning.exchange_traffic import TableIds, expected_distinct
from trainer.planning.network_cost import NetworkCost, count_step
from trainer.planning.row_spread import zipf_ids


@dataclass(frozen=True)
class RankerModel:
    """Model of a job, to plan.

    Attributes:
        features: its tables, lookups and inputs.
        tables: its tables, some with another number of rows than the job has.
        network: its network, on the meta device.
        ordered: tables whose rows have the order of the ids.
    """

    features: FeatureMap
    tables: tuple[Table, ...]
    network: Ranker
    ordered: frozenset[str] = frozenset()

    @staticmethod
    def of(config: JobConfig, spec: DatasetSpec, rows: Mapping[str, int]) -> RankerModel:
        """Return the model of a job.

        Args:
            config: the job.
            spec: description of its dataset.
            rows: table -> other number of rows.

        Raises:
            UserError: the job does not fit its dataset, or ``rows`` names an unknown table.
        """
        fitted = declared_features(spec, config.features, {name: rows[name] for name in ID_TABLES if name in rows})
        features = FeatureMap(spec, config.features, fitted, config.data.behaviours)
        known = [table.name for table in features.tables]
        for name in rows:
            if name not in known:
                raise UserError(f"--rows {name}: no such table; the job has {', '.join(known)}")
        tables = tuple(replace(table, rows=rows.get(table.name, table.rows)) for table in features.tables)
        with torch.device("meta"):
            network = build_ranker(config, features, config.model.kind)
        ordered = frozenset(name for name in ID_TABLES if getattr(config.features, name).ids in ("direct", "lookup"))
        return RankerModel(features, tables, network, ordered)

    @property
    def parameters(self) -> int:
        """Number of the network's weights."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def table_ids(
        self,
        rows: int,
        fill: float,
        distinct: float | None = None,
        zipf: float | None = None,
        *,
        deduplicate: bool = True,
    ) -> dict[str, TableIds]:
        """Return table -> ids that a batch of ``rows`` rows reads.

        Args:
            rows: rows of one rank in a step.
            fill: mean length of a history, as a share of its largest one.
            distinct: share of distinct ids among the ids of a step; None: as independent draws have it, and never more
                than even ones.
            zipf: exponent of the law by which users, authors and items are drawn; None: evenly.
            deduplicate: each id is sent once; else all ids are sent, whatever share of them is distinct.
        """
        counts = {table.name: 0.0 for table in self.tables}
        for lookup in self.features.lookups:
            counts[lookup.table] += ids_of(lookup, rows, fill)
        found = {}
        for table in self.tables:
            ids, population = counts[table.name], self._population(table)
            if zipf is not None and table.name in ID_TABLES:
                ordered = table.name in self.ordered
                sent, spread = zipf_ids(ids, population, zipf, deduplicate=deduplicate, ordered=ordered)
                found[table.name] = TableIds(ids, sent, spread)
                continue
            sent = ids
            if deduplicate:
                most = expected_distinct(ids, population)
                sent = most if distinct is None else min(most, distinct * ids)
            found[table.name] = TableIds(ids, sent)
        return found

    def _population(self, table: Table) -> int:
        """Return the number of ids that are drawn: a dynamic table is also asked for ids that have no row."""
        if table.dynamic is None:
            return table.rows
        return max(table.rows, self.features.spec.ids[table.name].count)

    def network_cost(self, rows: int, parts: int, fill: float, *, bf16: bool) -> NetworkCost:
        """Return the cost of the network for the rows of a step.

        Args:
            rows: rows of one rank in a step.
            parts: micro-batches of a step.
            fill: see :meth:`table_ids`.
            bf16: weights and activations are bfloat16.
        """
        network = self.network.to(torch.bfloat16 if bf16 else torch.float32).train()
        return count_step(network, self._inputs(-(-rows // parts), fill)).times(parts)

    def _inputs(self, rows: int, fill: float) -> tuple[object, ...]:
        """Return the network's arguments for a batch, on the meta device."""
        dims = {table.name: table.dim for table in self.tables}
        ids = {lookup.name: round(ids_of(lookup, rows, fill)) for lookup in self.features.lookups}
        embedded: dict[str, Tensor] = {
            lookup.name: torch.empty(ids[lookup.name], dims[lookup.table], device="meta", requires_grad=True)
            for lookup in self.features.lookups
        }
        lengths = {
            lookup.name: torch.empty(rows, dtype=torch.int64, device="meta")
            for lookup in self.features.lookups
            if lookup.length is None
        }
        inputs = embedded, lengths, torch.empty(rows, self.features.n_dense, device="meta")
        if not self.features.layout.content:
            return inputs
        content = {}
        for table in self.features.layout.content:
            places = {table.name: rows} | {name: ids[key] for name, key in table.entries.items()}
            content[table.name] = BatchVectors(
                torch.empty(sum(places.values()), table.width, dtype=getattr(torch, table.dtype), device="meta"),
                {name: torch.empty(count, dtype=torch.int64, device="meta") for name, count in places.items()},
                table.entries,
            )
        return *inputs, content


def ids_of(lookup: Lookup, rows: int, fill: float) -> float:
    """Return the ids of a lookup in a batch: whole entries of histories, ``fill`` of the largest number."""
    if lookup.length is not None:
        return rows * lookup.length
    return round(fill * rows * lookup.most_ids / lookup.ids_per_entry) * lookup.ids_per_entry
