"""Foresight's two passes: what each forecast and each step knows, killed, stopped, continued and extended runs."""

from __future__ import annotations

import errno
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import RunRanks
from tests.llm.tiny import StopAfter
from tests.nursery import Nursery
from tests.runtime.recorded_mlflow import RecordedRun
from tests.semantic_ids import foresight_world
from tests.semantic_ids.foresight_world import assert_same_model, write_codes, write_foresight
from tests.semantic_ids.segment_world import SEGMENT_MS, START_MS, make_version
from trainer.checkpoint.manifest import list_checkpoints
from trainer.checkpoint.reader import Checkpoint
from trainer.config.foresight import load_foresight_follow
from trainer.console.errors import UserError, user_message
from trainer.data.format.content_vectors import ContentVectors
from trainer.data.format.segment_codes import CodeFile
from trainer.data.format.segments import DatasetSegments
from trainer.foresight_follow import run_job
from trainer.report.run_report import make_report
from trainer.runtime.distributed import World
from trainer.runtime.preemption import Preempted, Preemption
from trainer.semantic_ids import foresight_follow, foresight_forecast
from trainer.semantic_ids.foresight_baselines import FREQUENT
from trainer.semantic_ids.foresight_follow_data import FollowData, FollowSchedule
from trainer.semantic_ids.foresight_forecast import TABLES, ForecastSegments, ForecastSpool
from trainer.semantic_ids.foresight_model import TrainedPredictor
from trainer.semantic_ids.foresight_progressive import NAMES
from trainer.semantic_ids.foresight_report import MODEL
from trainer.semantic_ids.foresight_rows import ForesightRows, SegmentContexts

SETTINGS = ("follow.warmup_steps=3", "train.log_every=4", "model.dropout=0.1", "train.without_context=0.1")
STEPS = 11
"""Full steps of 32 rows among the targets of 10 rooms, of which the last tick is open: 10 * 38 rows."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_foresight(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world, and a run on it that nothing has disturbed."""
    path = tmp_path_factory.mktemp("whole")
    write_foresight(path)
    follow(path, "checkpoint.every_steps=1", "checkpoint.keep=99", "checkpoint.background=false")
    return path


def follow(data: Path, *overrides: str, stop_after: int | None = None) -> dict[str, Any]:
    """Run the job in this process; a request to stop comes in step ``stop_after``."""
    config = load_foresight_follow(data / "job.toml", [*SETTINGS, *overrides])
    with World.join("cpu") as world:
        preemption = Preemption() if stop_after is None else StopAfter(stop_after)
        try:
            return run_job(config, world, preemption)
        except Preempted:
            assert stop_after is not None
            return {}


def tables(run: Path) -> dict[str, ContentVectors]:
    return {name: ContentVectors.open(run / "forecasts" / name) for name in TABLES}


def assert_same_tables(one: Path, other: Path) -> None:
    for name, table in tables(one).items():
        assert table.hash == tables(other)[name].hash and len(table) > 100, name


