"""Training on a stream on one rank: what is trained on, when, and with which loss.

tests/distributed/test_stream.py tests several ranks and resumed runs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.data.code_files import codes_beside, write_codes_of
from tests.data.features.test_content_inputs import values_of
from tests.data.features.test_feature_map import unpack_ids
from tests.data.vector_tables import vectors_beside, write_vectors_of
from tests.distributed.stream_ranks import JOB, SEARCHING
from tests.ranking.test_device_histories import everything, fitted_for
from trainer.config.load import parse_time
from trainer.config.ranker import JobConfig, load_config
from trainer.data.features.code_inputs import open_codes
from trainer.data.features.content_inputs import open_reader
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import FittedFeatures
from trainer.data.features.missing_inputs import MissingTally
from trainer.data.format.dataset import Dataset
from trainer.data.format.history import Histories
from trainer.data.format.schema import DatasetSpec, Rows
from trainer.data.format.shards import read_rows
from trainer.data.loading.batch import RankingBatch, unpack
from trainer.data.simulator.write_dataset import simulate
from trainer.engine.hybrid_engine import HybridEngine, StepResult
from trainer.rank import run_job
from trainer.ranking.stream_train_loop import _StreamTrainer
from trainer.ranking.training_state import TrainingState
from trainer.runtime.distributed import World
from trainer.runtime.preemption import Preemption
from trainer.serving.trained_run import open_run
from trainer.stream.labels.assembled_rows import SLOW
from trainer.stream.labels.batch_assembler import assemble_batch
from trainer.stream.labels.event_log import EventLog
from trainer.stream.labels.policy import event_timeouts, report_policy

FLUSH_MS, SLICE_MS = 1_800_000, 300_000


@dataclass
class Recorded:
    """Acts of a training on a stream, in order.

    Attributes:
        acts: ``("predict", request_ms of the requests)`` and ``("train", result of the step)``.
        rates: learning rates that were set.
        averaged: event time in horizons of each addition to the mean of the weights, and the weights then.
        config: config of the job.
        directory: directory of the run.
    """

    config: JobConfig
    directory: Path
    acts: list[tuple[str, Any]] = field(default_factory=list)
    rates: list[tuple[float, float]] = field(default_factory=list)
    averaged: list[tuple[float, dict[str, torch.Tensor]]] = field(default_factory=list)

    @property
    def steps(self) -> list[StepResult]:
        return [act for name, act in self.acts if name == "train"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "world"
    simulate(path, users=100, days=2, partitions=4, seed=4)
    codes = write_codes_of(path, path.parent / "codes.parquet")
    write_vectors_of(path, codes, path.parent / "vectors")
    return path


@pytest.fixture(scope="module", params=["realtime", "fast_slow"])
def recorded(dataset: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Recorded:
    directory = tmp_path_factory.mktemp("run") / request.param
    more = (*SEARCHING, codes_beside(dataset), *vectors_beside(dataset)) if request.param == "fast_slow" else ()
    settings = [*JOB, *more, "stream.until=2024-03-05T13:00"]
    settings.append("features.past={author={same='author'}, tag={same='tag'}, now={half_life_minutes=30}}")
    settings += ["train.batch_size=10", f"labels.policy={request.param}", f"data.path={dataset}"]
    found = Recorded(load_config("configs/moment.toml", [*settings, f"run.directory={directory}"]), directory)
    advance, predict, rate = TrainingState.advance, HybridEngine.predict, HybridEngine.set_learning_rate
    average = HybridEngine.average

    def recording_advance(self: TrainingState, result: StepResult) -> None:
        advance(self, result)
        found.acts.append(("train", result))

    def recording_predict(self: HybridEngine, batches: Iterator[RankingBatch]) -> Any:
        taken = list(batches)
        found.acts.append(("predict", [batch.request_ms for batch in taken]))
        return predict(self, iter(taken))

    def recording_rate(self: HybridEngine, tables: float, dense: float) -> None:
        found.rates.append((tables, dense))
        rate(self, tables, dense)

    def recording_average(self: HybridEngine, elapsed: float) -> None:
        weights = {name: value.detach().double().clone() for name, value in self._dense.module.named_parameters()}
        found.averaged.append((elapsed, weights))
        average(self, elapsed)

    with pytest.MonkeyPatch.context() as patch, World.join("cpu") as world:
        patch.setattr(HybridEngine, "average", recording_average)
        patch.setattr(TrainingState, "advance", recording_advance)
        patch.setattr(HybridEngine, "predict", recording_predict)
        patch.setattr(HybridEngine, "set_learning_rate", recording_rate)
        run_job(found.config, world, Preemption())
    return found


def test_evaluation_uses_the_mean_of_the_weights_over_event_time(recorded: Recorded) -> None:
    """Each set of weights counts by the event time of its rows, and exp(-age / 3 hours)."""
    elapsed = np.array([time for time, _ in recorded.averaged])
    # The intervals are whole slices; the first one and the last one, at the end of the stream, are ordinary ones.
    assert len(elapsed) > 10 and elapsed.min() * 3 * 3_600_000 >= SLICE_MS
    assert elapsed[0] == elapsed[-1] == pytest.approx(FLUSH_MS / (3 * 3_600_000))
    assert 1 / 3 * 12.9 < elapsed.sum() < 1 / 3 * 14.1
    age = np.append(np.cumsum(elapsed[::-1])[::-1][1:], 0)
    shares = -np.expm1(-elapsed) * np.exp(-age)
    with World.join("cpu") as world:
        evaluated = dict(open_run(str(recorded.directory), world).engine._dense.module.named_parameters())
        for name, value in evaluated.items():
            weights = [of_time[name] for _, of_time in recorded.averaged]
            expected = sum(share * weight for share, weight in zip(shares / shares.sum(), weights, strict=True))
            torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)
            assert not torch.equal(value.double(), weights[-1]), name


def expected_rows(dataset: Path, config: JobConfig) -> Rows:
    """Return the rows of the stream's events under the job's policy, from the batch assembler."""
    log = EventLog(dataset)
    assert config.stream is not None
    since, until = (parse_time(text, log.spec.timezone, "t") for text in (config.data.train_until, config.stream.until))
    parts = []
    for partition in range(log.spec.partitions):
        events = log.read(partition)
        inside = (events["time_ms"] >= since) & (events["time_ms"] < until)
        events = {name: column[inside] for name, column in events.items()}
        parts.append(assemble_batch(log.spec, report_policy(config.labels), event_timeouts(config.labels), events).rows)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_every_row_once_with_its_kind_labels_and_mask(recorded: Recorded, dataset: Path) -> None:
    rows = expected_rows(dataset, recorded.config)
    policy = recorded.config.labels.policy
    expected: Counter[tuple[Any, ...]] = Counter()
    for place, visit in enumerate(rows["visit_id"].tolist()):
        slow = policy == "fast_slow" and bool(rows["kind"][place] == SLOW)
        expected[visit, slow, (rows["label"] & rows["mask"])[place].tobytes(), rows["mask"][place].tobytes()] += 1
    found: Counter[tuple[Any, ...]] = Counter()
    for result in recorded.steps:
        batch = result.batch
        assert (batch.slow is not None) == (policy == "fast_slow")
        slow = torch.zeros(batch.rows, dtype=torch.bool) if batch.slow is None else batch.slow
        labels, mask = (values.to(torch.uint8).numpy() for values in (batch.label * batch.mask, batch.mask))
        for place, visit in enumerate(batch.visit_id.tolist()):
            found[visit, bool(slow[place]), labels[place].tobytes(), mask[place].tobytes()] += 1
    assert found == expected
    assert any(slow for _, slow, *_ in found) == (policy == "fast_slow")


def test_codes_and_vectors_in_the_stream_are_those_of_stored_rows(recorded: Recorded, dataset: Path) -> None:
    """Rows and histories of the stream read codes and vectors as of the request, as batches from the dataset do."""
    config, spec = recorded.config, DatasetSpec.load(dataset)
    fitted = FittedFeatures.load(recorded.directory / "features")
    codes = open_codes(config.features, fitted.codes, unchanged=True)
    content = open_reader(config.features, str(dataset), fitted.content)
    stored, place_of = read_rows(dataset, spec), {}
    for place, visit in enumerate(stored["visit_id"].tolist()):
        place_of[visit] = place
    # The history that searches by dot product depends on the step.
    own = {name: history for name, history in config.features.history.items() if name != "long"}
    features = FeatureMap(spec, config.features.model_copy(update={"history": own}), fitted, (), codes, content)
    histories = Histories(dataset, spec)
    names = [lookup.name for lookup in features.lookups if "codes-shown" in lookup.name]
    names += [lookup.name for lookup in features.content_lookups]
    assert len(names) == (0 if config.labels.policy == "realtime" else 5 * 3 + 2 * 3)
    present: dict[str, Counter[bool]] = {"codes": Counter(), "title": Counter(), "air": Counter()}
    for result in recorded.steps if names else ():
        places = [place_of[visit] for visit in result.batch.visit_id.tolist()]
        rows = {name: column[places] for name, column in stored.items()}
        batch = unpack(features.pack(rows, histories, rows["request_ms"]), features.layout, {})
        expected, found = (unpack_ids(each) | values_of(each) for each in (batch, result.batch))
        for name in names:
            assert found[name] == expected[name], name
            if "codes-shown" in name:
                present["codes"].update(row > 0 for of_row in found[name] for row in of_row)
            else:
                present[name.rpartition("_")[2]].update(vector is not None for vector in found[name])
    assert not names or min(min(count[True], count[False]) for count in present.values()) > 100


def test_counts_of_past_visits_in_the_stream_are_those_of_stored_rows(recorded: Recorded, dataset: Path) -> None:
    config, spec = recorded.config, DatasetSpec.load(dataset)
    own = config.features.model_copy(update={"history": {}, "codes": {}, "content": {}})
    features = FeatureMap(spec, own, FittedFeatures.load(recorded.directory / "features"))
    counts = [place for place, name in enumerate(features.dense_names) if name.startswith("past:")]
    assert len(counts) == 3 * (1 + len(spec.behaviours))
    stored, histories = read_rows(dataset, spec), Histories(dataset, spec)
    place_of = {visit: place for place, visit in enumerate(stored["visit_id"].tolist())}
    distinct = set()
    for result in recorded.steps:
        places = [place_of[visit] for visit in result.batch.visit_id.tolist()]
        rows = {name: column[places] for name, column in stored.items()}
        expected = unpack(features.pack(rows, histories, rows["request_ms"]), features.layout, {}).dense[:, counts]
        found = result.batch.dense[:, counts]
        assert torch.equal(found, expected)
        distinct.update(map(tuple, found.tolist()))
    assert len(distinct) > 100


def test_the_loss_of_a_step_is_that_of_the_policy(recorded: Recorded) -> None:
    for result in recorded.steps:
        batch, logits = result.batch, result.logits
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.label, reduction="none")
        if batch.slow is not None:
            p = torch.sigmoid(logits)
            losses = torch.where(batch.slow[:, None], -(p.log() - (1 - p).log()), losses)
        torch.testing.assert_close(result.loss, (losses * batch.mask).sum() / batch.rows, rtol=1e-4, atol=1e-5)


def test_steps_are_of_the_size_of_a_batch_and_rows_wait_for_a_flush_at_most(recorded: Recorded) -> None:
    size = recorded.config.train.batch_size
    groups: list[list[StepResult]] = [[]]
    for name, act in recorded.acts:
        if name == "predict":
            groups.append([])
        else:
            groups[-1].append(act)
    assert not groups[0], "requests are predicted before the first step"
    for steps in groups[1:]:
        rows = [result.rows_global for result in steps]
        # A flush trains on all its rows in as few steps as they fit into, of nearly equal sizes.
        assert len(rows) == -(-sum(rows) // size) and max(rows, default=0) - min(rows, default=0) <= 1
    # Between two flushes there is a batch of rows, or the time of a flush.
    whole = sum(sum(result.rows_global for result in steps) >= size for steps in groups[1:])
    assert 0 < whole < len(groups) - 1
    assert recorded.rates == [(recorded.config.tables.learning_rate, recorded.config.optimizer.learning_rate)]


def test_requests_are_predicted_in_batches_and_once(recorded: Recorded) -> None:
    sizes = [[len(part) for part in act] for name, act in recorded.acts if name == "predict"]
    limit = recorded.config.train.batch_size
    assert all(set(of_flush[:-1]) <= {limit} and of_flush[-1] <= limit for of_flush in sizes if of_flush)
    assert any(len(of_flush) > 1 for of_flush in sizes)
    summary = json.loads((recorded.directory / "metrics.json").read_text())["stream"]
    assert sum(map(sum, sizes)) == summary["counts"]["requests"] == summary["progressive"]["click"]["rows"]


def test_no_prediction_knows_a_label_of_its_time(recorded: Recorded) -> None:
    """Whatever was trained on before a request was predicted had its labels complete before that request."""
    horizon = recorded.config.labels.max_out_of_orderness_ms
    trained_ms = 0
    for name, act in recorded.acts:
        if name == "train":
            trained_ms = max(trained_ms, int(act.batch.request_ms.max()))
        elif trained_ms and act:
            assert min(int(part.min()) for part in act) > trained_ms - horizon - FLUSH_MS - SLICE_MS
            assert max(int(part.max()) for part in act) > trained_ms


def test_the_history_of_metrics_has_an_entry_every_few_steps_and_at_the_end(recorded: Recorded) -> None:
    (last,) = sorted((recorded.directory / "checkpoints").glob("step-*"))[-1:]
    trace = json.loads((last / "job.json").read_text())["trace"]
    steps, every = len(recorded.steps), recorded.config.train.log_every
    assert [entry["step"] for entry in trace] == list(range(every, steps + 1, every))
    for entry in trace:
        part = recorded.steps[entry["step"] - every : entry["step"]]
        rows = sum(result.rows_global for result in part)
        mean = sum(float(result.loss) * result.rows_global for result in part) / rows
        assert entry["rows"] == rows and entry["loss"] == pytest.approx(mean)
    events = EventAccumulator(str(recorded.directory / "tensorboard"))
    events.Reload()
    for name in ("loss", "lag_events", "lag_seconds"):
        points = [(point.step, point.value) for point in events.Scalars(name)]
        expected = [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in trace]
        # The last entry is made after the last checkpoint.
        assert points[: len(trace)] == expected and points[-1][0] == steps, name


@pytest.mark.parametrize("policy", ["realtime", "fast_slow"])
def test_a_gpu_gets_batches_in_page_locked_memory(dataset: Path, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host would wait for copies of any other tensor."""
    config = load_config("configs/moment.toml", [*JOB, f"labels.policy={policy}", f"data.path={dataset}"])
    data = Dataset.open(str(dataset), "error")
    features = FeatureMap(data.spec, config.features, fitted_for(config, data))
    trainer: Any = object.__new__(_StreamTrainer)
    trainer._stream = SimpleNamespace(features=features, histories=data.histories)
    trainer._state, trainer._config, trainer._on_device = SimpleNamespace(space=None), config, None
    trainer._world = SimpleNamespace(device=torch.device("cuda"))
    trainer._beyond, trainer._missing = Counter(), MissingTally()
    pinned: list[torch.Tensor] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    rows = {name: column[-20:] for name, column in read_rows(dataset, data.spec).items()}
    batch = trainer._batch(rows | {"kind": np.arange(20) % 2 * SLOW})
    assert (batch.slow is not None) == (policy == "fast_slow")
    memory = {tensor.untyped_storage().data_ptr() for tensor in pinned}
    for name, tensor in everything(batch).items():
        assert not len(tensor) or tensor.untyped_storage().data_ptr() in memory, name
