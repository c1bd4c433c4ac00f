"""Shared parts of Kafka consumers and producers: the library, its settings, retries, and metadata requests."""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from trainer.config.stream import StreamConfig
from trainer.console.errors import UserError
from trainer.console.setup_advice import extra_command
from trainer.runtime.stored_files import read_settings

logger = logging.getLogger(__name__)

T = TypeVar("T")

RESERVED_PROPERTIES = {
    "bootstrap.servers": "stream.brokers",
    "enable.auto.commit": "offsets are in the checkpoints",
    "enable.auto.offset.store": "offsets are in the checkpoints",
    "auto.offset.reset": "stream.on_gap",
    "enable.partition.eof": "the end of each partition must be reported",
    "allow.auto.create.topics": "a metadata request must not create the topic",
    "enable.idempotence": "a message must be written once",
    "error_cb": "it is a function",
}
"""Properties that a file may not set, and the key that sets them or the reason why they are fixed."""

LINE_SECONDS = 5.0
"""Minimum time between two progress lines of one retry."""

READ_MESSAGES = 1000
"""Maximum number of messages in a portion of :func:`read_ranges`."""

_READ_SECONDS = 0.5
_REQUEST_SECONDS = 2.0
_PAUSE_SECONDS = 0.5


def library() -> Any:
    """Return the package ``confluent_kafka``.

    Raises:
        UserError: it is not installed.
    """
    try:
        import confluent_kafka
    except ImportError as error:
        raise UserError(
            f"Kafka needs the package confluent-kafka ({error}); type: {extra_command('confluent-kafka', 'kafka')}"
        ) from None
    return confluent_kafka


def client_properties(config: StreamConfig) -> dict[str, Any]:
    """Return the properties of a client: the brokers, and the properties in the user's file.

    Raises:
        UserError: the file cannot be read, a line is not ``key=value``, or a property is reserved.
    """
    # Errors are reported by this module; the library's own log lines would repeat them.
    properties: dict[str, Any] = {"log_level": 2}
    if config.properties:
        try:
            lines = read_settings(Path(config.properties)).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"stream.properties = {config.properties!r}: cannot be read ({error})") from None
        for number, line in enumerate(lines, 1):
            key, equals, value = (part.strip() for part in line.partition("="))
            if not key or key.startswith("#"):
                continue
            if not equals:
                raise UserError(f"{config.properties}: line {number}: write key=value, a property of librdkafka")
            if key in RESERVED_PROPERTIES:
                raise UserError(
                    f"{config.properties}: line {number}: {key} cannot be set here ({RESERVED_PROPERTIES[key]})"
                )
            properties[key] = value
    return {**properties, "bootstrap.servers": config.brokers}


@dataclass
class BrokerStatus:
    """Last error of a client, and the time since when it has reached no broker.

    Attributes:
        last_error: text of the error.
        down_since: monotonic seconds; None while brokers are reachable.
        poll: function that makes the client deliver its errors. A consumer sets it to None when it starts to read,
            because polling would take a message from it.
    """

    last_error: str = ""
    down_since: float | None = None
    poll: Callable[[float], Any] | None = None

    def __call__(self, error: Any) -> None:
        """Record an error; clients call this as their ``error_cb``."""
        # The text of this error says nothing; the errors before it name the reason.
        if error.code() == library().KafkaError._ALL_BROKERS_DOWN:
            self.down_since = time.monotonic() if self.down_since is None else self.down_since
        else:
            self.last_error = error.str()


def make_client(kind: Callable[..., Any], properties: dict[str, Any], status: BrokerStatus, origin: str) -> Any:
    """Create a consumer, producer or admin client, which reports its errors to ``status``.

    Raises:
        UserError: the library refuses a property; names ``origin``, the file of the properties.
    """
    kafka = library()
    try:
        client = kind({**properties, "error_cb": status})
    except (kafka.KafkaException, ValueError, TypeError) as error:
        raise UserError(f"{origin or 'stream.brokers'}: {_text(error)}") from None
    status.poll = client.poll
    return client


def make_consumer(config: StreamConfig, status: BrokerStatus, group: str = "limelight") -> Any:
    """Create a consumer that commits no offsets, never resets its offset, and reports the ends of partitions.

    The library requires a ``group``; nothing is stored under the default one.
    """
    properties = {
        "group.id": group,
        **client_properties(config),
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "error",
        "enable.partition.eof": True,
        # A metadata request must not create a topic, and a training step may take long between two polls.
        "allow.auto.create.topics": False,
        "max.poll.interval.ms": 86_400_000,
    }
    return make_client(library().Consumer, properties, status, config.properties)


def make_producer(config: StreamConfig, status: BrokerStatus) -> Any:
    """Create a producer that writes every message exactly once and in order, with retries."""
    properties = {
        "linger.ms": 20,
        "compression.type": "lz4",
        "message.timeout.ms": round(config.retry_seconds * 1000),
        **client_properties(config),
        "enable.idempotence": True,
    }
    return make_client(library().Producer, properties, status, config.properties)