def plain_events(
    segments: list[tuple[int, int]], targets: list[tuple[int, int]], tick_ms: int, batch: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the segments before each step, and the rows of the step, by two loops over ticks; then the last segments.

    Args:
        segments, targets: times and numbers, sorted.
        tick_ms: length of a tick.
        batch: rows of a step.
    """
    forecast, waiting = [], []
    last = segments[-1][0] // tick_ms
    for tick in range(segments[0][0] // tick_ms, last + 1):
        forecast += [number for ms, number in segments if ms // tick_ms == tick]
        waiting += [number for ms, number in targets if ms // tick_ms == tick]
        while tick < last and len(waiting) >= batch:
            yield forecast, waiting[:batch]
            forecast, waiting = [], waiting[batch:]
    yield forecast, []


@given(st.data())
def test_each_step_has_what_two_loops_over_the_ticks_give_it(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 30))
    known_ms = np.array(data.draw(st.lists(st.integers(0, 60), min_size=count, max_size=count)), np.int64)
    item = np.array(data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)), np.int64)
    author, segment = item // 2, np.arange(count)
    code = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    tick_ms, batch = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 4))
    target = data.draw(st.sampled_from(["next", "change"]))
    since = data.draw(st.integers(0, int(known_ms.max())))
    contexts = SegmentContexts.of_all(author, segment, known_ms, np.array(code))
    rows = ForesightRows.make(author, item, segment, known_ms, np.array(code), target=target)
    first = int(np.searchsorted(contexts.as_of_ms, since))
    schedule = FollowSchedule(contexts, rows, first, count, since, tick_ms, batch)
    segments = [(int(ms), place) for place, ms in enumerate(contexts.as_of_ms) if ms >= since]
    # Rows are in the order of their times, so of targets that became known together this is the order as well.
    targets = sorted((int(ms), row) for row, ms in enumerate(rows.target_ms) if ms >= since)
    # Targets of a tick before the first segment's would be none: their own segment is known with them.
    wanted = list(plain_events(segments, targets, tick_ms, batch))
    assert schedule.steps == len(wanted) - 1
    for step, (forecast, trained) in enumerate(wanted):
        assert list(range(*schedule.segments(step))) == forecast
        if step < schedule.steps:
            assert schedule.step(step).tolist() == trained
            done = {row for _, own in wanted[:step] for row in own}
            earlier = {row for row, ms in enumerate(rows.target_ms) if ms < since}
            assert set(schedule.targets_before(step).tolist()) == done | earlier


def test_each_forecast_is_of_the_predictor_before_it_trains_on_the_tick(whole: Path) -> None:
    """Every checkpoint is opened, and the forecasts between it and the next one are computed from its parameters."""
    checkpoints = list_checkpoints(whole / "run/checkpoints")
    assert [int(path.name[-8:]) for path in checkpoints] == list(range(1, STEPS + 1))
    codes = CodeFile.read(whole / "world/codes.parquet")
    segments = ForecastSegments.of(codes)
    rows = ForesightRows.make(codes.author_id, codes.item_id, codes.segment, codes.known_ms, codes.codes[:, 0])
    model = TrainedPredictor.open(whole / "run")
    found = tables(whole / "run")
    checked = np.zeros(len(segments), bool)
    for step, checkpoint in enumerate(checkpoints, start=1):
        predictor = model.predictor()
        for name, slots in Checkpoint.open(checkpoint).model.dense.items():
            predictor.get_parameter(name).data.copy_(slots["parameter"].read())
        # With 32 rows a step, and 10 targets in each tick of 30 s from the second one on: ticks after this step's.
        done = -(-32 * step // 10) + 1
        tick = (segments.contexts.as_of_ms - START_MS) // SEGMENT_MS
        following = -(-32 * (step + 1) // 10) + 1 if step < STEPS else 99
        own = np.flatnonzero((tick > done) & (tick <= following))
        checked[own] = True
        code, length = map(torch.from_numpy, segments.contexts.contexts(own, 8))
        with torch.no_grad():
            forecast = predictor.forecast(code, length, "mean", model.version.codebook.levels[0])
        for name, values in forecast._asdict().items():
            stored = np.asarray(found[name].vectors[found[name].lookup(segments.ids[own])], np.float32)
            np.testing.assert_allclose(stored, values.numpy(), rtol=2e-3, atol=2e-4, err_msg=f"{name} {step}")
    # The others, of the first 5 ticks, are of the predictor before its first step.
    assert (~checked).sum() == 5 * 10 and len(rows) == 390


def test_each_row_is_foreseen_by_the_predictor_before_the_step_that_trains_on_it(whole: Path) -> None:
    data = FollowData.open(load_foresight_follow(whole / "job.toml"))
    records = json.loads((whole / "run/metrics.json").read_text())["progressive"]["records"]
    assert [record["step"] for record in records] == [4, 8, 11]
    page = make_report(whole / "run")
    assert "Progressive top 1" in page and "with a forecast" in page
    model = TrainedPredictor.open(whole / "run")
    # Checkpoints of the steps 4 to 7: what the steps of the second record began with.
    first, loss = 0, 0.0
    for checkpoint in list_checkpoints(whole / "run/checkpoints")[3:7]:
        predictor = model.predictor()
        for name, slots in Checkpoint.open(checkpoint).model.dense.items():
            predictor.get_parameter(name).data.copy_(slots["parameter"].read())
        part = data.schedule.step(int(checkpoint.name[-8:]))
        code, length = map(torch.from_numpy, data.rows.contexts(part, 8))
        with torch.no_grad():
            log_p = predictor.log_p(code, predictor(code, length)).numpy()
        target = data.rows.target[part]
        first += int((log_p.argmax(1) == target).sum())
        loss -= float(log_p[np.arange(len(part)), target].sum())
    assert records[1]["rows"] == 4 * 32
    assert records[1][MODEL] == pytest.approx({"top_1": first / 128, "nll": loss / 128}, rel=1e-5)


def test_records_add_up_to_the_run_and_are_scalars(whole: Path) -> None:
    document = json.loads((whole / "run/metrics.json").read_text())["progressive"]
    records = document["records"]
    assert document["rows"] == sum(record["rows"] for record in records) == 11 * 32
    for name in NAMES:
        for metric, value in document["quality"][name].items():
            mean = sum(record["rows"] * record[name][metric] for record in records) / document["rows"]
            assert value == pytest.approx(mean)
    events = EventAccumulator(str(whole / "run/tensorboard"))
    events.Reload()
    scalars = events.Scalars("progressive_nll/most frequent")
    assert [one.step for one in scalars] == [4, 8, 11]
    assert [one.value for one in scalars] == pytest.approx([record[FREQUENT]["nll"] for record in records])
    assert {"progressive_top_1/model", "progressive_top_1/last", "loss"} <= set(events.Tags()["scalars"])


def test_a_run_has_each_segment_once_and_its_numbers(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        document = follow(whole, f"run.directory={whole}/again", "follow.pooling=last")
    assert document["segments"] == {
        **{"forecast": 400, "earlier": 0, "later": 0, "without_author": 0},
        "short_contexts": document["segments"]["short_contexts"],
    }
    assert document["segments"]["short_contexts"] > 20
    assert document["training"]["steps"] == STEPS and len(document["training"]["loss"]) == 3
    assert document["training"]["slow_ticks"] == 0
    assert f"400 segments with codes of {document['codebook']} to forecast" in caplog.text
    segments = DatasetSegments.read(str(whole / "world"), embedded=False)
    for name, table in tables(whole / "again").items():
        assert table.ids.tolist() == list(range(400))
        assert table.segments == segments.hash(segments.rows_of(table.ids))
        assert (table.hash == tables(whole / "run")[name].hash) == (name != "encoder")
    assert [path.name for path in (whole / "again/forecasts").iterdir() if path.name.startswith(".")] == []


def test_a_stopped_run_continues_bit_for_bit(data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow_runs, store = RecordedRun.in_place_of_mlflow(monkeypatch), f"run.mlflow={data / 'store'}"
    assert follow(data, store, stop_after=7) == {}
    assert not (data / "run/metrics.json").exists() and not (data / "run/forecasts/decoder").exists()
    document = follow(data, store)
    assert [one.ends for one in mlflow_runs] == [[("stopped", "SIGTERM")], [("finished", "")]]
    steps = [step for one in mlflow_runs for name, _, step in one.scalars if name == "progressive_top_1/model"]
    assert steps == [4, 8, 11] and "progressive/quality/model/nll" in mlflow_runs[1].names
    assert document["training"]["steps"] == STEPS
    assert_same_tables(data / "run", whole / "run")
    assert_same_model(data / "run", whole / "run")
    # The stop is inside of a record.
    undisturbed = json.loads((whole / "run/metrics.json").read_text())
    assert document["progressive"] == undisturbed["progressive"]


def test_a_run_that_is_killed_in_a_save_continues_bit_for_bit(data: Path, whole: Path, nursery: Nursery) -> None:
    saves = (*SETTINGS, "checkpoint.every_steps=4", "checkpoint.background=false")
    ended = nursery.run("tests.semantic_ids.killed_foresight", ("2", data / "job.toml", *saves, "--follow"), ranks=1)
    assert ended.status in (-signal.SIGKILL, 128 + signal.SIGKILL), ended.stderr
    assert [path.name for path in list_checkpoints(data / "run/checkpoints")] == ["step-00000004"]
    follow(data)
    assert_same_tables(data / "run", whole / "run")
    # A finished run that is started again changes nothing.
    again = follow(data)
    assert again["training"]["steps"] == STEPS
    assert again["progressive"] == json.loads((whole / "run/metrics.json").read_text())["progressive"]
    assert_same_tables(data / "run", whole / "run")


def test_two_ranks_are_one(data: Path, whole: Path, run_ranks: RunRanks) -> None:
    run_ranks("trainer.foresight_follow", data / "job.toml", *SETTINGS, "model.dropout=0.0", "train.sampled_codes=20")
    follow(data, f"run.directory={data}/alone", "model.dropout=0.0", "train.sampled_codes=20")
    for name, table in tables(data / "alone").items():
        both = tables(data / "run")[name]
        assert np.array_equal(both.ids, table.ids)
        np.testing.assert_allclose(np.asarray(both.vectors), np.asarray(table.vectors), atol=0.02, rtol=0.02)


def test_later_segments_change_no_bit_of_a_forecast(data: Path) -> None:
    codes = CodeFile.read(data / "world/codes.parquet")
    border = START_MS + 13 * 60_000
    late = codes.known_ms > border
    settings = ("train.sampled_codes=8", "follow.tick_seconds=90")
    follow(data, *settings)
    write_codes(
        codes,
        ~(late & (codes.author_id == 101)),
        codes=np.where(late[:, None], (codes.codes + 1) % 12, codes.codes).astype(np.int32),
        known_ms=codes.known_ms + np.where(late & (codes.author_id == 102), 7_000, 0),
    )
    follow(data, *settings, f"run.directory={data}/changed")
    early = np.sort(codes.segment[~late])
    for name, table in tables(data / "run").items():
        other = tables(data / "changed")[name]
        assert np.array_equal(table.vectors[table.lookup(early)], other.vectors[other.lookup(early)]), name
        assert not np.array_equal(table.vectors[table.lookup(other.ids)], other.vectors)


@pytest.mark.parametrize("tick", [30, 600])
def test_a_finished_run_goes_on_to_segments_that_were_added(
    data: Path, tick: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ticks of 600 s, the first part ends inside of a tick."""
    codes = CodeFile.read(data / "world/codes.parquet")
    settings = (f"follow.tick_seconds={tick}", "train.batch_size=16")
    follow(data, *settings, f"run.directory={data}/once")
    monkeypatch.setattr(ForecastSpool, "CHUNK_ROWS", 7)
    write_codes(codes, codes.known_ms <= START_MS + 11 * 60_000)
    assert follow(data, *settings)["segments"]["forecast"] == 220
    write_codes(codes, codes.known_ms <= START_MS + 14 * 60_000)
    # A request to stop in the middle.
    if tick == 30:
        assert follow(data, *settings, stop_after=2) == {}
    write_codes(codes)
    document = follow(data, *settings)
    assert document["segments"]["forecast"] == 400
    # Records end with each part; the sums are those of one run on all.
    once = json.loads((data / "once/metrics.json").read_text())["progressive"]
    assert {name: document["progressive"][name] for name in ("rows", "quality")} == {
        name: once[name] for name in ("rows", "quality")
    }
    assert_same_tables(data / "run", data / "once")
    assert_same_model(data / "run", data / "once")


def test_a_run_starts_from_a_predictor_after_what_it_has_seen(data: Path) -> None:
    foresight_world.run(data, "train.epochs=1", f"run.directory={data}/fit", "model.dropout=0.1")
    start = f"follow.init_from={data}/fit"
    document = follow(data, start)
    # 29 segments of 10 rooms became known before the end of the training.
    assert document["segments"]["earlier"] == 290 and document["segments"]["forecast"] == 110
    model = TrainedPredictor.open(data / "fit")
    segments = ForecastSegments.of(CodeFile.read(data / "world/codes.parquet"))
    code, length = map(torch.from_numpy, segments.contexts.contexts(np.arange(290, 300), 8))
    with torch.no_grad():
        forecast = model.predictor().forecast(code, length, "mean", model.version.codebook.levels[0])
    table = tables(data / "run")["decoder"]
    stored = np.asarray(table.vectors[table.lookup(segments.ids[290:300])], np.float32)
    np.testing.assert_allclose(stored, forecast.decoder.numpy(), rtol=2e-3, atol=2e-4)
    assert not np.array_equal(table.vectors[-1:], table.vectors[:1])

    with pytest.raises(
        UserError, match=r"follow.since = 2024-03-04 is before 2024-03-04T00:15:00.*has seen what comes"
    ):
        follow(data, start, "follow.since=2024-03-04", f"run.directory={data}/x")
    with pytest.raises(UserError, match=r"its predictor is another one \(data.runs = 8 then, 9 now"):
        follow(data, start, "data.runs=9", f"run.directory={data}/x")
    with pytest.raises(UserError, match=r"trained on all segments \(follow.until is empty\)"):
        follow(data, f"follow.init_from={data}/run", f"run.directory={data}/x")
    with pytest.raises(UserError, match=r"began with other settings .*follow"):
        foresight_world.run(data, "train.epochs=1", f"run.directory={data}/run", *SETTINGS)
    assert not (data / "x").exists()
    # The run to start from may change only together with the directory.
    foresight_world.run(data, "train.epochs=2", f"run.directory={data}/other", "model.dropout=0.1")
    shutil.rmtree(data / "fit")
    (data / "other").rename(data / "fit")
    with pytest.raises(UserError, match="started from another predictor"):
        follow(data, start)


def test_data_that_does_not_fit_is_one_line(data: Path, whole: Path) -> None:
    codes = CodeFile.read(data / "world/codes.parquet")
    for overrides, message in (
        (["follow.since=2030-01-01"], "no segment of a known author became known from 2030-01-01T00:00"),
        (["follow.until=2024-03-04"], "no segment of a known author"),
        (["follow.until=2024-03-01", "follow.since=2024-03-02"], "must be later than follow.since"),
        (["follow.since=soon"], "follow.since = 'soon': not a time"),
        (["follow.init_from=nowhere"], "nowhere: no run here"),
        ([f"data.codebook={make_version(data / 'other', 11).path}"], "is of the codebook version"),
        (["data.codes=none.parquet"], "none.parquet: no such file"),
    ):
        with pytest.raises(UserError) as error:
            follow(data, *overrides)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert not (data / "run").exists()

    follow(data, stop_after=3)
    # An earlier code, a shorter file, and another end of the range.
    write_codes(codes, codes=(codes.codes + (codes.segment == 3)[:, None]).astype(np.int32) % 12)
    with pytest.raises(UserError, match=r"segments of .* before 2024-03-04T00:20:00.001.* have changed"):
        follow(data)
    write_codes(codes, codes.known_ms < START_MS + 10 * 60_000)
    with pytest.raises(UserError, match=r"has followed the segments up to .*later ones only"):
        follow(data)
    write_codes(codes)
    # What was computed before is not made up.
    shutil.rmtree(data / "run/forecasts")
    with pytest.raises(UserError, match=r"decoder|encoder"):
        follow(data)


def test_fewer_targets_than_a_batch_are_said(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    document = follow(data, "train.batch_size=1000")
    assert document["training"]["steps"] == 0 and document["segments"]["forecast"] == 400
    assert "has fewer targets than train.batch_size; nothing is trained" in caplog.text
    assert len(tables(data / "run")["decoder"]) == 400


def test_ticks_that_take_longer_than_their_event_time_are_counted_and_said(
    data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Each look at the clock is 100 s after the one before; steps of 32 rows are 90 s or 120 s apart.
    clock = iter(range(0, 100_000, 100))
    monkeypatch.setattr(foresight_follow, "perf_counter", lambda: float(next(clock)))
    document = follow(data)
    assert 2 <= document["training"]["slow_ticks"] < STEPS
    assert "100.0 s for 90 s of event time" in caplog.text
    assert f"{document['training']['slow_ticks']} times the forecasts and steps of some ticks" in caplog.text


def test_a_run_that_ends_while_it_writes_its_tables_continues(
    data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(self: ForecastSpool, *arguments: Any) -> None:
        raise UserError("ended")

    with monkeypatch.context() as patch:
        patch.setattr(ForecastSpool, "write_tables", ended)
        with pytest.raises(UserError, match="ended"):
            follow(data)
    # All is computed, and of the tables nothing is there.
    assert not (data / "run/metrics.json").exists() and not (data / "run/forecasts/encoder").exists()

    def half_removed(directory: Path, names: dict[str, int]) -> None:
        next(directory.glob(".encoder*")).unlink()
        raise UserError("ended")

    with monkeypatch.context() as patch:
        patch.setattr(ForecastSpool, "remove", half_removed)
        with pytest.raises(UserError, match="ended"):
            follow(data)
    assert_same_tables(data / "run", whole / "run")
    assert not (data / "run/metrics.json").exists()
    follow(data)
    assert_same_tables(data / "run", whole / "run")
    assert not list((data / "run/forecasts").glob(".*"))


def test_a_full_disk_is_one_line_and_the_run_continues(
    data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, writes = foresight_forecast.write_fully, []

    def full(file: Any, content: bytes) -> None:
        writes.append(content)
        if len(writes) == 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(foresight_forecast, "write_fully", full)
        with pytest.raises(OSError) as error:
            follow(data, "checkpoint.every_steps=2", "checkpoint.background=false")
    line = user_message(error.value)
    assert line is not None and f"{data}/run/forecasts/" in line and "free some space" in line
    follow(data)
    assert_same_tables(data / "run", whole / "run")
