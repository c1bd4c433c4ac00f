"""Events per second that a rank takes from a stream: files replayed as fast as possible, and a Kafka topic.

The topic lies in librdkafka's own cluster inside this process, which speaks the brokers' protocol over the loopback
interface and shares the cores with the reader: a real broker elsewhere costs less. That cluster keeps 5 MB of a
partition, so what is read from a topic is few events, several times.

    python -m benchmarks.sources --out benchmarks/results/sources.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from trainer.data.checks import Columns
from trainer.data.schema import DatasetSpec, partition_of
from trainer.data.visits import event_names, event_table
from trainer.run import environment, write_json
from trainer.stream.config import StreamConfig
from trainer.stream.files import FilesSource
from trainer.stream.kafka import KafkaSource
from trainer.stream.kafka_client import library
from trainer.stream.source import Source
from trainer.stream.topic import Topic

PARTITIONS = 4
START_MS = 1_700_000_000_000
MESSAGES = (("json", 1), ("json", 100), ("arrow", 1000))
SPEC = DatasetSpec(
    name="random",
    source="random numbers",
    licence="none",
    partitions=PARTITIONS,
    timezone="UTC",
    behaviours=("click", "like", "comment", "gift", "follow"),
    applies={name: ("video", "live") for name in ("click", "like", "comment", "gift", "follow")},
    candidates=("live",),
)


def random_events(events: int) -> Columns:
    """Events of ids as large as those of a service, 100 a second."""
    rng = np.random.default_rng(0)
    return {
        "user_id": rng.integers(0, 10_000_000, events),
        "author_id": rng.integers(0, 1_000_000, events),
        "item_id": rng.integers(0, 100_000_000, events),
        "domain": rng.integers(0, 2, events).astype(np.int8),
        "visit_id": rng.integers(0, 1 << 40, events),
        "event": rng.integers(0, len(event_names(SPEC)), events).astype(np.int8),
        "time_ms": START_MS + np.sort(rng.integers(0, events * 10, events)),
        "value": np.where(rng.random(events) < 0.2, rng.integers(1, 60_000, events), 0).astype(np.float32),
    }


def store(path: Path, events: Columns) -> None:
    """Write the events as a dataset has them."""
    (path / "events").mkdir(parents=True)
    owner = partition_of(events["user_id"], PARTITIONS)
    for partition in range(PARTITIONS):
        own = {name: column[owner == partition] for name, column in events.items()}
        pq.write_table(event_table(SPEC, own), path / "events" / f"part-{partition:05d}.parquet")
    (path / "dataset.json").write_text(SPEC.to_json())


def measure(work: Callable[[], int]) -> dict[str, float]:
    """Events that ``work`` gets done, per second by the clock and of CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    events = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"events": events, "events_per_second": events / wall, "events_per_cpu_second": events / cpu}


def drain(source: Source) -> int:
    """Take all batches."""
    with source.open(range(source.partitions)) as reader:
        return sum(len(batch) for batch in reader)


def publish(topic: Topic, events: Columns, per_message: int) -> int:
    """Write events to a topic and wait for the brokers."""
    count = len(events["time_ms"])
    for first in range(0, count, 20_000):
        topic.publish({name: column[first : first + 20_000] for name, column in events.items()}, per_message)
    topic.flush()
    return count


def best(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The best of several runs: what comes between them on a shared machine only slows."""
    return {key: max(run[key] for run in runs) for key in runs[0]}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=2_000_000, help="events of the replay")
    parser.add_argument("--topic-events", type=int, default=200_000, help="events of each topic")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the best counts")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args(argv)

    results: dict[str, Any] = {}
    events = random_events(options.events)
    with tempfile.TemporaryDirectory() as scratch:
        store(Path(scratch) / "log", events)
        source = FilesSource(Path(scratch) / "log", StreamConfig())
        results["files"] = {"read": best([measure(partial(drain, source)) for _ in range(options.repeats)])}

    few = {name: column[: options.topic_events] for name, column in events.items()}
    cluster = library().Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "ignored", "log_level": 2})
    brokers = ",".join(f"{broker.host}:{broker.port}" for broker in cluster.list_topics(timeout=20).brokers.values())
    for format, per_message in MESSAGES:
        name = f"{format}-{uuid.uuid4().hex[:8]}"
        cluster.list_topics(name, timeout=20)
        config = StreamConfig(source="kafka", brokers=brokers, topic=name, format=format, until_end=True)
        topic = Topic(config, SPEC, PARTITIONS)
        written = measure(partial(publish, topic, few, per_message))
        kafka = KafkaSource(config, SPEC)
        runs = [measure(partial(drain, kafka)) for _ in range(options.repeats)]
        results[f"kafka, {format}, {per_message:,} a message"] = {"read": best(runs), "publish": written}

    print("| source | events read/s | per CPU second | events published/s |")
    print("|---|---:|---:|---:|")
    for name, result in results.items():
        read = result["read"]
        written_text = f"{result['publish']['events_per_second']:,.0f}" if "publish" in result else ""
        print(f"| {name} | {read['events_per_second']:,.0f} | {read['events_per_cpu_second']:,.0f} | {written_text} |")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, {"results": results, "environment": environment(1)})


if __name__ == "__main__":
    main()
