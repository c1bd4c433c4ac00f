"""Tests of the report on what the machine has."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from launch import machine
from trainer.runtime.store_socket import open_store_socket


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)])
def test_cores_follow_the_quota_of_a_container(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(quota + "\n")
    monkeypatch.setattr(machine, "Path", lambda path: file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert machine.available_cores() == expected


def test_cores_without_a_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / "absent")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5})
    assert machine.available_cores() == 3


@pytest.mark.parametrize("address", ["127.0.0.1", ""])
def test_a_listening_port_is_in_use_and_a_closed_one_is_not(address: str) -> None:
    with socket.socket() as listener:
        listener.bind((address, 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert machine.port_in_use(port)
    assert not machine.port_in_use(port)


def test_a_free_port_is_refused_to_a_process_that_does_not_name_it_and_opened_by_the_rendezvous() -> None:
    port = machine.free_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        # Without SO_REUSEADDR, as for a port that the kernel chooses.
        other.bind(("127.0.0.1", port))
    open_store_socket(port).close()
    assert not machine.port_in_use(port)
