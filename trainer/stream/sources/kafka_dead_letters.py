"""Dead letters: writes messages with rejected events to a topic of their own, before the position passes them.

A dead letter is the whole message, with its key, value and headers. These headers are added:

======================  ===========================================================================================
header                  content
======================  ===========================================================================================
``limelight.reason``    reason; for several rejected events ``event 1: reason; event 4: reason``
``limelight.topic``     topic of the message, like ``limelight.partition`` and ``limelight.offset``
``limelight.format``    ``stream.format`` of the job
``limelight.inside``    numbers of the rejected events in the message, from 0 and with commas between; the other events
                        of the message are trained on
``limelight.target``    partition for each of these events, in which it can be put back
======================  ===========================================================================================

``limelight stream publish --dead-letters`` puts the rejected events back on the topic; see
``trainer.stream.sources.kafka_put_back``. A job that was killed sends the dead letters since its last checkpoint again;
the headers identify the duplicates. The counts in positions have each event once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config.stream import StreamConfig
from trainer.console.errors import UserError
from trainer.stream.sources.kafka_client import BrokerStatus, make_producer, produce
from trainer.stream.sources.message_codec import RejectedEvent

logger = logging.getLogger(__name__)

_LINE_SECONDS = 30.0

HEADERS = ("reason", "topic", "partition", "offset", "format", "inside", "target")
"""Headers of a dead letter, each after ``HEADER_PREFIX``."""

HEADER_PREFIX = "limelight."
PUT_BACK_HEADER = f"{HEADER_PREFIX}put_back"
"""Header of a message that was put back on its topic."""

_REASONS = 20


@dataclass(frozen=True)
class DeadLetter:
    """Message with rejected events.

    Attributes:
        message: message of the library.
        rejected: its rejected events.
    """

    message: Any
    rejected: tuple[RejectedEvent, ...]

    def __str__(self) -> str:
        return f"partition {self.message.partition()} offset {self.message.offset()}: {self.reason}"

    @property
    def reason(self) -> str:
        """Reason as text for a person."""
        if len(self.rejected) == 1:
            return self.rejected[0].reason
        reasons = [f"event {event.inside}: {event.reason}" for event in self.rejected[:_REASONS]]
        if len(self.rejected) > _REASONS:
            reasons.append(f"and {len(self.rejected) - _REASONS} more")
        return "; ".join(reasons)

    def headers(self, format: str) -> list[tuple[str, bytes | None]]:
        """Return the headers of the message, and those that are described at the top of this file."""
        message, partition = self.message, self.message.partition()
        targets = [partition if event.owner is None else event.owner for event in self.rejected]
        added = {
            "reason": self.reason,
            "topic": message.topic(),
            "partition": partition,
            "offset": message.offset(),
            "format": format,
            "inside": ",".join(str(event.inside) for event in self.rejected),
            "target": ",".join(map(str, targets)),
        }
        return own_headers(message) + [(f"{HEADER_PREFIX}{name}", str(value).encode()) for name, value in added.items()]


def own_headers(message: Any) -> list[tuple[str, bytes | None]]:
    """Return the headers of a message without those of a dead letter or of a message that was put back."""
    added = {PUT_BACK_HEADER, *(f"{HEADER_PREFIX}{name}" for name in HEADERS)}
    return [(name, value) for name, value in message.headers() or [] if name not in added]


class DeadLetterProducer:
    """Sends messages with rejected events to the dead-letter topic.

    The producer is created with the first dead letter.

    Args:
        config: config of the stream.
    """

    def __init__(self, config: StreamConfig) -> None:
        self._config, self._status = config, BrokerStatus()
        self._producer: Any = None
        self._topic = config.dead_letter or f"{config.topic}-dead-letters"
        self._unreported, self._last_report = 0, -_LINE_SECONDS

    def send(self, letters: Sequence[DeadLetter]) -> None:
        """Write messages to the dead-letter topic.

        Raises:
            UserError: they cannot be written.
        """
        if not letters:
            return
        self._write(letters)
        self._unreported += sum(len(letter.rejected) for letter in letters)
        # A broken producer may send thousands of bad events a second.
        if time.monotonic() - self._last_report >= _LINE_SECONDS:
            logger.info(
                f"stream: {self._unreported:,} events of topic {self._config.topic} were rejected (such as "
                f"{letters[0]}); they are in the dead-letter topic {self._topic}"
            )
            self._unreported, self._last_report = 0, time.monotonic()

    def _write(self, letters: Sequence[DeadLetter]) -> None:
        """Produce the letters, and wait until they are delivered."""
        if self._producer is None:
            self._producer = make_producer(self._config, self._status)
        # Delivery failures come in callbacks, which must not raise.
        failures: list[str] = []

        def delivered(error: Any, message: Any) -> None:
            if error is not None:
                failures.append(error.str())

        for letter in letters:
            produce(
                self._producer,
                self._topic,
                key=letter.message.key(),
                value=letter.message.value(),
                headers=letter.headers(self._config.format),
                on_delivery=delivered,
            )
        # The position may pass these events only once they are stored.
        left = self._producer.flush(self._config.retry_seconds)
        if left or failures:
            why = failures[0] if failures else self._status.last_error or "no broker answers"
            raise UserError(
                f"topic {self._config.topic}: {letters[0]}, and it cannot be written to the dead-letter topic "
                f"{self._topic} ({why}); create that topic, or name another one as stream.dead_letter"
            )
