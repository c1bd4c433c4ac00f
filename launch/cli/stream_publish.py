"""``limelight stream publish``: puts the events of a dataset on a Kafka topic, in event time order."""

from __future__ import annotations

import argparse

from trainer.console.job_arguments import add_command


def add_publish_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``publish``; ``run(arguments)`` of the parsed arguments returns the exit status."""
    publish = add_command(
        commands,
        "publish",
        "put a dataset's events on a Kafka topic",
        "Put the events of a dataset on a Kafka topic, each in the partition of its user and in event time order, and\n"
        "with each exposure the features of its training row, as of its request.\n"
        "The topic is made if it is not there. The messages are described at the top of\n"
        "trainer/stream/sources/message_codec.py.",
        "limelight stream publish data/world --brokers localhost:9092 --topic watch --speed 60",
    )
    publish.add_argument("dataset", metavar="DATASET", help="dataset, a directory or an fsspec URL")
    publish.add_argument("--brokers", required=True, metavar="HOST:PORT,...", help="Kafka brokers to begin with")
    publish.add_argument("--topic", required=True, metavar="T", help="topic to write to")
    publish.add_argument(
        "--speed", type=float, default=0.0, metavar="X", help="60 plays an hour in a minute; 0: as fast as possible"
    )
    publish.add_argument("--format", choices=("json", "arrow"), default="json", help="of the messages (default: json)")
    publish.add_argument(
        "--partitions", type=int, metavar="N", help="of a topic that is made (default: those of the dataset)"
    )
    publish.add_argument(
        "--events-per-message",
        type=int,
        metavar="N",
        help="most events of a message (default: 1 of JSON, 1000 of Arrow); those of a message share a partition",
    )
    publish.add_argument("--append", action="store_true", help="write to a topic that has messages already")
    publish.add_argument("--properties", default="", metavar="FILE", help="librdkafka properties, such as for TLS")
    publish.add_argument(
        "--retry-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="give up on silent brokers (default: %(default)s)",
    )
    publish.set_defaults(run=_publish)


def _publish(options: argparse.Namespace) -> int:
    from trainer.config.stream import StreamConfig
    from trainer.config.toml import validate
    from trainer.console.progress import Progress
    from trainer.data.format.schema import DatasetSpec
    from trainer.stream.sources.kafka_topic import TopicPublisher
    from trainer.stream.sources.replay import ReplaySource

    spec = DatasetSpec.load(options.dataset)
    config = validate(
        StreamConfig,
        {
            name: getattr(options, name)
            for name in ("brokers", "topic", "speed", "format", "properties", "retry_seconds")
        },
        "limelight stream publish",
    )
    topic = TopicPublisher(config, spec, options.partitions or spec.partitions, append=options.append)
    per_message = options.events_per_message or (1 if options.format == "json" else 1000)
    source = ReplaySource(options.dataset, config)
    with source.open(range(source.partitions)) as reader, Progress("publishing", spec.events, "events") as progress:
        for batch in reader:
            topic.publish(batch.events, per_message, batch.logged)
            progress.advance(len(batch))
    topic.flush()
    print(f"{spec.events:,} events are on topic {options.topic} in {topic.partitions} partitions")
    return 0
