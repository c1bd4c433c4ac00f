"""The Foresight job: any ranks, stopped, killed and continued; beside the rules; codes that do not fit it."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from modules.foresight import ForesightPredictor
from tests.conftest import RunRanks
from tests.device_waits import Waits
from tests.nursery import Nursery
from tests.runtime.recorded_mlflow import RecordedRun
from tests.semantic_ids.foresight_world import (
    CODES,
    assert_same_model,
    job_of,
    model_of,
    run,
    without_clock,
    write_codes,
    write_foresight,
)
from tests.semantic_ids.segment_world import SEGMENT_MS, START_MS, assigned, make_version
from trainer.checkpoint.describe import describe_checkpoint, format_checkpoint
from trainer.checkpoint.manifest import list_checkpoints, read_manifest
from trainer.config.foresight import ForesightConfig
from trainer.console.errors import UserError
from trainer.data.format.segment_codes import CodeFile
from trainer.engine import step_loop
from trainer.engine.lr_schedule import learning_rate_factor
from trainer.report.run_report import make_report
from trainer.runtime.rng_state import start_random_states
from trainer.runtime.watchdog import Watchdog
from trainer.semantic_ids import foresight_report, foresight_training
from trainer.semantic_ids.foresight_data import ForesightBatch, ForesightData, fingerprint
from trainer.semantic_ids.foresight_engine import PredictorEngine
from trainer.semantic_ids.foresight_training import (
    ForesightWindow,
    PredictorSteps,
    RowSchedule,
    predictor_size,
)
from trainer.semantic_ids.segments import TimeRange
from trainer.serving.export import export_checkpoint

RULES = ["model", "last", "most frequent", "by run length", "Markov", "author's Markov"]
STEPS = 18
"""Rows to train on: 29 segments of 10 rooms, of which the last has its target in the held-out range; two epochs."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_foresight(tmp_path)
    return tmp_path


