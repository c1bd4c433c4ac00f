"""Events that changed no row, kept in a file: too late, or of no open visit. Nothing is dropped silently."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from trainer.console.errors import UserError
from trainer.data.format.schema import DOMAINS, DatasetSpec
from trainer.data.format.validation import Columns
from trainer.data.format.visit_events import event_names
from trainer.stream.labels.assembled_rows import EVENT_TYPES, REASONS

DIRECTORY = "unused_events"


class UnusedEventLog:
    """``RUN/unused_events/rank-00000.jsonl``: an event a line, as messages have it, with its ``reason``.

    A run that goes on from a checkpoint meets the events behind it again and writes them again; the counts in the
    checkpoint are exact.

    Args:
        home: of the run.
        spec: of the stream.
        rank: of this process.
    """

    def __init__(self, home: Path, spec: DatasetSpec, rank: int) -> None:
        self._path = home / DIRECTORY / f"rank-{rank:05d}.jsonl"
        self._names = {"domain": DOMAINS, "event": event_names(spec), "reason": REASONS}

    def write(self, events: Columns) -> None:
        """Append events: columns of ``AssembledRows.unused``.

        Raises:
            UserError: the file cannot be written.
        """
        if not len(events["reason"]):
            return
        columns = [self._readable(name, events[name]) for name in (*EVENT_TYPES, "reason")]
        names = (*EVENT_TYPES, "reason")
        lines = [json.dumps(dict(zip(names, values, strict=True))) + "\n" for values in zip(*columns, strict=True)]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.writelines(lines)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written ({error.strerror})") from None

    def _readable(self, name: str, column: np.ndarray) -> list:
        values = column.tolist()
        return [self._names[name][code] for code in values] if name in self._names else values
