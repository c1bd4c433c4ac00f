"""What reading from and writing to Kafka share: the library, its settings, and timeouts with brokers and topics."""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from trainer.config.stream import StreamConfig
from trainer.console.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

OURS = {
    "bootstrap.servers": "stream.brokers",
    "enable.auto.commit": "offsets are in the checkpoints",
    "enable.auto.offset.store": "offsets are in the checkpoints",
    "auto.offset.reset": "stream.on_gap",
    "enable.partition.eof": "the end of a partition must be seen",
    "allow.auto.create.topics": "asking for a topic must not make it",
    "enable.idempotence": "a message must be written once",
    "error_cb": "it is no text",
}
"""Properties that a file may not set, and what stands for them."""

LINE_SECONDS = 5.0
"""Between two lines about the same trouble."""

_ASK_SECONDS = 2.0


def library() -> Any:
    """The package ``confluent_kafka``.

    Raises:
        UserError: it is not installed.
    """
    try:
        import confluent_kafka
    except ImportError as error:
        raise UserError(
            f"Kafka needs the package confluent-kafka ({error}); type: make setup EXTRAS=llm,dev,kafka"
        ) from None
    return confluent_kafka


def client_properties(config: StreamConfig) -> dict[str, Any]:
    """Settings of a client: the brokers, and the file of the user's.

    Raises:
        UserError: the file is not there, has a line that is none, or a property that is not the user's to set.
    """
    # What goes wrong is told by us; the library's own lines would come in between.
    properties: dict[str, Any] = {"log_level": 2}
    if config.properties:
        try:
            lines = Path(config.properties).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"stream.properties = {config.properties!r}: cannot be read ({error})") from None
        for number, line in enumerate(lines, 1):
            key, equals, value = (part.strip() for part in line.partition("="))
            if not key or key.startswith("#"):
                continue
            if not equals:
                raise UserError(f"{config.properties}: line {number}: write key=value, as librdkafka takes it")
            if key in OURS:
                raise UserError(f"{config.properties}: line {number}: {key} cannot be set here ({OURS[key]})")
            properties[key] = value
    return {**properties, "bootstrap.servers": config.brokers}


@dataclass
class BrokerStatus:
    """The last error that a client has told, and since when it has reached no broker.

    Attributes:
        said: the error.
        since: monotonic seconds.
        serve: has the client tell what it has to, which is to be set to None once that would take a message from it.
    """

    said: str = ""
    since: float | None = None
    serve: Callable[[float], Any] | None = None

    def __call__(self, error: Any) -> None:
        """Given to clients as ``error_cb``."""
        if error.code() == library().KafkaError._ALL_BROKERS_DOWN:
            self.since = time.monotonic() if self.since is None else self.since
        else:
            self.said = error.str()


def make_client(kind: Callable[..., Any], properties: dict[str, Any], trouble: BrokerStatus, origin: str) -> Any:
    """A consumer, producer or admin client.

    Raises:
        UserError: the library does not take a property.
    """
    kafka = library()
    try:
        client = kind({**properties, "error_cb": trouble})
    except (kafka.KafkaException, ValueError, TypeError) as error:
        raise UserError(f"{origin or 'stream.brokers'}: {_text(error)}") from None
    trouble.serve = client.poll
    return client


def make_consumer(config: StreamConfig, trouble: BrokerStatus) -> Any:
    """A consumer that commits nothing, resets nothing, and tells the ends of partitions."""
    properties = {
        # The library demands one; nothing is ever stored under it.
        "group.id": "limelight",
        **client_properties(config),
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "error",
        "enable.partition.eof": True,
        # Asking for a topic must not make it, and training may take its time.
        "allow.auto.create.topics": False,
        "max.poll.interval.ms": 86_400_000,
    }
    return make_client(library().Consumer, properties, trouble, config.properties)


def make_producer(config: StreamConfig, trouble: BrokerStatus) -> Any:
    """A producer that writes every message once and in order, though it sends it again when it must."""
    properties = {
        "linger.ms": 20,
        "compression.type": "lz4",
        "message.timeout.ms": round(config.retry_seconds * 1000),
        **client_properties(config),
        "enable.idempotence": True,
    }
    return make_client(library().Producer, properties, trouble, config.properties)


def retry(ask: Callable[[float], T], config: StreamConfig, trouble: BrokerStatus) -> T:
    """``ask(timeout)`` until it answers, with a line now and then.

    Args:
        ask: raises ``KafkaException`` if no broker answered, or :class:`TopicNotFound`.
        config: how long.
        trouble: of the client that asks.

    Raises:
        UserError: no answer in ``retry_seconds``.
    """
    kafka = library()
    began = told = time.monotonic()
    while True:
        left = config.retry_seconds - (time.monotonic() - began)
        try:
            return ask(min(_ASK_SECONDS, max(left / 2, 0.1)))
        except TopicNotFound as error:
            reason = str(error)
        except kafka.KafkaException as error:
            if trouble.serve is not None:
                trouble.serve(0)
            reason = f"no Kafka broker answers at {config.brokers} ({trouble.said or _text(error)})"
        now = time.monotonic()
        left = config.retry_seconds - (now - began)
        if left <= 0:
            raise UserError(f"{reason}; gave up after {config.retry_seconds:g} s (stream.retry_seconds)")
        if told == began or now - told >= LINE_SECONDS:
            logger.info(f"stream: {reason}; trying for another {left:.0f} s")
            told = now
        time.sleep(min(0.5, left))


class TopicNotFound(Exception):
    """Brokers answer, but do not have what is asked for: it may come."""


def topic_partitions(consumer: Any, topic: str, timeout: float) -> tuple[int, str | None]:
    """Number of partitions of a topic, and the id of its cluster.

    Raises:
        TopicNotFound: no such topic.
        KafkaException: no broker answers.
    """
    metadata = consumer.list_topics(topic, timeout=timeout)
    entry = metadata.topics.get(topic)
    if entry is None or not entry.partitions:
        others = [name for name in consumer.list_topics(timeout=timeout).topics if name != topic]
        near = difflib.get_close_matches(topic, others, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {len(others)} others"
        raise TopicNotFound(f"no topic {topic!r} on the Kafka brokers ({hint})")
    return len(entry.partitions), metadata.cluster_id


def watermarks(
    consumer: Any, partitions: Iterable[int], config: StreamConfig, trouble: BrokerStatus
) -> dict[int, tuple[int, int]]:
    """First offset that the topic holds of each partition, and the one that its next message will have.

    Raises:
        UserError: no broker answers.
    """
    kafka = library()

    def ask(partition: int, timeout: float) -> tuple[int, int]:
        held = consumer.get_watermark_offsets(kafka.TopicPartition(config.topic, partition), timeout=timeout)
        if held is None:
            raise kafka.KafkaException(kafka.KafkaError(kafka.KafkaError._TIMED_OUT))
        return int(held[0]), int(held[1])

    return {partition: retry(partial(ask, partition), config, trouble) for partition in partitions}


def produce(producer: Any, topic: str, **message: Any) -> None:
    """Hand a message to a producer, once it has room for it.

    Raises:
        UserError: the producer does not take it, such as for its size.
    """
    while True:
        try:
            producer.produce(topic, **message)
            return
        except BufferError:
            producer.poll(0.1)
        except library().KafkaException as error:
            size = len(message["value"])
            raise UserError(f"topic {topic}: a message of {size:,} bytes is not taken ({_text(error)})") from None


def _text(error: Exception) -> str:
    said = error.args[0] if error.args else error
    return said.str() if hasattr(said, "str") else str(said)
