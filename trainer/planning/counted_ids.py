"""Ids of one step of one rank, counted in the dataset of a job instead of assumed."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modules.embeddings import Lookup, Table
from trainer.config.ranker import JobConfig
from trainer.console.errors import UserError
from trainer.data.features.id_map import hash_rows, hash_salt
from trainer.data.features.search_vectors import SearchSpace, SpaceTable
from trainer.data.format.dataset import Dataset
from trainer.data.format.time_selection import Selection
from trainer.data.loading.batch import RankingBatch
from trainer.data.loading.loader import Loader
from trainer.planning.exchange_traffic import TableIds
from trainer.planning.row_spread import counted_spread
from trainer.ranking.job_features import open_features
from trainer.ranking.setup import split_in_time
from trainer.runtime.distributed import World
from trainer.semantic_ids.store_address import open_existing_store

_MINUTE_MS = 60_000


@dataclass(frozen=True)
class CountedIds:
    """Counts of one batch.

    Attributes:
        rows: rows of the batch.
        tables: table -> its ids.
        fill: mean length of a history, as a share of its largest one.
    """

    rows: int
    tables: dict[str, TableIds]
    fill: float


def count_ids(config: JobConfig, rows: int) -> CountedIds:
    """Read training rows of a job's dataset, as many as a rank has in a step, and count their ids.

    The rows are those of all partitions in the order of training, from the middle of the training range on, where
    histories are neither empty nor full. Searches by dot product find the latest entries, since there are no vectors.

    Raises:
        UserError: the dataset cannot be read or does not fit the job, or has too few training rows.
    """
    data = Dataset.open(config.data.path, config.data.on_corrupt)
    split = split_in_time(config, data.spec)
    with tempfile.TemporaryDirectory() as scratch, World.join("cpu") as world:
        features = open_features(config, data, split, Path(scratch) / "features", world, open_existing_store)
        sizes = {table.name: SpaceTable(table.rows, table.dim) for table in features.tables}
        searched: dict[str, SpaceTable] = {name: sizes[name] for name in config.features.search.tables if name in sizes}
        space = None
        if features.needs_space:
            space = SearchSpace(searched, searched, config.features.search.dtype, 0)
            space.newest = 0
        begin, end = max(split.train_from, data.spec.span_ms[0]), min(split.train_until, data.spec.span_ms[1])
        loader = Loader(
            data.store,
            data.histories,
            features,
            rank=0,
            world=1,
            batch_size=rows,
            seed=config.run.seed,
            selection=Selection(emit_from=(begin + end) // 2, emit_until=split.train_until),
            shuffle_ms=round(config.data.shuffle_minutes * _MINUTE_MS),
            space=space,
        )
        if loader.rows_total < rows:
            raise UserError(
                f"--count-ids: the later half of the training range has {loader.rows_total:,} rows in "
                f"{config.data.path}, and a rank reads {rows:,} in a step; use --zipf or --distinct, or more --gpus"
            )
        batch = next(iter(loader))
    return counts_of(batch, features.tables, features.lookups, deduplicate=config.tables.deduplicate)


def counts_of(
    batch: RankingBatch, tables: Sequence[Table], lookups: Sequence[Lookup], *, deduplicate: bool
) -> CountedIds:
    """Return the counts of a batch.

    Args:
        batch: the batch.
        tables: tables of the job.
        lookups: lookups of the job.
        deduplicate: each id is sent once.
    """
    of_lookup = {lookup.name: lookup for lookup in lookups}
    values: dict[str, list[np.ndarray]] = defaultdict(list)
    entries = most = 0
    for keyed in batch.ids:
        for key, part in zip(keyed.keys(), keyed.values().split(keyed.length_per_key()), strict=True):
            lookup = of_lookup[key]
            values[lookup.table].append(part.numpy())
            if lookup.length is None:
                entries += len(part)
                most += batch.rows * lookup.most_ids
    found = {}
    for table in tables:
        ids = np.concatenate(values[table.name]) if values[table.name] else np.empty(0, np.int64)
        sent = np.unique(ids) if deduplicate else ids
        found[table.name] = TableIds(len(ids), len(sent), counted_spread(_rows_of(sent, table), table.rows))
    return CountedIds(batch.rows, found, entries / most if most else 1.0)


def _rows_of(ids: np.ndarray, table: Table) -> np.ndarray:
    """Return the row of each id; of a dynamic table the one whose bucket the id belongs to."""
    if not table.dynamic:
        return ids
    rows = np.empty(len(ids), np.int64)
    if len(ids):
        hash_rows(np.ascontiguousarray(ids), hash_salt(table.name), table.rows, rows)
    return rows
