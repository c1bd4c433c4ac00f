"""What a topic has that is no event goes to a topic of its own, with the reason, before the position passes it.

A message there has the format of the stream and holds the rejected event alone, or what cannot be taken apart whole.
Its headers say why and where it was: ``limelight.reason``, ``limelight.topic``, ``limelight.partition``,
``limelight.offset`` and ``limelight.inside`` (which event of the message). A job that was killed sends what it had sent
since its last checkpoint again; the headers tell that it is the same. The counts in positions have each once.
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
    """What is no event, and where it was.

    Attributes:
        partition: of the topic.
        offset: of the message.
        inside: which event of the message.
        reason: for a person.
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
    """Sends rejected events away, says so, and gives up where most of a stream is none.

    Args:
        config: of the stream.
    """

    def __init__(self, config: StreamConfig) -> None:
        self._config, self._trouble = config, BrokerStatus()
        self._producer: Any = None
        self._topic = config.dead_letter or f"{config.topic}-dead-letters"
        self._recent: list[tuple[int, int]] = []
        self._unreported, self._last_report = 0, -_LINE_SECONDS

    def send(self, letters: Sequence[DeadLetter], good: int) -> None:
        """Have rejected events on their topic, and count them beside the ``good`` ones that came with them.

        Raises:
            UserError: they cannot be written; or most of what came lately is no event.
        """
        if letters:
            self._write(letters)
            self._unreported += len(letters)
            if time.monotonic() - self._last_report >= _LINE_SECONDS:
                logger.info(
                    f"stream: {self._unreported:,} of topic {self._config.topic} are no events (such as {letters[0]}); "
                    f"they are in topic {self._topic}"
                )
                self._unreported, self._last_report = 0, time.monotonic()
        self._recent.append((good, len(letters)))
        total = sum(good + bad for good, bad in self._recent)
        if total >= _WINDOW:
            rejected = sum(bad for _, bad in self._recent)
            self._recent = []
            if 2 * rejected > total:
                example = f" (such as {letters[0]})" if letters else ""
                raise UserError(
                    f"{rejected:,} of the last {total:,} of topic {self._config.topic} are no events{example}: are "
                    f"stream.format = {self._config.format!r} and stream.partitioner = {self._config.partitioner!r} "
                    f"those of the topic?"
                )

    def _write(self, letters: Sequence[DeadLetter]) -> None:
        if self._producer is None:
            self._producer = make_producer(self._config, self._trouble)
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
        left = self._producer.flush(self._config.retry_seconds)
        if left or failures:
            why = failures[0] if failures else self._trouble.said or "no broker answers"
            raise UserError(
                f"topic {self._config.topic}: {letters[0]}, and it cannot be put into topic {self._topic} ({why}); "
                f"make that topic, or name another as stream.dead_letter"
            )
