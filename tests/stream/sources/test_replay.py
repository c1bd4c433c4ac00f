"""Tests of the replay of stored events: order, any position, any number of ranks, and the clock."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.stream.event_logs import (
    START_MS,
    as_tuples,
    assert_logged,
    by_partition,
    content,
    events_of,
    merge_positions,
    merged,
    random_events,
    rows_of,
    store,
)
from tests.stream.random_logs import SPEC
from trainer.config.stream import StreamConfig
from trainer.console.errors import UserError
from trainer.data.format.shards import write_rows
from trainer.data.format.visit_events import event_table
from trainer.data.loading.batch_plan import partitions_of_rank
from trainer.stream.sources import replay
from trainer.stream.sources.open_source import open_source
from trainer.stream.sources.replay import ReplaySource
from trainer.stream.sources.source import EventBatch, check_identity

EVENTS = random_events(seed=3, events=4000)
ALL = range(SPEC.partitions)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store(tmp_path_factory.mktemp("log") / "log", EVENTS)


def read(source: ReplaySource, partitions, position=None, batches: int | None = None) -> list[EventBatch]:
    taken = []
    with source.open(partitions, position) as reader:
        while (batches is None or len(taken) < batches) and (batch := reader.take()) is not None:
            assert_logged(batch.events, batch.logged)
            taken.append(batch)
    return taken


@pytest.mark.parametrize("batch_events", [1, 97, 1000, 9999])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_event_once_in_one_order_of_each_rank(path, batch_events, world):
    source = ReplaySource(path, StreamConfig(batch_events=batch_events))
    for rank in range(world):
        owned = partitions_of_rank(SPEC.partitions, rank, world)
        batches = read(source, owned)
        assert events_of(batches) == merged(EVENTS, owned)
        assert {len(batch) for batch in batches[:-1]} <= {batch_events}
        assert batches[-1].position == {
            p: [len(own["time_ms"]), 0, int(own["time_ms"][-1]), 0]
            for p, own in by_partition(EVENTS).items()
            if p in owned
        }


@pytest.mark.parametrize("speed", [0, 1e6])
def test_it_resumes_from_any_position_as_if_it_had_never_stopped(path, speed):
    config = StreamConfig(batch_events=150, speed=speed, linger_seconds=0.005)
    source = ReplaySource(path, config)
    whole = [content(batch) for batch in read(source, ALL)]
    assert len(whole) > 20
    for cut, (_, _, position) in enumerate(whole[:-1], 1):
        assert [content(batch) for batch in read(source, ALL, position)] == whole[cut:]


def test_another_number_of_ranks_reads_the_rest(path):
    config = StreamConfig(batch_events=130)
    source = ReplaySource(path, config)
    seen: dict[int, list] = {p: [] for p in ALL}
    position = None
    for world, batches in ((2, 4), (1, 7), (4, 2), (3, None)):
        at = []
        for rank in range(world):
            owned = partitions_of_rank(SPEC.partitions, rank, world)
            taken = read(source, owned, position, batches)
            for batch in taken:
                for p, part in batch.by_partition():
                    assert_logged(part.events, part.logged)
                    assert len(part) == len(part.arrived_ms)
                    seen[p] += as_tuples(part.events)
            at.append(taken[-1].position)
        position = merge_positions(at)
    assert seen == {p: as_tuples(own) for p, own in by_partition(EVENTS).items()}


@pytest.mark.parametrize("speed", [0, 1e6])
@pytest.mark.parametrize("batch_events", [40, 9999])
def test_slices_of_time_end_batches(path, speed, batch_events):
    config = StreamConfig(batch_events=batch_events, speed=speed, linger_seconds=0.003)
    source = ReplaySource(path, config)
    with source.open(ALL, None, slice_ms=700) as reader:
        batches = list(reader)
    assert events_of(batches) == merged(EVENTS, ALL)
    slices = [set((batch.events["time_ms"] // 700).tolist()) for batch in batches]
    assert all(len(inside) == 1 for inside in slices)
    if batch_events == 9999 and not speed:
        assert len(slices) == len(set.union(*slices)), "a slice that fits is one batch"
    for cut in range(1, len(batches), 9):
        with source.open(ALL, batches[cut - 1].position, slice_ms=700) as reader:
            assert [content(batch) for batch in reader] == [content(batch) for batch in batches[cut:]]


def test_a_range_of_time(path):
    since_ms, until_ms = START_MS + 20_000, START_MS + 41_230
    source = ReplaySource(path, StreamConfig(batch_events=100), since_ms, until_ms)
    inside = (EVENTS["time_ms"] >= since_ms) & (EVENTS["time_ms"] < until_ms)
    batches = read(source, ALL)
    assert events_of(batches) == merged({name: column[inside] for name, column in EVENTS.items()}, ALL)
    assert events_of(read(source, ALL, batches[3].position)) == events_of(batches[4:])


def test_a_replay_comes_when_it_is_due_in_the_same_batches(path):
    # A minute of events takes 0.3 s: a batch every 10 ms holds 2 s of events.
    config = StreamConfig(speed=200, linger_seconds=0.01)
    began = time.monotonic()
    batches = read(ReplaySource(path, config), ALL)
    assert time.monotonic() - began >= 0.28, "a replay is never early"
    assert events_of(batches) == merged(EVENTS, ALL)
    for batch in batches:
        ticks = batch.events["time_ms"] // 2000
        assert ticks[0] == ticks[-1]
        since = np.diff(batch.arrived_ms)
        assert np.abs(since - np.diff(batch.events["time_ms"]) / 200).max() <= 1
    assert len({int(batch.events["time_ms"][0] // 2000) for batch in batches}) == len(batches)
    played = batches[-1].arrived_ms[-1] - batches[0].arrived_ms[0]
    assert abs(played - (EVENTS["time_ms"][-1] - EVENTS["time_ms"][0]) / 200) <= 2


def test_memory_is_bounded(path, monkeypatch):
    held = []

    class Watched(replay.TimeMerge):
        def append(self, partition, columns, logged) -> None:
            super().append(partition, columns, logged)
            held.append(self.events)

    monkeypatch.setattr(replay, "TimeMerge", Watched)
    assert events_of(read(ReplaySource(path, StreamConfig(batch_events=50, buffer_events=400)), ALL)) == merged(
        EVENTS, ALL
    )
    assert 300 < max(held) <= 400 + 50


def test_lag_counts_what_was_not_taken(path):
    with ReplaySource(path, StreamConfig(batch_events=1000)).open(ALL) as reader:
        assert reader.lag().waiting == 4000
        batch = reader.take()
        assert batch is not None
        lag = reader.lag()
        assert lag.waiting == 3000
        assert lag.event_ms == EVENTS["time_ms"][-1] - batch.events["time_ms"][-1]
        assert len(list(reader)) == 3
        assert (reader.lag().waiting, reader.lag().event_ms) == (0, 0)


def test_from_a_url(path):
    memory = fsspec.filesystem("memory")
    memory.put(str(path), "/replayed/log", recursive=True)
    source = ReplaySource("memory://replayed/log", StreamConfig())
    assert events_of(read(source, ALL)) == merged(EVENTS, ALL)
    check_identity(source.identity, ReplaySource(path, StreamConfig()).identity)
    memory.rm("/replayed", recursive=True)


def test_another_log_has_another_identity(path, tmp_path):
    other = random_events(seed=3, events=4000)
    other["item_id"][17] += 1 << 30
    with pytest.raises(UserError, match=r"is of events '.*', the stream now has '"):
        check_identity(
            ReplaySource(path, StreamConfig()).identity,
            ReplaySource(store(tmp_path / "other", other), StreamConfig()).identity,
        )


def test_other_rows_have_another_identity(path, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(path, other, ignore=shutil.ignore_patterns("rows"))
    rows = rows_of(EVENTS)
    rows["stat"][5] += 1
    write_rows(other, SPEC, rows, rows_per_record=20)
    assert ReplaySource(other, StreamConfig()).identity != ReplaySource(path, StreamConfig()).identity


def test_partitions_without_events(tmp_path):
    few = random_events(seed=1, events=3, users=1)
    source = ReplaySource(store(tmp_path / "few", few), StreamConfig())
    assert events_of(read(source, ALL)) == as_tuples(few)
    empty = {name: column[:0] for name, column in few.items()}
    for p in ALL:
        pq.write_table(event_table(SPEC, empty), tmp_path / "few" / "events" / f"part-{p:05d}.parquet")
    assert read(source, ALL) == []


def break_file(change, path: Path) -> None:
    file = path / "events" / "part-00002.parquet"
    table = change(pq.read_table(file))
    pq.write_table(table, file)


def with_event(table: pa.Table, name: str) -> pa.Table:
    return table.set_column(5, "event", pa.array([name] * table.num_rows).dictionary_encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "dataset.json").unlink(), "no dataset here"),
        (lambda path: (path / "events/part-00002.parquet").unlink(), "part-00002.parquet: no such file"),
        (lambda path: (path / "events/part-00002.parquet").write_bytes(b"PAR1"), "not a readable Parquet file"),
        (
            lambda path: break_file(lambda table: with_event(table, "poke"), path),
            "column 'event' is 'poke', which is not an event",
        ),
        (
            lambda path: break_file(lambda table: table.set_column(6, "time_ms", table["value"]), path),
            "column 'time_ms' is float; it must be int64",
        ),
        (lambda path: break_file(lambda table: table.slice(0, 3), path), "is event 8.., .* has 3: replay the dataset"),
    ],
)
def test_mistakes_are_errors_of_one_line(path, tmp_path, change, message):
    broken = tmp_path / "broken"
    shutil.copytree(path, broken)
    end = read(ReplaySource(path, StreamConfig()), ALL)[-1].position
    change(broken)
    with pytest.raises(UserError, match=message):
        read(ReplaySource(broken, StreamConfig()), ALL, end if "replay" in message else None)


def test_the_source_of_a_config(path, tmp_path):
    assert events_of(read(open_source(StreamConfig(), SPEC, str(path)), ALL)) == merged(EVENTS, ALL)
    other = (tmp_path / "other") / "dataset.json"
    other.parent.mkdir()
    other.write_text(SPEC.to_json().replace("gift", "share"))
    with pytest.raises(UserError, match=r"behaviours are click, like, share, those of .* are click, like, gift"):
        open_source(StreamConfig(path=str(other.parent)), SPEC, str(path))
    for changed, message in (
        (replace(SPEC, side=SPEC.side[:1]), "its side features are tab of 50 rows, age of 8 rows, those of"),
        (replace(SPEC, dense=()), "its dense features are load, those of .* are none"),
        (replace(SPEC, statistics=SPEC.statistics[::-1]), "its statistics are user, item x tab, those of .* are item"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(StreamConfig(path=str(path)), changed, "elsewhere")
    with pytest.raises(ValueError, match="needs `brokers` and `topic`"):
        StreamConfig(source="kafka", topic="watch")
