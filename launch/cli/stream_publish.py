"""``limelight stream publish``: write the events of a dataset to a Kafka topic, in event time order."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from launch.cli.command import Command, json_option, print_json
from trainer.console.errors import UserError
from trainer.console.outputs import InputPath


@click.command(
    cls=Command,
    short_help="Publish a dataset's events to a Kafka topic.",
    example="limelight stream publish data/world --brokers localhost:9092 --topic watch --speed 60",
)
@click.argument(
    "dataset",
    metavar="[DATASET]",
    required=False,
    type=InputPath(urls=True),
    help="Dataset: a directory or an fsspec URL.",
)
@click.option("--brokers", required=True, metavar="HOST:PORT,...", help="Kafka bootstrap brokers.")
@click.option("--topic", required=True, metavar="T", help="Topic to write to.")
@click.option(
    "--speed",
    type=float,
    default=0.0,
    metavar="X",
    help="Replay speed: 60 replays an hour in a minute; 0, the default, as fast as possible.",
)
@click.option(
    "--format",
    "message_format",
    type=click.Choice(["json", "arrow"]),
    default="json",
    show_default=True,
    help="Format of the messages.",
)
@click.option(
    "--partitions", type=int, metavar="N", help="Partitions of a topic that is created (default: the dataset's)."
)
@click.option(
    "--events-per-message",
    type=int,
    metavar="N",
    help="Most events of a message (default: 1 of JSON, 1000 of Arrow); all are of one partition.",
)
@click.option(
    "--dead-letters",
    is_flag=True,
    help="Put the topic's dead letters back on it, instead of a dataset's events; those put back before are left out.",
)
@click.option(
    "--dead-letter-topic", default="", metavar="T", help="Topic of the dead letters (default: TOPIC-dead-letters)."
)
@click.option("--append", is_flag=True, help="Write to a topic that has messages already.")
@click.option(
    "--properties", default="", metavar="FILE", type=InputPath(), help="librdkafka properties, such as for TLS."
)
@click.option(
    "--retry-seconds",
    type=float,
    default=60.0,
    show_default=True,
    metavar="S",
    help="Give up on brokers that do not answer for so long.",
)
@json_option
def publish(
    dataset: str | None,
    message_format: str,
    partitions: int | None,
    events_per_message: int | None,
    dead_letters: bool,
    dead_letter_topic: str,
    append: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Publish the events of a dataset to a Kafka topic.

    Each event goes to the partition of its user, in event time order, and each exposure carries the features of its
    training row as of its request. A topic that does not exist is created. The messages are described at the top of
    trainer/stream/sources/message_codec.py.

    With --dead-letters, messages that a job has rejected are put back on the topic, such as after a mistake in the
    job's settings was corrected: without the events that were trained on, and with their keys and headers.
    """
    if dead_letters:
        _put_back({**settings, "dead_letter": dead_letter_topic}, as_json, dataset or partitions or append)
        return
    if dataset is None:
        raise UserError("stream publish: name a DATASET, or --dead-letters")
    from trainer.config.stream import StreamConfig
    from trainer.config.toml import validate
    from trainer.console.progress import Progress
    from trainer.data.format.schema import DatasetSpec
    from trainer.stream.sources.kafka_topic import TopicPublisher
    from trainer.stream.sources.replay import ReplaySource

    spec = DatasetSpec.load(dataset)
    config = validate(StreamConfig, {**settings, "format": message_format}, "limelight stream publish")
    topic = TopicPublisher(config, spec, partitions or spec.partitions, append=append).open()
    per_message = events_per_message or (1 if message_format == "json" else 1000)
    source = ReplaySource(dataset, config)
    with (
        source.open(range(source.partitions)) as reader,
        Progress("publishing", spec.events, "events", quiet=as_json) as progress,
    ):
        for batch in reader:
            topic.publish(batch.events, per_message, batch.logged)
            progress.advance(len(batch))
    topic.flush()
    if as_json:
        print_json({"events": spec.events, "topic": config.topic, "partitions": topic.partitions})
        return
    print(f"{spec.events:,} events are on topic {config.topic} in {topic.partitions} partitions")


def _put_back(settings: dict[str, Any], as_json: bool, unused: Any) -> None:
    """Put dead letters back, and print their numbers."""
    from trainer.config.stream import StreamConfig
    from trainer.config.toml import validate
    from trainer.console.progress import Progress
    from trainer.stream.sources.kafka_put_back import put_back

    if unused:
        raise UserError("stream publish: --dead-letters takes no DATASET, --partitions or --append")
    config = validate(StreamConfig, settings, "limelight stream publish")
    with Progress("putting back", 0, "letters", quiet=as_json) as progress:

        def reached(done: int, total: int) -> None:
            progress.total = total
            progress.advance(done - progress.done)

        counts = put_back(config, reached)
    if as_json:
        print_json({"topic": config.topic, **asdict(counts)})
        return
    left = f"; {counts.foreign:,} messages that are no dead letters of this topic were left" if counts.foreign else ""
    repeated = f", {counts.duplicates:,} repeated dead letters left out" if counts.duplicates else ""
    print(f"messages put back on topic {config.topic}: {counts.messages:,}{repeated}{left}")
