"""Memory of a ranker's ranks beside tables, network and exchange: ids, histories, and what the host keeps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from modules.search.search import padded_width
from trainer.config.ranker import JobConfig
from trainer.data.features.fitted_codes import read_code_files
from trainer.data.format.growing_history import MOST_PLACES
from trainer.data.format.schema import DatasetSpec
from trainer.data.loading.loader import FETCHED_AHEAD
from trainer.planning.accelerators import Cluster
from trainer.planning.ranker_model import RankerModel
from trainer.planning.table_memory import FLOAT, RankTables
from trainer.ranking.device_entries import entry_bytes
from trainer.ranking.device_histories import AUTO_SHARE, listing_bytes, listings_of, refusal
from trainer.ranking.device_segments import DeviceCodes
from trainer.ranking.device_vectors import DeviceVectors
from trainer.ranking.growing_device_histories import places_for
from trainer.sparse.dynamic_ids import ID_BYTES

SNAPSHOT_DENSE = 12
"""Bytes of a network's weight in a snapshot: value and two moments in float32, whole on each rank."""

AVERAGE = 4
"""Bytes of a network's weight in the mean over time of ``stream.average_hours``, whole on each rank."""


def id_columns(plan: list[dict[str, Any]], model: RankerModel, world: int) -> list[int]:
    """Return the bytes of the ids of dynamic tables on each rank."""
    dynamic = {table.name for table in model.tables if table.dynamic}
    columns = [0] * world
    for table in plan:
        for rank, (rows, _) in zip(table["ranks"], table["shards"], strict=True):
            columns[rank] += ID_BYTES * rows * (table["table"] in dynamic)
    return columns


def searched_histories(model: RankerModel, config: JobConfig, spec: DatasetSpec, cluster: Cluster, other: int) -> int:
    """Return the bytes of the histories and search vectors of a rank whose device searches; 0 if the loader searches.

    Args:
        model: the model.
        config: the job.
        spec: description of the dataset. Visits of a stream are counted with the largest number of places that each may
            take.
        cluster: the cluster.
        other: bytes of the other parts of the fullest rank, for a job that lets the free memory decide.
    """
    search, figures = config.features.search, cluster.accelerator
    automatic = search.device == "auto"
    if not model.features.needs_space or search.device == "cpu" or refusal(config):
        return 0
    entries = _visits(spec, cluster)
    if config.stream is not None:
        needed = places_for(MOST_PLACES * entries) * entry_bytes(model.features)
    else:
        needed = entries * (entry_bytes(model.features) + listing_bytes(model.features, entries))
        needed += _inputs_of_visits(model, config, entries)
    if figures.device == "cuda":
        # A CPU searches the vectors of the host where they are.
        needed += _vector_bytes(model, config)
    if automatic and (figures.device == "cpu" or needed > AUTO_SHARE * (figures.memory_bytes - other)):
        return 0
    return needed


def orders_of_histories(model: RankerModel, config: JobConfig, spec: DatasetSpec, cluster: Cluster) -> int:
    """Return the bytes of host memory of a rank that order the visits which its device searches."""
    if config.stream is not None:
        return 0
    return _visits(spec, cluster) * sum(key.host_bytes for key in listings_of(model.features))


def _inputs_of_visits(model: RankerModel, config: JobConfig, entries: int) -> int:
    """Return the bytes of codes and pre-trained vectors of visits on a device that searches."""
    of_histories = {code_set.name: code_set for code_set in model.features.codes.sets if code_set.in_histories}
    files = read_code_files({name: code_set.config for name, code_set in of_histories.items()})
    needed = sum(DeviceCodes.bytes_needed(of_histories[name], len(file), entries) for name, file in files.items())
    for table in model.features.layout.content:
        if table.entries:
            facts = model.features.fitted.content[table.name]
            size, owner = np.dtype(facts.dtype).itemsize * facts.width, config.features.content[table.name].of
            needed += DeviceVectors.bytes_needed(entries, facts.count, size, of_segments=owner == "segment")
    return needed


def _visits(spec: DatasetSpec, cluster: Cluster) -> int:
    """Return the visits of a rank's users: each exposure may be one of a history, and every rank has as many."""
    return math.ceil(spec.exposures / cluster.gpus)


def search_vectors(model: RankerModel, config: JobConfig) -> int:
    """Return the bytes of the search vectors that a rank keeps in host memory; 0 if no history searches by them.

    They are of all rows of the searched tables, whichever rank trains them, twice if they are renewed.
    """
    if not model.features.needs_space:
        return 0
    return (2 if config.features.search.refresh_steps else 1) * _vector_bytes(model, config)


def _vector_bytes(model: RankerModel, config: JobConfig) -> int:
    """Return the bytes of one version of the search vectors."""
    search = config.features.search
    values = sum(table.rows * padded_width(table.dim) for table in model.tables if table.name in search.tables)
    return values * np.dtype(search.dtype).itemsize


def batches_ahead(model: RankerModel, config: JobConfig, rows: int, ids: float, workers: int) -> int:
    """Return the bytes of the batches that the loader of a rank makes ahead, page-locked on a GPU.

    Args:
        model: the model.
        config: the job.
        rows: rows of a rank in a step.
        ids: ids of these rows.
        workers: loader processes of the rank, if the job does not name a number.
    """
    own = workers if config.data.workers is None else config.data.workers
    values = model.features.n_dense + 2 * len(model.features.behaviours)
    return round((own * config.data.prefetch + FETCHED_AHEAD) * (8 * ids + FLOAT * rows * values))


def host_memory(of_rank: RankTables, model: RankerModel, config: JobConfig, batches: int) -> dict[str, int]:
    """Return what one rank needs in host memory.

    Args:
        of_rank: tables of the rank.
        model: the model.
        config: the job.
        batches: bytes of the batches that are read ahead.
    """
    weight = SNAPSHOT_DENSE + (AVERAGE if config.averages else 0)
    snapshot = of_rank.whole + weight * model.parameters if config.checkpoint.background else 0
    vectors = search_vectors(model, config)
    return {
        "tables in host memory": of_rank.host,
        "checkpoint snapshot": snapshot,
        **({"search vectors": vectors} if vectors else {}),
        "batches ahead": batches,
    }


def fullest_host(host: list[dict[str, int]], capacity: int) -> dict[str, Any]:
    """Return the host memory of the rank that needs most of it."""
    totals = [sum(of_rank.values()) for of_rank in host]
    rank = totals.index(max(totals))
    return {"capacity": capacity, "rank": rank, "parts": host[rank], "total": totals[rank]}
