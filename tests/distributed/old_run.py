"""Old run made by hand, and jobs that start from it, for test_init_from.py and its ranks.

It has every mapping of ids: users by lookup, authors direct, items hashed. Since the old run, a feature of the packed
table has got more values; in some jobs one feature was removed and another one added.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.checkpoint.stored_checkpoint import write_checkpoint
from trainer.config.ranker import JobConfig, parse_config
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import FittedFeatures, feature_layout
from trainer.data.format.schema import DatasetSpec
from trainer.engine.build_ranker import build_ranker

DIMS = {"user": 16, "author": 8, "item": 16, "side": 8}
OLD_AUTHORS, NEW_AUTHORS, ITEMS = 40, 57, 90
OLD_EXCLUDE = {1: ("city_tier",)}
"""Seed of an old run -> features that it excluded."""
GROWN = 3
"""Number of values that the first side feature has gained since the old run."""

SETTINGS: dict[str, Any] = {
    "data": {"path": "nowhere"},
    "features": {
        "user": {"ids": "lookup", "dim": 16},
        "author": {"rows": NEW_AUTHORS, "dim": 8},
        "item": {"ids": "hash", "rows": ITEMS, "dim": 16},
        "side": {"dim": 8},
    },
    "model": {"kind": "shared_bottom", "expert_layers": [[8]], "tower": [4], "attention": [4]},
}


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with changes, which are given by ``section.key``."""
    result = copy.deepcopy(dict(settings))
    for key, value in changes.items():
        *sections, last = key.split(".")
        node = result
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return result


def config_of(changes: Mapping[str, Any]) -> JobConfig:
    """Return a job with changes, which are given by ``section.key``."""
    return parse_config(merged(SETTINGS, changes), "test")


def vocabularies(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the users of the old and of the new run; some are in both, some in only one."""
    random = np.random.default_rng(seed)
    return np.sort(random.choice(200, 70, replace=False)), np.sort(random.choice(200, 90, replace=False))


def features_of(spec: DatasetSpec, config: JobConfig, users: np.ndarray, less: int = 0) -> FeatureMap:
    """Return features with made-up fitted values.

    Args:
        spec: layout of the dataset.
        config: settings of the job.
        users: ids of the known users.
        less: number of values that the first side feature lacks compared with ``spec``.
    """
    layout = feature_layout(spec)
    rows = {name: getattr(config.features, name).rows for name in ("author", "item")}
    fitted = FittedFeatures(
        layout=layout,
        table_rows={"user": len(users) + 1, **rows},
        prior=np.full(len(spec.behaviours), 0.1),
        mean=np.zeros(200),
        deviation=np.ones(200),
        vocabularies={"user": users},
    )
    features = FeatureMap(spec, config.features, fitted, config.data.behaviours)
    layout["side"] = [[name, rows - less * (place == 0)] for place, (name, rows) in enumerate(layout["side"])]
    return features


def old_changes(seed: int) -> dict[str, Any]:
    """Return the settings in which the old run differs from the new jobs."""
    return {"features.author.rows": OLD_AUTHORS, "features.exclude": OLD_EXCLUDE.get(seed, ())}


def old_features(spec: DatasetSpec, seed: int) -> FeatureMap:
    """Return the features of the old run, with the side features of that time."""
    return features_of(spec, config_of(old_changes(seed)), vocabularies(seed)[0], GROWN)


def write_old_run(directory: Path, spec: DatasetSpec, seed: int, optimizer: str) -> dict[str, Tensor]:
    """Write a run with random tables, and return its tensors by name.

    The names are ``TABLE`` and ``TABLE/accumulated`` for a table, and the parameter's name for the dense network.
    """
    changes = old_changes(seed)
    config, features = config_of(changes), old_features(spec, seed)
    generator = torch.Generator().manual_seed(seed)
    rows = {table.name: table.rows for table in features.tables}
    rows["side"] -= GROWN
    tables = {name: torch.randn(rows[name], DIMS[name], generator=generator) for name in rows}
    states = {
        name: torch.rand(weight.shape if optimizer == "adagrad" else (len(weight),), generator=generator)
        for name, weight in tables.items()
        if optimizer != "sgd"
    }
    ranker = build_ranker(config, features, config.model.kind)
    dense = {name: torch.randn(p.shape, generator=generator) for name, p in ranker.named_parameters()}
    (directory / "features").mkdir(parents=True)
    features.fitted.save(directory / "features")
    write_checkpoint(
        directory,
        tables,
        states,
        dense,
        seed=seed,
        config=merged(SETTINGS, changes),
        table_optimizer=optimizer,
        behaviours=features.behaviours,
    )
    return tables | {f"{name}/accumulated": state for name, state in states.items()} | dense