def retry(request: Callable[[float], T], config: StreamConfig, status: BrokerStatus) -> T:
    """Call ``request(timeout)`` until it succeeds, with a progress line every ``LINE_SECONDS``.

    Args:
        request: raises ``KafkaException`` if no broker answers, or :class:`TopicNotFound`.
        config: ``retry_seconds`` is the total time.
        status: status of the client that makes the request.

    Raises:
        UserError: no success within ``retry_seconds``; gives the last reason.
    """
    kafka = library()
    start = last_line = time.monotonic()
    while True:
        left = config.retry_seconds - (time.monotonic() - start)
        try:
            # Half of the time left, so that there is a second attempt even when the total time is short.
            return request(min(_REQUEST_SECONDS, max(left / 2, 0.1)))
        except TopicNotFound as error:
            reason = str(error)
        except kafka.KafkaException as error:
            # The client's own error says more than the exception, which often is only a timeout.
            if status.poll is not None:
                status.poll(0)
            reason = f"no Kafka broker answers at {config.brokers} ({status.last_error or _text(error)})"
        now = time.monotonic()
        left = config.retry_seconds - (now - start)
        if left <= 0:
            raise UserError(f"{reason}; gave up after {config.retry_seconds:g} s (stream.retry_seconds)")
        if last_line == start or now - last_line >= LINE_SECONDS:
            logger.info(f"stream: {reason}; trying for another {left:.0f} s")
            last_line = now
        time.sleep(min(_PAUSE_SECONDS, left))


class TopicNotFound(Exception):
    """The brokers answer, but the topic does not exist (yet)."""


def topic_partitions(consumer: Any, topic: str, timeout: float) -> tuple[int, str | None]:
    """Return the number of partitions of a topic, and the id of its cluster.

    Raises:
        TopicNotFound: there is no such topic.
        KafkaException: no broker answers.
    """
    metadata = consumer.list_topics(topic, timeout=timeout)
    entry = metadata.topics.get(topic)
    if entry is None or not entry.partitions:
        others = [name for name in consumer.list_topics(timeout=timeout).topics if name != topic]
        near = difflib.get_close_matches(topic, others, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {len(others)} other topics"
        raise TopicNotFound(f"no topic {topic!r} on the Kafka brokers ({hint})")
    return len(entry.partitions), metadata.cluster_id


def watermarks(
    consumer: Any, partitions: Iterable[int], config: StreamConfig, status: BrokerStatus
) -> dict[int, tuple[int, int]]:
    """Return the low and high offsets of each partition: its first message, and its next future message.

    Raises:
        UserError: no broker answers.
    """
    kafka = library()

    def request(partition: int, timeout: float) -> tuple[int, int]:
        held = consumer.get_watermark_offsets(kafka.TopicPartition(config.topic, partition), timeout=timeout)
        # The library returns None on a timeout, but ``retry`` expects an exception.
        if held is None:
            raise kafka.KafkaException(kafka.KafkaError(kafka.KafkaError._TIMED_OUT))
        return int(held[0]), int(held[1])

    return {partition: retry(partial(request, partition), config, status) for partition in partitions}


def without_errors(offsets: list[Any]) -> list[Any]:
    """Return the offsets of partitions, as a request has returned them.

    Raises:
        KafkaException: the request has failed for one of the partitions.
    """
    for at in offsets:
        if at.error is not None:
            raise library().KafkaException(at.error)
    return offsets


def read_ranges(topic: str, ranges: Mapping[int, tuple[int, int]], config: StreamConfig) -> Iterator[list[Any]]:
    """Yield the messages of a topic in the range ``[first, end)`` of each partition, in portions of any size.

    It has a consumer of its own, because one that reads a partition again may report the earlier end once more.

    Raises:
        UserError: a partition cannot be read, or no message comes for ``retry_seconds``.
    """
    kafka, status = library(), BrokerStatus()
    missing = {p: end for p, (first, end) in ranges.items() if first < end}
    if not missing:
        return
    consumer = make_consumer(config, status)
    # Polling would take a message away.
    status.poll = None
    consumer.assign([kafka.TopicPartition(topic, p, ranges[p][0]) for p in missing])
    heard = time.monotonic()
    try:
        while missing:
            portion, ended = [], set()
            for message in consumer.consume(READ_MESSAGES, _READ_SECONDS):
                heard, p, error = time.monotonic(), message.partition(), message.error()
                if error is not None and error.code() != kafka.KafkaError._PARTITION_EOF:
                    raise UserError(f"topic {topic} partition {p}: cannot be read ({error.str()})")
                if error is None and p in missing and message.offset() < missing[p]:
                    portion.append(message)
                # The end of a partition may come before ``end``: transaction markers have offsets, but do not arrive.
                if p in missing and (error is not None or message.offset() + 1 >= missing[p]):
                    ended.add(p)
            if ended:
                consumer.incremental_unassign([kafka.TopicPartition(topic, p) for p in ended])
                missing = {p: end for p, end in missing.items() if p not in ended}
            if portion:
                yield portion
            elif time.monotonic() - heard > config.retry_seconds:
                reason = status.last_error or "no broker answers"
                raise UserError(f"topic {topic}: no message for {config.retry_seconds:g} s ({reason})")
    finally:
        consumer.close()


def produce(producer: Any, topic: str, **message: Any) -> None:
    """Pass a message to a producer, and wait while its queue is full.

    Raises:
        UserError: the producer refuses the message, such as for its size.
    """
    while True:
        try:
            producer.produce(topic, **message)
            return
        except BufferError:
            # Polling delivers reports of earlier messages, which frees the queue.
            producer.poll(0.1)
        except library().KafkaException as error:
            size = len(message["value"] or b"")
            raise UserError(
                f"topic {topic}: a message of {size:,} bytes is refused ({_text(error)}); raise "
                f"message.max.bytes in the file of stream.properties"
            ) from None


def _text(error: Exception) -> str:
    """Return the message of an error of the library."""
    message = error.args[0] if error.args else error
    return message.str() if hasattr(message, "str") else str(message)
