"""Commands that run in the process of a test, and what they say about files."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path

import trainer.evaluate
import trainer.explain
import trainer.finetune
import trainer.rank
import trainer.score
from launch.cli.main import main

NOBODY = 65534


def as_nobody(work: Callable[[], str]) -> str:
    """Result of a function in a child process without root's rights."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            os.write(writer, work().encode())
        except BaseException as error:
            os.write(writer, f"died: {error!r}".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


def command(*arguments: object) -> str:
    """Exit status and stderr of a command, run in this process, with the rank that it would start."""
    run = {
        "score": trainer.score.main,
        "evaluate": trainer.evaluate.main,
        "explain": trainer.explain.main,
        "rank": trainer.rank.main,
        "tune": trainer.finetune.main,
    }.get(str(arguments[0]))
    words = [str(argument) for argument in arguments]
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(words) if run is None else run(words[1:])
        except BaseException as error:
            return f"traceback of {error!r}"
        finally:
            # A job that saves its state on SIGTERM has set a handler of its own.
            signal.signal(signal.SIGTERM, on_sigterm)
    return f"{status} {err.getvalue()}"


def assert_one_line(told: str, *expected: str) -> None:
    assert told.startswith("2 limelight: error: ") and told.count("\n") == 1 and told.endswith("\n"), told
    for text in expected:
        assert text in told, told


def write_text(path: Path, text: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


DAMAGED = [b"null", b"[]", b"1e999", b"7", b'"text"', b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b"{}", b'{"a": 1e999}']
