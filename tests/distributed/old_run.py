"""An old run made by hand and jobs that start from it, for test_init_from.py and its ranks.

Every mapping of ids is there: users are looked up, authors direct, items hashed; a feature of the packed table has got
more values, and where the jobs say so it has lost one and got another.
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
"""Features that the old run of a seed did not see."""
GROWN = 3
"""Values that the first side feature has more than before."""

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
    """Settings with ``section.key`` changed."""
    result = copy.deepcopy(dict(settings))
    for key, value in changes.items():
        *sections, last = key.split(".")
        node = result
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return result


def config_of(changes: Mapping[str, Any]) -> JobConfig:
    """A job with ``section.key`` changed."""
    return parse_config(merged(SETTINGS, changes), "test")


def vocabularies(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Users of the old and of the new run: some in both, some in one."""
    random = np.random.default_rng(seed)
    return np.sort(random.choice(200, 70, replace=False)), np.sort(random.choice(200, 90, replace=False))


def features_of(spec: DatasetSpec, config: JobConfig, users: np.ndarray, less: int = 0) -> FeatureMap:
    """Features fitted on nothing.

    Args:
        spec: of the dataset.
        config: of the job.
        users: that are known.
        less: values that the first side feature has fewer; the tables are then not those of ``spec``.
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
    """Settings that the old run had otherwise."""
    return {"features.author.rows": OLD_AUTHORS, "features.exclude": OLD_EXCLUDE.get(seed, ())}


def old_features(spec: DatasetSpec, seed: int) -> FeatureMap:
    """Features of the old run; ``side`` of their layout is what it was then."""
    return features_of(spec, config_of(old_changes(seed)), vocabularies(seed)[0], GROWN)


def write_old_run(home: Path, spec: DatasetSpec, seed: int, optimizer: str) -> dict[str, Tensor]:
    """Write a run with random tables; the tensors that are in it, by name.

    A table's are named by it and ``TABLE/accumulated``; those of the dense network by its parameters.
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
    (home / "features").mkdir(parents=True)
    features.fitted.save(home / "features")
    write_checkpoint(
        home,
        tables,
        states,
        dense,
        seed=seed,
        config=merged(SETTINGS, changes),
        table_optimizer=optimizer,
        behaviours=features.behaviours,
    )
    return tables | {f"{name}/accumulated": state for name, state in states.items()} | dense
