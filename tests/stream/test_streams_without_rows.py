"""Tests of streams that end without a training step: the job finishes with 0 rows, and says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.stream.conftest import Cluster
from trainer.checkpoint.manifest import checkpoints_at, read_manifest
from trainer.data.simulator.write_dataset import simulate

JOB = (
    "configs/moment.toml",
    "data.train_until=2024-03-05T12:00",
    "model.expert_layers=[[16], [8]]",
    "model.tower=[8]",
    "train.device=cpu",
    "stream.publish_minutes=0.0001",
)
NO_EVENTS = ("stream.since=2024-03-09", "stream.until=2024-03-10")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quiet") / "world"
    simulate(path, users=40, days=2, partitions=4, seed=6)
    return path


@pytest.mark.parametrize(("source", "ranks"), [("replay", 1), ("replay", 2), ("topic", 1)])
def test_a_stream_without_a_step_finishes_with_no_rows(
    limelight: Any, cluster: Cluster, world: Path, tmp_path: Path, source: str, ranks: int
) -> None:
    run, settings = tmp_path / "run", NO_EVENTS
    if source == "topic":
        topic = cluster.topic()
        settings = ("stream.source=kafka", "stream.until_end=true", f"stream.brokers={cluster.brokers}")
        settings += (f"stream.topic={topic}",)
    command = ("train", *JOB, *settings, f"data.path={world}", f"run.directory={run}", "--ranks", ranks)
    first = limelight(*command)
    printed = "ple: trained on 0 rows: the stream has ended, and its events (0) gave no row"
    assert printed in first.stdout and "Traceback" not in first.stderr
    document = json.loads((run / "metrics.json").read_text())
    assert document["training"]["rows"] == 0 and document["training"]["rows_per_second"] is None
    assert set(document["training"]["share_of_time"].values()) == {None}
    assert set(document["stream"]["counts"].values()) == {0}
    assert document["stream"]["progressive"]["click"]["rows"] == 0
    assert "The model was trained on 0 rows." in (run / "report.html").read_text()
    manifest = read_manifest(checkpoints_at(run)[-1])
    assert (manifest.step, manifest.rows_done, manifest.finished) == (0, 0, True)
    shown = limelight("checkpoint", "show", run).stdout
    assert "0 (finished)" in shown and "4 partitions of a stream, no events yet" in shown

    # The same command again has nothing to do, with the results of the first start and without them.
    assert "finished already" in limelight(*command).stdout
    (run / "metrics.json").unlink()
    (run / "report.html").unlink()
    assert printed in limelight(*command).stdout
    again = json.loads((run / "metrics.json").read_text())
    assert again | {"training": None} == document | {"training": None}


def test_a_stream_of_events_that_give_no_row_says_how_many_there_were(
    limelight: Any, cluster: Cluster, world: Path, tmp_path: Path
) -> None:
    """A like without an exposure changes no row."""
    topic, run = cluster.topic(), tmp_path / "run"
    event = {"author_id": 3, "item_id": 9, "domain": "live", "visit_id": 5, "event": "like"}
    event |= {"user_id": 1, "time_ms": 1_709_900_000_000}
    cluster.send(topic, 0, [json.dumps(event).encode()])
    settings = ("stream.source=kafka", "stream.until_end=true", f"stream.brokers={cluster.brokers}")
    settings += (f"stream.topic={topic}", "stream.partitioner=producer")
    printed = limelight("train", *JOB, *settings, f"data.path={world}", f"run.directory={run}").stdout
    assert "ple: trained on 0 rows: the stream has ended, and its events (1) gave no row" in printed
    counts = json.loads((run / "metrics.json").read_text())["stream"]["counts"]
    assert counts["events"] == counts["no_open_visit"] == 1
