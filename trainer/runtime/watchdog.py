"""Ends a job that hangs, and reports which rank hangs and where.

A thread of each rank watches the steps of its main thread. If no step ends for too long, the ranks exchange the states
of their main threads over sockets of their own. A rank that is not waiting in a collective, or does not answer, blocks
all others. Every rank reports it in one line, and the blocking rank adds the stacks of its threads.
"""

from __future__ import annotations

import ast
import dis
import itertools
import json
import linecache
import logging
import os
import secrets
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType

import torch

from trainer.console.exit_status import HUNG_STATUS
from trainer.runtime.distributed import World, local_size
from trainer.runtime.run_status import record_failure

logger = logging.getLogger(__name__)

TICK_SECONDS = 1.0
"""Longest interval between two checks of the main thread."""

ANSWER_SECONDS = 5.0
"""A rank whose watchdog does not answer within this time counts as stopped."""

FIRST_STEP_SECONDS = 120.0
"""Minimum time for the first step: it starts the loaders and compiles kernels."""

_ROOT = Path(__file__).resolve().parents[2]
_OWN = tuple(f"{_ROOT / package}{os.sep}" for package in ("trainer", "modules", "launch"))
_LIBRARIES = tuple(
    f"{Path(torch.__file__).parents[1] / package}{os.sep}" for package in ("torch", "torchrec", "deepspeed")
)
_BACKGROUND_CALLS = str(_ROOT / "trainer" / "runtime" / "background_calls.py")
_COLLECTIVES = ("distributed_c10d.py", "_functional_collectives.py")
_GPU_LIBRARIES = tuple(
    f"{Path(torch.__file__).parents[1] / package}{os.sep}"
    for package in ("torch", "torchrec", "fbgemm_gpu", "deepspeed", "transformers", "peft")
)
_NO_GPU = tuple(
    f"{folder}{os.sep}"
    for folder in (
        *(_ROOT / "trainer" / package for package in ("config", "console", "data", "stream", "checkpoint")),
        *(Path(torch.__file__).parent / package for package in ("utils/data", "multiprocessing", "distributed")),
    )
)
"""Code that works with arrays and files of the host: its ``tolist()`` may wait for a disk, but for no GPU."""

_GPU_CALLS = frozenset(
    (
        *("item", "tolist", "cpu", "numpy", "to", "float", "int", "bool", "equal", "allclose", "nonzero", "argwhere"),
        *(
            "masked_select",
            "unique",
            "bincount",
            "synchronize",
            "wait",
            "run_backward",
            "print",
            "str",
            "repr",
            "format",
        ),
    )
)
"""Functions that return only when the GPU has done the work that was queued before, if their tensors are on one."""

_GPU_INSTRUCTIONS = {
    **dict.fromkeys(("UNARY_NOT", "TO_BOOL"), "bool()"),
    **dict.fromkeys(("FORMAT_VALUE", "FORMAT_SIMPLE", "FORMAT_WITH_SPEC"), "format()"),
    **dict.fromkeys(("BINARY_SUBSCR", "STORE_SUBSCR"), "an index"),
}
"""Instructions of Python that do the same without a call, and what a report calls them."""

_FOR_ITS_GPU = " for its GPU"
_LISTED = 4
"""Ranks, or groups of ranks at one place, that a report lists."""


@dataclass(frozen=True)
class State:
    """Activity of a rank's main thread.

    Attributes:
        rank: of the process.
        step: last completed step.
        collective: collective in which it waits for the other ranks, such as ``all_reduce``, or call in which it waits
            for its GPU, whose collectives wait for the other ranks; empty if it does not wait.
        place: innermost lines of the project's own code, such as ``trainer/engine/hybrid_engine.py:120 in steps``.
        busy: announced long work, see :meth:`Watchdog.busy`; empty while this work waits for other ranks itself.
    """

    rank: int
    step: int
    collective: str
    place: str
    busy: str


