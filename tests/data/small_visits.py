"""Small visits, tables and a description for the tests of the dataset builder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.data.format.schema import DatasetSpec, DenseFeature, SideFeature
from trainer.data.writing.builder import DatasetBuilder

BEHAVIOURS = ("click", "like", "gift")
SPEC = DatasetSpec(
    name="t",
    source="s",
    licence="l",
    partitions=3,
    timezone="Asia/Shanghai",
    behaviours=BEHAVIOURS,
    applies={"click": ("video", "live"), "like": ("video", "live"), "gift": ("live",)},
    candidates=("video", "live"),
    side=(
        SideFeature("tab", "context", 4),
        SideFeature("age", "user", 8),
        SideFeature("topic", "item", 6),
        SideFeature("style", "author", 5),
    ),
    dense=(DenseFeature("price", "item"), DenseFeature("load", "context"), DenseFeature("wealth", "user")),
    statistics=(("user",), ("item", "tab"), ("topic",)),
    extra={"seed": 3},
)
START = 1_700_000_000_000


def make_visits(seed: int, n: int = 300, span: int = 400, spec: DatasetSpec = SPEC) -> dict[str, np.ndarray]:
    """Make visits of a few users with ties in time, in random order."""
    rng = np.random.default_rng(seed)
    request = START + rng.integers(0, span, n)
    delays = np.where(rng.random((3, n)) < 0.3, rng.integers(0, 60, (3, n)), -1).astype(np.int32)
    domain = rng.integers(0, 2, n).astype(np.int8)
    delays[2, domain == 0] = -1
    return {
        "visit_id": rng.permutation(n) + 10,
        "user_id": rng.integers(0, 12, n) * 977,
        "author_id": rng.integers(0, 6, n),
        "item_id": rng.integers(0, 9, n),
        "domain": domain,
        "request_ms": request,
        "exit_ms": request + np.maximum(delays.max(axis=0), 0) + rng.integers(0, 20, n),
        "play_ms": rng.integers(0, 3, n) * 7,
        **{f"delay_{name}": delay for name, delay in zip(BEHAVIOURS, delays, strict=True)},
        "value_gift": rng.random(n).astype(np.float32),
        "tab": rng.integers(0, 4, n).astype(np.int32),
        "load": rng.random(n).astype(np.float32),
    }


def make_tables() -> dict[str, pa.Table]:
    """Make tables without some of the ids that visits name."""
    rng = np.random.default_rng(9)
    users = np.arange(1, 11) * 977
    return {
        "users": pa.table({"user_id": users, "age": rng.integers(1, 8, 10), "wealth": rng.random(10)}),
        "authors": pa.table({"author_id": np.arange(5), "style": rng.integers(1, 5, 5), "name": list("abcde")}),
        "items": pa.table({"item_id": [8, 3, 100, 5], "topic": [1, 5, 2, 3], "price": [0.5, -1.0, 7.0, 2.5]}),
    }


def build_dataset(
    out: Path,
    visits: dict[str, np.ndarray],
    *,
    spec: DatasetSpec = SPEC,
    calls: Iterable[np.ndarray] | None = None,
    truth: pa.Table | None = None,
    events: pa.Table | None = None,
    **options,
) -> DatasetSpec:
    with DatasetBuilder(out, spec, **options) as builder:
        for name, table in make_tables().items():
            builder.table(name, table)
        for part in calls or [np.arange(len(visits["visit_id"]))]:
            builder.visits(pa.table({name: column[part] for name, column in visits.items()}))
        if truth is not None:
            builder.truth(truth)
        if events is not None:
            builder.events(events)
        return builder.finish()


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
