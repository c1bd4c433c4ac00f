"""Fills the search space: from content embeddings at first, from the trained tables ever after.

Every rank keeps the vectors of all rows, since a history may hold any item: ranks send each other their shards, as they
are stored in the space.
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
from trainer.runtime.distributed import World, control_group

logger = logging.getLogger(__name__)

_CHUNK_ROWS = 1 << 16


class _ShardPlace(NamedTuple):
    """Where a rank's shard lies in its table."""

    table: str
    row: int
    column: int
    rows: int
    columns: int


def make_space(config: JobConfig, features: FeatureMap) -> SearchSpace | None:
    """The empty search space of a job; None if no history searches by dot product.

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
        # Content tells nothing of authors: they have vectors, of zeros.
        first = {name: SpaceTable(own.rows, 1) for name, own in later.items()}
        first["item"] = SpaceTable(rows, _open_embeddings(search.embedding).dim)
    # The first version is put before the loader starts its processes, which then see it in any memory.
    forked = config.data.workers > 0 and search.refresh_steps > 0
    return SearchSpace(first, later, search.dtype, search.refresh_steps, forked)


class SearchSpaceRefresher:
    """Keeps a job's search space up to date while its model is trained. Calls are collective.

    Args:
        space: of the job.
        config: the job.
        features: of the model.
        engine: the model.
        world: its ranks.
    """

    def __init__(
        self, space: SearchSpace, config: JobConfig, features: FeatureMap, engine: HybridEngine, world: World
    ) -> None:
        self.space = space
        self._config, self._features, self._engine, self._world = config, features, engine, world
        self._control = control_group()

    def begin(self) -> None:
        """Put the first version, unless the space has gone on from a checkpoint.

        Raises:
            UserError: a content embedding is NaN or infinite, or there are none of the dataset's items.
        """
        if self.space.newest >= 0:
            return
        embedding = self._config.features.search.embedding
        if not embedding:
            self._put(0)
            return
        item = IdMap(
            "item",
            self._config.features.item.ids,
            self._features.fitted.table_rows["item"],
            self._features.fitted.vocabularies.get("item"),
        )
        missing = put_content(self.space, _open_embeddings(embedding), item)
        if self._world.rank == 0:
            logger.info(
                f"search vectors from {embedding}: {missing:,} of {item.rows - 1:,} items have none and score 0"
            )

    def after_step(self, step: int) -> None:
        """Put the next version when it is due; ``step`` steps are done."""
        if self.space.is_due(step):
            self._put(step // self.space.refresh_steps)

    def catch_up(self, step: int) -> None:
        """Put the version of the last step that was due, unless it is there: for batches that none is made ahead of."""
        if self.space.refresh_steps and step // self.space.refresh_steps > self.space.newest:
            self._put(step // self.space.refresh_steps)

    def finish(self) -> None:
        """Put a last version, of the model as it is at the end of training; evaluation uses it."""
        if self.space.refresh_steps:
            self._put(self.space.newest + 1)

    def _put(self, version: int) -> None:
        shards = [
            (_ShardPlace(shard.table, shard.row, shard.column, *shard.values.shape), shard.values.detach())
            for shard in self._engine.table_shards()
            if shard.table in self.space.tables(version)
        ]
        largest = torch.tensor([float(values.abs().max()) for _, values in shards if values.numel()] or [0.0]).max()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._control)
        everyone: list[list[_ShardPlace]] = [[] for _ in range(self._world.size)]
        dist.all_gather_object(everyone, [place for place, _ in shards], group=self._control)
        target = self.space.at(version)
        mine = dict(shards)
        for rank, places in enumerate(everyone):
            for place in places:
                for begin in range(0, place.rows, _CHUNK_ROWS):
                    end = min(begin + _CHUNK_ROWS, place.rows)
                    part = np.empty((end - begin, place.columns), target[place.table].dtype)
                    if rank == self._world.rank:
                        part[:] = self.space.quantised(mine[place][begin:end].float().cpu().numpy(), float(largest))
                    if self._world.size > 1:
                        flat = torch.from_numpy(part.reshape(-1).view(np.uint8))
                        dist.broadcast(flat, src=rank, group=self._control)
                    columns = slice(place.column, place.column + place.columns)
                    target[place.table][place.row + begin : place.row + end, columns] = part
        for name, values in target.items():
            # Unknown ids share a row that is trained, but are not alike.
            values[0] = 0
            values[:, self.space.tables(version)[name].dim :] = 0
        self.space.newest = version


def put_content(space: SearchSpace, table: ContentVectors, item: IdMap) -> int:
    """Put version 0 from content embeddings; ids that share a row have the vector of the largest.

    Args:
        space: of the job.
        table: embeddings by item id.
        item: how ids become rows.

    Returns:
        Rows of items that have no embedding: zeros, so that they score 0 whatever the candidate.

    Raises:
        UserError: an embedding is NaN or infinite, or there is none of any item.
    """
    target = space.at(0)
    for values in target.values():
        values[:] = 0
    known = np.zeros(item.rows, bool)
    largest = 0.0
    for begin in range(0, len(table.ids), _CHUNK_ROWS):
        part = np.asarray(table.vectors[begin : begin + _CHUNK_ROWS])
        finite = np.isfinite(part).all(axis=1)
        if not finite.all():
            wrong = table.ids[begin + int(np.argmin(finite))]
            raise UserError(f"{table.path}: the embedding of item {wrong} is not finite; make it again")
        largest = max(largest, float(np.abs(part).max(initial=0)))
    for begin in range(0, len(table.ids), _CHUNK_ROWS):
        ids = np.asarray(table.ids[begin : begin + _CHUNK_ROWS])
        inside = np.ones(len(ids), bool)
        if item.mapping == "direct":
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
        raise UserError(f"{table.path}: has no embedding of any item of the dataset; is it of another dataset?")
    return int((~known[1:]).sum())


def _open_embeddings(path: str) -> ContentVectors:
    try:
        return ContentVectors.open(path)
    except UserError as error:
        raise UserError(f"features.search.embedding: {error}") from None