class Watchdog:
    """Watches the training loop of all ranks; a context manager whose entry and regular exit are collective.

    Work announced by :meth:`busy` on any rank has no time limit, and the first step has a longer one. Time during which
    this process itself was stopped does not count.

    Args:
        world: the ranks.
        seconds: time without a completed step after which the job is ended; 0 switches the watchdog off.
    """

    def __init__(self, world: World, seconds: float) -> None:
        self._world, self._seconds = world, seconds
        self._tick = min(TICK_SECONDS, seconds / 10)
        self._main = threading.get_ident()
        self._step, self._busy = 0, ""
        self._allowed, self._beaten = max(seconds, FIRST_STEP_SECONDS), time.monotonic()
        self._heard: dict[int, State] = {}

    def __enter__(self) -> Watchdog:
        if not self._seconds:
            return self
        self._listener, address = _listen(self._world.size)
        self._addresses = self._world.agree(self._world.gather(address) or [])
        self._token = self._world.agree(secrets.token_hex(8))
        self._stopped, self._stop = os.pipe()
        self._beaten = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._seconds:
            return
        try:
            if error is None:
                # A rank that still works on its last step finds the others here if it hangs.
                self._world.barrier()
        finally:
            # A byte, since closing the pipe would not wake the thread: forked loader workers hold this end as well.
            os.write(self._stop, b".")
            self._thread.join()
            os.close(self._stop)
            os.close(self._stopped)
            self._listener.close()

    def beat(self, step: int) -> None:
        """Record that the main thread completed a step."""
        self._step, self._beaten, self._allowed = step, time.monotonic(), self._seconds

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Announce long work of the main thread, such as ``writing a checkpoint``; no rank is ended during it."""
        self._busy = what
        try:
            yield
        finally:
            self._busy, self._beaten = "", time.monotonic()

    def _watch(self) -> None:
        looked = time.monotonic()
        while True:
            ready, _, _ = select.select([self._listener.fileno(), self._stopped], [], [], self._tick)
            if self._stopped in ready:
                return
            now = time.monotonic()
            if now - looked > 2 * self._tick + 1:
                # This process was stopped, or starved: so was its main thread.
                self._beaten = now
            looked = now
            called = self._listener.fileno() in ready and self._hear()
            if called or now - self._beaten > self._allowed:
                self._compare(now - self._beaten)
                looked = time.monotonic()

    def _compare(self, seconds: float) -> None:
        """Exchange states with all ranks, and end this process if a rank hangs."""
        mine = self._heard[self._world.rank] = main_thread_state(
            self._world.rank, self._step, self._busy, self._main, gpu=self._world.device.type == "cuda"
        )
        gone = self._tell(mine)
        until = time.monotonic() + ANSWER_SECONDS
        while len(self._heard) + len(gone) < self._world.size and (left := until - time.monotonic()) > 0:
            if self._listener in select.select([self._listener], [], [], left)[0]:
                self._hear()
        heard, self._heard = self._heard, {}
        working = [state for state in heard.values() if state.busy]
        if working:
            if self._world.rank in (0, working[0].rank):
                first = working[0]
                _report_now(f"limelight: rank {first.rank} is still {first.busy}; the other ranks wait for it")
            self._beaten = time.monotonic()
            # Late answers must not count as another request.
            while self._listener in select.select([self._listener], [], [], self._tick)[0]:
                self._hear()
            self._heard = {}
            return
        culprits = find_culprits(heard, gone, self._world.size)
        reason = report(heard, gone, self._world.size, max(seconds, self._seconds))
        _report_now(f"limelight: error: {reason}")
        record_failure(reason)
        if not culprits or self._world.rank in culprits:
            _report_now(f"limelight: stacks of rank {self._world.rank}:\n" + all_stacks(self._main))
        else:
            # The blocking rank must end first: a launcher shows the last lines of the first rank that failed.
            time.sleep(0.5)
        os._exit(HUNG_STATUS)

    def _tell(self, mine: State) -> set[int]:
        """Send this rank's state to the others; return the ranks whose port refuses connections: they have ended."""
        message = json.dumps({"token": self._token, **asdict(mine)}).encode() + b"\n"
        gone = set()
        for rank, address in enumerate(self._addresses):
            if rank == self._world.rank:
                continue
            try:
                with socket.create_connection(address, timeout=1) as connection:
                    connection.sendall(message)
            except ConnectionRefusedError:
                gone.add(rank)
            except OSError:
                continue  # The caller notices that this rank does not answer.
        return gone

    def _hear(self) -> bool:
        """Receive one message; True if it came from a rank of this job, since anyone may connect to an open port."""
        try:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(1)
                text = connection.makefile("rb").readline(1 << 16)
            fields = json.loads(text)
            if fields.pop("token") != self._token:
                return False
            state = State(**fields)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return False
        self._heard[state.rank] = state
        return True


