"""The log of a job: messages on the first rank's terminal, and all records of every rank in a file of its own.

Modules log through the standard library: ``logger = logging.getLogger(__name__)``. :func:`start_log` adds the handlers
to the project's logger. A record of level INFO or above is shown on the terminal of the first rank, as its text alone;
DEBUG goes to the file only. In ``RUN/logs/rank-00000.log``, which is continued over restarts, every line has time,
rank and step, so that the files of all ranks can be merged by sorting::

    2024-03-05T12:00:07.315+00:00 rank 0 step 120 | train: 61,440/98,304 rows (62 %), ...

The file also holds what the terminal of a large job does not show: warnings, records of other libraries, tracebacks of
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
from datetime import datetime
from pathlib import Path
from typing import TextIO

from trainer.console.errors import UserError, user_message

LOG_NOTE_VARIABLE = "LIMELIGHT_LOG_NOTE"
"""Environment variable with the name of a file to which a rank writes its log's path, for the report of a dead rank."""

EARLIER_TEXTS = 1000
"""Records kept until the file is opened; a command without a run directory never opens one."""

logger = logging.getLogger(__name__)
_project = logging.getLogger("trainer")


class _Position(logging.Filter):
    """Adds rank and step to each record."""

    def __init__(self) -> None:
        super().__init__()
        self.rank = int(os.environ["RANK"]) if os.environ.get("RANK", "").isdecimal() else 0
        self.step = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass every record on."""
        record.rank, record.step = self.rank, self.step
        return True


class _Terminal(logging.Handler):
    """Shows messages on the first rank's standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        if record.__dict__["rank"] == 0:
            from tqdm import tqdm

            # tqdm's own call, since a progress bar may stand on the terminal.
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


class _RunFile(logging.Handler):
    """Writes records into the rank's file, and keeps them until there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.path: Path | None = None
        self.descriptor: int | None = None
        self.earlier: deque[bytes] = deque(maxlen=EARLIER_TEXTS)
        self._reported = False

    def handle(self, record: logging.LogRecord) -> bool:
        """Write without a lock: the watchdog and signal handlers must not wait for a thread that hangs in a write."""
        if passed := bool(self.filter(record)):
            self.emit(record)
        return passed

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, each of its lines with time, rank and step."""
        time = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        head = f"{time} rank {record.__dict__['rank']} step {record.__dict__['step']} |"
        lines = "".join(f"{head} {line}".rstrip() + "\n" for line in self.format(record).splitlines() or [""])
        self.write(lines.encode(errors="backslashreplace"))

    def open(self, path: Path, descriptor: int) -> int:
        """Write to a file from now on, beginning with the records kept so far. Returns the descriptor in use."""
        if self.descriptor is not None:
            # The number stays: faulthandler knows it.
            os.dup2(descriptor, self.descriptor, inheritable=False)
            os.close(descriptor)
            descriptor = self.descriptor
        self.path, self.descriptor, self._reported = path, descriptor, False
        while self.earlier:
            self.write(self.earlier.popleft())
        return descriptor

    def write(self, lines: bytes) -> None:
        """Append whole lines by one call: threads and forked processes need no lock between them."""
        if self.descriptor is None:
            self.earlier.append(lines)
            return
        try:
            os.write(self.descriptor, lines)
        except OSError as error:
            # The checkpoint reports a full disk; a run does not end because of its log.
            if not self._reported:
                print(
                    f"limelight: {self.path}: lines of the log are lost ({error.strerror})", file=sys.stderr, flush=True
                )
            self._reported = True


_position, _file = _Position(), _RunFile()


def start_log() -> None:
    """Add the handlers of the terminal and of the file to the project's logger. Later calls change nothing."""
    if _file in _project.handlers:
        return
    terminal = _Terminal(logging.INFO)
    for handler in (terminal, _file):
        handler.addFilter(_position)
        _project.addHandler(handler)
    _project.setLevel(logging.DEBUG)
    # A library that configures the root logger would show every message a second time.
    _project.propagate = False


def open_log(directory: Path, rank: int) -> None:
    """Write all records to ``directory/rank-00000.log`` from now on, those logged before at its head.

    Args:
        directory: the run's ``logs``; made if it is not there.
        rank: of this process.

    Raises:
        UserError: the file cannot be written.
    """
    start_log()
    path = directory / f"rank-{rank:05d}.log"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"{path}: the log cannot be written ({error.strerror})") from None
    first = _file.descriptor is None
    _position.rank = rank
    descriptor = _file.open(path, descriptor)
    logger.debug(f"process {os.getpid()} on {platform.node()}: {shlex.join(sys.argv)}")
    if first:
        _record_failures()
    faulthandler.enable(file=descriptor)
    if LOG_NOTE_VARIABLE in os.environ:
        Path(os.environ[LOG_NOTE_VARIABLE]).write_text(str(path))


def set_step(step: int) -> None:
    """Set the optimizer step of the records to come; a further model of the run starts again from 0."""
    _position.step = step


def current_step() -> int:
    """Return the optimizer step of the latest :func:`set_step`."""
    return _position.step


class _OtherLibraries(logging.Handler):
    """Copies records of other libraries into the file, and leaves the terminal as it would be without it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record; what no other handler shows is shown as Python does by itself."""
        _project.debug(self.format(record))
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return
            logger = logger.parent if logger.propagate else None
        if logging.lastResort is not None and record.levelno >= logging.lastResort.level:
            logging.lastResort.handle(record)


def _record_failures() -> None:
    """Copy into the file what libraries and Python itself report. Called once per process."""
    # Some libraries send events of their own machinery through loggers that let everything pass.
    handler = _OtherLibraries(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    known = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    for other in (logging.root, *(logger for logger in known if not logger.propagate and logger is not _project)):
        other.addHandler(handler)

    show_warning, show_error, show_thread_error = warnings.showwarning, sys.excepthook, threading.excepthook

    def warn(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        _project.debug(warnings.formatwarning(message, category, filename, lineno, line))
        show_warning(message, category, filename, lineno, file, line)

    def fail(kind: type[BaseException], error: BaseException, trace: object) -> None:
        _project.debug("".join(traceback.format_exception(error)))
        show_error(kind, error, error.__traceback__)

    def fail_thread(arguments: threading.ExceptHookArgs) -> None:
        name = arguments.thread.name if arguments.thread is not None else "a thread that has gone"
        if arguments.exc_value is not None and arguments.exc_type is not SystemExit:
            _project.debug(f"in {name}:\n" + "".join(traceback.format_exception(arguments.exc_value)))
            if user_message(arguments.exc_value) is not None:
                # Such as a full disk under TensorBoard's thread: the call that gave it the data raises it again.
                return
        show_thread_error(arguments)

    warnings.showwarning = warn
    sys.excepthook = fail
    threading.excepthook = fail_thread
