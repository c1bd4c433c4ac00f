"""Jobs that follow a file and kill themselves: ``python -m tests.semantic_ids.killed_follow WHOLE KILLED``.

The job in the folder ``WHOLE`` runs undisturbed. That in ``KILLED`` is killed at each point in turn, each time in a
process of its own, while the lines of the other's file arrive. The encoder and the codebook are those of the tests.

``python -m tests.semantic_ids.killed_follow job POINT ARGUMENT...`` runs ``trainer.embed`` until it is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.semantic_ids.follow_parts import HashEncoder
from tests.semantic_ids.followed_job import Job
from trainer import embed
from trainer.llm.embedding.segment_encoder import TextSegmentEncoder
from trainer.semantic_ids import follow, vector_cache
from trainer.semantic_ids.follow_dead_letters import DeadLetterFile
from trainer.semantic_ids.sqlite_store import SqliteCodeStore
from trainer.semantic_ids.vector_cache import VectorCache

POINTS = (
    "before the vectors",
    "after the vectors",
    "after the dead letters",
    "in a record of the cache",
    "before the cache is synced",
    "after the cache",
    "in the store",
    "after the store",
    "before the mark is renamed",
    "after the mark",
)
CALL = 2
"""Number of the call that is killed."""


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wrap(target: Any, name: str, *, before: bool) -> None:
    """Make the second call of a function of a class or module kill the process, before or after its work."""
    work, calls = getattr(target, name), []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if before and len(calls) == CALL:
            die()
        result = work(*arguments, **options)
        if not before and len(calls) == CALL:
            die()
        return result

    setattr(target, name, counted)


class TornFile:
    """File whose write stops in the middle."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, content: bytes) -> None:
        self._file.write(content[: 2 * len(content) // 3])
        die()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def torn_record() -> None:
    work: Callable[..., int] = VectorCache.append

    def append(self: VectorCache, *arguments: Any) -> int:
        if self.sequence and not hasattr(self, "first"):
            self.first = self.sequence  # type: ignore[attr-defined]
            self._file = TornFile(self._file)  # type: ignore[assignment]
        return work(self, *arguments)

    VectorCache.append = append  # type: ignore[method-assign]


def arm(point: str, encoder: type = HashEncoder) -> None:
    """Make this process kill itself when it comes to a point a second time."""
    arms: dict[str, Callable[[], None]] = {
        "before the vectors": lambda: wrap(encoder, "encode", before=True),
        "after the vectors": lambda: wrap(encoder, "encode", before=False),
        "after the dead letters": lambda: wrap(DeadLetterFile, "append", before=False),
        "in a record of the cache": torn_record,
        "before the cache is synced": lambda: wrap(vector_cache.os, "fdatasync", before=True),
        "after the cache": lambda: wrap(VectorCache, "append", before=False),
        "in the store": lambda: wrap(SqliteCodeStore, "_remove_old", before=True),
        "after the store": lambda: wrap(SqliteCodeStore, "append", before=False),
        "before the mark is renamed": lambda: wrap(Path, "replace", before=True),
        "after the mark": lambda: wrap(follow, "write_json", before=False),
    }
    assert set(arms) == set(POINTS)
    arms[point]()


def run_in_process(folder: Path, point: str) -> int:
    """Run a job in a fork of this process, and return its exit status, negative for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        if point:
            arm(point)
        Job(folder).run()
        status = 0
    finally:
        os._exit(status)


def main() -> None:
    """Run both jobs, and print the exit status of each process; or a job of ``trainer.embed``."""
    if sys.argv[1] == "job":
        arm(sys.argv[2], TextSegmentEncoder)
        sys.exit(embed.main(sys.argv[3:]))
    whole, killed = (Path(folder) for folder in sys.argv[1:])
    statuses = {"undisturbed": run_in_process(whole, "")}
    lines = (whole / "in.jsonl").read_bytes().splitlines(keepends=True)
    for number, point in enumerate((*POINTS, "")):
        stop = 11 * number + 11 if point else len(lines)
        with open(killed / "in.jsonl", "ab") as file:
            file.writelines(lines[11 * number : stop])
        statuses[point or "the last"] = run_in_process(killed, point)
    print(json.dumps(statuses))


if __name__ == "__main__":
    main()
