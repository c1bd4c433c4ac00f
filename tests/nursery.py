"""Start of jobs without the seconds of importing torch: one process imports it, and all others are forked from it.

A nursery is a process of its own, and is shared by all test processes of a run. For each of them it forks a server,
which reads orders (start, wait, mount, compile) from a socket, one line of JSON each, and answers each with one line.
Launcher and ranks are the real ones, each in its own process; only ``exec`` is skipped.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import io
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

from tests.disk_syncs import leave_out_syncs
from tests.paths import ROOT

PRELOADED = (
    "tests.faults.faulty_rank",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "peft",
    "pyarrow.dataset",
    "torch.distributed.run",
    "torch.utils.tensorboard.summary",
    "trainer.llm.finetuning.adapter_engine",
    "transformers.models.qwen2.modeling_qwen2",
)
"""Modules whose import takes long, at the start of a rank or later."""


TORCHRUN = "torch.distributed.run"
SPARES = 4
"""Largest number of workers that an agent of torchrun starts, with those that it starts again."""

PR_SET_PDEATHSIG = 1
"""Option of Linux's prctl that requests a signal at the death of the parent, from sys/prctl.h."""

CLONE_NEWNS = 0x20000
"""Flag of unshare for a new mount namespace, from linux/sched.h; Python has it from 3.12 on."""


class Ended(NamedTuple):
    """Exit status and output of a process that has ended."""

    status: int
    stdout: str
    stderr: str


class NurseryProcess:
    """The process that imports and forks; it imports nothing before its first client, and ends with this process.

    Attributes:
        address: socket that clients connect to.
        can_mount: True if the nursery has a mount namespace of its own.
    """

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        # A mount namespace of its own, where the machine allows one, makes file systems of any size possible.
        probe = ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
        self.can_mount = (
            shutil.which("unshare") is not None and not subprocess.run(probe, capture_output=True).returncode
        )
        with socket.socket(socket.AF_UNIX) as listener:
            # The kernel chooses an address that no file stands for.
            listener.bind("")
            listener.listen()
            self.address: bytes = listener.getsockname()
            self._process = subprocess.Popen(
                [
                    *(["unshare", "-Urm"] if self.can_mount else []),
                    *(sys.executable, "-m", "tests.nursery", str(listener.fileno())),
                ],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )

    def close(self) -> None:
        """End the process; servers end with their clients."""
        self._process.kill()
        self._process.communicate()


