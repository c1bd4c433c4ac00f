"""The network interface by which the other machines of a job reach this one."""

from __future__ import annotations

import ipaddress
import socket

import psutil

_LOOPBACK = "lo"

_IP = (socket.AF_INET, socket.AF_INET6)

_ELSEWHERE = ("192.0.2.1", "2001:db8::1")
"""Addresses for "any other machine", reserved for documentation by RFC 5737 and RFC 3849."""


def interface_towards(master: str) -> str | None:
    """Return the interface between this machine and the other machines of a job, or ``None`` if there is no route.

    On the first machine, its own name often resolves to the loopback, which the others cannot reach; the interface of
    the default route is returned there. Nothing is sent.

    Args:
        master: name or address of the first machine (MASTER_ADDR), the same on all machines.
    """
    address = _source_address(master)
    if address is None or (address.is_loopback and not _is_loopback_for_all(master)):
        found = (_source_address(elsewhere) for elsewhere in _ELSEWHERE)
        address = next((candidate for candidate in found if candidate is not None), address)
    return None if address is None else _interface_of(address)


def loopback_interface() -> str | None:
    """Return the loopback interface, or ``None`` if it does not have the name that Linux gives it."""
    return _LOOPBACK if _LOOPBACK in (name for _, name in socket.if_nameindex()) else None


def _is_loopback_for_all(master: str) -> bool:
    """True if ``master`` means every machine itself: then the whole job runs on this machine."""
    try:
        return ipaddress.ip_address(master).is_loopback
    except ValueError:
        return master == "localhost"


def _source_address(target: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the source address of packets from this machine to ``target``."""
    try:
        family, _, _, _, place = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            return ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
    except OSError:
        return None


def _interface_of(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str | None:
    """Return the interface that has an address of this machine."""
    if address.is_loopback:
        return loopback_interface()
    for name, addresses in psutil.net_if_addrs().items():
        for known in addresses:
            # An IPv6 address of one link only ends with %INTERFACE.
            if known.family in _IP and ipaddress.ip_address(known.address.partition("%")[0]) == address:
                return name
    return None
