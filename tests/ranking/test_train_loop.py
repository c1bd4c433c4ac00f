"""Training loop of stored rows on one rank: weights of the losses, and the schedule of both learning rates."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from tests.device_waits import Waits
from tests.distributed.engine_ranks import everything
from tests.runtime.recorded_mlflow import RecordedRun
from trainer.config.ranker import JobConfig, load_config
from trainer.data.format.schema import DatasetSpec
from trainer.data.simulator.write_dataset import simulate
from trainer.engine import build_engine
from trainer.engine.hybrid_engine import HybridEngine, StepResult
from trainer.rank import run_job
from trainer.ranking.checkpoints import Checkpoints
from trainer.ranking.train_loop import write_scalars
from trainer.ranking.training_state import TrainingState
from trainer.runtime.distributed import World
from trainer.runtime.phase_timer import PHASES
from trainer.runtime.preemption import Preemption

ROWS = 24
WEIGHTS = {"click": 0.25, "gift": 4.0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("train") / "world"
    simulate(path, users=60, days=2, partitions=2, seed=2)
    return path


def job(dataset: Path, directory: Path, decay: str, *more: str) -> JobConfig:
    settings = [
        f"data.path={dataset}",
        f"run.directory={directory}",
        "data.eval_from=",
        "model.expert_layers=[[8]]",
        "model.tower=[4]",
        "features.history.short.length=3",
        "features.history.live.length=3",
        "tables.learning_rate=0.2",
        "optimizer.learning_rate=0.01",
        "optimizer.warmup=0.3",
        f"optimizer.decay={decay}",
        f"train.batch_size={ROWS}",
        "train.epochs=2",
        "train.device=cpu",
        *(f"train.weights.{name}={weight}" for name, weight in WEIGHTS.items()),
        *more,
    ]
    return load_config("configs/simulated.toml", settings)


@pytest.mark.parametrize("decay", ["linear", "constant"])
def test_weights_and_learning_rates_of_each_step(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decay: str
) -> None:
    rates: list[tuple[float, float]] = []
    results: list[StepResult] = []
    used: list[tuple[float, float]] = []
    set_rates, advance = HybridEngine.set_learning_rate, TrainingState.advance

    def recording_rates(self: HybridEngine, tables: float, dense: float) -> None:
        rates.append((tables, dense))
        set_rates(self, tables, dense)

    def recording_advance(self: TrainingState, result: StepResult) -> None:
        results.append(result)
        used.append(rates[-1])
        advance(self, result)

    monkeypatch.setattr(HybridEngine, "set_learning_rate", recording_rates)
    monkeypatch.setattr(TrainingState, "advance", recording_advance)
    mlflow_runs = RecordedRun.in_place_of_mlflow(monkeypatch)
    config = job(dataset, tmp_path / "run", decay, f"run.mlflow={tmp_path / 'store'}", "train.log_every=1")
    with World.join("cpu") as world:
        run_job(config, world, Preemption())

    assert len(results) > 10
    (training,) = mlflow_runs
    assert [point for point in training.scalars if point[0] == "loss"] == [
        ("loss", pytest.approx(float(result.loss)), step) for step, result in enumerate(results, 1)
    ]
    assert training.ends == [("finished", "")] and training.target.name == "run"
    total, done = sum(result.rows_global for result in results) / ROWS, 0.0
    rise = 0.3 * total
    behaviours = DatasetSpec.load(dataset).behaviours
    assert set(WEIGHTS) < set(behaviours)
    for result, (tables, dense) in zip(results, used, strict=True):
        factor = 1.0
        if done + 1 < rise:
            factor = (done + 1) / rise
        elif decay == "linear":
            factor = 1 - max(0.0, done - rise) / (total - rise)
        assert tables == pytest.approx(0.2 * factor) and dense == pytest.approx(0.01 * factor)
        done += result.rows_global / ROWS
        batch = result.batch
        losses = torch.nn.functional.binary_cross_entropy_with_logits(result.logits, batch.label, reduction="none")
        weight = torch.tensor([WEIGHTS.get(name, 1.0) for name in behaviours])
        torch.testing.assert_close(result.loss, (losses * batch.mask * weight).sum() / batch.rows)
    assert used[0][0] < used[1][0], "it warms up"


class Trained(NamedTuple):
    """A run, with the calls of each step for which the host would have waited for a GPU."""

    history: list[dict[str, Any]]
    tensors: dict[str, torch.Tensor]
    waits: list[list[str]]


def train_counted(config: JobConfig, *, later: bool) -> Trained:
    """Run a job whose engine reads losses ``later``, or at once."""
    waits, starts = Waits(), list[int]()
    histories: list[list[dict[str, Any]]] = []
    tensors: dict[str, torch.Tensor] = {}
    advance, save = TrainingState.advance, Checkpoints.save

    def counted_advance(self: TrainingState, result: StepResult) -> None:
        starts.append(len(waits.calls))
        advance(self, result)

    def last_save(self: Checkpoints, engine: HybridEngine, state: TrainingState, *, wait: bool = False) -> None:
        save(self, engine, state, wait=wait)
        histories.append(list(state.metric_history))
        tensors.update(everything(engine, world))

    with pytest.MonkeyPatch.context() as patch, World.join("cpu") as world, waits if later else nullcontext():
        patch.setattr(build_engine, "HybridEngine", partial(HybridEngine, read_later=later))
        patch.setattr(TrainingState, "advance", counted_advance)
        patch.setattr(Checkpoints, "save", last_save)
        run_job(config, world, Preemption())
    of_seconds = {"rows_per_second", *PHASES}
    history = [{name: value for name, value in entry.items() if name not in of_seconds} for entry in histories[-1]]
    return Trained(history, tensors, [waits.calls[start:stop] for start, stop in pairwise(starts)])


@pytest.mark.parametrize(
    "model", [{"model.attention_kind": "din"}, {"model.attention_kind": "multi_head", "alignment.anchor": "live"}]
)
def test_the_host_waits_for_the_device_once_a_step_and_no_bit_changes(
    dataset: Path, tmp_path: Path, model: dict[str, str]
) -> None:
    # The CPU stands for a GPU, where no loops are compiled.
    operations = {"model.compiled_attention": "false", "model.compiled_experts": "false"}
    settings = {**model, **operations, "train.log_every": 3, "data.workers": 0}
    runs = {}
    for later in (False, True):
        config = job(dataset, tmp_path / f"{later}", "linear", *(f"{key}={value}" for key, value in settings.items()))
        runs[later] = train_counted(config, later=later)
    at_once, late = runs[False], runs[True]
    assert len(late.waits) > 10
    # Adam's moments and DeepSpeed's buffers are made in the first step.
    for step, calls in enumerate(late.waits[1:], 2):
        assert len(calls) <= 1, f"step {step}: {calls}"
    assert late.history == at_once.history and len(late.history) > 3
    assert late.tensors.keys() == at_once.tensors.keys()
    for name, values in at_once.tensors.items():
        assert torch.equal(late.tensors[name], values), name


def test_every_figure_of_an_entry_is_a_scalar() -> None:
    entry = {
        **{"step": 7, "loss": 0.5, "alignment": 0.25, "rows_per_second": 9.0},
        **{phase: float(place) for place, phase in enumerate(PHASES)},
        **{"auc": {"click": 0.75, "gift": None}, "gauc": {"click": None, "gift": 0.5}},
        "ids": {"item": {"rows": 4, "evicted": 2}},
    }
    written: list[tuple[str, float, int]] = []
    scalars: Any = SimpleNamespace(add_scalar=lambda *point: written.append(point))
    write_scalars(scalars, entry)
    names = {"loss": 0.5, "alignment": 0.25, "rows_per_second": 9.0}
    names |= {f"seconds/{phase}": float(place) for place, phase in enumerate(PHASES)}
    names |= {"progressive_auc/click": 0.75, "progressive_gauc/gift": 0.5, "ids_rows/item": 4, "ids_evicted/item": 2}
    assert sorted(written) == sorted((name, value, 7) for name, value in names.items())
