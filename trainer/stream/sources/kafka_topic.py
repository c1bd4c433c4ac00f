"""Writes events to a Kafka topic, each in the partition of its user."""

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
    """A topic to publish to; it is made if it is not there.

    Args:
        config: brokers, topic, format and timeouts.
        spec: of the dataset whose events are published.
        partitions: of a topic that is made.
        append: write to a topic that has messages already.

    Attributes:
        partitions: of the topic.

    Raises:
        UserError: brokers do not answer, the topic cannot be made, or it is not empty.
    """

    def __init__(self, config: StreamConfig, spec: DatasetSpec, partitions: int, append: bool = False) -> None:
        self._config, self._codec, self._trouble = config, MessageCodec(config.format, spec, 0), BrokerStatus()
        self._failures: list[str] = []
        self._producer = make_producer(config, self._trouble)
        consumer = make_consumer(config, self._trouble)
        try:
            known = retry(lambda timeout: consumer.list_topics(timeout=timeout), config, self._trouble).topics
            if config.topic not in known:
                self._make(partitions)
            self.partitions = retry(
                lambda timeout: topic_partitions(consumer, config.topic, timeout), config, self._trouble
            )[0]
            held = watermarks(consumer, range(self.partitions), config, self._trouble)
        finally:
            consumer.close()
        messages = sum(high - low for low, high in held.values())
        if messages and not append:
            raise UserError(
                f"topic {config.topic} has {messages:,} messages already; name a new topic, or --append to add to them"
            )

    def publish(self, events: Columns, per_message: int, logged: RequestFeatures | None = None) -> None:
        """Hand events to the producer, which sends them in the background; ``logged`` with some of them.

        Raises:
            UserError: some before them could not be delivered.
        """
        owner = partition_of(events["user_id"], self.partitions)
        for p in np.unique(owner).tolist():
            at = np.flatnonzero(owner == p)
            own = {name: column[at] for name, column in events.items()}
            features = None if logged is None else logged.take(at)
            for key, value in self._messages(own, features, per_message):
                produce(
                    self._producer, self._config.topic, key=key, value=value, partition=p, on_delivery=self._delivered
                )
            self._producer.poll(0)
        self._check()

    def flush(self) -> None:
        """Wait until all messages are delivered.

        Raises:
            UserError: some could not be.
        """
        self._producer.flush()
        self._check()

    def _messages(
        self, events: Columns, logged: RequestFeatures | None, per_message: int
    ) -> Iterator[tuple[bytes | None, bytes]]:
        """Keys and values; what holds events of several users has no key, but their partition."""
        if per_message == 1:
            keys = (str(user).encode() for user in events["user_id"])
            yield from zip(keys, self._codec.encode(events, logged), strict=True)
            return
        for first in range(0, len(events["user_id"]), per_message):
            part = {name: column[first : first + per_message] for name, column in events.items()}
            features = None if logged is None else logged.part(first, first + per_message)
            yield None, self._codec.encode_together(part, features)

    def _make(self, partitions: int) -> None:
        from confluent_kafka.admin import AdminClient, NewTopic

        admin = make_client(AdminClient, client_properties(self._config), self._trouble, self._config.properties)
        new = NewTopic(self._config.topic, num_partitions=partitions)
        made = admin.create_topics([new], request_timeout=self._config.retry_seconds)
        try:
            made[self._config.topic].result()
        except library().KafkaException as error:
            raise UserError(
                f"topic {self._config.topic} is not there and cannot be made ({error.args[0].str()}); make it with "
                f"{partitions} partitions, with the tools of the broker"
            ) from None

    def _delivered(self, error: Any, message: Any) -> None:
        if error is not None:
            self._failures.append(error.str())

    def _check(self) -> None:
        if self._failures:
            raise UserError(
                f"topic {self._config.topic}: {len(self._failures):,} messages could not be delivered "
                f"({self._failures[0]}); publish the dataset anew to another topic"
            )
