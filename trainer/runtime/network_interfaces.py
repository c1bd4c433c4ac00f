"""Which network interface of this machine the other machines of a job reach it by."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

_LOOPBACK = "lo"

_SIOCGIFADDR = 0x8915
"""ioctl of Linux that reads an interface's IPv4 address: sockios.h."""

_ELSEWHERE = ("192.0.2.1", "2001:db8::1")
"""Addresses that stand for any other machine: reserved for documentation by RFC 5737 and RFC 3849."""


def interface_towards(master: str) -> str | None:
    """The interface by which this machine reaches, and is reached by, the machines of a job; None if there is no way.

    On the first machine its own name often leads to the loopback, by which the others cannot come; the interface of
    the default route is taken there. Nothing is sent.

    Args:
        master: name or address of the first machine, as all machines are told it.
    """
    address = _source_address(master)
    if address is None or (address.is_loopback and not _is_loopback_for_all(master)):
        found = (_source_address(elsewhere) for elsewhere in _ELSEWHERE)
        address = next((candidate for candidate in found if candidate is not None), address)
    return None if address is None else _interface_of(address)


def loopback_interface() -> str | None:
    """The interface between processes of this machine; None where it has another name than Linux's."""
    return _LOOPBACK if _LOOPBACK in (name for _, name in socket.if_nameindex()) else None


def _is_loopback_for_all(master: str) -> bool:
    """Whether every machine takes ``master`` for itself: then all of the job's machines are this one."""
    try:
        return ipaddress.ip_address(master).is_loopback
    except ValueError:
        return master == "localhost"


def _source_address(target: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """This machine's own address on the way to ``target``."""
    try:
        family, _, _, _, place = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            return ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
    except OSError:
        return None


def _interface_of(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str | None:
    if address.is_loopback:
        return loopback_interface()
    if isinstance(address, ipaddress.IPv6Address):
        table = Path("/proc/net/if_inet6")
        lines = [line.split() for line in table.read_text().splitlines()] if table.exists() else []
        return next((line[-1] for line in lines if bytes.fromhex(line[0]) == address.packed), None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # It has no address.
            if answer[20:24] == address.packed:
                return name
    return None
