"""Fixture: a small dataset with every kind of feature, written with the project's own writers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from trainer.data.format.history import FOLDER as HISTORY_FOLDER
from trainer.data.format.history import Histories, HistoryWriter
from trainer.data.format.schema import DatasetSpec, DenseFeature, IdSpace, Rows, SideFeature, partition_of
from trainer.data.format.shards import RowStore, write_rows

HOUR_MS = 3_600_000
START_MS = 1_700_000_000_000


@dataclass(frozen=True)
class SmallDataset:
    """A dataset on disk, with the rows and visits that were written to it."""

    path: Path
    spec: DatasetSpec
    rows: Rows
    visits: dict[str, np.ndarray]

    def store(self, on_corrupt: str = "error") -> RowStore:
        return RowStore(self.path, self.spec, on_corrupt)

    def histories(self) -> Histories:
        return Histories(self.path, self.spec)


WriteDataset = Callable[..., SmallDataset]


@pytest.fixture
def write_dataset(tmp_path: Path) -> WriteDataset:
    """Return ``write_dataset(seed=0, rows=3000, users=60, ...)``; the same arguments give the same dataset.

    ``edit(rows)`` and ``edit_visits(visits)`` can change the arrays before they are written.
    """

    def write(
        seed: int = 0,
        rows: int = 3000,
        users: int = 60,
        partitions: int = 4,
        hours: int = 48,
        rows_per_record: int = 64,
        name: str = "small",
        edit: Callable[[Rows], None] | None = None,
        edit_visits: Callable[[Rows], None] | None = None,
    ) -> SmallDataset:
        rng = np.random.default_rng(seed)
        spec = _spec(name, partitions, users)
        canonical = _rows(rng, spec, rows, users, hours)
        if edit is not None:
            edit(canonical)
        span = (int(canonical["request_ms"].min()), int(canonical["request_ms"].max()))
        spec = replace(spec, span_ms=span, rows=rows, exposures=rows)
        path = tmp_path / name
        write_rows(path, spec, canonical, rows_per_record=rows_per_record)
        visits = _visits(rng, users, hours)
        if edit_visits is not None:
            edit_visits(visits)
        _write_histories(path / HISTORY_FOLDER, visits, partitions)
        (path / "dataset.json").write_text(spec.to_json())
        return SmallDataset(path, spec, canonical, visits)

    return write


def _spec(name: str, partitions: int, users: int) -> DatasetSpec:
    return DatasetSpec(
        name=name,
        source="random numbers",
        licence="none",
        partitions=partitions,
        timezone="UTC",
        behaviours=("click", "like", "gift"),
        applies={"click": ("video", "live"), "like": ("video", "live"), "gift": ("live",)},
        candidates=("video", "live"),
        side=(SideFeature("hour", "context", 25), SideFeature("city", "user", 9), SideFeature("tag", "item", 40)),
        dense=(DenseFeature("age", "user"), DenseFeature("price", "item")),
        statistics=(("user",), ("user", "author"), ("tag",)),
        ids={"user": IdSpace(users, users - 1), "author": IdSpace(30, 29), "item": IdSpace(200, 199)},
    )


def _rows(rng: np.random.Generator, spec: DatasetSpec, n: int, users: int, hours: int) -> Rows:
    request = START_MS + np.sort(rng.integers(0, hours * HOUR_MS, n))
    domain = rng.integers(0, 2, n).astype(np.uint8)
    mask = np.ones((n, 3), np.uint8)
    mask[domain == 0, 2] = 0
    shown = rng.integers(0, 50, (n, 3, 1))
    return {
        "visit_id": rng.permutation(n).astype(np.int64),
        "user_id": rng.integers(0, users, n),
        "author_id": rng.integers(0, 30, n),
        "item_id": rng.integers(0, 200, n),
        "domain": domain,
        "kind": np.full(n, 4, np.uint8),
        "request_ms": request,
        "emit_ms": request + rng.integers(0, 2 * HOUR_MS, n),
        "side": np.stack([rng.integers(0, side.rows, n) for side in spec.side], axis=1).astype(np.int32),
        "dense": (rng.standard_normal((n, 2)) * [3, 0.1] + [100, -1]).astype(np.float32),
        "stat": np.concatenate([shown, rng.binomial(shown, 0.3, (n, 3, 3))], axis=2).reshape(n, -1).astype(np.float32),
        "label": (rng.random((n, 3)) < [0.5, 0.2, 0.1]).astype(np.uint8) & mask,
        "mask": mask,
    }


def _visits(rng: np.random.Generator, users: int, hours: int) -> dict[str, np.ndarray]:
    """Make visits that begin up to two days before the first row; users have from none to many of them."""
    n = 30 * users
    request = START_MS + rng.integers(-48 * HOUR_MS, hours * HOUR_MS, n)
    return {
        "user_id": rng.integers(0, users, n) ** 2 // users,
        "domain": rng.integers(0, 2, n).astype(np.uint8),
        "item_id": rng.integers(0, 200, n),
        "author_id": rng.integers(0, 30, n),
        "request_ms": request,
        "play_ms": rng.integers(1, 60_000, n),
        "bits": rng.integers(0, 8, n).astype(np.int32),
        # Distinct, so that "the latest" is one answer.
        "known_ms": (request + rng.integers(1, HOUR_MS, n)) // n * n + np.arange(n),
    }


def _write_histories(folder: Path, visits: dict[str, np.ndarray], partitions: int) -> None:
    folder.mkdir()
    writer = HistoryWriter(folder)
    owner = partition_of(visits["user_id"], partitions)
    for partition in range(partitions):
        writer.append({name: column[owner == partition] for name, column in visits.items()})
    writer.close()
