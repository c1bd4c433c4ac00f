"""Two hosts on one machine: network namespaces with a cable between them, or two loopback addresses."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.nursery import Nursery, end_with

CLONE_NEWNET = 0x40000000
"""Flag of unshare for a new network namespace, from linux/sched.h; Python has it from 3.12 on."""

TIMEOUTS = 600.0
ADDRESSES = ("10.71.0.1", "10.71.0.2")


class NoNamespaces(Exception):
    """Tests cannot have network namespaces on this machine."""


@dataclass(frozen=True)
class Host:
    """Host on which a command runs.

    Attributes:
        prefix: words before the command that run it on this host.
        address: address by which the other host reaches this one.
        process: process of a nursery in this host's network namespace; 0 if it is that of the machine.
    """

    prefix: tuple[str, ...]
    address: str
    process: int = 0

    def run(self, command: str) -> str:
        """Run a command to its end, and return its output."""
        done = subprocess.run(
            [*self.prefix, *shlex.split(command)], capture_output=True, text=True, timeout=TIMEOUTS, check=True
        )
        return done.stdout


@contextmanager
def namespaces() -> Iterator[list[Host]]:
    """Yield two network namespaces that are connected only by a pair of virtual network cards.

    Raises:
        OSError, subprocess.SubprocessError: a user may not create namespaces on this machine, or it has no ``ip``.
    """
    with ExitStack() as stack:
        first = stack.enter_context(_namespace(["unshare", "--user", "--map-root-user", "--net"]))
        inside = ("nsenter", "--preserve-credentials", "--user", "--net", "--target")
        hosts = [Host((*inside, str(first)), ADDRESSES[0])]
        second = stack.enter_context(_namespace([*hosts[0].prefix, "unshare", "--net"]))
        hosts.append(Host((*inside, str(second)), ADDRESSES[1]))
        hosts[0].run(f"ip link add cable0 type veth peer name cable1 netns {second}")
        for number, host in enumerate(hosts):
            host.run(f"ip address add {host.address}/24 dev cable{number}")
            host.run(f"ip link set cable{number} up")
            host.run("ip link set lo up")
        yield hosts


@contextmanager
def _namespace(command: Sequence[str]) -> Iterator[int]:
    """Create a namespace by ``command``, keep it open by a process, and yield the id of that process."""
    keep = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    process = subprocess.Popen([*command, *keep], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise subprocess.SubprocessError(f"{shlex.join(command)}: not possible here")
        yield process.pid
    finally:
        process.kill()
        process.communicate()


@contextmanager
def nursery_namespaces(nursery: Nursery, directory: Path) -> Iterator[list[Host]]:
    """Yield two network namespaces as :func:`namespaces` does, which forks of a nursery can join.

    Raises:
        NoNamespaces: the nursery may not create namespaces on this machine, or it has no ``ip``.
    """
    if not nursery.can_mount:
        raise NoNamespaces
    out, ended = directory / "hosts", None
    out.touch()
    keeper = nursery.start("tests.distributed.hosts", [], 0, {}, out)
    try:
        while not out.read_text().endswith("]\n"):
            ended = nursery.wait(keeper, 0.05)
            if ended is not None:
                raise NoNamespaces(out.read_text())
        processes = json.loads(out.read_text().splitlines()[-1])
        yield [Host((), address, process) for address, process in zip(ADDRESSES, processes, strict=True)]
    finally:
        if ended is None:
            os.killpg(keeper, signal.SIGKILL)
            nursery.wait(keeper, TIMEOUTS)


def _keep_two() -> None:
    """Create two network namespaces with a cable between them, print a process in each, and keep them."""
    _enter_new_network()
    ready, made = os.pipe()
    first, other = os.getpid(), os.fork()
    if not other:
        end_with(first)
        _enter_new_network()
        os.write(made, b".")
        signal.pause()
    os.close(made)
    if not os.read(ready, 1):
        raise OSError("no second network namespace")
    processes = (first, other)
    _run(f"ip link add cable0 type veth peer name cable1 netns {other}")
    for number, process in enumerate(processes):
        inside = f"nsenter --net --target {process}"
        _run(f"{inside} ip address add {ADDRESSES[number]}/24 dev cable{number}")
        _run(f"{inside} ip link set cable{number} up")
        _run(f"{inside} ip link set lo up")
    print(json.dumps(processes), flush=True)
    signal.pause()


def _enter_new_network() -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")


def _run(command: str) -> None:
    subprocess.run(shlex.split(command), check=True, timeout=TIMEOUTS)


def loopbacks() -> list[Host]:
    """Return two hosts that share this machine's network."""
    return [Host((), "127.0.0.1"), Host((), "127.0.0.2")]


if __name__ == "__main__":
    _keep_two()
