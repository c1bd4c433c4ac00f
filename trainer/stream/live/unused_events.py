"""Log of the unused events of a stream: late events, and events without an open visit."""

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
    """Appends events that change no row to ``RUN/unused_events/rank-00000.jsonl``, one JSON event per line.

    A line has the fields of a message and ``reason``. A resumed run reads the events after its checkpoint again and
    writes them again; the counts in the checkpoint are exact.

    Earlier versions wrote to ``RUN/aside/``. Such a run continues in ``RUN/unused_events/``; its old files stay as they
    are, because ranks on several machines cannot move them safely, and nothing reads them back.

    Args:
        model_dir: directory of the model's files.
        spec: description of the data in the stream.
        rank: rank of this process.
    """

    def __init__(self, model_dir: Path, spec: DatasetSpec, rank: int) -> None:
        self._path = model_dir / DIRECTORY / f"rank-{rank:05d}.jsonl"
        self._names = {"domain": DOMAINS, "event": event_names(spec), "reason": REASONS}

    def write(self, events: Columns) -> None:
        """Append events, given as columns of ``AssembledRows.unused``.

        Raises:
            UserError: the file cannot be written.
        """
        # No empty file for a stream without unused events.
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
        """Return the values of a column, with names in place of codes."""
        values = column.tolist()
        return [self._names[name][code] for code in values] if name in self._names else values
