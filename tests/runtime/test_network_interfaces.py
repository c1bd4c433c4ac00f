"""Choice of the network interface by which the machines of a job reach each other."""

from __future__ import annotations

import ipaddress
import socket

import pytest

from trainer.runtime import network_interfaces
from trainer.runtime.network_interfaces import interface_towards

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@pytest.mark.parametrize("master", ["127.0.0.1", "127.0.0.2", "localhost"])
def test_machines_that_are_all_this_one_meet_on_the_loopback(master: str) -> None:
    assert interface_towards(master) == "lo"


@pytest.mark.parametrize(
    ("master", "expected"),
    [("10.0.0.7", "ib0"), ("master.cluster", "ib0"), ("this-host", "eth0"), ("unknown.name", "eth0")],
)
def test_the_network_to_the_first_machine_is_taken_and_never_a_loopback(
    master: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host's own name often leads to the loopback, which other machines cannot reach: the default route is used."""
    own = {"10.0.0.7": "10.0.0.9", "master.cluster": "10.0.0.9", "this-host": "127.0.1.1", "192.0.2.1": "172.16.0.2"}
    names = {"10.0.0.9": "ib0", "172.16.0.2": "eth0", "127.0.1.1": "lo"}

    def source_address(target: str) -> Address | None:
        return ipaddress.ip_address(own[target]) if target in own else None

    monkeypatch.setattr(network_interfaces, "_source_address", source_address)
    monkeypatch.setattr(network_interfaces, "_interface_of", lambda address: names[str(address)])
    assert interface_towards(master) == expected


def test_a_machine_without_a_network_has_no_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_interfaces, "_source_address", lambda target: None)
    assert interface_towards("10.0.0.7") is None


def test_interfaces_are_known_by_their_addresses() -> None:
    """Compares with the kernel's own list of interfaces."""
    assert network_interfaces._interface_of(ipaddress.ip_address("127.0.0.1")) == "lo"
    found = interface_towards("192.0.2.1")
    assert found is None or found in {name for _, name in socket.if_nameindex()}
    assert network_interfaces._interface_of(ipaddress.ip_address("203.0.113.77")) is None
