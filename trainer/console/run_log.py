"""What a job says: the first rank on the terminal, every rank in a file of its own.

On the terminal stands the text alone. In ``RUN/logs/rank-00000.log``, which is continued over restarts, every line has
time, rank and step, so that the files of all ranks can be merged by sorting::

    2024-03-05T12:00:07.315+00:00 rank 0 step 120 | train: 61,440/98,304 rows (62 %), ...

The file also gets what passes by the terminal of a large job unseen: warnings, records of ``logging``, tracebacks of
the process and of its threads, and the Python stack of a crash in native code.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import platform
import shlex
import sys
import threading
import traceback
import warnings
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from trainer.console.errors import UserError

LOG_NOTE_VARIABLE = "LIMELIGHT_LOG_NOTE"
"""Environment variable naming a file that is to hold the path of this rank's log, for who reports a dead rank."""

EARLIER_TEXTS = 1000
"""Texts kept until there is a file to put them into; a job that never opens one must not collect them for ever."""


@dataclass
class _State:
    rank: int
    step: int = 0
    path: Path | None = None
    descriptor: int | None = None
    earlier: deque[bytes] = field(default_factory=lambda: deque(maxlen=EARLIER_TEXTS))
    unwritable: bool = False


_state = _State(int(os.environ["RANK"]) if os.environ.get("RANK", "").isdecimal() else 0)


def open_log(directory: Path, rank: int) -> None:
    """From now on everything also goes to ``directory/rank-00000.log``, with what was said before at its head.

    Args:
        directory: the run's ``logs``; made if it is not there.
        rank: of this process.

    Raises:
        UserError: the file cannot be written.
    """
    path = directory / f"rank-{rank:05d}.log"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"{path}: the log cannot be written ({error.strerror})") from None
    first = _state.descriptor is None
    if _state.descriptor is not None:
        # The number stays: faulthandler knows it.
        os.dup2(descriptor, _state.descriptor, inheritable=False)
        os.close(descriptor)
        descriptor = _state.descriptor
    _state.rank, _state.path, _state.descriptor, _state.unwritable = rank, path, descriptor, False
    while _state.earlier:
        _write(_state.earlier.popleft())
    note(f"process {os.getpid()} on {platform.node()}: {shlex.join(sys.argv)}")
    if first:
        _listen()
    faulthandler.enable(file=descriptor)
    if LOG_NOTE_VARIABLE in os.environ:
        Path(os.environ[LOG_NOTE_VARIABLE]).write_text(str(path))


def set_step(step: int) -> None:
    """Lines from now on belong to optimizer step ``step``; a further model of the run starts again from 0."""
    _state.step = step


def say(text: str) -> None:
    """Say something to the user: on the first rank's terminal, and in every rank's file."""
    if _state.rank == 0:
        # Past a progress bar, if one stands there.
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    note(text)


def note(text: str) -> None:
    """Put something into this rank's file only."""
    head = f"{datetime.now().astimezone().isoformat(timespec='milliseconds')} rank {_state.rank} step {_state.step} |"
    lines = "".join(f"{head} {line}".rstrip() + "\n" for line in text.splitlines() or [""])
    _write(lines.encode(errors="backslashreplace"))


def _write(lines: bytes) -> None:
    """Append whole lines by one call: threads, signal handlers and forked processes need no lock between them."""
    if _state.descriptor is None:
        _state.earlier.append(lines)
        return
    try:
        os.write(_state.descriptor, lines)
    except OSError as error:
        # A full disk is for the checkpoint to report; a run does not end over its log.
        if not _state.unwritable:
            print(
                f"limelight: {_state.path}: lines of the log are lost ({error.strerror})", file=sys.stderr, flush=True
            )
        _state.unwritable = True


class _Handler(logging.Handler):
    """Copies records into the file, and leaves the terminal as it would be without it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Note the record; what no other handler shows is shown as Python does by itself."""
        note(self.format(record))
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return
            logger = logger.parent if logger.propagate else None
        if logging.lastResort is not None and record.levelno >= logging.lastResort.level:
            logging.lastResort.handle(record)


def _listen() -> None:
    """Note what libraries and Python itself report, once per process."""
    # Some libraries send events of their own machinery through loggers that let everything pass.
    handler = _Handler(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    known = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    for logger in (logging.root, *(logger for logger in known if not logger.propagate)):
        logger.addHandler(handler)

    show_warning, show_error, show_thread_error = warnings.showwarning, sys.excepthook, threading.excepthook

    def warn(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        note(warnings.formatwarning(message, category, filename, lineno, line))
        show_warning(message, category, filename, lineno, file, line)

    def fail(kind: type[BaseException], error: BaseException, trace: object) -> None:
        note("".join(traceback.format_exception(error)))
        show_error(kind, error, error.__traceback__)

    def fail_thread(arguments: threading.ExceptHookArgs) -> None:
        name = arguments.thread.name if arguments.thread is not None else "a thread that has gone"
        if arguments.exc_value is not None and arguments.exc_type is not SystemExit:
            note(f"in {name}:\n" + "".join(traceback.format_exception(arguments.exc_value)))
        show_thread_error(arguments)

    warnings.showwarning = warn
    sys.excepthook = fail
    threading.excepthook = fail_thread
