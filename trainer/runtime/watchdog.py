"""Ends a job that hangs, and says which rank hangs where.

A thread of each rank watches the steps of its main thread. When they stop coming, the ranks tell each other over
sockets of their own what their main threads are doing: the one that is not waiting for the others in a collective, or
does not answer, is why all of them stand still. Every rank reports that in a line; the rank at fault adds its stacks.
"""

from __future__ import annotations

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

logger = logging.getLogger(__name__)

TICK_SECONDS = 1.0
"""Longest pause between two looks at the main thread."""

ANSWER_SECONDS = 5.0
"""A rank whose watchdog says nothing for so long, once asked, is taken for stopped."""

FIRST_STEP_SECONDS = 120.0
"""The first step may take so long where less is configured: loaders start in it, and libraries compile."""

_ROOT = Path(__file__).resolve().parents[2]
_OWN = tuple(f"{_ROOT / package}{os.sep}" for package in ("trainer", "modules", "launch"))
_LIBRARIES = tuple(
    f"{Path(torch.__file__).parents[1] / package}{os.sep}" for package in ("torch", "torchrec", "deepspeed")
)
_COLLECTIVES = ("distributed_c10d.py", "_functional_collectives.py")
_LISTED = 4
"""Ranks, or groups of ranks at one place, that a report names."""


@dataclass(frozen=True)
class State:
    """What a rank's main thread is doing.

    Attributes:
        rank: of the process.
        step: last step that it ended.
        collective: what it waits for the other ranks in, such as ``all_reduce``; empty where it does not.
        place: innermost lines of the project's own code, such as ``trainer/engine/hybrid_engine.py:120 in steps``.
        busy: long work that it announced, see :meth:`Watchdog.busy`; empty while that waits for other ranks itself.
    """

    rank: int
    step: int
    collective: str
    place: str
    busy: str


class Watchdog:
    """Watches the training loop of all ranks; a context manager whose entry and regular exit are collective.

    What is announced by :meth:`busy` on any rank may take its time, and the first step some of it. Time in which this
    process itself was stopped does not count.

    Args:
        world: the ranks.
        seconds: without a step on some rank after which the job is ended; 0 switches the watchdog off.
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
            # What the end of a rank at fault does to the main threads of the others is not told: they end in here.
            # Closing would not do: forked loader workers hold this end as well.
            os.write(self._stop, b".")
            self._thread.join()
            os.close(self._stop)
            os.close(self._stopped)
            self._listener.close()

    def beat(self, step: int) -> None:
        """The main thread has ended a step."""
        self._step, self._beaten, self._allowed = step, time.monotonic(), self._seconds

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Announce long work of the main thread, such as ``writing a checkpoint``: no rank is ended meanwhile."""
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
        """Exchange states with all ranks; end this one if some rank hangs, else go on watching."""
        mine = self._heard[self._world.rank] = main_thread_state(self._world.rank, self._step, self._busy, self._main)
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
                _say(f"limelight: rank {first.rank} is still {first.busy}; the other ranks wait for it")
            self._beaten = time.monotonic()
            # Answers that come late are not taken for another call.
            while self._listener in select.select([self._listener], [], [], self._tick)[0]:
                self._hear()
            self._heard = {}
            return
        culprits = find_culprits(heard, gone, self._world.size)
        _say("limelight: error: " + report(heard, gone, self._world.size, max(seconds, self._seconds)))
        if not culprits or self._world.rank in culprits:
            _say(f"limelight: stacks of rank {self._world.rank}:\n" + all_stacks(self._main))
        else:
            # The rank at fault ends first: a launcher shows the last lines of the first one that failed.
            time.sleep(0.5)
        os._exit(HUNG_STATUS)

    def _tell(self, mine: State) -> set[int]:
        """Send this rank's state to the others. Those that nothing listens for any more: their processes have ended."""
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
                continue  # It will be found not to answer.
        return gone

    def _hear(self) -> bool:
        """Take what another rank has sent. Whether it was one; anything else may knock at an open port."""
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


def main_thread_state(rank: int, step: int, busy: str, thread: int) -> State:
    """What a thread, known by its identity, is doing at the moment; work that it announced may be done by others."""
    stacks = {identity: _frames(innermost) for identity, innermost in sys._current_frames().items()}
    doing = [_doing(stacks.get(thread, []))]
    if busy:
        doing += [_doing(frames) for identity, frames in stacks.items() if identity != thread]
    waiting = [(collective, place) for collective, place in doing if collective]
    collective, place = waiting[0] if waiting else doing[0]
    return State(rank, step, collective, place, "" if waiting else busy)


