"""Exit statuses after ctrl-C and SIGTERM, also where a library turns the exception of the signal into another one."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainer.console import exit_status as exit_status_module
from trainer.console.errors import UserError
from trainer.console.exit_status import (
    INTERRUPTED_STATUS,
    TERMINATED_STATUS,
    USER_ERROR_STATUS,
    end_on_sigterm,
    exit_status,
)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Give this process the handlers of a new one, and restore its own after each test."""
    new = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in new.items()}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def swallow(number: int, error: Exception) -> None:
    """Do what numpy does when its import is interrupted."""
    try:
        send(number)
    except BaseException:
        raise error from None


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, INTERRUPTED_STATUS), (signal.SIGTERM, TERMINATED_STATUS)]
)
@pytest.mark.parametrize(
    "work", [send, lambda n: swallow(n, ImportError("again")), lambda n: swallow(n, RuntimeError("gloo/x"))]
)
def test_a_signal_prints_nothing(
    number: int, status: int, work: Callable[[int], None], capfd: pytest.CaptureFixture[str]
) -> None:
    end_on_sigterm()
    assert exit_status(lambda: work(number)) == status
    assert capfd.readouterr() == ("", "")
    if number == signal.SIGINT:
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL, "a second ctrl-C ends the process at once"


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, INTERRUPTED_STATUS), (signal.SIGTERM, TERMINATED_STATUS)]
)
def test_a_signal_inside_an_import_is_taken_after_it(
    number: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The import catches whatever is raised in it, as some C extensions do."""
    (tmp_path / "extension.py").write_text(
        f"import os\ntry:\n    os.kill(os.getpid(), {int(number)})\n    for i in range(1000): pass\n"
        "except BaseException:\n    pass\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "extension", raising=False)
    imported = []

    def work() -> None:
        imported.append(importlib.import_module("extension").whole)
        while True:
            time.sleep(1)

    end_on_sigterm()
    assert exit_status(work) == status
    assert imported == [True]


def test_ctrl_c_while_a_command_imports_its_work_ends_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(signal.SIGINT)})\ntime.sleep(600)\n")
    monkeypatch.syspath_prepend(tmp_path)

    def verb() -> None:
        exec("import work", {"__name__": "launch.cli.jobs"})

    child = os.fork()
    if not child:
        exit_status(verb)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == INTERRUPTED_STATUS


def test_a_signal_that_is_lost_is_raised_again() -> None:
    lost = 0

    def work() -> None:
        nonlocal lost
        while True:
            try:
                if not lost:
                    send(signal.SIGINT)
                time.sleep(1)
            except KeyboardInterrupt:
                lost += 1
                if lost == 3:
                    raise

    assert exit_status(work) == INTERRUPTED_STATUS
    assert lost == 3


def test_what_a_command_removes_is_not_interrupted_again() -> None:
    removed = []

    @contextlib.contextmanager
    def unfinished() -> Iterator[None]:
        try:
            yield
        finally:
            with contextlib.suppress(ValueError):
                raise ValueError
            until = time.monotonic() + 4 * exit_status_module._AGAIN_SECONDS
            while time.monotonic() < until:
                pass
            removed.append(True)

    def work() -> None:
        with unfinished():
            send(signal.SIGINT)

    assert exit_status(work) == INTERRUPTED_STATUS
    assert removed == [True]


def test_a_signal_that_waited_is_taken_first(capfd: pytest.CaptureFixture[str]) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    # To this thread: another one of the process does not block the signal, and would take it at once.
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)
    assert exit_status(lambda: pytest.fail("the work has begun")) == INTERRUPTED_STATUS
    assert capfd.readouterr() == ("", "")


def test_the_next_work_knows_nothing_of_an_earlier_signal(capfd: pytest.CaptureFixture[str]) -> None:
    def mistake() -> None:
        raise UserError("job.toml: wrong")

    assert exit_status(lambda: send(signal.SIGINT)) == INTERRUPTED_STATUS
    assert exit_status(mistake) == USER_ERROR_STATUS
    assert capfd.readouterr().err == "limelight: error: job.toml: wrong\n"


def test_the_handler_is_the_earlier_one_after_the_work() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)]
    assert exit_status(lambda: None) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)] == before


def test_no_alarm_and_no_handler_of_it_outlives_the_work() -> None:
    before = signal.getsignal(signal.SIGALRM)
    assert exit_status(lambda: send(signal.SIGINT)) == INTERRUPTED_STATUS
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
