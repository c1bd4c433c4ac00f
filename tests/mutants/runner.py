"""Runs tests against a copy of the tree that has one small bug.

A test process is a fork of this process, which has imported torch and its like, and imports the project from the copy.
The nursery of the tests (``tests/nursery.py``) is a fork as well. So a bug costs the seconds of its tests and not those
of the imports.

``tests.mutants.targets`` names the test files of a module. A server imports and collects them once. For each bug inside
of a function it forks a process, which gives the function other code and runs the tests until one fails. Bugs outside
of functions and in code that numba compiles need a process that imports everything again, and so do tests that start
processes of their own; these run if all others pass, then the tests on several ranks, and the slow tests that are named
one by one last.

A test that has found a bug must pass without it, which :meth:`TestRunner.failing` finds out for all of them together.
A test that did not end, or that starts processes of its own, may have failed because the machine was busy: it must fail
a second time with the bug, within a limit of at least ten times the seconds that it takes without the bug.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import hypothesis
import pytest
from hypothesis import Phase

OWN = ("tests", "trainer", "modules", "launch", "benchmarks")
PRELOADED = (
    *("torch", "torch.distributed.checkpoint", "torch.utils.tensorboard", "torchrec", "fbgemm_gpu", "deepspeed"),
    *("deepspeed.runtime.zero.muon.muon_optimizer", "torchrec.distributed.model_parallel", "numba", "pyarrow.dataset"),
    *("pyarrow.parquet", "pydantic", "confluent_kafka", "scipy.stats", "sklearn.metrics"),
    *("transformers.models.qwen2.modeling_qwen2", "peft", "tokenizers", "safetensors.torch", "webdataset", "fsspec"),
    *("torch.distributed.run", "torch._dynamo", "matplotlib.pyplot"),
)
"""Modules of others whose import takes long; one that is not installed is left out."""

PROCESSES = {"nursery", "run_ranks", "limelight"}
"""Fixtures of tests that run the project in other processes."""

NO_CODE = 99
"""Exit status of a process that could not give a function its code."""

PROCESSOR_SECONDS = 60
"""Seconds of processor time after which a test is ended: a bug may make a loop endless."""

TEST_SECONDS, PROCESS_SECONDS = 180, 900
"""Elapsed seconds after which a test is ended, alone or with processes of its own: a bug may make it wait for ever."""

SLOWER = 10
"""Times the seconds without a bug that a test may take with it."""

RANKS = "tests/distributed/"
"""Tests on several ranks, which take longest."""

_DEATH_SIGNAL, _SUBREAPER = 1, 36
"""PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER of linux/prctl.h: a process that ends takes its children along, and
processes whose parent has ended become children of this one."""


@dataclass(frozen=True)
class Outcome:
    """The end of a test process.

    Attributes:
        found: test that failed or did not end; ``the import of FILE`` or ``the start of FILE``; None if all tests
            passed.
        ran: number of tests that ran.
        seconds: elapsed time.
        ended: False if the process was killed inside of the test, by a limit or by another signal.
        last: elapsed seconds of the last test that ended.
    """

    found: str | None
    ran: int
    seconds: float
    ended: bool = True
    last: float = 0.0


def copy_tree(root: Path, copy: Path) -> None:
    """Copy the files of a repository that git knows or would add, and nothing else."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, copy / name)


def preload() -> None:
    """Import the slow modules of others into this process, and take care of the processes that tests leave."""
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except ImportError:
            continue


