"""Tests of the join of stored features to the exposures of a replay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.stream.event_logs import START_MS
from tests.stream.random_logs import SPEC as BOTH
from trainer.console.errors import UserError
from trainer.data.format.schema import Rows, row_columns
from trainer.data.format.shards import RowStore, write_rows
from trainer.data.format.validation import Columns
from trainer.stream.labels.assembled_rows import ENTER, EVENT_TYPES, EXPOSURE
from trainer.stream.sources.logged_features import FEATURES, RequestFeatures
from trainer.stream.sources.replay_features import ReplayFeatures

SPEC = replace(BOTH, partitions=1, candidates=("live",))
LIVE = 1
Key = tuple[int, int, int]


def random_rows(seed: int, rows: int, longest_ms: int = 3_000, span_ms: int = 20_000) -> Rows:
    """Return rows whose visits share ids, some even the whole key; every row has features of its own."""
    rng = np.random.default_rng(seed)
    columns = {name: np.zeros((rows, *shape), dtype) for name, (dtype, shape) in row_columns(SPEC).items()}
    columns["visit_id"] = rng.integers(0, rows // 3, rows)
    columns["user_id"] = rng.integers(0, 5, rows)
    columns["domain"][:] = LIVE
    columns["request_ms"] = START_MS + rng.integers(0, span_ms, rows)
    columns["emit_ms"] = columns["request_ms"] + rng.integers(0, longest_ms, rows)
    for place, name in enumerate(FEATURES):
        columns[name][:] = np.arange(rows)[:, None] + 10 * place
    return columns


def write(path: Path, rows: Rows, spec=SPEC) -> ReplayFeatures:
    write_rows(path, spec, rows, rows_per_record=16, records_per_shard=5)
    return ReplayFeatures(path, replace(spec, rows=len(rows["visit_id"])), 0)


def random_events(rows: Rows, seed: int, events: int) -> Columns:
    """Return events in time order about the visits of rows: their exposures, and events close to one."""
    rng = np.random.default_rng(seed)
    of = rng.integers(0, len(rows["visit_id"]), events)
    columns = {name: np.zeros(events, dtype) for name, dtype in EVENT_TYPES.items()}
    columns["visit_id"], columns["user_id"] = rows["visit_id"][of].copy(), rows["user_id"][of].copy()
    columns["time_ms"] = rows["request_ms"][of].copy()
    columns["event"][:] = np.where(rng.random(events) < 0.8, EXPOSURE, rng.integers(0, 6, events))
    columns["domain"][:] = rng.random(events) < 0.9
    for name in ("visit_id", "user_id", "time_ms"):
        columns[name] += rng.random(events) < 0.1
    order = np.argsort(columns["time_ms"], kind="stable")
    return {name: column[order] for name, column in columns.items()}


def first_rows(rows: Rows) -> dict[Key, set[int]]:
    """Return the rows of each key."""
    found: dict[Key, set[int]] = {}
    keys = zip(*(rows[name].tolist() for name in ("visit_id", "user_id", "request_ms")), strict=True)
    for row, key in enumerate(keys):
        found.setdefault(key, set()).add(row)
    return found


def check(events: Columns, logged: RequestFeatures, known: dict[Key, set[int]]) -> int:
    """Check that exposures in the candidate domain have the features of their row; return the number with features."""
    keys = list(zip(*(events[name].tolist() for name in ("visit_id", "user_id", "time_ms")), strict=True))
    counts = (events["event"] == EXPOSURE) & (events["domain"] == LIVE)
    assert logged.at.tolist() == [k for k, key in enumerate(keys) if counts[k] and key in known]
    for place, k in enumerate(logged.at.tolist()):
        row = int(logged.side[place, 0])
        assert row in known[keys[k]]
        assert (logged.side[place] == row).all()
        assert (logged.dense[place] == row + 10).all()
        assert (logged.stat[place] == row + 20).all()
    return len(logged)


@pytest.mark.parametrize("seed", range(4))
def test_exposures_have_the_features_of_their_rows_in_portions_of_any_size(tmp_path: Path, seed: int) -> None:
    rows = random_rows(seed, 600)
    features, known = write(tmp_path, rows), first_rows(rows)
    events = random_events(rows, seed, 900)
    rng, first, carried = np.random.default_rng(seed), 0, 0
    while first < 900:
        stop = first + int(rng.integers(0, 60))
        part = {name: column[first:stop] for name, column in events.items()}
        carried += check(part, features.lookup(part), known)
        first = stop
    assert 300 < carried < 700
    # An earlier portion can be looked up again.
    earlier = {name: column[200:350] for name, column in events.items()}
    assert check(earlier, features.lookup(earlier), known) > 50


def test_every_record_is_read_once_and_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(0, 3000, longest_ms=500)
    features, events = write(tmp_path, rows), random_events(rows, 0, 3000)
    read: list[int] = []
    plain = RowStore.read
    monkeypatch.setattr(
        RowStore, "read", lambda self, partition, record, columns: read.append(record) or plain(self, partition, record)
    )
    most = 0
    for first in range(0, 3000, 50):
        features.lookup({name: column[first : first + 50] for name, column in events.items()})
        most = max(most, len(features._records))
    assert sorted(read) == sorted(set(read)) and len(read) >= 3000 // 16
    # Rows of 500 ms out of 20 s are in few of the 188 records.
    assert most <= 12


def test_an_enter_has_no_features_in_a_replay(tmp_path: Path) -> None:
    rows = random_rows(1, 60)
    events = random_events(rows, 1, 60)
    events["event"][:] = ENTER
    assert len(write(tmp_path, rows).lookup(events)) == 0


def test_a_dataset_of_events_only_has_no_features(tmp_path: Path) -> None:
    events = random_events(random_rows(1, 60), 1, 60)
    assert len(ReplayFeatures(tmp_path, SPEC, 0).lookup(events)) == 0


def test_rows_that_cannot_be_read(tmp_path: Path) -> None:
    rows = random_rows(2, 100)
    features, events = write(tmp_path, rows), random_events(rows, 2, 100)
    shard = tmp_path / "rows" / "part-00000-000000.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"part-00000-000000.tar: record .* cannot be read: the shard is cut short"):
        features.lookup(events)
    (tmp_path / "rows" / "part-00000.index.json").unlink()
    with pytest.raises(UserError, match="the index of partition 0 is missing"):
        ReplayFeatures(tmp_path, replace(SPEC, rows=100), 0)