class Nursery:
    """Client of a nursery, used by tests as a context manager.

    Args:
        address: socket of a nursery that other clients use too; by default, a nursery of its own is started.
        can_mount: True if the nursery at ``address`` has a mount namespace of its own.

    Attributes:
        can_mount: True if the nursery has a mount namespace of its own.
    """

    def __init__(self, address: bytes | None = None, can_mount: bool = False) -> None:
        self._own: NurseryProcess | None = None
        if address is None:
            self._own = NurseryProcess()
            address, can_mount = self._own.address, self._own.can_mount
        self.can_mount = can_mount
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        self._stream = self._socket.makefile("rw")
        self._server = int(self._answer())

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()
        self._socket.close()
        if self._own is not None:
            self._own.close()

    def path(self, path: Path) -> Path:
        """Convert a path in the nursery's mount namespace to one that this process can read."""
        return Path(f"/proc/{self._server}/root{path}") if self.can_mount else path

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
        network: int = 0,
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
            network: process of the nursery whose network namespace it joins; 0 for that of the machine.
        """
        files, more = [str(out), str(err or out)], [shared_memory, str(directory), network]
        order = ["start", module, list(arguments), ranks, dict(environment), *files, *more]
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
        self._stream.write(json.dumps(order) + "\n")
        self._stream.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._stream.readline()
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


class SpareProcess:
    """A worker as a torchrun agent sees it: a fork in place of a new interpreter.

    An agent has threads, and a fork of a process with threads may hang. So its workers are forked before it starts, and
    each waits for the worker's arguments.
    """

    _spares: ClassVar[list[tuple[int, socket.socket]]] = []

    @classmethod
    def fork_spares(cls) -> None:
        """Fork the workers of an agent, which is this process, and make it use them."""
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
        from torch.distributed.elastic.rendezvous import dynamic_rendezvous

        # For each of its events it looks for the caller among all imported modules. That takes a second here, and two
        # agents that write their state less often than that overwrite each other without an end.
        dynamic_rendezvous.get_method_name = lambda depth=2: "rendezvous"

        for _ in range(SPARES):
            agent, worker = socket.socketpair()

            def run(agent: socket.socket = agent, worker: socket.socket = worker) -> int:
                for end in (agent, *(end for _, end in cls._spares)):
                    end.close()
                order = worker.makefile().readline()
                if not order:
                    return 0
                module, arguments, environment = json.loads(order)
                return _run_module(module, arguments, environment, None)

            cls._spares.append((_fork(run), agent))
            worker.close()
        subprocess_handler.Popen = cls

    def __init__(
        self, *, args: Sequence[str], env: Mapping[str, str], stdout: object, stderr: object, start_new_session: bool
    ) -> None:
        python, unbuffered, flag, module, *arguments = args
        if (python, unbuffered, flag, stdout, stderr) != (sys.executable, "-u", "-m", None, None):
            raise NotImplementedError(f"a worker of torchrun that is no module, or whose output goes to files: {args}")
        self.pid, worker = self._spares.pop()
        self.returncode: int | None = None
        worker.sendall(json.dumps([module, arguments, dict(env)]).encode() + b"\n")

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        until = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("worker of torchrun", timeout)
            time.sleep(0.01)
        return status


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


def end_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have ended before the request.
    if os.getppid() != parent:
        os._exit(1)


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
    network: int,
) -> int:
    from launch import local
    from trainer.console.exit_status import exit_status

    if network:
        with open(f"/proc/{network}/ns/net") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), "setns")
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
        if module == TORCHRUN:
            SpareProcess.fork_spares()
        return _run_as_main(module, arguments)
    return exit_status(lambda: local.start_ranks(module, arguments, ranks))


def _wait(process: int, timeout: float) -> int | None:
    until = time.monotonic() + timeout
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.01)


def _compile() -> str:
    import numpy as np

    from modules.search.search import SearchPart, SearchVectors, top

    zero, ids, vectors = np.zeros(1, np.int64), np.zeros(9, np.int64), SearchVectors(np.zeros((2, 16), np.float16))
    top(zero, zero + 9, 4, SearchPart(ids, zero, vectors))
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
    """Do what the first job of each process would take a second for: load numba's compiler and loops, find versions."""
    import torch

    from modules import din_loops, expert_kernel
    from trainer.runtime.environment import package_versions
    from trainer.sparse.dedup_exchange import unique_ids

    unique_ids([torch.arange(3)])
    din_loops.compile_loops()
    expert_kernel.compile_loops()
    package_versions()


def _serve(client: socket.socket) -> int:
    """Execute the orders of a client until it ends."""
    stream = client.makefile("rw")
    server = os.getpid()
    answer: Any = server

    def launch(arguments: Sequence[Any]) -> int:
        # A client that is killed ends its server, and so all that it has started.
        end_with(server)
        return _launch(*arguments)

    while True:
        print(json.dumps(answer), file=stream, flush=True)
        line = stream.readline()
        if not line:
            return 0
        order, *arguments = json.loads(line)
        if order == "start":
            answer = _fork(lambda arguments=arguments: launch(arguments))
        elif order == "wait":
            answer = _wait(*arguments)
        elif order == "compile":
            answer = _compile()
        else:
            answer = _mount(*arguments)


def main(listener: socket.socket) -> None:
    """Fork a server for each client, until the standard input ends."""
    os.dup2(2, 1)
    leave_out_syncs()
    loaded = False
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        client, _ = listener.accept()
        if not loaded:
            for module in PRELOADED:
                importlib.import_module(module)
            _warm_up()
            # DeepSpeed collects garbage several times in each start of an engine, which would visit every imported
            # object.
            gc.freeze()
            loaded = True

        def serve(client: socket.socket = client) -> int:
            listener.close()
            return _serve(client)

        _fork(serve)
        client.close()


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
