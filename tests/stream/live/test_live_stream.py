"""Tests of a rank's stream state against the stored dataset: rows with features, requests, outcomes, histories."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.config.stream import LabelConfig, StreamConfig
from trainer.data.format.growing_history import GrowingHistories
from trainer.data.format.history import Histories
from trainer.data.format.schema import KINDS, DatasetSpec, Rows, partition_of
from trainer.data.format.shards import read_rows
from trainer.data.simulator.write_dataset import simulate
from trainer.ranking.training_stream import as_arrays, as_tensors
from trainer.stream.labels.assembled_rows import END_OF_TIME, concatenate
from trainer.stream.labels.batch_assembler import assemble_batch
from trainer.stream.labels.event_log import EventLog
from trainer.stream.labels.policy import event_timeouts, report_policy
from trainer.stream.live import live_stream
from trainer.stream.live.live_stream import LiveStream
from trainer.stream.sources.replay import ReplaySource

HOUR_MS = 3_600_000
FEATURES = ("side", "dense", "stat")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("live") / "world"
    simulate(path, users=60, days=2, partitions=3, seed=11)
    return path


def since_ms(spec: DatasetSpec) -> int:
    return spec.span_ms[0] + 20 * HOUR_MS


def open_live(world: Path, spec: DatasetSpec, labels: LabelConfig, owned: Sequence[int]) -> LiveStream:
    histories = GrowingHistories(
        Histories(world, spec),
        lambda user: np.isin(partition_of(user, spec.partitions), owned),
        owned,
        since_ms(spec),
    )
    return LiveStream(spec, labels, owned, histories, lambda item: np.zeros(len(item), np.int32), 2, True)


def through_a_file(live: LiveStream, world: Path, labels: LabelConfig, owned: list[int]) -> LiveStream:
    """Save the state in the form of a checkpoint of two ranks, and load it on one rank."""
    spec = DatasetSpec.load(world)
    buffer = io.BytesIO()
    torch.save(as_tensors(live.state_dict()), buffer)
    buffer.seek(0)
    saved = as_arrays(torch.load(buffer, weights_only=True))
    fresh = open_live(world, spec, labels, owned)
    empty = {"partitions": {}, "counts": dict.fromkeys(live.counts, 0)}
    fresh.load_state_dict([empty, saved], [0, 1])
    return fresh


@pytest.mark.parametrize("policy", ["full", "fast_slow", "realtime", "realtime_naive"])
@pytest.mark.parametrize(("slice_minutes", "saved_every"), [(10, 0), (37, 3)])
def test_the_stream_gives_the_rows_of_the_dataset(world, policy, slice_minutes, saved_every, monkeypatch):
    if saved_every:
        # Features of finished visits are removed at once.
        monkeypatch.setattr(live_stream, "_SLACK", 3)
    spec, labels = DatasetSpec.load(world), LabelConfig(policy=policy)
    owned, slice_ms = [0, 2], slice_minutes * 60_000
    live = open_live(world, spec, labels, owned)
    source = ReplaySource(world, StreamConfig(batch_events=300), since_ms(spec))
    rows: list[Rows] = []
    requests: list[Rows] = []
    outcomes: list[Rows] = []
    rng = np.random.default_rng(5)
    now = 0
    with source.open(owned, slice_ms=slice_ms) as reader:
        for number, batch in enumerate(reader):
            at = max(place[2] for place in batch.position.values()) // slice_ms * slice_ms
            if at > now:
                live.advance(at)
                now = at
            live.push(batch)
            taken = live.take_requests()
            requests.append(taken)
            # The logits encode their request, so that a mix-up shows.
            live.add_predictions(
                taken, np.stack([taken["visit_id"], taken["request_ms"] % 1000], axis=1).astype(np.float32)
            )
            outcome = live.take_outcomes()
            np.testing.assert_array_equal(outcome.logits[:, 0], outcome.rows["visit_id"].astype(np.float32))
            outcomes.append(outcome.rows)
            rows.append(live.take_rows(now - int(rng.integers(0, HOUR_MS))))
            if saved_every and number % saved_every == 0:
                live = through_a_file(live, world, labels, owned)
    live.advance()
    last = live.take_requests()
    live.add_predictions(last, np.stack([last["visit_id"], last["visit_id"]], axis=1).astype(np.float32))
    requests.append(last)
    outcomes.append(live.take_outcomes().rows)
    rows.append(live.take_rows(END_OF_TIME))
    assert live.counts["without_features"] == live.counts["unanswered"] == live.counts["late"] == 0
    of_kinds = np.bincount(np.concatenate([part["kind"] for part in rows]), minlength=len(KINDS))
    assert [live.counts[f"rows_{kind}"] for kind in KINDS] == of_kinds.tolist()

    expected, full = [], []
    log = EventLog(world)
    for partition in owned:
        events = log.read(partition)
        events = {name: column[events["time_ms"] >= since_ms(spec)] for name, column in events.items()}
        expected.append(assemble_batch(spec, report_policy(labels), event_timeouts(labels), events).rows)
        full.append(
            assemble_batch(spec, report_policy(LabelConfig(policy="full")), event_timeouts(labels), events).rows
        )
    stored = read_rows(world, spec)
    check_rows(concatenate(rows), concatenate(expected), stored)
    check_rows(concatenate(outcomes), concatenate(full), None)
    asked = concatenate(requests)
    assert sorted(asked["visit_id"].tolist()) == sorted(concatenate(full)["visit_id"].tolist())
    check_features(asked, stored)


def check_rows(found: Rows, expected: Rows, stored: Rows | None) -> None:
    names = ("visit_id", "user_id", "author_id", "item_id", "domain", "kind", "request_ms", "emit_ms")
    for rows in (found, expected):
        order = np.lexsort([rows[name] for name in ("request_ms", "visit_id", "user_id", "emit_ms")])
        rows.update({name: column[order] for name, column in rows.items()})
    for name in (*names, "label", "mask"):
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert len(found["visit_id"]) > 50
    if stored is not None:
        check_features(found, stored)


def check_features(found: Rows, stored: Rows) -> None:
    place = {visit: at for at, visit in enumerate(stored["visit_id"].tolist())}
    at = [place[visit] for visit in found["visit_id"].tolist()]
    for name in FEATURES:
        np.testing.assert_array_equal(found[name], stored[name][at], err_msg=name)


def test_rows_come_in_order_and_not_before_their_time(world):
    spec, labels = DatasetSpec.load(world), LabelConfig()
    live = open_live(world, spec, labels, [0, 1, 2])
    with ReplaySource(world, StreamConfig(), since_ms(spec)).open(range(3)) as reader:
        for batch in reader:
            live.push(batch)
    live.advance()
    middle = (since_ms(spec) + spec.span_ms[1]) // 2
    waiting = live.trainable(middle)
    first, rest = live.take_rows(middle), live.take_rows(END_OF_TIME)
    assert len(first["emit_ms"]) == waiting > 0 and first["emit_ms"].max() < middle <= rest["emit_ms"].min()
    for rows in (first, rest):
        keys = list(
            zip(*(rows[name].tolist() for name in ("emit_ms", "user_id", "visit_id", "request_ms")), strict=True)
        )
        assert keys == sorted(keys) and len(set(keys)) == len(keys)


def test_histories_grow_into_those_of_the_dataset(world):
    spec, labels = DatasetSpec.load(world), LabelConfig()
    owned = [0, 1, 2]
    stored = Histories(world, spec)
    growing = GrowingHistories(stored, lambda user: np.ones(len(user), bool), owned, since_ms(spec))
    live = LiveStream(spec, labels, owned, growing, lambda item: np.zeros(len(item), np.int32), 2, False)
    users = np.unique(read_rows(world, spec)["user_id"])
    slice_ms, rng = 30 * 60_000, np.random.default_rng(1)
    asked = 0
    with ReplaySource(world, StreamConfig(), since_ms(spec)).open(owned, slice_ms=slice_ms) as reader:
        for batch in reader:
            now = max(place[2] for place in batch.position.values()) // slice_ms * slice_ms
            live.advance(now)
            # Histories hold the visits that ended before the watermark, and no later ones.
            as_of = now - labels.max_out_of_orderness_ms - rng.integers(0, 20 * HOUR_MS, len(users))
            for domain in (0, 1):
                for require in (0, 1):
                    ours, theirs = (
                        histories.latest(users, as_of, domain=domain, length=15, require=require)
                        for histories in (growing, stored)
                    )
                    for name in ("lengths", "item_id", "author_id", "request_ms", "play_ms", "bits"):
                        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
            asked += 1
            live.push(batch)
    assert asked > 20
