"""Watch times of visits: equal to a plain loop, and never from the future, least of all the visit's own."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from tests.paths import ROOT
from trainer.comment_staytime import watch_times
from trainer.comment_staytime.evaluation import fitted_values, train_and_evaluate
from trainer.comment_staytime.inputs import StaytimeData, load_staytime
from trainer.comment_staytime.model import build_network, fit_base_on, joint_loss, make_batch, predict, train
from trainer.comment_staytime.watch_times import (
    MOST_LOOPS,
    PAST_WATCH_FEATURES,
    WatchTimes,
    past_watch_features,
    read_watch_times,
    watch_labels,
)
from trainer.config.load import load_job
from trainer.config.staytime import StaytimeConfig
from trainer.console.errors import UserError
from trainer.data.format.text_schema import read_texts
from trainer.data.simulator.write_dataset import simulate
from trainer.runtime.checksums import CHECKSUMS

JOB = ROOT / "configs" / "staytime.toml"
CPU = torch.device("cpu")
SMALL = ["train.epochs=1", "train.batch_size=512", "input.dim=8", "base.widths=[8]", "lcu.enabled=false"]
CUT_MS = 1_709_654_400_000
SEEDS = range(3)


class Log:
    """Visits of few users to videos of few authors, with equal times, unknown ends, authors, tags and durations."""

    def __init__(self, seed: int, visits: int = 150) -> None:
        random = np.random.default_rng(seed)
        self.user, self.author, self.tag = (random.integers(low, 4, visits) for low in (0, -1, -1))
        self.request = random.integers(0, 300, visits)
        seconds = random.choice([0.0, 1.0, 3.5, 20.0, 400.0], visits)
        known = random.random(visits) < 0.9
        # A visit of 0 seconds ends in the millisecond of its request.
        end = self.request + seconds.astype(np.int64)
        self.duration = random.choice([0.0, 5.0, 30.0], visits)
        self.watch = WatchTimes(np.where(known, seconds, 0), np.where(known, end, 0), known)
        self.training, self.until = np.flatnonzero(self.request < 200), 210

    def features(self, watch: WatchTimes | None = None, last: int = 5) -> np.ndarray:
        return past_watch_features(
            self.watch if watch is None else watch,
            *(self.user, self.author, self.tag, self.duration, self.request),
            last=last,
            training=self.training,
            until_ms=self.until,
        )


def plain(log: Log, row: int, last: int) -> list[float]:
    """Describe one visit by looping over all of them."""
    watch = log.watch
    fitted = [r for r in log.training if watch.known[r] and watch.known_ms[r] < log.until]
    prior = np.mean([np.log1p(watch.seconds[r]) for r in fitted])

    def shares(rows: list[int]) -> list[float]:
        return [min(watch.seconds[r] / log.duration[r], MOST_LOOPS) for r in rows if log.duration[r] > 0]

    def latest(*groups: np.ndarray) -> list[int]:
        rows = [
            r
            for r in range(len(log.user))
            if watch.known[r]
            and watch.known_ms[r] < log.request[row]
            and all(group[r] == group[row] for group in groups)
        ]
        return sorted(rows, key=lambda r: watch.known_ms[r])[-last:]

    own = latest(log.user)
    logs = [np.log1p(watch.seconds[r]) for r in own]
    mean = (sum(logs) + prior) / (len(own) + 1)
    share = (sum(shares(own)) + np.mean(shares(fitted))) / (len(shares(own)) + 1)
    found = [mean, share, np.log1p(len(own)), logs[-1] if logs else prior]
    for group in (log.author, log.tag):
        alike = latest(log.user, group) if group[row] >= 0 else []
        found += [(sum(np.log1p(watch.seconds[r]) for r in alike) + mean) / (len(alike) + 1), np.log1p(len(alike))]
    return found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("last", [1, 5, 1000])
def test_the_features_are_those_of_a_plain_loop(seed: int, last: int) -> None:
    log = Log(seed)
    found = log.features(last=last)
    assert found.shape == (150, len(PAST_WATCH_FEATURES))
    np.testing.assert_allclose(found, [plain(log, row, last) for row in range(150)], rtol=1e-5)


@pytest.mark.parametrize(("seconds", "loops"), [(0.0, 0.0), (25.0, 2.5), (30.0, 3.0), (600.0, 3.0)])
def test_a_video_that_is_looped_counts_as_three_loops_at_most(seconds: float, loops: float) -> None:
    log = Log(1, visits=2)
    log.user, log.author, log.tag = (np.zeros(2, int) for _ in range(3))
    log.request, log.duration = np.array([0, 10]), np.full(2, 10.0)
    log.watch = WatchTimes(np.array([seconds, 1.0]), np.array([1, 20]), np.ones(2, bool))
    log.training, log.until = np.array([0]), 5
    # The prior is this one visit, too.
    assert log.features()[1, PAST_WATCH_FEATURES.index("past_watch_share")] == loops


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_known_at_or_after_a_request_is_looked_at(seed: int) -> None:
    """Other watch times and ends of all visits that end at a moment or later, within what was known then."""
    log, random = Log(seed), np.random.default_rng(seed)
    before = log.features()
    for moment in (220, 250, 280):
        later = log.watch.known_ms >= moment
        other = WatchTimes(
            np.where(later, random.integers(0, 999, 150), log.watch.seconds),
            np.where(later, random.integers(moment, 900, 150), log.watch.known_ms),
            np.where(later, random.random(150) < 0.5, log.watch.known),
        )
        after, asked = log.features(other), log.request <= moment
        np.testing.assert_array_equal(before[asked], after[asked])
        assert not np.array_equal(before, after)


@pytest.mark.parametrize("seed", SEEDS)
def test_later_visits_of_other_users_change_no_bit(seed: int) -> None:
    """Watch times of the later visits are so long that a running total in float64 loses digits of the others."""
    short, long, random = Log(seed), Log(seed, visits=300), np.random.default_rng(seed)
    for log, count in ((short, 150), (long, 300)):
        log.until, log.training = 300, np.arange(100)
        log.user, log.request, log.duration = 2 * np.arange(count) % 8, 7 * np.arange(count), np.full(count, 30.0)
        log.author, log.tag = np.arange(count) % 3, np.arange(count) % 5
    seconds = np.concatenate([1e-5 * random.random(150), 1e300 * random.random(150)])
    # One user sorts before the others, one behind, and two between them.
    long.user[150:] = random.choice([-1, 1, 3, 9], 150)
    for log, count in ((short, 150), (long, 300)):
        log.watch = WatchTimes(seconds[:count], log.request + 1, np.ones(count, bool))
    np.testing.assert_array_equal(long.features()[:150], short.features())


def test_the_total_over_all_users_may_wrap_around(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(1)
    expected, unit = log.features(), 1 << 55
    assert unit * np.log1p(log.watch.seconds).sum() > 2**63
    monkeypatch.setattr(watch_times, "UNIT", unit)
    np.testing.assert_allclose(log.features(), expected, rtol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_visits_own_watch_time_is_none_of_its_features(seed: int) -> None:
    log = Log(seed)
    before = log.features()
    for row in np.flatnonzero(log.request > log.until)[:20]:
        for seconds in (0.0, 7.0, 5000.0):
            watched, ended = log.watch.seconds.copy(), log.watch.known_ms.copy()
            watched[row], ended[row] = seconds, log.request[row] + int(seconds)
            changed = log.features(replace(log.watch, seconds=watched, known_ms=ended))
            np.testing.assert_array_equal(changed[row], before[row])


def test_labels_are_standardised_on_what_training_knew() -> None:
    log = Log(1)
    labels = watch_labels(log.watch, log.training, log.until)
    in_training = np.isin(np.arange(150), log.training)
    late = in_training & (log.watch.known_ms >= log.until)
    assert late.any() and np.isnan(labels.target[late | ~log.watch.known]).all()
    fitted = in_training & ~late & log.watch.known
    assert labels.target[fitted].mean() == pytest.approx(0, abs=1e-6)
    assert labels.target[fitted].std() == pytest.approx(1, rel=1e-5)
    there = ~late & log.watch.known
    np.testing.assert_allclose(
        labels.mean + labels.scale * labels.target[there], np.log1p(log.watch.seconds[there]), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(UserError, match="no training visit ended before the end of training"):
        watch_labels(log.watch, log.training, 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("watch") / "world"
    simulate(out, users=40, days=3, partitions=2, seed=3, texts=True)
    return out


def job(world: Path, *overrides: str) -> StaytimeConfig:
    return load_job(StaytimeConfig, JOB, [f"data.path={world}", "data.eval_from=2024-03-06", *SMALL, *overrides])


def load(config: StaytimeConfig) -> StaytimeData:
    return load_staytime(config.data, config.input, config.lcu, config.run.seed, config.watch)


def other_future(world: Path, copy: Path) -> Path:
    """Copy a world with other watch times of all visits that end after training."""
    shutil.copytree(world, copy)
    (copy / CHECKSUMS).unlink()
    random = np.random.default_rng(1)
    for file in copy.glob("events/*.parquet"):
        table = pq.read_table(file)
        later = pc.equal(table["event"].cast(pa.string()), "exit").to_numpy() & (table["time_ms"].to_numpy() >= CUT_MS)
        value = np.where(later, random.integers(0, 90_000, len(table)), table["value"].to_numpy())
        at = table.column_names.index("value")
        pq.write_table(table.set_column(at, "value", pa.array(value.astype(np.float32))), file)
    return copy


def test_watch_times_are_those_of_the_histories_entry_by_entry(world: Path) -> None:
    visits = read_texts(world, "visits", ["visit_id", "request_ms"])
    watch = read_watch_times(str(world), visits["visit_id"].to_numpy())
    assert watch.known.all() and (watch.known_ms >= visits["request_ms"].to_numpy()).all()
    seconds = np.load(world / "history/play_ms.npy") / 1000
    # Histories leave out visits without a watch time or a behaviour, and have live rooms beside the videos.
    short = np.sort(watch.seconds[watch.seconds > 0])
    assert np.isin(short.astype(np.float32), seconds.astype(np.float32)).all()
    with pytest.raises(UserError, match=r"the events have no end of any visit of texts/visits"):
        read_watch_times(str(world), np.array([1 << 60]))


@pytest.mark.parametrize("task", ["joint", "feature"])
def test_watch_times_of_the_held_out_days_change_nothing_that_is_learnt_or_predicted(
    world: Path, tmp_path: Path, task: str
) -> None:
    """Without past watch times, the held-out predictions do not depend on held-out watch times at all."""
    trained = []
    for path in (world, other_future(world, tmp_path / "changed")):
        config = job(path, f"watch.task={task}", "input.duration=true")
        data = load(config)
        torch.manual_seed(1)
        base = fit_base_on(config, data)
        network = build_network(config, data, base)
        train(config, data, base, network, CPU, quiet=True)
        trained.append((network.state_dict(), predict(config, data, base, network, CPU, data.held_out), data))
    (first, before, data), (second, after, other) = trained
    assert all(torch.equal(first[name], second[name]) for name in first)
    np.testing.assert_array_equal(before.seconds, after.seconds)
    assert before.watch is not None and after.watch is not None and data.watch is not None and other.watch is not None
    np.testing.assert_array_equal(before.watch, after.watch)
    assert not np.array_equal(data.watch.target, other.watch.target, equal_nan=True)


def test_past_watch_times_are_features_as_of_the_request(world: Path, tmp_path: Path) -> None:
    """Other watch times after training change features of later requests only."""
    settings = ("input.past_watch=20", "input.duration=true")
    data, other = (load(job(path, *settings)) for path in (world, other_future(world, tmp_path / "changed")))
    assert data.dense_names[-9:] == ("log_video_seconds", *PAST_WATCH_FEATURES)
    np.testing.assert_array_equal(data.dense[data.training], other.dense[other.training])
    assert not np.array_equal(data.dense[data.held_out], other.dense[other.held_out])
    without = load(job(world))
    np.testing.assert_array_equal(data.dense[:, :-9], without.dense)
    assert fitted_values(data, {})["digest"] != fitted_values(without, {})["digest"]
    left = load(job(world, *settings, "input.exclude=['tag_past_watch']"))
    assert "tag_past_watch" not in left.dense_names and len(left.dense_names) == len(data.dense_names) - 1


@pytest.mark.parametrize("task", ["joint", "feature"])
@pytest.mark.parametrize("lcu", ["lcu.enabled=false", "lcu.enabled=true"])
def test_the_watch_time_is_learnt_with_and_without_lcu(world: Path, task: str, lcu: str) -> None:
    config = job(world, f"watch.task={task}", lcu, "lcu.heads=2", "lcu.hidden=8", "input.past_watch=20")
    metrics = train_and_evaluate(config, load(config), CPU, quiet=True)
    assert metrics["losses"][0]["watch"] > 0 and metrics["watch"]["rmse_log"] > 0
    assert metrics["watch"]["explained"] < 1


@pytest.mark.parametrize("task", ["joint", "feature"])
def test_the_joint_loss_has_the_squared_error_of_the_known_watch_times(world: Path, task: str) -> None:
    config = job(world, f"watch.task={task}")
    data = load(config)
    assert data.watch is not None
    data.watch.target[data.training[:3]] = np.nan
    base = fit_base_on(config, data)
    network = build_network(config, data, base)
    torch.manual_seed(2)
    for weight in network.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    inputs, labels = make_batch(data, data.training[:40], CPU)
    output = network(inputs)
    parts = joint_loss(output, base, labels, inputs.present, config.lcu, 0.7)
    assert output.watch is not None
    expected = (output.watch[3:] - torch.from_numpy(data.watch.target[data.training[3:40]])).square().mean()
    torch.testing.assert_close(parts["watch"], expected)
    torch.testing.assert_close(parts["loss"], parts["staytime"] + 0.7 * expected)
    parts["loss"].backward()
    assert all(torch.isfinite(weight.grad).all() for weight in network.parameters() if weight.grad is not None)
    if task == "feature":
        # The staytime's loss teaches nothing to the network that predicts the watch time.
        network.zero_grad()
        base.loss(network(inputs).logits, labels.seconds, labels.duration).mean().backward()
        assert all(weight.grad is None or not weight.grad.any() for weight in network.watch.parameters())  # type: ignore[union-attr, operator]


def test_the_released_code_has_no_watch_times(world: Path) -> None:
    with pytest.raises(UserError, match=r"`separate_opening` and lcu\.mode = 'released' need watch\.task = 'none'"):
        job(world, "lcu.peculiarities=['separate_opening']", "watch.task=joint")


def test_a_feature_of_the_dataset_with_our_name_is_refused(world: Path, tmp_path: Path) -> None:
    copy = tmp_path / "named"
    shutil.copytree(world, copy)
    (copy / CHECKSUMS).unlink()
    described = (copy / "dataset.json").read_text()
    (copy / "dataset.json").write_text(described.replace('"duration_band"', '"log_video_seconds"'))
    items = pq.read_table(copy / "items.parquet")
    names = ["log_video_seconds" if name == "duration_band" else name for name in items.column_names]
    pq.write_table(items.rename_columns(names), copy / "items.parquet")
    with pytest.raises(UserError, match=r"input\.duration makes a feature 'log_video_seconds', but"):
        load(job(copy, "input.duration=true"))