class TestRunner:
    """Runs test files of a copy of the tree in forks of this process; call :func:`preload` before.

    Args:
        copy: directory of the copy.
        work: directory for the outputs of the test processes.
        left_out: tests that do not run.

    Attributes:
        left_out: as given; tests may be added.
    """

    __test__ = False

    def __init__(self, copy: Path, work: Path, left_out: Sequence[str] = ()) -> None:
        self._copy, self._work = copy, work
        self.left_out = set(left_out)
        self._server: _Server | None = None

    def find(
        self,
        file: str,
        function: str,
        content: bytes,
        tests: Sequence[str],
        ranks: bool = True,
        slow: Sequence[str] = (),
    ) -> Outcome:
        """Look for a test that fails with other content of a file, which is restored.

        Args:
            file: path below the copy.
            function: outermost function that has changed; empty for other changes.
            content: of the file, with the bug.
            tests: test files.
            ranks: run the tests on several ranks as well, if all others pass.
            slow: names of slow tests that run if all others pass.
        """
        path = self._copy / file
        plain, times = path.read_bytes(), path.stat()
        # numba keeps compiled code by the file of the outer function, and does not see a change in an inner one.
        compiled = self._work / "numba" if b"numba" in plain or b"compiled(" in plain else None
        near = [test for test in tests if not test.startswith(RANKS)]
        far = [test for test in tests if test.startswith(RANKS) and ranks]
        seconds, ran = 0.0, 0
        server = self._served(near) if near and function and compiled is None else None
        try:
            path.write_bytes(content)
            _forget_bytecode(path)
            for kind, chosen in (("alone", near), ("processes", near), ("all", far), ("slow", slow)):
                if not chosen:
                    continue
                outcome = None
                if kind == "alone" and server is not None:
                    outcome = server.find(path, function)
                if outcome is None:
                    outcome = self.run(chosen, kind, compiled)
                seconds, ran = seconds + outcome.seconds, ran + outcome.ran
                busy: set[str] = set()
                while outcome.found is not None and not self._fails_again(outcome, kind, path, plain, compiled):
                    busy.add(outcome.found)
                    path.write_bytes(content)
                    outcome = self.run(chosen, kind, compiled, busy)
                    seconds, ran = seconds + outcome.seconds, ran + outcome.ran
                if outcome.found is not None:
                    return Outcome(outcome.found, ran, seconds)
        finally:
            path.write_bytes(plain)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            _forget_bytecode(path)
        return Outcome(None, ran, seconds)

    def _fails_again(self, outcome: Outcome, kind: str, path: Path, plain: bytes, compiled: Path | None) -> bool:
        """Return True if a test has failed by the bug and not since the machine was busy.

        Args:
            outcome: of a run with the bug, whose test has failed.
            kind: of this run.
            path: file with the bug.
            plain: content of the file without it.
            compiled: as for :meth:`run`.
        """
        test = outcome.found or ""
        if "::" not in test or (outcome.ended and kind == "alone"):
            return True
        content, seconds = path.read_bytes(), 0.0
        if not outcome.ended:
            path.write_bytes(plain)
            _forget_bytecode(path)
            seconds = self.run([test], "slow", compiled).last
            path.write_bytes(content)
            _forget_bytecode(path)
        return self.run([test], "slow", compiled, limit=SLOWER * seconds).found is not None

    def _served(self, tests: list[str]) -> _Server | None:
        """Return the server of some test files; None if it does not start."""
        if self._server is None or self._server.tests != tests:
            self.close()
            self._server = _Server(self._copy, tests, self.left_out, self._work)
        return self._server if self._server.ready else None

    def close(self) -> None:
        """End the server of tests."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def failing(self, finders: Sequence[str]) -> set[str]:
        """Return those that fail without a bug.

        Args:
            finders: tests, or names of other places where :meth:`find` has met an error.
        """
        failing = set()
        for file, rest in by_file(finders).items():
            tests = [test for test in rest if "::" in test]
            if len(tests) < len(rest) and self.run([file], "none").found is not None:
                failing.update(rest)
                continue
            while tests and (found := self.run(tests, "slow").found) is not None:
                if found not in tests:
                    # The tests before it may have passed or not run.
                    failing.update(tests)
                    break
                failing.add(found)
                tests.remove(found)
        return failing

    def run(
        self,
        tests: Sequence[str],
        kind: str = "all",
        compiled: Path | None = None,
        busy: Collection[str] = (),
        limit: float = 0.0,
    ) -> Outcome:
        """Run test files, or tests, in a fork until one fails.

        Args:
            tests: files below the copy, or names of tests.
            kind: ``alone`` for the tests without processes of their own, ``processes`` for the others, ``all``,
                ``slow`` for all with those that are marked as slow, or ``none`` to import them only.
            compiled: directory for the code that numba compiles, which is emptied before; None for the usual place.
            busy: more tests that do not run.
            limit: seconds that each test may take at least, elapsed or of the processor.
        """
        written = self._work / "outcome.json"
        written.unlink(missing_ok=True)
        if compiled is not None:
            shutil.rmtree(compiled, ignore_errors=True)
        started, others = time.monotonic(), _children()
        watch = _Watch(self.left_out.union(busy), kind, written, limit=limit)
        child = _fork(lambda: _test(self._copy, tests, watch, compiled), self._work / "output")
        os.waitpid(child, 0)
        _end(others)
        return _outcome(written, started, tests)


def by_file(finders: Sequence[str]) -> dict[str, list[str]]:
    """Return file -> tests of it, or names of other places in it where :meth:`TestRunner.find` has met an error."""
    files: dict[str, list[str]] = {}
    for finder in finders:
        files.setdefault(_file_of(finder), []).append(finder)
    return files


def _file_of(finder: str) -> str:
    return finder.partition("::")[0].rpartition(" ")[2]


def _outcome(written: Path, started: float, tests: Sequence[str]) -> Outcome:
    elapsed = time.monotonic() - started
    if not written.exists():
        return Outcome(f"the start of {_file_of(tests[0])}", 0, elapsed)
    found = json.loads(written.read_text())
    # A process that was killed has not got to the end of its test.
    ended = found["failed"] is not None or found["running"] is None
    return Outcome(found["failed"] or found["running"], found["ran"], elapsed, ended, found["seconds"])


class _Server:
    """A process that has collected some test files, and runs them in forks of itself.

    Attributes:
        tests: the files.
        ready: True if they could be collected.
    """

    def __init__(self, copy: Path, tests: list[str], left_out: set[str], work: Path) -> None:
        self.tests, self._written = tests, work / "outcome.json"
        orders, ordered = os.pipe()
        answers, answered = os.pipe()
        watch = _Watch(left_out, "alone", self._written, (orders, answered))

        def serve() -> None:
            os.close(ordered)
            os.close(answers)
            _test(copy, tests, watch, None)

        self._child = _fork(serve, work / "output-of-server")
        os.close(orders)
        os.close(answered)
        self._orders, self._answers = os.fdopen(ordered, "w"), os.fdopen(answers)
        self.ready = self._answers.readline() == "ready\n"

    def find(self, path: Path, function: str) -> Outcome | None:
        """Run the tests with the code that a function has in its file now; None if it cannot be given to it."""
        self._written.unlink(missing_ok=True)
        started, others = time.monotonic(), _children()
        self._orders.write(json.dumps([str(path), function]) + "\n")
        self._orders.flush()
        answer = self._answers.readline()
        _end(others)
        return _outcome(self._written, started, self.tests) if answer == "done\n" else None

    def close(self) -> None:
        """End the process."""
        self._orders.close()
        self._answers.close()
        os.waitpid(self._child, 0)


def _serve(orders: int, answered: int) -> bool:
    """Fork a process for each order. Return False in such a process, which then runs its tests, True at the end."""
    with os.fdopen(orders) as lines, os.fdopen(answered, "w") as answers:
        print("ready", file=answers, flush=True)
        for line in lines:
            path, function = json.loads(line)
            child = os.fork()
            if not child:
                ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
                if not _give_code(path, function):
                    os._exit(NO_CODE)
                return False
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print("no code" if status == NO_CODE else "done", file=answers, flush=True)
    return True


def _give_code(path: str, function: str) -> bool:
    """Give a function that was imported the code that its file has now; False if this cannot be done."""
    waiting, code = [compile(Path(path).read_bytes(), path, "exec")], None
    while waiting:
        each = waiting.pop()
        if each.co_qualname == function:
            code = each
            break
        waiting += [part for part in each.co_consts if isinstance(part, CodeType)]
    found = [
        each
        for each in gc.get_objects()
        if isinstance(each, FunctionType)
        and each.__code__.co_filename == path
        and each.__code__.co_qualname == function
    ]
    if code is None or not found or any(each.__code__.co_freevars != code.co_freevars for each in found):
        return False
    for each in found:
        each.__code__ = code
    return True


class _Watch:
    """Plugin of pytest that orders tests, limits their time, and records their ends."""

    def __init__(
        self,
        left_out: set[str],
        kind: str,
        written: Path,
        pipes: tuple[int, int] | None = None,
        limit: float = 0.0,
    ) -> None:
        self._left_out, self.kind, self.written, self._pipes, self._limit = left_out, kind, written, pipes, limit
        self._started = 0.0
        self._result: dict[str, Any] = {"failed": None, "running": None, "ran": 0, "seconds": 0.0}

    def pytest_collection(self) -> None:
        # A counterexample is enough; nobody reads a small one.
        hypothesis.settings.register_profile(
            "mutants", deadline=None, database=None, phases=(Phase.explicit, Phase.generate)
        )
        hypothesis.settings.load_profile("mutants")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if self._left_out.isdisjoint({item.nodeid, item.nodeid.partition("[")[0]})]
        if self.kind == "none":
            items.clear()
        elif self.kind in ("alone", "processes"):
            items[:] = [item for item in items if _starts_processes(item) == (self.kind == "processes")]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self) -> bool | None:
        # None lets pytest run the tests.
        return None if self._pipes is None else _serve(*self._pipes) or None

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and self._result["failed"] is None:
            self._result["failed"] = f"the import of {report.nodeid}"
            self._write()

    def pytest_runtest_setup(self, item: Any) -> None:
        # The signals end the process, with all that the test has started; an earlier test may have left a handler.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        elapsed = PROCESS_SECONDS if _starts_processes(item) else TEST_SECONDS
        signal.setitimer(signal.ITIMER_REAL, max(elapsed, self._limit))
        signal.setitimer(signal.ITIMER_PROF, max(PROCESSOR_SECONDS, self._limit))
        self._started = time.monotonic()
        self._result["running"] = item.nodeid
        self._write()

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._result["ran"] += report.when == "call"
        if report.failed and self._result["failed"] is None:
            self._result["failed"] = report.nodeid
        if report.when == "teardown":
            self._result["running"] = None
            self._result["seconds"] = time.monotonic() - self._started
            self._write()

    def pytest_sessionfinish(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        self._write()

    def _write(self) -> None:
        self.written.write_text(json.dumps(self._result))


def _starts_processes(item: Any) -> bool:
    return not PROCESSES.isdisjoint(getattr(item, "fixturenames", ()))


def _test(copy: Path, tests: Sequence[str], watch: _Watch, compiled: Path | None) -> None:
    """Run pytest on a copy, in a process that has imported nothing of the project."""
    os.chdir(copy)
    if compiled is not None:
        os.environ["NUMBA_CACHE_DIR"] = str(compiled)
        numba = sys.modules.get("numba")
        if numba is not None:
            numba.core.config.reload_config()
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]
    sys.path[:] = [str(copy), *(place for place in sys.path if place and not Path(place, "trainer").is_dir())]
    os.environ["PYTHONPATH"] = str(copy)
    importlib.invalidate_caches()
    # If this process is a fork of pytest, the thread that this call would wait for is in the other process.
    faulthandler.cancel_dump_traceback_later = lambda: None
    if (copy / "tests" / "nursery.py").exists():
        _replace_nursery()
    options = ["-q", "-x", "--tb=short", "--show-capture=no", "--disable-warnings", "-p", "no:cacheprovider"]
    options += [
        "--override-ini=faulthandler_timeout=0",
        f"--rootdir={copy}",
        f"--basetemp={watch.written.with_name('tests')}",
        "--hypothesis-seed=0",
    ]
    if watch.kind == "slow" and (copy / "tests" / "conftest.py").exists():
        options.append("--slow")
    pytest.main([*options, *tests], plugins=[watch])


def _replace_nursery() -> None:
    """Fork the nursery now, while nothing of the project is imported; it imports when its first client connects."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")
    listener.listen()
    lives, _ = os.pipe()
    child = os.fork()
    if not child:
        os.setsid()
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        sys.stdin = os.fdopen(lives)
        try:
            importlib.import_module("tests.nursery").main(listener)
        finally:
            os._exit(0)
    address = listener.getsockname()
    listener.close()
    nursery = importlib.import_module("tests.nursery")
    connect = nursery.Nursery.__init__
    nursery.Nursery.__init__ = lambda self: connect(self, address)


def _fork(run: Callable[[], None], output: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        run()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(0)


def _children() -> set[int]:
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def _end(others: set[int]) -> None:
    """Kill the processes that a test process has left, and those that they have left; ``others`` are not of it."""
    while left := _children() - others:
        for child in left:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _forget_bytecode(path: Path) -> None:
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()