def test_a_run_has_the_model_beside_all_rules(
    data: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow_runs = RecordedRun.in_place_of_mlflow(monkeypatch)
    with caplog.at_level("INFO"):
        document = run(data, f"run.mlflow={data / 'store'}")
    assert json.loads((data / "run/metrics.json").read_text()) == document
    (tracked_run,) = mlflow_runs
    losses = [value for name, value, _ in tracked_run.scalars if name == "loss"]
    assert losses == document["training"]["loss"] and tracked_run.ends == [("finished", "")]
    assert {"learning_rate", "evaluation/quality/all/model/top_10"} <= tracked_run.names
    page = make_report(data / "run")
    assert "Next code: top 10" in page and "author&#39;s Markov" in page and "Loss of a row" in page
    assert (document["codes"], document["target"]) == (CODES, "next")
    # The last of the 40 segments of a room has no row, and that in the middle is in neither range.
    assert document["rows"] == {
        "training": 280,
        "held_out": 100,
        "segments_without_author": 0,
        "short_contexts": {"training": document["rows"]["short_contexts"]["training"], "held_out": 0},
    }
    found = document["evaluation"]
    assert found["rows"] == {"all": 100, "unseen authors": 0}
    assert list(found["quality"]["all"]) == RULES and "reference" not in found
    for quality in found["quality"]["all"].values():
        assert 0 <= quality["top_1"] <= quality["top_10"] <= 1 and quality["nll"] > 0
    assert found["quality"]["unseen authors"]["model"] == {"top_1": None, "top_10": None, "nll": None}
    losses = document["training"]["loss"]
    assert document["training"]["steps"] == len(losses) == STEPS
    assert all(rule in caplog.text for rule in RULES) and "280 to train on, 100 held out" in caplog.text
    assert "with fewer than 8 runs" in caplog.text and "0 segments have no known author" in caplog.text

    shown = format_checkpoint(describe_checkpoint(data / "run"), everything=True)
    assert "Foresight's predictor" in shown and "of 560 (100.0 %)" in shown
    with pytest.raises(UserError, match="a checkpoint of Foresight's predictor, and no ranker's"):
        export_checkpoint(data / "run", data / "exported")
    # A finished run is not trained or saved again; it is evaluated again, here in small blocks, and is the same.
    saved = read_manifest(list_checkpoints(data / "run/checkpoints")[-1])
    assert saved.finished and (saved.step, saved.rows_done) == (STEPS, 560)
    monkeypatch.setattr(foresight_report, "ROWS_AT_ONCE", 3)
    again = without_clock(run(data))["evaluation"]["quality"]["all"]
    for rule, quality in found["quality"]["all"].items():
        assert again[rule] == pytest.approx(quality)
    assert read_manifest(list_checkpoints(data / "run/checkpoints")[-1]) == saved


def test_training_learns_what_the_frequency_does_not_say(data: Path) -> None:
    losses = run(data, "train.epochs=12")["training"]["loss"]
    counts = ForesightData.open(job_of(data)).target_counts
    p = counts[counts > 0] / counts.sum()
    assert np.mean(losses[-9:]) < -(p * np.log(p)).sum() - 0.3


def test_the_first_step_is_that_of_the_mean_loss_and_each_has_the_rate_of_its_schedule(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's steps do not depend on the scale of a loss, so its moments are compared."""
    settings = ("train.without_context=0.0", "optimizer.warmup=0.3", "optimizer.decay=linear")
    settings += (f"train.deepspeed={data}/settings.json",)
    (data / "settings.json").write_text('{"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 2}')
    config, rates = job_of(data, *settings), list[float]()
    set_rate, data_of_run = PredictorEngine.set_learning_rate, ForesightData.open(config)

    def record(self: PredictorEngine, rate: float) -> None:
        rates.append(rate)
        set_rate(self, rate)

    monkeypatch.setattr(PredictorEngine, "set_learning_rate", record)
    assert run(data, *settings, stop_after=1) == {}
    found = model_of(data / "run")
    assert run(data, *settings) and rates == [
        0.01 * learning_rate_factor(step, STEPS, 0.3, "linear") for step in range(STEPS)
    ]

    start_random_states(config.run.seed, 0, 0)
    counts = torch.from_numpy(data_of_run.target_counts)
    predictor = ForesightPredictor(predictor_size(config, CODES), data_of_run.centroids, counts)
    part = RowSchedule(data_of_run.training, 32, 2, config.run.seed).step(0)
    batch = ForesightBatch.of(data_of_run.rows, part, 8, torch.device("cpu"))
    predictor.losses(batch.code, predictor(batch.code, batch.length), batch.target).mean().backward()
    compared = 0
    for name, parameter in predictor.named_parameters():
        if parameter.grad is not None:
            own = next(value for key, value in found.items() if key.endswith(f"{name}/exp_avg"))
            torch.testing.assert_close(own, 0.1 * parameter.grad, rtol=1e-3, atol=1e-7)
            compared += bool(parameter.grad.any())
    assert compared > 20


def test_a_window_goes_on_where_it_was_saved_and_the_time_between_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(foresight_training, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    window = ForesightWindow()
    window.add(3.0, 4)
    clock.now = 107.0
    saved = json.loads(json.dumps(window.state_dict()))
    clock.now = 1000.0
    resumed = ForesightWindow()
    resumed.load_state_dict(saved)
    clock.now = 1003.0
    resumed.add(2.0, 1)
    expected = {"step": 7, "loss": 1.0, "learning_rate": 0.5, "rows": 5, "seconds": 10.0}
    assert resumed.entry(7, 0.5) == expected


def test_the_identity_of_codes_is_what_earlier_runs_have_kept() -> None:
    """Another one would refuse to continue them."""
    numbers = np.arange(4)
    codes = CodeFile(Path("f"), "3-0123", (3,), numbers + 5, numbers + 7, numbers, 10 * numbers, numbers[:, None] % 3)
    assert fingerprint(codes, TimeRange(3, 25)) == "6dd99f642dc1c55e"


def test_two_ranks_are_one(data: Path, run_ranks: RunRanks) -> None:
    alone = run(data, f"run.directory={data}/alone", "train.sampled_codes=20")
    run_ranks("trainer.foresight", data / "job.toml", "train.sampled_codes=20")
    both = json.loads((data / "run/metrics.json").read_text())
    np.testing.assert_allclose(both["training"]["loss"], alone["training"]["loss"], rtol=1e-5)
    for name, tensor in model_of(data / "alone").items():
        torch.testing.assert_close(model_of(data / "run")[name], tensor, atol=2e-4, rtol=1e-3)
    first, second = (found["evaluation"]["quality"]["all"] for found in (alone, both))
    # Another order of sums may move the last bits of the model, and so a tie.
    assert second.pop("model")["nll"] == pytest.approx(first.pop("model")["nll"], rel=1e-3)
    for rule, quality in first.items():
        assert second[rule] == pytest.approx(quality)
    assert both["evaluation"]["weights"] == alone["evaluation"]["weights"]


@pytest.mark.parametrize("steps", [1, 10])
def test_a_stopped_run_continues_bit_for_bit(data: Path, steps: int) -> None:
    changes = ("model.dropout=0.2", "train.sampled_codes=8", "train.without_context=0.2", "train.log_every=4")
    through = run(data, f"run.directory={data}/through", *changes)
    assert run(data, *changes, stop_after=steps) == {}
    assert not (data / "run/metrics.json").exists()
    (saved,) = list_checkpoints(data / "run/checkpoints")
    assert saved.name == f"step-{steps:08d}" and not read_manifest(saved).finished
    assert without_clock(run(data, *changes)) == without_clock(through)
    assert_same_model(data / "run", data / "through")


def test_a_run_that_is_killed_in_a_save_continues_bit_for_bit(data: Path, nursery: Nursery) -> None:
    saves = ("checkpoint.every_steps=4", "checkpoint.background=false")
    ended = nursery.run("tests.semantic_ids.killed_foresight", ("3", data / "job.toml", *saves), ranks=1)
    assert ended.status in (-signal.SIGKILL, 128 + signal.SIGKILL), ended.stderr
    assert [path.name for path in list_checkpoints(data / "run/checkpoints")] == ["step-00000004", "step-00000008"]
    resumed = run(data, *saves)
    through = run(data, f"run.directory={data}/through")
    assert without_clock(resumed) == without_clock(through)
    assert_same_model(data / "run", data / "through")


def test_a_run_of_two_ranks_is_continued_by_one(data: Path, run_ranks: RunRanks) -> None:
    whole = run(data, f"run.directory={data}/whole")
    run_ranks("tests.semantic_ids.stopped_foresight", data / "job.toml", "7", ranks=2)
    (saved,) = list_checkpoints(data / "run/checkpoints")
    assert saved.name == "step-00000007"
    found = run(data)
    np.testing.assert_allclose(found["training"]["loss"], whole["training"]["loss"], rtol=1e-5)


def test_the_watchdog_sees_each_step(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    class Seen(Watchdog):
        def __init__(self, world: object, seconds: float) -> None:
            seen.append(seconds)
            super().__init__(world, seconds)  # type: ignore[arg-type]

        def beat(self, step: int) -> None:
            seen.append(step)
            super().beat(step)

    monkeypatch.setattr(step_loop, "Watchdog", Seen)
    run(data)
    assert seen == [300.0, *range(1, STEPS + 1)]


def test_the_host_waits_for_the_device_once_a_step(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, backward = list[int](), PredictorSteps.backward

    def counted_backward(self: PredictorSteps, step: int) -> Sequence[float]:
        starts.append(len(waits.calls))
        return backward(self, step)

    monkeypatch.setattr(PredictorSteps, "backward", counted_backward)
    with Waits() as waits:
        run(data, "train.sampled_codes=4", "train.log_every=3", "model.copy_runs=true")
    of_step = [waits.calls[start:stop] for start, stop in pairwise(starts)]
    # Adam's moments and DeepSpeed's buffers are made in the first step.
    assert of_step[1:] == (STEPS - 2) * [["values of a step"]]


def test_a_loss_that_is_not_finite_is_one_line(data: Path) -> None:
    with pytest.raises(UserError, match=r"the loss of step \d+ is not finite; the predictor was not updated with it"):
        run(data, "optimizer.learning_rate=1e30", "optimizer.warmup=0.0", "train.epochs=5")


@pytest.mark.parametrize("table", ["frozen", "learnt", "random"])
def test_only_a_table_that_is_learnt_moves(data: Path, table: str) -> None:
    run(data, f"model.table={table}", "train.epochs=1", f"run.directory={data}/{table}")
    checkpoint = describe_checkpoint(data / table)
    assert ("table.vectors" in checkpoint["buffers"]) == (table == "frozen")
    assert ("table.vectors" in checkpoint["dense"]) == (table != "frozen")


def test_rows_of_unseen_authors_are_measured_apart(data: Path) -> None:
    """The rooms of author 100 are moved behind the range of training."""
    codes = CodeFile.read(data / "world/codes.parquet")
    write_codes(codes, known_ms=codes.known_ms + np.where(codes.author_id == 100, 20 * 60_000, 0))
    found = run(data, "train.epochs=1")["evaluation"]
    assert found["rows"] == {"all": 4 * 2 * 10 + 2 * 39, "unseen authors": 2 * 39}
    assert found["quality"]["unseen authors"]["model"]["nll"] > 0


def test_authors_and_rooms_that_are_not_known_are_counted(data: Path) -> None:
    codes = CodeFile.read(data / "world/codes.parquet")
    write_codes(codes, author_id=np.where(codes.author_id == 103, -1, codes.author_id))
    document = run(data, "data.runs=40", "train.epochs=1")
    rows = document["rows"]
    assert (rows["segments_without_author"], rows["training"], rows["held_out"]) == (80, 224, 80)
    # No author has 40 runs so early; the predictor takes what is there.
    assert rows["short_contexts"]["training"] > 100


def test_the_truth_of_the_world_is_a_rule_where_the_codes_are_topics(data: Path) -> None:
    topic = CodeFile.read(data / "world/codes.parquet").codes[:, 0].astype(np.int64)
    segments = pq.read_table(data / "world/segments.parquet")
    pq.write_table(segments.append_column("topic", pa.array(topic)), data / "world/segments.parquet")
    (data / "world/truth").mkdir()
    # What comes next is known, but for a twentieth.
    following = np.append(topic[1:], 0)
    p_next = np.full((len(topic), CODES), 0.05 / CODES, np.float32)
    p_next[np.arange(len(topic)), following] += 0.95
    columns = {"item_id": segments["item_id"], "segment": np.arange(len(topic)), "p_next": list(p_next)}
    pq.write_table(pa.table(columns), data / "world/truth/segments.parquet")
    quality = run(data, "train.epochs=1")["evaluation"]["quality"]["all"]
    assert list(quality) == [*RULES, "bayes"]
    assert quality["bayes"]["top_1"] == 1.0 and quality["bayes"]["nll"] < 0.2
    # Topics of other numbers are no truth about the codes.
    pq.write_table(segments.append_column("topic", pa.array((topic + 1) % CODES)), data / "world/segments.parquet")
    assert ForesightData.open(job_of(data)).truth is None


def test_codes_of_another_version_are_refused_by_name(data: Path) -> None:
    run(data, "train.epochs=1", stop_after=2)
    trained = ForesightData.open(job_of(data)).version.name
    other = make_version(data / "other", CODES - 1)
    with pytest.raises(
        UserError, match=rf"codes.parquet: is of the codebook version '{trained}', .*other is {other.name}"
    ):
        run(data, "train.epochs=1", f"data.codebook={data}/other")
    # The same places, but the codes were assigned again by another codebook.
    (data / "codebook").rename(data / "old")
    (data / "other").rename(data / "codebook")
    assigned(other, data / "world")
    with pytest.raises(UserError, match="this run began with another dataset"):
        run(data, "train.epochs=1")
    with pytest.raises(UserError) as refused:
        run(data, "train.epochs=1", "resume.allow_new_data=true")
    message = str(refused.value)
    assert "\n" not in message and f"codebook version '{trained}'" in message and f"codes of {other.name};" in message


def test_later_segments_do_not_make_it_another_run(data: Path) -> None:
    """Segments after the range of training may arrive while a run is stopped."""
    whole = CodeFile.read(data / "world/codes.parquet")
    write_codes(whole, whole.known_ms < START_MS + 35 * SEGMENT_MS)
    assert run(data, stop_after=5) == {}
    write_codes(whole)
    document = run(data)
    assert document["rows"]["held_out"] == 100 and document["training"]["steps"] == STEPS
    # Another code before the end of that range makes it one.
    codes = whole.codes.copy()
    codes[5] = (codes[5] + 1) % CODES
    write_codes(whole, codes=codes)
    with pytest.raises(UserError, match="this run began with another dataset"):
        run(data)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.codes=none.parquet"], "none.parquet: no such file"),
        (["data.codebook=nowhere"], "nowhere: no codebook version here"),
        (["data.path=nowhere"], "nowhere: no dataset here"),
        (["data.train_until=2024-03-03"], "no segment in the range of training has a later one of its room in it"),
        (["data.eval_from=2024-03-04T00:10"], "the held-out range overlaps the range of the training"),
        (["data.train_until=soon"], "data.train_until = 'soon'"),
        (["model.dim=9"], "dim = 9 must be a multiple of heads = 2"),
        (["data.train_until=", "data.eval_until=2024-03-05"], "data.eval_until needs"),
        (["train.deepspeed=none.json"], "train.deepspeed = 'none.json'"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(data: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        run(data, *overrides)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (data / "run").exists()


def test_a_codebook_of_several_levels_is_refused(data: Path) -> None:
    assigned(make_version(data / "levels", 4, 3), data / "world")
    with pytest.raises(UserError, match=r"levels': has 2 levels; Foresight takes codes of one level"):
        run(data, f"data.codebook={data}/levels")


def test_a_held_out_range_without_rows_is_said(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    document = run(data, "data.eval_from=2034-01-01", "train.epochs=1")
    assert document["evaluation"] == {} and "no row is in the held-out range" in caplog.text


def test_every_row_is_in_each_epoch_once() -> None:
    rows = np.arange(10, 33)
    schedule = RowSchedule(rows, 5, 3, seed=1)
    assert (schedule.steps, schedule.rows) == (15, 69)
    epochs = [np.concatenate([schedule.step(epoch * 5 + step) for step in range(5)]) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == rows.tolist()
    assert not np.array_equal(epochs[0], epochs[1])
    # A resumed run asks for a step in the middle first.
    assert np.array_equal(RowSchedule(rows, 5, 3, seed=1).step(8), epochs[1][15:20])


def test_defaults_are_those_of_the_shipped_job() -> None:
    assert ForesightConfig.model_fields["model"].get_default(call_default_factory=True).table == "frozen"


def test_codes_without_segments_are_refused(data: Path) -> None:
    codes = CodeFile.read(data / "world/codes.parquet")
    write_codes(codes, np.zeros(len(codes), bool))
    with pytest.raises(UserError, match="no segment in the range of training"):
        run(data)
