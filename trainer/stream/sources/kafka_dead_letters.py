"""Dead letters: writes rejected events with the reason to a topic of their own, before the position passes them.

A dead letter has the format of the stream. It holds only the rejected event, or the whole message if that cannot be
split into events. Its headers give the reason and the source: ``limelight.reason``, ``limelight.topic``,
``limelight.partition``, ``limelight.offset`` and ``limelight.inside`` (the number of the event in its message). A job
that was killed sends the dead letters since its last checkpoint again; the headers identify the duplicates. The counts
in positions have each event once.
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

logger = logging.getLogger(__name__)

_LINE_SECONDS = 30.0
_WINDOW = 1000


@dataclass(frozen=True)
class DeadLetter:
    """Rejected event and its place in the topic.

    Attributes:
        partition: partition of the topic.
        offset: offset of the message.
        inside: number of the event in the message.
        reason: reason as text for a person.
        content: see ``trainer.stream.sources.message_codec.RejectedEvent``.
    """

    partition: int
    offset: int
    inside: int
    reason: str
    content: bytes

    def __str__(self) -> str:
        return f"partition {self.partition} offset {self.offset}: {self.reason}"


class DeadLetterProducer:
    """Sends rejected events to the dead-letter topic, and stops the job if most of a stream is rejected.

    The producer is created with the first dead letter.

    Args:
        config: config of the stream.
    """

    def __init__(self, config: StreamConfig) -> None:
        self._config, self._status = config, BrokerStatus()
        self._producer: Any = None
        self._topic = config.dead_letter or f"{config.topic}-dead-letters"
        self._recent: list[tuple[int, int]] = []
        self._unreported, self._last_report = 0, -_LINE_SECONDS

    def send(self, letters: Sequence[DeadLetter], good: int) -> None:
        """Write rejected events to the dead-letter topic, and count them against the ``good`` ones of the same chunk.

        Raises:
            UserError: they cannot be written, or most of the latest events were rejected.
        """
        if letters:
            self._write(letters)
            self._unreported += len(letters)
            # A broken producer may send thousands of bad events a second.
            if time.monotonic() - self._last_report >= _LINE_SECONDS:
                logger.info(
                    f"stream: {self._unreported:,} events of topic {self._config.topic} were rejected (such as "
                    f"{letters[0]}); they are in the dead-letter topic {self._topic}"
                )
                self._unreported, self._last_report = 0, time.monotonic()
        self._recent.append((good, len(letters)))
        total = sum(good + bad for good, bad in self._recent)
        if total >= _WINDOW:
            rejected = sum(bad for _, bad in self._recent)
            self._recent = []
            # So many rejections mean wrong settings, and training on the rest would hide them.
            if 2 * rejected > total:
                example = f" (such as {letters[0]})" if letters else ""
                raise UserError(
                    f"{rejected:,} of the last {total:,} events of topic {self._config.topic} were rejected{example}; "
                    f"check that stream.format = {self._config.format!r} and stream.partitioner = "
                    f"{self._config.partitioner!r} are those of the topic"
                )

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
            headers = {
                "reason": letter.reason,
                "topic": self._config.topic,
                "partition": letter.partition,
                "offset": letter.offset,
                "inside": letter.inside,
            }
            produce(
                self._producer,
                self._topic,
                value=letter.content,
                headers=[(f"limelight.{name}", str(value).encode()) for name, value in headers.items()],
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
