"""Publishes events to a Kafka topic, each to the partition of its user."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from trainer.config.stream import StreamConfig
from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec, partition_of
from trainer.data.format.validation import Columns
from trainer.stream.sources.kafka_client import (
    BrokerStatus,
    client_properties,
    library,
    make_client,
    make_consumer,
    make_producer,
    produce,
    retry,
    topic_partitions,
    watermarks,
)
from trainer.stream.sources.logged_features import RequestFeatures
from trainer.stream.sources.message_codec import MessageCodec


class TopicPublisher:
    """Publishes events to a topic; call :meth:`open` first.

    Args:
        config: brokers, topic, format and timeouts.
        spec: description of the dataset whose events are published.
        partitions: number of partitions of a topic that has to be created.
        append: write to a topic even if it has messages already.

    Attributes:
        partitions: number of partitions of the topic, once it is open.
    """

    def __init__(self, config: StreamConfig, spec: DatasetSpec, partitions: int, append: bool = False) -> None:
        self._config, self._codec, self._status = config, MessageCodec(config.format, spec, 0), BrokerStatus()
        self._append = append
        self._failures: list[str] = []
        self._producer: Any = None
        self.partitions = partitions

    def open(self) -> TopicPublisher:
        """Connect to the brokers, and create the topic if it does not exist; return this publisher.

        Raises:
            UserError: no broker answers, the topic cannot be created, or it is not empty.
        """
        config = self._config
        consumer = make_consumer(config, self._status)
        try:
            known = retry(lambda timeout: consumer.list_topics(timeout=timeout), config, self._status).topics
            if config.topic not in known:
                self._create(self.partitions)
            self.partitions = retry(
                lambda timeout: topic_partitions(consumer, config.topic, timeout), config, self._status
            )[0]
            held = watermarks(consumer, range(self.partitions), config, self._status)
        finally:
            consumer.close()
        # Publishing twice by mistake would double every event.
        messages = sum(high - low for low, high in held.values())
        if messages and not self._append:
            raise UserError(
                f"topic {config.topic} has {messages:,} messages already; name a new topic, or --append to add to them"
            )
        self._producer = make_producer(config, self._status)
        return self

    def publish(self, events: Columns, per_message: int, logged: RequestFeatures | None = None) -> None:
        """Pass events and their ``logged`` features to the producer, which sends them in the background.

        Raises:
            UserError: earlier messages could not be delivered.
        """
        owner = partition_of(events["user_id"], self.partitions)
        # The partition is given explicitly, because a producer's own hash would differ from ours.
        for p in np.unique(owner).tolist():
            at = np.flatnonzero(owner == p)
            own = {name: column[at] for name, column in events.items()}
            features = None if logged is None else logged.take(at)
            for key, value in self._messages(own, features, per_message):
                produce(
                    self._producer, self._config.topic, key=key, value=value, partition=p, on_delivery=self._delivered
                )
            # Serves the delivery callbacks, which record failures.
            self._producer.poll(0)
        self._check()

    def flush(self) -> None:
        """Wait until all messages are delivered.

        Raises:
            UserError: messages could not be delivered.
        """
        self._producer.flush()
        self._check()

    def _messages(
        self, events: Columns, logged: RequestFeatures | None, per_message: int
    ) -> Iterator[tuple[bytes | None, bytes]]:
        """Yield keys and values; a message with events of several users has no key, only their partition."""
        if per_message == 1:
            # The key is for other consumers; this project reads the user from the message.
            keys = (str(user).encode() for user in events["user_id"])
            yield from zip(keys, self._codec.encode(events, logged), strict=True)
            return
        for first in range(0, len(events["user_id"]), per_message):
            part = {name: column[first : first + per_message] for name, column in events.items()}
            features = None if logged is None else logged.part(first, first + per_message)
            yield None, self._codec.encode_together(part, features)

    def _create(self, partitions: int) -> None:
        """Create the topic."""
        from confluent_kafka.admin import AdminClient, NewTopic

        admin = make_client(AdminClient, client_properties(self._config), self._status, self._config.properties)
        new = NewTopic(self._config.topic, num_partitions=partitions)
        created = admin.create_topics([new], request_timeout=self._config.retry_seconds)
        try:
            created[self._config.topic].result()
        except library().KafkaException as error:
            raise UserError(
                f"topic {self._config.topic} does not exist and cannot be created ({error.args[0].str()}); create it "
                f"with {partitions} partitions, with the tools of the broker"
            ) from None

    def _delivered(self, error: Any, message: Any) -> None:
        if error is not None:
            self._failures.append(error.str())

    def _check(self) -> None:
        """Raise if messages could not be delivered."""
        if self._failures:
            raise UserError(
                f"topic {self._config.topic}: {len(self._failures):,} messages could not be delivered "
                f"({self._failures[0]}); publish the dataset anew to another topic"
            )
