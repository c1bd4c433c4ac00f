"""Fills the search space: first from content embeddings if there are any, later from the trained tables.

Every rank keeps the vectors of all rows, because a history may hold any item. Ranks broadcast their shards to each
other, already quantised as they are stored in the space.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from trainer.config.ranker import JobConfig
from trainer.console.errors import UserError
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.id_map import IdMap
from trainer.data.features.search_vectors import SearchSpace, SpaceTable
from trainer.data.format.content_vectors import ContentVectors
from trainer.engine.hybrid_engine import HybridEngine
from trainer.runtime.distributed import World

logger = logging.getLogger(__name__)

_CHUNK_ROWS = 1 << 16


class _ShardPlace(NamedTuple):
    """Position and shape of a rank's shard in its table."""

    table: str
    row: int
    column: int
    rows: int
    columns: int


def make_space(config: JobConfig, features: FeatureMap) -> SearchSpace | None:
    """Return the empty search space of a job; None if no history searches by dot product.

    Raises:
        UserError: the content embeddings cannot be read.
    """
    if not features.needs_space:
        return None
    search = config.features.search
    later: dict[str, SpaceTable] = {
        table.name: SpaceTable(table.rows, table.dim) for table in features.tables if table.name in search.tables
    }
    first = later
    if search.embedding:
        rows = features.fitted.table_rows["item"]
        # Content embeddings are of items only; the other tables get vectors of zeros.
        first = {name: SpaceTable(own.rows, 1) for name, own in later.items()}
        first["item"] = SpaceTable(rows, _open_embeddings(search.embedding).dim)
    # The first version is written before the loader forks its workers, which then see it in any kind of memory.
    forked = config.data.workers != 0 and search.refresh_steps > 0
    return SearchSpace(first, later, search.dtype, search.refresh_steps, forked)


