"""What the machine has."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from launch import machine


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


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", machine.free_port()))