def main_thread_state(rank: int, step: int, busy: str, thread: int, *, gpu: bool = False) -> State:
    """Return the present state of a thread.

    Other threads are searched too, since they may do its announced work, or the calls that it waits for.

    Args:
        rank: of this process.
        step: last completed step.
        busy: announced work, or empty.
        thread: identity of the main thread.
        gpu: True if the rank computes on a GPU.
    """
    stacks = {identity: _frames(innermost) for identity, innermost in sys._current_frames().items()}
    main = stacks.get(thread, [])
    doing = [_doing(main, gpu)]
    if busy or any(_awaits_calls(frame) for frame in main):
        doing += [_doing(frames, gpu) for identity, frames in stacks.items() if identity != thread]
    waiting = [(collective, place) for collective, place in doing if collective]
    collective, place = waiting[0] if waiting else doing[0]
    return State(rank, step, collective, place, "" if waiting else busy)


def _awaits_calls(frame: FrameType) -> bool:
    """True if a frame waits for a call of the thread of ``BackgroundCalls``."""
    return (frame.f_code.co_filename, frame.f_code.co_name) == (_BACKGROUND_CALLS, "result")


def _frames(innermost: FrameType | None) -> list[FrameType]:
    frames = []
    while innermost is not None:
        frames.append(innermost)
        innermost = innermost.f_back
    return frames


def _doing(frames: list[FrameType], gpu: bool) -> tuple[str, str]:
    """Return what a thread waits in, or an empty text, and its place in the project's own code."""
    own = [place for place, inner in enumerate(frames) if inner.f_code.co_filename.startswith(_OWN)]
    # Calls from the project's code inward; all calls if none of them is the project's.
    inside = frames[: own[0] + 1] if own else frames
    shown = [frames[place] for place in own if not frames[place].f_code.co_name.startswith("<")][:3] or frames[:1]
    waiting = _collective(inside) or (_gpu_wait(frames[0]) if gpu and frames else "")
    return waiting, ", called at ".join(map(_place, shown))


def _collective(frames: list[FrameType]) -> str:
    """Return the collective that the innermost frame waits in, or an empty text."""
    for frame in frames:
        file = frame.f_code.co_filename
        if f"{os.sep}torch{os.sep}distributed{os.sep}" in file and file.endswith(_COLLECTIVES):
            return frame.f_code.co_name
    # The wait for an asynchronous collective is compiled code, without a frame of its own.
    innermost = frames[0] if frames else None
    if innermost is None or not innermost.f_code.co_filename.startswith((*_OWN, *_LIBRARIES)):
        return ""
    line = linecache.getline(innermost.f_code.co_filename, innermost.f_lineno)
    return "wait() of an asynchronous collective" if ".wait(" in line else ""


def _gpu_wait(frame: FrameType) -> str:
    """Return the call in which the innermost frame waits for the GPU, or an empty text.

    On a GPU a collective is queued like any other work, and the thread runs on until it needs a value. So a rank that
    waits for others stands in ``item()`` or in ``HostCopy.read``, not in a collective.
    """
    file = frame.f_code.co_filename
    if file.startswith(_NO_GPU) or not file.startswith((*_OWN, *_GPU_LIBRARIES)):
        return ""
    operation = dis.opname[frame.f_code.co_code[frame.f_lasti]]
    if "JUMP" in operation and "_IF_" in operation:
        return "bool()" + _FOR_ITS_GPU
    if operation in _GPU_INSTRUCTIONS:
        return _GPU_INSTRUCTIONS[operation] + _FOR_ITS_GPU
    called = _called(frame)
    return f"{called}(){_FOR_ITS_GPU}" if called in _GPU_CALLS else ""


