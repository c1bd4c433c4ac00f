"""Tests of training on a topic: stopped and resumed with every row once, and with users in several partitions."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.data.code_files import codes_beside, write_codes_of
from tests.distributed.launches import ENVIRONMENT
from tests.distributed.stream_ranks import JOB
from tests.nursery import Nursery
from tests.stream.conftest import PARTITIONS, Cluster
from trainer.checkpoint.manifest import checkpoints_at, read_manifest
from trainer.config.load import parse_time
from trainer.config.stream import LabelConfig, StreamConfig
from trainer.console.exit_status import PREEMPTED_STATUS
from trainer.data.format.schema import DatasetSpec
from trainer.data.simulator.write_dataset import simulate
from trainer.stream.labels.batch_assembler import assemble_batch
from trainer.stream.labels.event_log import EventLog
from trainer.stream.labels.policy import event_timeouts, report_policy
from trainer.stream.sources.kafka_topic import TopicPublisher
from trainer.stream.sources.message_codec import MessageCodec
from trainer.stream.sources.replay import ReplaySource

LIMIT_SECONDS = 600.0
SINCE = "2024-03-05"


def publish(config: StreamConfig, world: Path, spec: DatasetSpec, hours: tuple[float, float]) -> None:
    """Publish the events of some hours to the topic, with their logged features."""
    begin = parse_time(SINCE, spec.timezone, "t")
    since, until = (begin + round(hour * 3_600_000) for hour in hours)
    topic = TopicPublisher(config, spec, 4, append=True).open()
    with ReplaySource(world, StreamConfig(), since, until).open(range(spec.partitions)) as reader:
        for batch in reader:
            topic.publish(batch.events, 100, batch.logged)
    topic.flush()


def expected_rows(world: Path, spec: DatasetSpec, hours: float) -> int:
    begin = parse_time(SINCE, spec.timezone, "t")
    rows = 0
    for partition in range(spec.partitions):
        events = EventLog(world).read(partition)
        inside = (events["time_ms"] >= begin) & (events["time_ms"] < begin + hours * 3_600_000)
        events = {name: column[inside] for name, column in events.items()}
        labels = LabelConfig()
        rows += len(assemble_batch(spec, report_policy(labels), event_timeouts(labels), events).rows["user_id"])
    return rows


@pytest.fixture
def world(tmp_path: Path) -> Path:
    simulate(tmp_path / "world", users=120, days=2, partitions=4, seed=6)
    return tmp_path / "world"


def test_a_live_topic_is_trained_on_as_it_arrives(
    cluster: Cluster, nursery: Nursery, world: Path, tmp_path: Path
) -> None:
    spec, run = DatasetSpec.load(world), tmp_path / "run"
    config = cluster.config(cluster.topic(), format="arrow")
    settings = [
        *(setting for setting in JOB if not setting.startswith(("stream.until", "checkpoint.every_steps"))),
        codes_beside(world),
        f"data.path={world}",
        f"run.directory={run}",
        "stream.source=kafka",
        "stream.format=arrow",
        f"stream.brokers={config.brokers}",
        f"stream.topic={config.topic}",
        "stream.idle_seconds=0.2",
        "checkpoint.every_steps=2",
    ]
    write_codes_of(world, tmp_path / "codes.parquet")
    arguments = ["train", "configs/moment.toml", *settings]
    publish(config, world, spec, (0, 6))

    out = tmp_path / "out"
    live = nursery.start("launch.cli.main", arguments, 0, ENVIRONMENT, out)
    try:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not (run / "checkpoints").exists() or not list((run / "checkpoints").glob("step-*")):
            assert nursery.wait(live, 0.1) is None and time.monotonic() < deadline, out.read_text()
        publish(config, world, spec, (6, 10))
        os.kill(live, signal.SIGTERM)
        assert nursery.wait(live, LIMIT_SECONDS) == PREEMPTED_STATUS, out.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(live, signal.SIGKILL)
    saved = read_manifest(checkpoints_at(run)[-1])
    assert not saved.finished and saved.rows_done > 0

    publish(config, world, spec, (10, 14))
    ended = nursery.run(
        "launch.cli.main", [*arguments, "stream.until_end=true"], environment=ENVIRONMENT, timeout=LIMIT_SECONDS
    )
    assert ended.status == 0, ended.stdout + ended.stderr
    assert "resuming from" in ended.stdout
    # Candidates of the topic have codes. How many have none depends on where the stop came.
    counts = re.findall(r"without a code of shown: ([\d,]+) of ([\d,]+) candidates", ended.stdout)
    missing, candidates = (int(number.replace(",", "")) for number in counts[0])
    assert missing < candidates
    last, rows = read_manifest(checkpoints_at(run)[-1]), expected_rows(world, spec, 14)
    assert last.finished and last.rows_done == rows > saved.rows_done
    stream = json.loads((run / "metrics.json").read_text())["stream"]
    assert stream["counts"]["unanswered"] == stream["counts"]["without_features"] == stream["counts"]["late"] == 0
    assert stream["counts"]["requests"] == stream["progressive"]["click"]["rows"] > 0
    assert stream["freshness_seconds"]["count"] > 0


def test_users_that_a_producer_spreads_over_partitions_are_counted_and_named_at_once(
    limelight: Any, cluster: Cluster, world: Path, tmp_path: Path
) -> None:
    spec, run = DatasetSpec.load(world), tmp_path / "run"
    config = cluster.config(cluster.topic())
    begin = parse_time(SINCE, spec.timezone, "t")
    codec, sent, users = MessageCodec("json", spec, 0), 0, set()
    with ReplaySource(world, StreamConfig(), begin, begin + 3 * 3_600_000).open(range(spec.partitions)) as reader:
        for batch in reader:
            users |= set(batch.events["user_id"].tolist())
            # A producer without keys writes its messages to one partition after another.
            for value in codec.encode(batch.events, batch.logged):
                cluster.producer.produce(config.topic, value=value, partition=sent % PARTITIONS)
                sent += 1
            assert cluster.producer.flush(30) == 0
    settings = [setting for setting in JOB if not setting.startswith("stream.until=")]
    settings += [f"data.path={world}", f"run.directory={run}", "stream.source=kafka", f"stream.topic={config.topic}"]
    settings += [f"stream.brokers={config.brokers}", "stream.until_end=true", "stream.partitioner=producer"]
    done = limelight("train", "configs/moment.toml", *settings, "--ranks", 2)
    found = json.loads((run / "metrics.json").read_text())["stream"]
    assert found["counts"]["events"] == sent and found["users"]["counted_share"] == 1
    assert found["users"]["seen"] == len(users)
    assert found["users"]["in_two_partitions"] > len(users) / 2
    lines = [line for line in done.stdout.splitlines() if "users have events in two partitions (such as user " in line]
    assert len(lines) >= 2 and "ple: " in lines[-1] and "ple: " not in lines[0]
    assert done.stdout.index(lines[0]) < done.stdout.index("predicted as requests came")
