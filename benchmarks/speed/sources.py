"""Measure the events a second that a rank reads from a replay of files and from a Kafka topic.

Each source is read without and with logged features, 85 numbers with one event of sixteen. The topic lies in
librdkafka's own cluster inside this process, which speaks the brokers' protocol over the loopback interface and shares
the cores with the reader: a real broker elsewhere costs less. That cluster keeps 5 MB of a partition, so few events are
read from a topic, several times.

    python -m benchmarks.speed.sources --out benchmarks/results/sources.json
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.measure import best_of, make_parser, spread_of, write_result
from trainer.config.stream import StreamConfig
from trainer.data.format.schema import DatasetSpec, DenseFeature, SideFeature, partition_of, row_columns
from trainer.data.format.shards import write_rows
from trainer.data.format.validation import Columns
from trainer.data.format.visit_events import event_names, event_table
from trainer.stream.labels.assembled_rows import EXPOSURE
from trainer.stream.sources.kafka_client import library
from trainer.stream.sources.kafka_source import KafkaSource
from trainer.stream.sources.kafka_topic import TopicPublisher
from trainer.stream.sources.logged_features import FEATURES, RequestFeatures
from trainer.stream.sources.replay import ReplaySource
from trainer.stream.sources.source import Source

SHORT = ("--events", "200000", "--topic-events", "20000", "--repeats", "1")

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
    side=tuple(SideFeature(f"side_{k}", "context", 1000) for k in range(20)),
    dense=tuple(DenseFeature(f"dense_{k}", "context") for k in range(5)),
    statistics=tuple((f"side_{k}",) for k in range(10)),
)
LONGEST_VISIT_MS = 1_800_000


def random_events(events: int) -> Columns:
    """Return 100 events a second, with ids as large as those of a service."""
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


def random_features(events: Columns) -> RequestFeatures:
    """Return random features of the exposures of live rooms."""
    rng = np.random.default_rng(1)
    at = np.flatnonzero((events["event"] == EXPOSURE) & (events["domain"] == 1))
    shape = {name: (len(at), *row_columns(SPEC)[name][1]) for name in FEATURES}
    side = rng.integers(0, 1000, shape["side"]).astype(np.int32)
    stat = rng.geometric(0.05, shape["stat"]).astype(np.float32)
    return RequestFeatures(at, side, rng.random(shape["dense"], np.float32), stat)


def stored_rows(events: Columns, logged: RequestFeatures) -> dict[str, np.ndarray]:
    """Return training rows with these features, of visits of up to half an hour."""
    rng = np.random.default_rng(2)
    layout = row_columns(SPEC).items()
    rows = {name: np.zeros((len(logged), *shape), dtype) for name, (dtype, shape) in layout}
    rows |= {name: events[name][logged.at] for name in ("visit_id", "user_id", "author_id", "item_id")}
    rows |= {name: getattr(logged, name) for name in FEATURES}
    rows["request_ms"] = events["time_ms"][logged.at]
    rows["emit_ms"] = rows["request_ms"] + rng.integers(0, LONGEST_VISIT_MS, len(logged))
    return rows


def store(path: Path, events: Columns, logged: RequestFeatures | None) -> None:
    """Write the events as a dataset, with or without training rows."""
    (path / "events").mkdir(parents=True)
    owner = partition_of(events["user_id"], PARTITIONS)
    for partition in range(PARTITIONS):
        own = {name: column[owner == partition] for name, column in events.items()}
        pq.write_table(event_table(SPEC, own), path / "events" / f"part-{partition:05d}.parquet")
    if logged is not None:
        write_rows(path, SPEC, stored_rows(events, logged))
    spec = replace(SPEC, rows=0 if logged is None else len(logged))
    (path / "dataset.json").write_text(spec.to_json())


def measure(work: Callable[[], int]) -> dict[str, float]:
    """Return the events that ``work`` handles, and their rates per elapsed second and per CPU second."""
    wall, cpu = time.perf_counter(), time.process_time()
    events = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"events": events, "events_per_second": events / wall, "events_per_cpu_second": events / cpu}


def drain(source: Source) -> int:
    """Read all batches; return the number of events."""
    with source.open(range(source.partitions)) as reader:
        return sum(len(batch) for batch in reader)


def publish(topic: TopicPublisher, events: Columns, logged: RequestFeatures | None, per_message: int) -> int:
    """Write events to a topic, wait for the brokers, and return the number of events."""
    count = len(events["time_ms"])
    for first in range(0, count, 20_000):
        part = {name: column[first : first + 20_000] for name, column in events.items()}
        topic.publish(part, per_message, None if logged is None else logged.part(first, first + 20_000))
    topic.flush()
    return count


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("speed.sources", __doc__)
    parser.add_argument("--events", type=int, default=2_000_000, help="events of the replay (default: %(default)s)")
    parser.add_argument("--topic-events", type=int, default=200_000, help="events of each topic (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the best counts (default: %(default)s)")
    options = parser.parse_args(argv)

    results: dict[str, Any] = {}
    events = random_events(options.events)
    logged = random_features(events)
    with tempfile.TemporaryDirectory() as scratch:
        for name, carried in (("files", None), ("files, features", logged)):
            path = Path(scratch) / name
            store(path, events, carried)
            source = ReplaySource(path, StreamConfig())
            runs = [measure(partial(drain, source)) for _ in range(options.repeats)]
            results[name] = {"read": best_of(runs), "spread": spread_of(runs)}
    plain, joined = (options.events / results[name]["read"]["events_per_cpu_second"] for name in results)
    results["files, features"] |= {"rows": len(logged), "seconds_a_million_rows": (joined - plain) / len(logged) * 1e6}

    few = {name: column[: options.topic_events] for name, column in events.items()}
    cluster = library().Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "ignored", "log_level": 2})
    brokers = ",".join(f"{broker.host}:{broker.port}" for broker in cluster.list_topics(timeout=20).brokers.values())
    for (format, per_message), carried in product(MESSAGES, (None, logged.part(0, options.topic_events))):
        name = f"{format}-{uuid.uuid4().hex[:8]}"
        cluster.list_topics(name, timeout=20)
        config = StreamConfig(source="kafka", brokers=brokers, topic=name, format=format, until_end=True)
        topic = TopicPublisher(config, SPEC, PARTITIONS).open()
        written = measure(partial(publish, topic, few, carried, per_message))
        kafka = KafkaSource(config, SPEC).connect()
        runs = [measure(partial(drain, kafka)) for _ in range(options.repeats)]
        label = f"kafka, {format}, {per_message:,} a message" + ("" if carried is None else ", features")
        results[label] = {"read": best_of(runs), "spread": spread_of(runs), "publish": written}

    print("| source | events read/s | per CPU second | events published/s |")
    print("|---|---:|---:|---:|")
    for name, result in results.items():
        read = result["read"]
        written_text = f"{result['publish']['events_per_second']:,.0f}" if "publish" in result else ""
        print(f"| {name} | {read['events_per_second']:,.0f} | {read['events_per_cpu_second']:,.0f} | {written_text} |")
    joining = results["files, features"]["seconds_a_million_rows"]
    print(f"\njoining the features of a million stored rows to their exposures takes {joining:.1f} s of CPU")
    write_result(options.out, {"results": results})


if __name__ == "__main__":
    main()
