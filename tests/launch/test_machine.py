"""Tests of the report on what the machine has."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from launch import machine
from trainer.runtime.store_socket import open_store_socket


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


@pytest.mark.parametrize(
    ("nvidia_smi", "kernel", "version"),
    [
        ("580.65.06\n580.65.06\n", None, "580.65.06"),
        ("575.57\n", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.1  Mon\n", "575.57"),
        (None, "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\n", "580.82.07"),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", None, None),
        (None, None, None),
    ],
)
def test_the_version_of_the_driver(
    nvidia_smi: str | None, kernel: str | None, version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if nvidia_smi is not None:
        (tmp_path / "answer").write_text(nvidia_smi)
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat {tmp_path}/answer\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    file = tmp_path / "version"
    if kernel is not None:
        file.write_text(kernel)
    monkeypatch.setattr(machine, "Path", lambda path: file)
    assert machine.nvidia_driver_version() == version