def _called(frame: FrameType) -> str:
    """Return the name of the function or method that a frame calls now, or an empty text."""
    first, last, start, stop = next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
    if first is None or last is None or start is None or stop is None:
        return ""
    lines = [linecache.getline(frame.f_code.co_filename, number).encode() for number in range(first, last + 1)]
    # Columns are bytes; the last line is cut first, since it may be the first one too.
    lines[-1] = lines[-1][:stop]
    lines[0] = lines[0][start:]
    try:
        call = ast.parse(b"".join(lines), mode="eval").body
    except (SyntaxError, ValueError):
        return ""
    function = call.func if isinstance(call, ast.Call) else None
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _place(frame: FrameType) -> str:
    file = Path(frame.f_code.co_filename)
    name = file.relative_to(_ROOT) if file.is_relative_to(_ROOT) else file
    return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"


def find_culprits(heard: Mapping[int, State], gone: set[int], size: int) -> list[int]:
    """Return the ranks that block the others: ended, silent, or neither in a collective nor waiting for their GPU.

    Empty if there is none.
    """
    return [rank for rank in range(size) if rank in gone or rank not in heard or not heard[rank].collective]


def report(heard: Mapping[int, State], gone: set[int], size: int, seconds: float) -> str:
    """Format one line that names the ranks that hang, with their places, and the places where the others wait."""
    culprits = find_culprits(heard, gone, size)
    doing: dict[str, list[int]] = {}
    for rank in culprits:
        if rank in gone:
            what = "has ended"
        elif rank not in heard:
            what = "does not answer at all (stopped, or stuck in compiled code?)"
        else:
            what = f"is not in a collective: at {heard[rank].place}"
        doing.setdefault(what, []).append(rank)
    for rank in sorted(set(range(size)) - set(culprits)):
        doing.setdefault(f"waits in {heard[rank].collective} at {heard[rank].place}", []).append(rank)
    parts = [f"{_ranks(ranks)} {what}" for what, ranks in list(doing.items())[:_LISTED]]
    if len(doing) > _LISTED:
        parts.append(f"others at {len(doing) - _LISTED} more places")
    if not culprits and any(state.collective.endswith(_FOR_ITS_GPU) for state in heard.values()):
        parts.append(
            "all wait for each other or for their GPUs: they are in different collectives, or a GPU hangs (dmesg: Xid)"
        )
    elif not culprits:
        parts.append("all wait in collectives, but not in the same one")
    step = max((state.step for state in heard.values()), default=0)
    return f"no step for {seconds:.0f} s after step {step}: {'; '.join(parts)}"


def _ranks(ranks: list[int]) -> str:
    if len(ranks) <= _LISTED:
        return "rank " + ", ".join(map(str, ranks)) + ("" if len(ranks) == 1 else " each")
    return f"rank {ranks[0]} and {len(ranks) - 1} more each"


def all_stacks(first: int) -> str:
    """Format the stacks of all threads of this process; that of thread ``first`` comes last, innermost calls last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] == first)
    return "\n".join(
        f"thread {names.get(identity, identity)}:\n{''.join(traceback.format_stack(frame)).rstrip()}"
        for identity, frame in frames
        if identity != threading.get_ident()
    )


def _listen(ranks: int) -> tuple[socket.socket, tuple[str, int]]:
    """Open a socket for the other ranks; return it with the address at which they reach it."""
    if local_size() == ranks:
        listener = socket.create_server(("127.0.0.1", 0), backlog=ranks)
        return listener, ("127.0.0.1", listener.getsockname()[1])
    if socket.has_dualstack_ipv6():
        listener = socket.create_server(("", 0), family=socket.AF_INET6, backlog=ranks, dualstack_ipv6=True)
    else:
        listener = socket.create_server(("", 0), backlog=ranks)
    # The source address of packets to the first machine; nothing is sent. On the first machine this may be the
    # loopback: there, the others use the name that all ranks have.
    master = os.environ["MASTER_ADDR"]
    family, kind, protocol, _, place = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(place)
        address = probe.getsockname()[0]
    loopback = address.startswith("127.") or address == "::1"
    return listener, (master if loopback else address, listener.getsockname()[1])


def _report_now(text: str) -> None:
    """Write a line to the log and to standard error of this rank, whatever its number."""
    logger.debug(text)
    print(text, file=sys.stderr, flush=True)
