"""Start of jobs without the seconds of importing torch: one process imports it, and all others are forked from it.

A nursery is a process of its own. It reads orders (start, wait, mount, compile) from its standard input, one line of
JSON each, and answers each with one line. Launcher and ranks are the real ones, each in its own process; only ``exec``
is skipped.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from tests.paths import ROOT

PRELOADED = (
    "tests.faults.faulty_rank",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "pyarrow.dataset",
    "torch.utils.tensorboard.summary",
)
"""Modules whose import takes long, at the start of a rank or later."""


CLONE_NEWNS = 0x20000
"""Flag of unshare for a new mount namespace, from linux/sched.h; Python has it from 3.12 on."""


class Ended(NamedTuple):
    """Exit status and output of a process that has ended."""

    status: int
    stdout: str
    stderr: str


class Nursery:
    """Client of a nursery, used by tests as a context manager.

    Attributes:
        can_mount: True if the nursery has a mount namespace of its own.
    """

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        # A mount namespace of its own, where the machine allows one, makes file systems of any size possible.
        probe = ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
        self.can_mount = (
            shutil.which("unshare") is not None and not subprocess.run(probe, capture_output=True).returncode
        )
        self._process = subprocess.Popen(
            [*(["unshare", "-Urm"] if self.can_mount else []), sys.executable, "-m", "tests.nursery"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._answer()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *error: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def path(self, path: Path) -> Path:
        """Convert a path in the nursery's mount namespace to one that this process can read."""
        return Path(f"/proc/{self._process.pid}/root{path}") if self.can_mount else path

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        ranks: int,
        environment: Mapping[str, str],
        out: Path,
        err: Path | None = None,
        shared_memory: int = 0,
        directory: Path = ROOT,
    ) -> int:
        """Start a launcher of ``module``, and return its process id.

        Args:
            module: run as ``python -m module``.
            arguments: arguments of each rank.
            ranks: number of ranks; 0 runs the module alone, without a launcher.
            environment: variables that are added to the environment of this process.
            out: file for the output of the launcher and its ranks.
            err: file for standard error; ``out`` by default.
            shared_memory: size of its own /dev/shm in bytes; 0 for that of the machine.
            directory: working directory.
        """
        files = [str(out), str(err or out)]
        order = ["start", module, list(arguments), ranks, dict(environment), *files, shared_memory, str(directory)]
        return int(self._ask(order))

    def run(
        self,
        module: str,
        arguments: Sequence[object],
        *,
        ranks: int = 0,
        environment: Mapping[str, str] | None = None,
        timeout: float = 600,
        shared_memory: int = 0,
        directory: Path = ROOT,
    ) -> Ended:
        """Run ``python -m module`` to its end, alone or on ``ranks`` ranks. It is killed after ``timeout`` seconds."""
        with tempfile.TemporaryDirectory(prefix="nursery-") as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            words = [str(argument) for argument in arguments]
            process = self.start(module, words, ranks, environment or {}, out, err, shared_memory, directory)
            status = self.wait(process, timeout)
            if status is None:
                # The kernel ends ranks whose launcher is gone.
                os.killpg(process, signal.SIGKILL)
                status = self.wait(process, 10)
            return Ended(-signal.SIGKILL if status is None else status, out.read_text(), err.read_text())

    def wait(self, process: int, timeout: float) -> int | None:
        """Wait for a launcher. Returns its exit status, negative for a signal, or None if it has not ended in time."""
        status = self._ask(["wait", process, timeout])
        return None if status is None else int(status)

    def mount(self, path: Path, size: int) -> None:
        """Move the content of ``path`` to a file system of ``size`` bytes, or resize the file system that it is on."""
        self._ask(["mount", str(path), size])

    def compile_search(self) -> None:
        """Compile the kernel of the search in float16 vectors, which takes seconds, once for all later processes."""
        self._ask(["compile"])

    def _ask(self, order: list[Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the nursery has ended")
        return json.loads(line)


class ForkedProcess:
    """Replacement of ``subprocess.Popen`` in ``launch.local``: runs ``python -m module`` in a fork of this process."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int,
        stdout: Any,
        stderr: int | None,
        start_new_session: bool,
        pass_fds: Sequence[int],
        preexec_fn: Callable[[], None],
    ) -> None:
        module, *arguments = command[2:]
        self.returncode: int | None = None
        self._waiting = threading.Lock()

        def run() -> int:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
            preexec_fn()
            output = None if stdout is None else stdout.fileno()
            return _run_module(module, arguments, env, output)

        self.pid = _fork(run)

    def wait(self) -> int:
        with self._waiting:
            if self.returncode is None:
                self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            return self.returncode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)


def _fork(run: Callable[[], int]) -> int:
    """Run a function in a child process with a session of its own, and return the child's process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        status = run()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # Without exit handlers, which belong to the nursery; the launcher ends the loader workers of a rank.
        os._exit(status)


def _run_module(module: str, arguments: Sequence[str], environment: Mapping[str, str], output: int | None) -> int:
    os.environ.clear()
    os.environ.update(environment)
    if output is not None:
        os.dup2(output, 1)
        os.dup2(output, 2)
    from trainer.console import run_log

    # The module was imported before the rank was known.
    run_log._position.rank = int(environment["RANK"])
    return _run_as_main(module, arguments)


def _run_as_main(module: str, arguments: Sequence[str]) -> int:
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    return 0


def _launch(
    module: str,
    arguments: Sequence[str],
    ranks: int,
    environment: Mapping[str, str],
    out: str,
    err: str,
    shared_memory: int,
    directory: str,
) -> int:
    from launch import local
    from trainer.console.exit_status import exit_status

    if shared_memory:
        # A mount namespace of this process and its ranks alone.
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "unshare")
        command = ["mount", "-t", "tmpfs", "-o", f"size={shared_memory}", "tmpfs", "/dev/shm"]
        subprocess.run(command, check=True)
    for number, name in enumerate((out, err), 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # Unbuffered, so that lines of the launcher and of the ranks are in order.
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, io.TextIOWrapper(os.fdopen(number, "wb", 0), write_through=True))
    os.environ.update(environment)
    os.chdir(directory)
    local.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=ForkedProcess, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT
    )
    if not ranks:
        return _run_as_main(module, arguments)
    return exit_status(lambda: local.start_ranks(module, arguments, ranks))