def _frames(innermost: FrameType | None) -> list[FrameType]:
    frames = []
    while innermost is not None:
        frames.append(innermost)
        innermost = innermost.f_back
    return frames


def _doing(frames: list[FrameType]) -> tuple[str, str]:
    """The collective that a thread waits in, if it does, and its place in the project's own code."""
    own = [place for place, inner in enumerate(frames) if inner.f_code.co_filename.startswith(_OWN)]
    # The calls between the project's code and where the thread is: all of them if the project's code is not on it.
    inside = frames[: own[0] + 1] if own else frames
    shown = [frames[place] for place in own if not frames[place].f_code.co_name.startswith("<")][:3] or frames[:1]
    return _collective(inside), ", called at ".join(map(_place, shown))


def _collective(frames: list[FrameType]) -> str:
    """The collective that the innermost of some frames waits in; empty if it is none."""
    for frame in frames:
        file = frame.f_code.co_filename
        if f"{os.sep}torch{os.sep}distributed{os.sep}" in file and file.endswith(_COLLECTIVES):
            return frame.f_code.co_name
    # Work of an asynchronous collective is waited for in compiled code; Python's own waits have frames of their own.
    innermost = frames[0] if frames else None
    if innermost is None or not innermost.f_code.co_filename.startswith((*_OWN, *_LIBRARIES)):
        return ""
    line = linecache.getline(innermost.f_code.co_filename, innermost.f_lineno)
    return "wait() of an asynchronous collective" if ".wait(" in line else ""


def _place(frame: FrameType) -> str:
    file = Path(frame.f_code.co_filename)
    name = file.relative_to(_ROOT) if file.is_relative_to(_ROOT) else file
    return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"


def find_culprits(heard: Mapping[int, State], gone: set[int], size: int) -> list[int]:
    """Ranks that the others wait for: ended, silent, or not in a collective. None where all are in collectives."""
    return [rank for rank in range(size) if rank in gone or rank not in heard or not heard[rank].collective]


def report(heard: Mapping[int, State], gone: set[int], size: int, seconds: float) -> str:
    """One line: which ranks hang and where, and where the others wait for them."""
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
    said = [f"{_ranks(ranks)} {what}" for what, ranks in list(doing.items())[:_LISTED]]
    if len(doing) > _LISTED:
        said.append(f"others at {len(doing) - _LISTED} more places")
    if not culprits:
        said.append("all wait in collectives, but not in the same one")
    step = max((state.step for state in heard.values()), default=0)
    return f"no step for {seconds:.0f} s after step {step}: {'; '.join(said)}"


def _ranks(ranks: list[int]) -> str:
    if len(ranks) <= _LISTED:
        return "rank " + ", ".join(map(str, ranks)) + ("" if len(ranks) == 1 else " each")
    return f"rank {ranks[0]} and {len(ranks) - 1} more each"


def all_stacks(first: int) -> str:
    """Stacks of all threads of this process, that of thread ``first`` last, innermost calls last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] == first)
    return "\n".join(
        f"thread {names.get(identity, identity)}:\n{''.join(traceback.format_stack(frame)).rstrip()}"
        for identity, frame in frames
        if identity != threading.get_ident()
    )


def _listen(ranks: int) -> tuple[socket.socket, tuple[str, int]]:
    """A socket for the other ranks, and the address at which they reach it."""
    if local_size() == ranks:
        listener = socket.create_server(("127.0.0.1", 0), backlog=ranks)
        return listener, ("127.0.0.1", listener.getsockname()[1])
    if socket.has_dualstack_ipv6():
        listener = socket.create_server(("", 0), family=socket.AF_INET6, backlog=ranks, dualstack_ipv6=True)
    else:
        listener = socket.create_server(("", 0), backlog=ranks)
    # The address by which this machine goes to the first one; nothing is sent. On the first one that may be the
    # loopback, where the others go by the name that they all know.
    master = os.environ["MASTER_ADDR"]
    family, kind, protocol, _, place = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(place)
        address = probe.getsockname()[0]
    loopback = address.startswith("127.") or address == "::1"
    return listener, (master if loopback else address, listener.getsockname()[1])


def _say(text: str) -> None:
    logger.debug(text)
    print(text, file=sys.stderr, flush=True)