class SearchSpaceRefresher:
    """Writes new versions of a job's search space while its model is trained. All calls are collective.

    Args:
        space: search space of the job.
        config: config of the job.
        features: feature map of the model.
        engine: model whose tables give the vectors.
        world: ranks of the job.
    """

    def __init__(
        self, space: SearchSpace, config: JobConfig, features: FeatureMap, engine: HybridEngine, world: World
    ) -> None:
        self.space = space
        self._config, self._features, self._engine, self._world = config, features, engine, world

    def begin(self) -> None:
        """Write the first version, unless the space was loaded from a checkpoint.

        Raises:
            UserError: a content embedding is NaN or infinite, or no item of the dataset has one.
        """
        if self.space.newest >= 0:
            return
        embedding = self._config.features.search.embedding
        if not embedding:
            self._write_version(0)
            return
        item = IdMap(
            "item",
            self._config.features.item.ids,
            self._features.fitted.table_rows["item"],
            self._features.fitted.vocabularies.get("item"),
        )
        missing = write_content_version(self.space, _open_embeddings(embedding), item)
        if self._world.rank == 0:
            logger.info(
                f"search vectors from {embedding}: {missing:,} of {item.rows - 1:,} items have no vector and score 0"
            )

    def after_step(self, step: int) -> None:
        """Write the next version if it is due after ``step`` steps."""
        if self.space.is_due(step):
            self._write_version(step // self.space.refresh_steps)

    def catch_up(self, step: int) -> None:
        """Write the newest due version unless it exists, for training whose batches are not prepared ahead."""
        if self.space.refresh_steps and step // self.space.refresh_steps > self.space.newest:
            self._write_version(step // self.space.refresh_steps)

    def finish(self) -> None:
        """Write a last version from the trained model, for evaluation."""
        if self.space.refresh_steps:
            self._write_version(self.space.newest + 1)

    def _write_version(self, version: int) -> None:
        """Write a version from the tables of all ranks."""
        shards = [
            (_ShardPlace(shard.table, shard.row, shard.column, *shard.values.shape), shard.values.detach())
            for shard in self._engine.table_shards()
            if shard.table in self.space.tables(version)
        ]
        # All ranks quantise with one scale, so they need the largest value of all tables.
        largest = torch.tensor([largest_magnitude(values) for _, values in shards if values.numel()] or [0.0]).max()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._world.control)
        places_by_rank: list[list[_ShardPlace]] = [[] for _ in range(self._world.size)]
        dist.all_gather_object(places_by_rank, [place for place, _ in shards], group=self._world.control)
        target = self.space.at(version)
        own_shards = dict(shards)
        for rank, places in enumerate(places_by_rank):
            for place in places:
                for begin in range(0, place.rows, _CHUNK_ROWS):
                    end = min(begin + _CHUNK_ROWS, place.rows)
                    part = np.empty((end - begin, place.columns), target[place.table].dtype)
                    if rank == self._world.rank:
                        part[:] = self.space.quantised(
                            own_shards[place][begin:end].float().cpu().numpy(), float(largest)
                        )
                    if self._world.size > 1:
                        # As bytes, so that every dtype of a space can be sent.
                        flat = torch.from_numpy(part.reshape(-1).view(np.uint8))
                        dist.broadcast(flat, src=rank, group=self._world.control)
                    columns = slice(place.column, place.column + place.columns)
                    target[place.table][place.row + begin : place.row + end, columns] = part
        for name, values in target.items():
            # Unknown ids share row 0, but are not similar: a vector of zeros scores 0.
            values[0] = 0
            values[:, self.space.tables(version)[name].dim :] = 0
        self.space.newest = version


def largest_magnitude(values: torch.Tensor) -> float:
    """Return the largest absolute value, without a copy of the values; NaN if there is one among them."""
    lowest, highest = values.aminmax()
    return float(torch.maximum(-lowest, highest))


def write_content_version(space: SearchSpace, table: ContentVectors, item: IdMap) -> int:
    """Write version 0 from content embeddings; of ids that share a row, the largest id gives the vector.

    Args:
        space: search space of the job.
        table: embeddings by item id.
        item: map from item ids to rows.

    Returns:
        Number of item rows without an embedding. They have zeros, so that they score 0 with every candidate.

    Raises:
        UserError: an embedding is NaN or infinite, or no item of the dataset has one.
    """
    target = space.at(0)
    for values in target.values():
        values[:] = 0
    known = np.zeros(item.rows, bool)
    largest = 0.0
    for begin in range(0, len(table.ids), _CHUNK_ROWS):
        # In chunks, because the embeddings are memory-mapped and may be larger than memory.
        part = np.asarray(table.vectors[begin : begin + _CHUNK_ROWS])
        finite = np.isfinite(part).all(axis=1)
        if not finite.all():
            wrong = table.ids[begin + int(np.argmin(finite))]
            raise UserError(f"{table.path}: the embedding of item {wrong} is not finite; embed the items again")
        largest = max(largest, float(np.abs(part).max(initial=0)))
    for begin in range(0, len(table.ids), _CHUNK_ROWS):
        ids = np.asarray(table.ids[begin : begin + _CHUNK_ROWS])
        inside = np.ones(len(ids), bool)
        if item.mapping == "direct":
            # With direct ids, an id out of range has no row of its own.
            inside = (ids >= 0) & (ids < item.rows - 1)
        rows = np.empty(int(inside.sum()), np.int64)
        item(ids[inside], rows)
        part = np.asarray(table.vectors[begin : begin + _CHUNK_ROWS])[inside].astype(np.float32)
        target["item"][rows, : table.dim] = space.quantised(part, largest)
        known[rows] = True
    for values in target.values():
        values[0] = 0
    space.newest = 0
    if not known[1:].any():
        raise UserError(f"{table.path}: has no embedding of any item of the dataset; it may be of another dataset")
    return int((~known[1:]).sum())


def _open_embeddings(path: str) -> ContentVectors:
    """Open the content embeddings; an error names the key of the config."""
    try:
        return ContentVectors.open(path)
    except UserError as error:
        raise UserError(f"features.search.embedding: {error}") from None
