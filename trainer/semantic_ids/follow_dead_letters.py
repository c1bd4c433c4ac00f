"""Dead letters of a job that follows live rooms: messages that cannot be used, with their reasons."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from trainer.console.errors import UserError
from trainer.semantic_ids.segment_source import RejectedMessage

FILE = "dead-letters.jsonl"
MAX_FILE_BYTES = 1 << 28
"""Size from which the file is renamed to ``dead-letters.jsonl.old``: a broken producer must not fill the disk."""
KEPT_BYTES = 1 << 16
"""Longest part of a message that is kept."""


class DeadLetterFile:
    """File of dead letters, each a line of JSON with ``reason``, ``place`` and ``message``.

    Args:
        directory: directory of the job.
        size: bytes of the file that belong to stored records. What an ended process has written after them is cut off,
            because its messages are read again.

    Attributes:
        size: bytes of the file.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, directory: Path, size: int) -> None:
        self._path = directory / FILE
        try:
            with open(self._path, "ab") as file:
                self.size = os.fstat(file.fileno()).st_size
                # A shorter file is one that the user has begun anew.
                if self.size > size:
                    file.truncate(size)
                    self.size = size
        except OSError as error:
            raise self._failed(error) from None

    def append(self, rejected: Sequence[RejectedMessage]) -> None:
        """Write messages; they are on disk when the call returns.

        Raises:
            UserError: they cannot be written.
        """
        if not rejected:
            return
        lines = b"".join(_line(message) for message in rejected)
        try:
            if self.size >= MAX_FILE_BYTES:
                os.replace(self._path, self._path.with_name(f"{FILE}.old"))
            with open(self._path, "ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
                self.size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self._path}: cannot be written ({error.strerror})")


def _line(message: RejectedMessage) -> bytes:
    content = message.content[:KEPT_BYTES].decode(errors="backslashreplace")
    return json.dumps({"reason": message.reason, "place": message.place, "message": content}).encode() + b"\n"
