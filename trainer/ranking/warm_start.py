"""Warm start: a new model takes tables from an old one, and its dense network on request.

A rank reads the stored pieces with rows of its own shards, one at a time, for any number of ranks and any sharding of
the old model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modules.ranker import RankerKind
from trainer.checkpoint.model_state import list_differences
from trainer.checkpoint.reader import Checkpoint, StoredPiece, StoredTensor
from trainer.checkpoint.store import verify_together
from trainer.config.ranker import InitFromConfig, JobConfig
from trainer.console.errors import UserError
from trainer.console.text_table import text_table
from trainer.data.features.code_inputs import check_codes
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import ID_TABLES, FittedFeatures
from trainer.data.features.packed_side import side_ranges
from trainer.engine.hybrid_engine import HybridEngine
from trainer.ranking.row_mapping import ModelFeatures, RowMap, map_rows
from trainer.runtime.distributed import World
from trainer.sparse.sharded_tables import Shard

_ROWS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class TakenTable:
    """Summary of one table that was taken from the old model.

    Attributes:
        table: name.
        rows: rows of the new table.
        taken: rows with values of the old table; the others have initial values.
        left: rows of the old table without a row in the new one.
        optimizer: True if the optimizer's state was taken for these rows; otherwise it starts anew.
    """

    table: str
    rows: int
    taken: int
    left: int
    optimizer: bool


@dataclass(frozen=True)
class WarmStartSummary:
    """Summary of a warm start.

    Attributes:
        checkpoint: of the old model.
        step: of the checkpoint.
        tables: taken tables.
        fresh: tables of the new model with initial values.
        unused: tables of the old model that were not taken.
        dense: taken parameters of the dense network, all or none; their optimizer starts anew.
        optimizers: optimizer of the tables in the old and in the new model.
    """

    checkpoint: Path
    step: int
    tables: tuple[TakenTable, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    dense: tuple[str, ...]
    optimizers: tuple[str, str]


def check_source(config: JobConfig) -> None:
    """Check the conditions of :func:`warm_start` that are known before the features are fitted.

    Raises:
        UserError: there is no checkpoint of a ranker, a table is missing in one of the models, or its dimension
            differs.
    """
    tables = [name for name in (*ID_TABLES, "side") if not (name == "user" and "user_id" in config.features.exclude)]
    dims = {name: getattr(config.features, name).dim for name in tables}
    dims |= {table.name: table.dim for code_set in check_codes(config.features.codes) for table in code_set.declare()}
    old = Checkpoint.open(config.init_from.run)
    # Refuses a checkpoint of another job than a ranker's.
    _ = old.config
    _choose(config.init_from, old, dims)


def warm_start(
    engine: HybridEngine, config: JobConfig, kind: RankerKind, features: FeatureMap, world: World
) -> WarmStartSummary:
    """Copy values of the old model of ``init_from`` into a new one. Collective.

    All other values stay initial: new rows of a table, tables that are not named, and the dense network without
    ``init_from.dense`` or of a baseline.

    Args:
        engine: the new model, not trained yet.
        config: of the new job; ``init_from.run`` is set.
        kind: network of the new model.
        features: of the new model.
        world: the ranks.

    Raises:
        UserError: there is no checkpoint, or it is damaged; a table is missing in one of the models, has another
            dimension, or its rows have another meaning; the dense networks differ.
    """
    wanted, old = config.init_from, Checkpoint.open(config.init_from.run)
    _verify(old, world)
    there = {entry.table: entry for entry in old.manifest.tables}
    here = {table.name: table for table in features.tables}
    sides = ModelFeatures(old.config.features, old.fitted), ModelFeatures(config.features, features.fitted)
    names = _choose(wanted, old, {table.name: table.dim for table in features.tables})
    maps = {name: map_rows(name, *sides, there[name].rows, here[name].rows) for name in names}
    dense = wanted.dense and kind == config.model.kind
    if dense:
        _check_dense(old, engine, config, features)

    same_optimizer = old.manifest.table_optimizer == engine.table_optimizer.kind
    shards, states = list(engine.table_shards()), list(engine.table_optimizer_shards())
    for name, rows in maps.items():
        stored = old.model.tables[name]
        _fill(stored.weight, [shard for shard in shards if shard.table == name], rows)
        for state, tensor in stored.states.items() if same_optimizer else ():
            _fill(tensor, [shard for key, shard in states if (key, shard.table) == (state, name)], rows)
    if dense:
        # The mean over time is what the old run was evaluated with, if it has one.
        values = {name: slots.get("average", slots["parameter"]).read() for name, slots in old.model.dense.items()}
        engine.set_dense_parameters(values)
    return WarmStartSummary(
        checkpoint=old.directory,
        step=old.manifest.step,
        tables=tuple(
            TakenTable(name, here[name].rows, rows.taken, there[name].rows - rows.taken, same_optimizer)
            for name, rows in maps.items()
        ),
        fresh=tuple(name for name in here if name not in maps),
        unused=tuple(name for name in there if name not in maps),
        dense=tuple(old.model.dense) if dense else (),
        optimizers=(old.manifest.table_optimizer, engine.table_optimizer.kind),
    )


def format_taken(taken: WarmStartSummary) -> str:
    """Format the summary of a warm start as text."""
    then, now = taken.optimizers
    lines = [
        [
            entry.table,
            "taken" if entry.optimizer else "anew",
            f"{entry.rows:,}",
            f"{entry.taken:,}",
            f"{entry.rows - entry.taken:,}",
            f"{entry.left:,}",
        ]
        for entry in taken.tables
    ]
    text = [f"starting from {taken.checkpoint} (step {taken.step:,})"]
    text.append(text_table(["table", "optimizer", "rows", "taken", "fresh", "left behind"], lines, texts=2))
    if then != now:
        text.append(f"the tables' optimizer starts anew: it was {then} and is {now}")
    if taken.fresh:
        text.append(f"fresh tables: {', '.join(taken.fresh)}")
    if taken.unused:
        text.append(f"tables of the old model that were not taken: {', '.join(taken.unused)}")
    dense = f"{len(taken.dense)} parameters taken, their optimizer starts anew" if taken.dense else "fresh"
    text.append(f"dense network: {dense}")
    return "\n".join(text)


def _verify(old: Checkpoint, world: World) -> None:
    """Verify the checksums of all files; each rank reads a share of them."""
    if problem := verify_together(old.directory, old.manifest, world):
        raise UserError(f"init_from.run: {old.directory} is damaged ({problem})")


def _choose(wanted: InitFromConfig, old: Checkpoint, dims: Mapping[str, int]) -> list[str]:
    """Return the tables to take; ``dims`` are the dimensions of the new model's tables."""
    there = {entry.table: entry.dim for entry in old.manifest.tables}
    for name in wanted.tables:
        for has, who in ((there, f"{old.directory}"), (dims, "this model")):
            if name not in has:
                raise UserError(f"init_from.tables: {who} has no table {name!r}; it has {', '.join(sorted(has))}")
    names = list(dict.fromkeys(wanted.tables)) or sorted(there.keys() & dims.keys())
    if not names:
        raise UserError(f"init_from: {old.directory} has no table in common with this model")
    for name in names:
        if there[name] != dims[name]:
            raise UserError(
                f"init_from: table {name!r} had dim = {there[name]} and has {dims[name]} now; set "
                f"features.{name}.dim = {there[name]}, or leave it out of init_from.tables"
            )
    return names


