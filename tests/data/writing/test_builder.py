"""The dataset builder against a reference in plain Python."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.small_visits import BEHAVIOURS, SPEC, START, build_dataset, files_of, make_tables, make_visits
from tests.data.statistics_reference import statistics_as_of
from trainer.console.errors import UserError
from trainer.data.format.history import Histories
from trainer.data.format.schema import (
    DOMAINS,
    EVENT_COLUMNS,
    DatasetSpec,
    IdSpace,
    partition_of,
    row_columns,
    visit_schema,
)
from trainer.data.format.shards import RowStore, read_rows
from trainer.data.writing import builder as build
from trainer.data.writing import partition_spill as spill
from trainer.data.writing import training_rows as assemble
from trainer.data.writing.builder import DatasetBuilder
from trainer.data.writing.duplicates import DuplicateRule


def expected_rows(spec: DatasetSpec, visits: dict[str, np.ndarray]) -> list[dict]:
    """Make training rows without statistics, visit by visit, ordered by partition, emission, request and visit."""
    tables = {name: {row[f"{name[:-1]}_id"]: row for row in table.to_pylist()} for name, table in make_tables().items()}
    rows = []
    for line in pa.table(visits).to_pylist():
        domain = DOMAINS[line["domain"]]
        if domain not in spec.candidates:
            continue

        def feature(of: str, name: str, line: dict = line) -> float:
            return line[name] if of == "context" else tables[f"{of}s"].get(line[f"{of}_id"], {}).get(name, 0)

        rows.append(
            {
                **{
                    name: line[name] for name in ("visit_id", "user_id", "author_id", "item_id", "domain", "request_ms")
                },
                "kind": 4,
                "emit_ms": line["exit_ms"],
                "side": [feature(side.of, side.name) for side in spec.side],
                "dense": [np.float32(feature(dense.of, dense.name)) for dense in spec.dense],
                "label": [int(line[f"delay_{behaviour}"] >= 0) for behaviour in BEHAVIOURS],
                "mask": [int(domain in spec.applies[behaviour]) for behaviour in BEHAVIOURS],
                "partition": int(partition_of(np.array([line["user_id"]]), spec.partitions)[0]),
            }
        )
    return sorted(rows, key=lambda row: [row[name] for name in ("partition", "emit_ms", "request_ms", "visit_id")])


@pytest.mark.parametrize("candidates", [("live",), ("video", "live")])
@pytest.mark.parametrize("seed", range(2))
def test_rows_are_the_visits_with_their_features(tmp_path, seed, candidates):
    spec = replace(SPEC, candidates=candidates)
    visits = make_visits(seed)
    built = build_dataset(tmp_path / "out", visits, spec=spec, rows_per_record=16, records_per_shard=2)
    rows = read_rows(tmp_path / "out", built)
    expected = expected_rows(spec, visits)
    assert len(expected) == built.rows == len(rows["visit_id"])
    for name in {*row_columns(spec), "partition"} - {"stat"}:
        np.testing.assert_array_equal(rows[name], np.array([row[name] for row in expected]), err_msg=name)
    np.testing.assert_array_equal(rows["stat"], statistics_as_of(spec, rows, rows["request_ms"]))
    assert rows["stat"].max() > 10


def test_description_tells_what_is_there(tmp_path):
    visits = make_visits(0)
    with DatasetBuilder(tmp_path / "out", SPEC) as builder:
        for name, table in make_tables().items():
            builder.table(name, table)
        builder.visits(pa.table(visits))
        seen = []
        built = builder.finish(progress=lambda *step: seen.append(step), extra={"dropped": 4})
    assert built == DatasetSpec.load(tmp_path / "out")
    assert built.span_ms == (visits["request_ms"].min(), visits["request_ms"].max())
    assert (built.rows, built.exposures) == (300, 300)
    assert built.events == sum(len(pq.read_table(file)) for file in (tmp_path / "out/events").iterdir())
    # Ids of visits and of tables: item 100 was never shown, item 0 has no line.
    assert built.ids == {"user": IdSpace(12, 11 * 977), "author": IdSpace(6, 5), "item": IdSpace(10, 100)}
    assert built.extra == {"seed": 3, "dropped": 4}
    assert [done for what, done, total in seen if what == "sorting visits"] == [0, 1, 2, 3]
    assert ("writing rows", 300, 300) in seen
    assert seen[-1][0] == "computing checksums" and seen[-1][1] == seen[-1][2] > 0
    for name, table in make_tables().items():
        assert pq.read_table(tmp_path / "out" / f"{name}.parquet") == table
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(
        [
            "checksums.json",
            "dataset.json",
            "users.parquet",
            "authors.parquet",
            "items.parquet",
            "events",
            "rows",
            "history",
        ]
    )


@pytest.mark.parametrize("way", ["shuffled", "many calls", "tiny memory", "tiny slices", "one partition"])
def test_the_way_there_does_not_matter(tmp_path, monkeypatch, way):
    visits = make_visits(1)
    truth = pa.table({name: visits[name] for name in ("visit_id", "user_id", "request_ms")})
    for behaviour in BEHAVIOURS:
        truth = truth.append_column(f"p_{behaviour}", pa.array(visits["load"]))
    spec = SPEC if way != "one partition" else replace(SPEC, partitions=1)
    build_dataset(tmp_path / "a", visits, spec=spec, truth=truth)
    order = np.random.default_rng(0).permutation(300)
    calls = [order]
    if way == "many calls":
        calls = np.array_split(order, 40)
    elif way == "tiny memory":
        monkeypatch.setattr(spill, "_ROWS_IN_MEMORY", 13)
        monkeypatch.setattr(spill, "_ROWS_PER_PARTITION", 1)
    elif way == "tiny slices":
        monkeypatch.setattr(build, "assemble", functools.partial(assemble.assemble, rows_per_slice=5))
    build_dataset(tmp_path / "b", visits, spec=spec, truth=truth.take(order), calls=calls)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_partitions_hold_their_users_and_change_no_statistic(tmp_path):
    visits = make_visits(2)
    by_visit = []
    for partitions in (1, 7):
        spec = replace(SPEC, partitions=partitions)
        built = build_dataset(tmp_path / str(partitions), visits, spec=spec)
        rows = read_rows(tmp_path / str(partitions), built)
        np.testing.assert_array_equal(rows.pop("partition"), partition_of(rows["user_id"], partitions))
        order = np.argsort(rows["visit_id"])
        by_visit.append({name: column[order] for name, column in rows.items()})
    for name in by_visit[0]:
        np.testing.assert_array_equal(by_visit[0][name], by_visit[1][name])


def test_events_follow_from_visits(tmp_path):
    visits = make_visits(3)
    build_dataset(tmp_path / "out", visits)
    expected = []
    for line in pa.table(visits).to_pylist():
        ids = tuple(line[name] for name in ("user_id", "author_id", "item_id", "domain", "visit_id"))
        happened = [("exposure", 0, 0.0), ("exit", line["exit_ms"] - line["request_ms"], float(line["play_ms"]))]
        happened += [("enter", 0, 0.0)] if line["play_ms"] else []
        for behaviour in BEHAVIOURS:
            if (delay := line[f"delay_{behaviour}"]) >= 0:
                happened.append((behaviour, delay, line["value_gift"] if behaviour == "gift" else 0.0))
        expected += [(*ids, name, line["request_ms"] + delay, value) for name, delay, value in happened]
    found = []
    for partition in range(SPEC.partitions):
        table = pq.read_table(tmp_path / f"out/events/part-{partition:05d}.parquet")
        assert table.schema.names == EVENT_COLUMNS.names
        assert table.schema.types == EVENT_COLUMNS.types
        assert set(partition_of(table["user_id"].to_numpy(), SPEC.partitions)) == {partition}
        times = table["time_ms"].to_numpy()
        assert (times[1:] >= times[:-1]).all()
        found += [tuple(line.values()) for line in table.to_pylist()]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("encoded", [True, False], ids=["dictionary", "text"])
def test_events_of_the_callers_own(tmp_path, encoded):
    rng = np.random.default_rng(4)
    names = pa.array(["like", "exit", "like", "enter", "exposure", "gift", "click"])
    events = pa.table(
        {
            **{name: rng.integers(0, 50, 7) for name in ("user_id", "author_id", "item_id", "visit_id", "time_ms")},
            "domain": np.ones(7, np.int8),
            "event": names.dictionary_encode() if encoded else names,
            "value": rng.random(7).astype(np.float32),
        }
    )
    calls = pa.concat_tables([events.slice(0, 3), events.slice(3)])
    built = build_dataset(tmp_path / "out", make_visits(5), events=calls)
    tables = [pq.read_table(file) for file in sorted((tmp_path / "out/events").iterdir())]
    assert built.events == 7
    stored = pa.concat_tables(tables).select(events.column_names).to_pylist()
    assert sorted(map(str, stored)) == sorted(map(str, events.to_pylist()))
    for table in tables:
        assert table["time_ms"].to_pylist() == sorted(table["time_ms"].to_pylist())


def test_repeats_come_beside_what_follows_from_visits(tmp_path):
    visits = make_visits(5)
    rng = np.random.default_rng(6)
    of = rng.integers(0, 300, 50)
    names = rng.choice(np.array(BEHAVIOURS), 50)
    repeats = pa.table(
        {
            **{name: visits[name][of] for name in ("user_id", "author_id", "item_id", "visit_id", "domain")},
            "event": names,
            "time_ms": visits["exit_ms"][of],
            "value": rng.random(50).astype(np.float32),
        }
    )
    built = []
    for name in ("with", "without"):
        with DatasetBuilder(tmp_path / name, SPEC) as builder:
            for table_name, table in make_tables().items():
                builder.table(table_name, table)
            builder.visits(pa.table(visits))
            if name == "with":
                builder.repeats(repeats.slice(0, 20))
                builder.repeats(repeats.slice(20))
            built.append(builder.finish())
    lines = []
    for name in ("with", "without"):
        tables = [pq.read_table(file) for file in sorted((tmp_path / name / "events").iterdir())]
        for table in tables:
            times = table["time_ms"].to_numpy()
            assert (times[1:] >= times[:-1]).all()
            # The exit of a visit is its last event, also where a repeat comes in its millisecond.
            last = {line["visit_id"]: line["event"] for line in table.to_pylist()}
            assert set(last.values()) <= {"exit"}
        lines.append(sorted(map(str, pa.concat_tables(tables).to_pylist())))
    assert built[0].events == built[1].events + 50
    added = list(map(str, repeats.select(EVENT_COLUMNS.names).to_pylist()))
    assert lines[0] == sorted(lines[1] + added)


def test_histories_hold_what_was_watched_or_acted_upon(tmp_path):
    visits = make_visits(6)
    built = build_dataset(tmp_path / "out", visits, spec=replace(SPEC, candidates=("live",), tag="topic"))
    histories = Histories(tmp_path / "out", built)
    items = make_tables()["items"]
    topic = dict(zip(items["item_id"].to_pylist(), items["topic"].to_pylist(), strict=True))
    happened = np.stack([visits[f"delay_{name}"] >= 0 for name in BEHAVIOURS])
    bits = (happened * np.array([[1], [2], [4]])).sum(axis=0)
    for user in np.unique(visits["user_id"]):
        for domain in range(2):
            kept = (visits["user_id"] == user) & (visits["domain"] == domain)
            kept &= (visits["play_ms"] > 0) | (bits > 0)
            lines = np.flatnonzero(kept)
            lines = lines[
                np.lexsort((visits["visit_id"][lines], visits["request_ms"][lines], visits["exit_ms"][lines]))
            ]
            found = histories.latest(np.array([user]), np.array([START * 2]), domain=domain, length=999)
            assert found.item_id.tolist() == visits["item_id"][lines].tolist()
            assert found.request_ms.tolist() == visits["request_ms"][lines].tolist()
            assert found.bits.tolist() == bits[lines].tolist()
            assert found.tag.tolist() == [topic.get(item, 0) for item in visits["item_id"][lines].tolist()]


def test_truth_is_kept_apart_by_partition(tmp_path):
    visits = make_visits(7)
    truth = {name: visits[name] for name in ("visit_id", "user_id", "request_ms")}
    truth |= {f"p_{name}": np.random.default_rng(k).random(300).astype(np.float32) for k, name in enumerate(BEHAVIOURS)}
    build_dataset(tmp_path / "out", visits, truth=pa.table(truth))
    tables = [pq.read_table(tmp_path / f"out/truth/part-{partition:05d}.parquet") for partition in range(3)]
    for partition, table in enumerate(tables):
        assert set(partition_of(table["user_id"].to_numpy(), 3)) == {partition}
        assert table["request_ms"].to_pylist() == sorted(table["request_ms"].to_pylist())
    stored = pa.concat_tables(tables).sort_by("visit_id")
    assert stored == pa.table(truth).sort_by("visit_id")


def test_factors_are_kept_apart_by_partition_in_the_order_of_time(tmp_path):
    visits = make_visits(7)
    factors = {name: visits[name] for name in ("visit_id", "user_id", "request_ms")}
    rng = np.random.default_rng(1)
    factors |= {"context": rng.integers(0, 4, 300).astype(np.int8), "mood": rng.random(300).astype(np.float32)}
    with DatasetBuilder(tmp_path / "out", SPEC) as builder:
        for name, table in make_tables().items():
            builder.table(name, table)
        builder.visits(pa.table(visits))
        builder.factors(pa.table(factors).slice(0, 100))
        builder.factors(pa.table(factors).slice(100))
        builder.finish()
    tables = [pq.read_table(tmp_path / f"out/truth/factors-{partition:05d}.parquet") for partition in range(3)]
    for partition, table in enumerate(tables):
        assert set(partition_of(table["user_id"].to_numpy(), 3)) == {partition}
        assert table["request_ms"].to_pylist() == sorted(table["request_ms"].to_pylist())
    assert pa.concat_tables(tables).sort_by("visit_id") == pa.table(factors).sort_by("visit_id")


def test_parts_of_factors_with_other_columns_are_refused(tmp_path):
    factors = {name: np.zeros(1, np.int64) for name in ("visit_id", "user_id", "request_ms", "context", "mood")}
    with DatasetBuilder(tmp_path / "out", SPEC) as builder:
        builder.factors(pa.table(factors))
        with pytest.raises(UserError, match="factors: unknown column 'taste'"):
            builder.factors(pa.table({**factors, "taste": np.zeros(1)}))
    with (
        DatasetBuilder(tmp_path / "out", SPEC) as builder,
        pytest.raises(UserError, match="factors: column 'context' is missing"),
    ):
        builder.factors(pa.table({name: factors[name] for name in factors if name != "context"}))


@pytest.mark.parametrize("seed", range(3))
def test_the_future_can_be_anything(tmp_path, seed):
    """Rows do not change if later visits change, or later behaviours of the visits that were open at a moment."""
    visits = make_visits(seed + 20)
    moment = START + 200
    rng = np.random.default_rng(seed)
    altered = {name: column.copy() for name, column in visits.items()}
    later = np.flatnonzero(visits["request_ms"] > moment)
    shuffled = rng.permutation(later)
    for name in altered:
        if name != "visit_id":
            altered[name][later] = altered[name][shuffled]
    ongoing = np.flatnonzero((visits["request_ms"] <= moment) & (visits["exit_ms"] >= moment))
    for behaviour in BEHAVIOURS[:2]:
        altered[f"delay_{behaviour}"][ongoing] = rng.integers(-1, 90, len(ongoing))
    altered["exit_ms"][ongoing] = np.maximum(
        altered["request_ms"][ongoing] + 90, moment + rng.integers(0, 9, len(ongoing))
    )

    rows, histories = [], []
    for name, each in (("before", visits), ("after", altered)):
        built = build_dataset(tmp_path / name, each)
        read = read_rows(tmp_path / name, built, request_until=moment + 1)
        order = np.argsort(read["visit_id"])
        rows.append({column: values[order] for column, values in read.items()})
        histories.append(Histories(tmp_path / name, built))
    for name in ("visit_id", "request_ms", "side", "dense", "stat", "mask"):
        np.testing.assert_array_equal(rows[0][name], rows[1][name], err_msg=name)
    assert (rows[0]["label"] != rows[1]["label"]).any()
    for domain in range(2):
        reads = [each.latest(rows[0]["user_id"], rows[0]["request_ms"], domain=domain, length=50) for each in histories]
        assert len(reads[0].item_id) > 20
        for name in ("lengths", "item_id", "author_id", "request_ms", "play_ms", "bits"):
            np.testing.assert_array_equal(getattr(reads[0], name), getattr(reads[1], name), err_msg=name)


def test_repeated_visits_can_be_dropped(tmp_path):
    visits = make_visits(8)
    twice = {name: np.concatenate([column, column[:40]]) for name, column in visits.items()}
    twice["visit_id"][300:] += 1000
    built = build_dataset(tmp_path / "out", twice, duplicates=DuplicateRule())
    keys = set(zip(*(visits[name].tolist() for name in ("user_id", "item_id", "request_ms")), strict=True))
    assert built.exposures == built.rows == len(keys)
    assert built.extra["duplicates_dropped"] == 340 - len(keys)
    assert read_rows(tmp_path / "out", built)["visit_id"].max() < 1000


def test_a_table_may_come_in_parts(tmp_path):
    visits = make_visits(9)
    build_dataset(tmp_path / "whole", visits)
    with DatasetBuilder(tmp_path / "parts", SPEC) as builder:
        for name, table in make_tables().items():
            for at in range(len(table)):
                builder.table(name, table.slice(at, 1))
        builder.visits(pa.table(visits))
        builder.finish()
    left, right = files_of(tmp_path / "whole"), files_of(tmp_path / "parts")
    different = ["authors.parquet", "checksums.json", "items.parquet", "users.parquet"]
    assert [name for name in left if left[name] != right[name]] == different
    for name in make_tables():
        whole, parts = (pq.read_table(tmp_path / way / f"{name}.parquet") for way in ("whole", "parts"))
        assert whole == parts


def test_more_partitions_than_users(tmp_path):
    spec = replace(SPEC, partitions=40)
    visits = make_visits(0)
    built = build_dataset(tmp_path / "out", visits, spec=spec)
    assert built.rows == len(read_rows(tmp_path / "out", built)["visit_id"]) == 300
    store = RowStore(tmp_path / "out", built)
    assert min(len(store.records(partition).rows) for partition in range(40)) == 0


def test_visit_schema_is_what_the_tests_make():
    assert list(make_visits(0)) == visit_schema(SPEC).names