def _wait(process: int, timeout: float) -> int | None:
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def _compile() -> str:
    import numpy as np

    from modules.search.search import SearchPart, SearchVectors, top

    ids, vectors = np.zeros(9, np.int64), SearchVectors(np.zeros((2, 16), np.float16))
    top(ids[:1], ids[:1] + 9, 4, SearchPart(ids, ids[:1], vectors))
    gc.freeze()
    return "compiled"


def _mount(path: str, size: int) -> str:
    known = os.path.ismount(path)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}" + (",remount" if known else ""), "tmpfs", path]
    with tempfile.TemporaryDirectory() as kept:
        if not known:
            shutil.copytree(path, kept, dirs_exist_ok=True)
        subprocess.run(command, check=True)
        if not known:
            shutil.copytree(kept, path, dirs_exist_ok=True)
    return "mounted"


def _warm_up() -> None:
    """Load numba's compiler, which takes a second in the first process that calls a compiled loop."""
    import torch

    from trainer.sparse.dedup_exchange import unique_ids

    unique_ids([torch.arange(3)])


def main() -> None:
    """Execute orders until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in PRELOADED:
        importlib.import_module(module)
    _warm_up()
    # DeepSpeed collects garbage several times in each start of an engine, which would visit every imported object.
    gc.freeze()
    answer: Any = "ready"
    while True:
        print(json.dumps(answer), file=answers, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        order, *arguments = json.loads(line)
        if order == "start":
            answer = _fork(lambda arguments=arguments: _launch(*arguments))
        elif order == "wait":
            answer = _wait(*arguments)
        elif order == "compile":
            answer = _compile()
        else:
            answer = _mount(*arguments)


if __name__ == "__main__":
    main()