def _check_dense(old: Checkpoint, engine: HybridEngine, config: JobConfig, features: FeatureMap) -> None:
    """Check that inputs and outputs of both networks have the same meaning, since equal shapes are not enough."""
    before = network_meaning(old.config, old.fitted, old.manifest.behaviours)
    now = network_meaning(config, features.fitted, features.behaviours)
    for what, value in before.items():
        if value != now[what]:
            raise UserError(
                f"init_from.dense: the old network has {what} {value}, this one {now[what]}; make them equal, or leave "
                "init_from.dense out and take tables only"
            )
    parameters, _ = engine.dense_shapes
    differences = list_differences(old.manifest.dense, parameters)
    if differences:
        raise UserError(f"init_from.dense: the old network is another one: {differences}")


def network_meaning(config: JobConfig, fitted: FittedFeatures, behaviours: Sequence[str]) -> dict[str, Any]:
    """Return the settings that define the columns of a network's inputs and outputs."""
    features, layout = config.features, fitted.layout
    return {
        "model.kind": config.model.kind,
        "behaviours": list(behaviours),
        "side features": list(side_ranges(layout, features)),
        "dense features": layout["dense"],
        "statistics": layout["statistics"],
        "rates": list(features.rates or layout["behaviours"]),
        "histories": {
            name: history.domain if history.search == "latest" else f"{history.search} of {history.domain}"
            for name, history in features.history.items()
        },
        "features.tags": features.tags,
        "features.author_side": list(features.author_side),
        "features.exclude": sorted(features.exclude),
        "features.codes": {
            # The order of the tables is that of the network's inputs; paths and sharding do not matter.
            name: own.model_dump(mode="json", include={"levels", "tables", "history"})
            for name, own in features.codes.items()
        },
        "features.content": {
            # A projection of the vectors of one model means nothing for those of another one.
            name: own.model_dump(mode="json", exclude={"table"}) | fitted.content[name].kind
            for name, own in features.content.items()
        },
    }


def _fill(stored: StoredTensor, shards: list[Shard], rows: RowMap) -> None:
    """Copy rows into the memory of shards; only pieces with rows of these shards are read."""
    for piece in stored.pieces:
        read = cache(piece.read)
        first, last = piece.offsets[0], piece.offsets[0] + piece.sizes[0]
        for start in range(first, last, _ROWS_AT_ONCE):
            old, new = rows.of(start, min(start + _ROWS_AT_ONCE, last))
            for shard in shards:
                mine = (new >= shard.row) & (new < shard.row + len(shard.values))
                if mine.any():
                    _copy(read, piece, old[mine] - first, shard, new[mine] - shard.row)


def _copy(read: Callable[[], torch.Tensor], piece: StoredPiece, old: np.ndarray, shard: Shard, new: np.ndarray) -> None:
    source, target = torch.from_numpy(old), torch.from_numpy(new).to(shard.values.device)
    if shard.values.ndim == 1:
        shard.values[target] = read()[source].to(shard.values.device)
        return
    left = max(piece.offsets[1], shard.column)
    right = min(piece.offsets[1] + piece.sizes[1], shard.column + shard.values.shape[1])
    if left < right:
        values = read()[source, left - piece.offsets[1] : right - piece.offsets[1]]
        shard.values[target, left - shard.column : right - shard.column] = values.to(shard.values.device)
