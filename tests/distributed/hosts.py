"""Two hosts on one machine: network namespaces with a cable between them, or two loopback addresses."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

TIMEOUTS = 600.0
ADDRESSES = ("10.71.0.1", "10.71.0.2")


@dataclass(frozen=True)
class Host:
    """Host on which a command runs.

    Attributes:
        prefix: words before the command that run it on this host.
        address: address by which the other host reaches this one.
    """

    prefix: tuple[str, ...]
    address: str

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


def loopbacks() -> list[Host]:
    """Return two hosts that share this machine's network."""
    return [Host((), "127.0.0.1"), Host((), "127.0.0.2")]
