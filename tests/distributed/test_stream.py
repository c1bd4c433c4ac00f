"""Tests of training on a stream: every row once in spite of stops, and bit for bit on the same number of ranks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.code_files import write_codes_of
from tests.data.vector_tables import write_vectors_of
from tests.distributed.stream_ranks import POLICIES, job
from tests.distributed.test_resume import trained
from tests.nursery import Nursery
from trainer.checkpoint.reader import Checkpoint
from trainer.config.load import parse_time
from trainer.data.format.history import Histories
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.shards import read_rows
from trainer.data.simulator.write_dataset import simulate
from trainer.serving.exported_model import open_export
from trainer.stream.labels.assembled_rows import SLOW
from trainer.stream.labels.batch_assembler import assemble_batch
from trainer.stream.labels.event_log import EventLog
from trainer.stream.labels.policy import event_timeouts, report_policy

STARTS: dict[str, tuple[str, ...]] = {"2a": (), "1a": ("2a",)}


@pytest.fixture(scope="module")
def outcomes(nursery: Nursery, run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    nursery.compile_search()
    out = tmp_path_factory.mktemp("stream")
    simulate(out / "world", users=150, days=2, partitions=4, seed=4)
    codes = write_codes_of(out / "world", out / "codes.parquet")
    write_vectors_of(out / "world", codes, out / "vectors")
    found: dict[str, Any] = {"dataset": out / "world"}
    for start, earlier in STARTS.items():
        arguments = (start, out, out / "world", *earlier)
        run_ranks("tests.distributed.stream_ranks", *arguments, ranks=int(start[0]), timeout=600)
        found[start] = torch.load(out / f"{start}.pt")
    return found


@pytest.mark.parametrize("policy", POLICIES)
def test_a_resumed_run_is_bitwise_equal_to_an_undisturbed_one(outcomes: dict[str, Any], policy: str) -> None:
    of_policy = outcomes["2a"][policy]
    through, stopped, resumed = of_policy["through"], of_policy["stopped"], of_policy["resumed"]["2a"]
    assert stopped["report"] is None and 0 < stopped["step"] < through["step"]
    assert stopped["losses"] + resumed["losses"] == through["losses"]
    assert resumed["trace"] == through["trace"]
    for before, after in ((stopped["saved"], resumed["loaded"]), (through["saved"], resumed["saved"])):
        assert before.keys() == after.keys()
        for name in before:
            assert torch.equal(before[name], after[name]), name
    assert all(map(torch.equal, resumed["random"], through["random"]))
    summaries = [
        json.loads((outcomes["dataset"].parent / "2a" / policy / name / "metrics.json").read_text())["stream"]
        for name in ("through", "stopped")
    ]
    assert summaries[0] == summaries[1] and summaries[0]["counts"]["requests"] > 100


@pytest.mark.parametrize("policy", POLICIES)
def test_every_row_of_the_log_is_trained_on_once(outcomes: dict[str, Any], policy: str) -> None:
    dataset = outcomes["dataset"]
    config, log = job(dataset, dataset, policy), EventLog(dataset)
    assert config.stream is not None
    since, until = (parse_time(text, log.spec.timezone, "t") for text in (config.data.train_until, config.stream.until))
    expected: Counter[int] = Counter()
    slow: Counter[int] = Counter()
    for partition in range(log.spec.partitions):
        events = log.read(partition)
        inside = (events["time_ms"] >= since) & (events["time_ms"] < until)
        events = {name: column[inside] for name, column in events.items()}
        rows = assemble_batch(log.spec, report_policy(config.labels), event_timeouts(config.labels), events).rows
        expected.update(rows["visit_id"].tolist())
        slow.update(rows["visit_id"][rows["kind"] == SLOW].tolist())
    assert expected and max(expected.values()) > 1
    found = outcomes["2a"][policy]
    assert trained(found["through"]) == expected
    # Slow rows have a loss of their own; only this policy has any.
    assert bool(slow) == (policy == "fast_slow")
    assert Counter(visit for of_rank in found["through"]["slow"] for visit in of_rank) == slow
    assert trained(found["stopped"]) + trained(found["resumed"]["2a"]) == expected
    assert trained(found["stopped"]) + trained(outcomes["1a"][policy]["resumed"]["2a"]) == expected


@pytest.mark.parametrize("policy", POLICIES)
def test_another_number_of_ranks_resumes_with_the_same_model(outcomes: dict[str, Any], policy: str) -> None:
    stopped, resumed = outcomes["2a"][policy]["stopped"], outcomes["1a"][policy]["resumed"]["2a"]
    assert stopped["saved"].keys() == resumed["loaded"].keys()
    for name, tensor in stopped["saved"].items():
        assert torch.equal(tensor, resumed["loaded"][name]), name
    counts = [
        json.loads((outcomes["dataset"].parent / model_dir / "metrics.json").read_text())["stream"]["counts"]
        for model_dir in (f"2a/{policy}/through", f"1a/{policy}/from-2a")
    ]
    assert counts[0] == counts[1]
    assert counts[0]["unanswered"] == counts[0]["without_features"] == 0


def test_every_prediction_is_compared_with_its_outcome(outcomes: dict[str, Any]) -> None:
    """The progressive metrics count each request once with its full labels, so they agree with the log."""
    dataset = outcomes["dataset"]
    summary = json.loads((dataset.parent / "2a" / "realtime" / "through" / "metrics.json").read_text())["stream"]
    config, spec = job(dataset, dataset, "full"), DatasetSpec.load(dataset)
    assert config.stream is not None
    since, until = (parse_time(text, spec.timezone, "t") for text in (config.data.train_until, config.stream.until))
    rows = positives = 0
    for partition in range(spec.partitions):
        events = EventLog(dataset).read(partition)
        inside = (events["time_ms"] >= since) & (events["time_ms"] < until)
        events = {name: column[inside] for name, column in events.items()}
        full = assemble_batch(spec, report_policy(config.labels), event_timeouts(config.labels), events).rows
        click = spec.behaviours.index("click")
        rows += int(full["mask"][:, click].sum())
        positives += int(np.sum(full["label"][:, click] & full["mask"][:, click]))
    click_metrics = summary["progressive"]["click"]
    assert summary["counts"]["requests"] == rows == click_metrics["rows"]
    assert click_metrics["positives"] == positives > 0


def test_a_run_directory_of_a_stream(outcomes: dict[str, Any]) -> None:
    model_dir: Path = outcomes["dataset"].parent / "2a" / "realtime" / "through"
    trace = json.loads(sorted((model_dir / "checkpoints").glob("step-*"))[-1].joinpath("job.json").read_text())["trace"]
    assert {"lag_events", "lag_seconds"} <= trace[-1].keys()
    assert (model_dir / "report.html").exists()


def test_models_are_published_during_training(outcomes: dict[str, Any]) -> None:
    model_dir: Path = outcomes["dataset"].parent / "2a" / "realtime" / "through"
    published = sorted(entry.name for entry in (model_dir / "published").glob("step-*"))
    last = sorted((model_dir / "checkpoints").glob("step-*"))[-1].name
    assert len(published) == 2 and published[-1] == last
    assert (model_dir / "published" / "current").resolve().name == last
    spec = DatasetSpec.load(outcomes["dataset"])
    model = open_export(model_dir / "published" / "current")
    stored = Checkpoint.open(model_dir).model.dense
    for name, parameter in model.ranker.named_parameters():
        assert torch.equal(parameter, stored[name]["average"].read()), name
        assert not torch.equal(parameter, stored[name]["parameter"].read()), name
    rows = {name: column[:40] for name, column in read_rows(outcomes["dataset"], spec).items()}
    batch = model.features.pack(rows, Histories(outcomes["dataset"], spec), rows["request_ms"])
    (logits,) = model.logits([batch])
    assert logits.shape == (40, len(spec.behaviours)) and bool(torch.isfinite(logits).all())
