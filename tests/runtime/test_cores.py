"""Cores of a process, and the choice of those near a GPU, on a described machine."""

from __future__ import annotations

import os
import platform
import threading
from pathlib import Path

import pytest
import torch

from trainer.runtime import cores, distributed
from trainer.runtime.cores import (
    Place,
    available_cores,
    bind_to,
    core_quota,
    cores_near,
    node_of_device,
    numa_nodes,
    nvidia_gpus,
    own_place,
    share_of_cores,
)
from trainer.runtime.distributed import World

NEAR, FAR = "0000:1b:00.0", "0000:c1:00.0"


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """Two NUMA nodes with eight cores each and a GPU on each of them, a node of memory alone, and other devices."""
    for node, cpus in (("node0", "0-3,8-11"), ("node1", "4-7,12-15"), ("node2", "")):
        directory = tmp_path / "devices/system/node" / node
        directory.mkdir(parents=True)
        (directory / "cpulist").write_text(cpus + "\n")
    (tmp_path / "devices/system/node/possible").write_text("0-2\n")
    for pci, vendor, kind, node in (
        (NEAR, "0x10de", "0x030200", 0),
        (FAR, "0x10de", "0x030000", 1),
        ("0000:1b:00.1", "0x10de", "0x040300", 0),
        ("0000:02:00.0", "0x8086", "0x030000", 0),
        ("0000:03:00.0", "0x10de", "0x030200", -1),
    ):
        directory = tmp_path / "bus/pci/devices" / pci
        directory.mkdir(parents=True)
        for name, text in (("vendor", vendor), ("class", kind), ("numa_node", str(node))):
            (directory / name).write_text(text + "\n")
    return tmp_path


ALL = frozenset(range(16))
FIRST = frozenset([*range(4), *range(8, 12)])


def test_nodes_and_gpus_are_those_of_sysfs(sysfs: Path, tmp_path: Path) -> None:
    assert numa_nodes(sysfs) == {0: FIRST, 1: ALL - FIRST}
    assert nvidia_gpus(sysfs) == ["0000:03:00.0", NEAR, FAR]
    assert [node_of_device(pci, sysfs) for pci in (NEAR, FAR.upper(), "0000:03:00.0", "0000:ff:00.0")] == [
        *(0, 1, None, None)
    ]
    assert numa_nodes(tmp_path / "none") == {} and nvidia_gpus(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("pci", "allowed", "expected", "why"),
    [
        (NEAR, ALL, FIRST, "NUMA node 0 of GPU 0000:1b:00.0"),
        (FAR, ALL, ALL - FIRST, "NUMA node 1 of GPU"),
        # A container or a launcher has taken some cores away.
        (NEAR, frozenset({1, 2, 6}), frozenset({1, 2}), "NUMA node 0"),
        (NEAR, frozenset({4, 6}), frozenset({4, 6}), "a launcher has bound it away from NUMA node 0"),
        ("0000:03:00.0", ALL, ALL, "the NUMA node of GPU 0000:03:00.0 is not known"),
    ],
)
def test_a_process_gets_the_cores_of_its_gpus_node(
    sysfs: Path, pci: str, allowed: frozenset[int], expected: frozenset[int], why: str
) -> None:
    found, phrase = cores_near(pci, allowed, sysfs)
    assert found == expected and phrase.startswith(why)


def test_a_machine_with_one_node_is_left_alone(sysfs: Path) -> None:
    (sysfs / "devices/system/node/node1/cpulist").write_text("")
    assert cores_near(NEAR, ALL, sysfs) == (ALL, "the machine has one NUMA node")


def test_ranks_share_the_cores_that_several_may_use() -> None:
    everything, half = frozenset(range(8)), frozenset(range(4))
    whole, first, second = (Place("a", cores) for cores in (everything, half, everything - half))
    assert [share_of_cores([whole] * 2, rank) for rank in (0, 1)] == [4, 4]
    # A launcher has bound each rank to cores of its own, or a rank is alone on its host.
    assert share_of_cores([first, second], 0) == 4
    assert share_of_cores([whole, Place("b", everything)], 1) == 8
    assert [share_of_cores([first, first, second], rank) for rank in range(3)] == [2, 2, 4]
    assert share_of_cores([first] * 8, 0) == 1
    assert share_of_cores([whole] * 2, 0, quota=5) == 2
    assert share_of_cores([whole], 0, quota=0) == 1


def test_containers_share_the_cores_of_their_machine_but_not_their_quotas() -> None:
    everything = frozenset(range(16))
    places = [Place("a", everything, group) for group in ("first", "first", "second")] + [
        Place("b", everything, "first")
    ]
    assert [share_of_cores(places, rank) for rank in range(4)] == [5, 5, 5, 16]
    assert [share_of_cores(places, rank, quota=6) for rank in range(4)] == [3, 3, 5, 6]


def test_a_place_is_known_by_the_kernel_and_not_by_the_name_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def place(kernel: str, name: str, container: str) -> Place:
        proc, sysfs = tmp_path / kernel, tmp_path / container
        for file, text in ((proc / "sys/kernel/random/boot_id", kernel), (sysfs / "fs/cgroup/cpu.max", "max 100000")):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        monkeypatch.setattr(platform, "node", lambda: name)
        return own_place(proc, sysfs)

    first = place("kernel-1", "worker", "container-1")
    assert first == place("kernel-1", "another-name", "container-1")
    assert first.cores == frozenset(os.sched_getaffinity(0))
    other_container, other_machine = place("kernel-1", "worker", "container-2"), place("kernel-2", "worker", "c")
    assert first.host == other_container.host != other_machine.host
    assert first.group != other_container.group
    # A sandbox that hides both.
    monkeypatch.setattr(platform, "node", lambda: "worker")
    assert own_place(tmp_path / "none", tmp_path / "none")[::2] == ("name worker", "")


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)])
def test_cores_follow_the_quota_of_a_container(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(quota + "\n")
    monkeypatch.setattr(cores, "core_quota", lambda: core_quota(file))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert available_cores() == expected


def test_cores_without_a_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "core_quota", lambda: core_quota(tmp_path / "absent"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5})
    assert available_cores() == 3


def test_every_thread_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: dict[int, frozenset[int]] = {}
    monkeypatch.setattr(os, "sched_setaffinity", bound.__setitem__)
    started, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (started.set(), done.wait()))
    thread.start()
    started.wait()
    bind_to(frozenset({0}))
    done.set()
    thread.join()
    assert {thread.native_id, threading.get_native_id()} <= bound.keys() and set(bound.values()) == {frozenset({0})}


def test_a_rank_of_a_gpu_is_bound_unless_the_job_says_no(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        pci_domain_id, pci_bus_id, pci_device_id = 0, 0x1B, 0

    bound: list[frozenset[int]] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(ALL))
    monkeypatch.setattr(distributed, "cores_near", lambda pci, allowed: cores_near(pci, allowed, sysfs))
    monkeypatch.setattr(distributed, "bind_to", bound.append)
    assert distributed._bind(torch.device("cuda", 0)) == "bound to NUMA node 0 of GPU 0000:1b:00.0"
    assert bound == [FIRST]
    assert distributed._bind(torch.device("cpu")) == "not bound, since there is no GPU"
    with World.join("cpu") as world:
        assert world.placement.endswith("; train.bind_cores is false") and world.cores >= 1
    assert len(bound) == 1
