"""The doctor: each thing that can be wrong is found and answered with what to type."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launch.doctor import host, packages, probe, report
from launch.doctor.check import Check
from launch.doctor.probe import ProbeError
from tests.nursery import Nursery
from trainer.runtime import large_pages
from trainer.runtime.environment import computed_on_this_cpu

GOOD = {"torch": "2.13.0+cpu", "fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.0"}

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ({}, "ok", "pip check misses fbgemm-gpu for torchrec: expected"),
        ({"fbgemm-gpu": "1.8.0"}, "fail", "both installed and overwrite each other"),
        ({"fbgemm-gpu-cpu": None, "fbgemm-gpu": "1.8.0", "torch": "2.13.0+cu130"}, "ok", "fbgemm-gpu 1.8.0"),
        ({"fbgemm-gpu-cpu": None}, "fail", "not installed: fbgemm-gpu or fbgemm-gpu-cpu"),
        ({"torchrec": None}, "fail", "not installed: torchrec"),
        ({"torch": None, "fbgemm-gpu-cpu": None}, "fail", "not installed: torch, fbgemm-gpu or fbgemm-gpu-cpu"),
        ({"torchrec": "1.7.0"}, "fail", "must have the same minor version"),
        ({"torch": "2.12.0"}, "warn", "not among the measured triples 2.13.0/1.8.0/1.8.0"),
        ({"torch": "2.11.0+cu130", "fbgemm-gpu-cpu": "1.6.0", "torchrec": "1.6.1"}, "ok", "torch 2.11.0"),
    ],
)
def test_triple(change: dict[str, str | None], status: str, told: str) -> None:
    installed = {name: version for name, version in (GOOD | change).items() if version is not None}
    check = packages.check_triple(installed)
    assert check.status == status and told in check.message
    assert bool(check.fix) == (status != "ok")


@pytest.mark.parametrize(
    ("installed", "pinned", "status", "told"),
    [
        ({"torch": "2.13.0+cpu", "numpy": "2.4.6"}, {"torch": "2.13.0", "numpy": "2.4.6"}, "ok", "all 2 dependencies"),
        ({"numpy": "2.4.5"}, {"numpy": "2.4.6"}, "warn", "numpy 2.4.5 (measured: 2.4.6)"),
        ({}, {"numpy": "2.4.6", "tqdm": "1"}, "fail", "not installed: numpy, tqdm"),
        ({"numpy": "2.4.6"}, {}, "fail", "limelight is not installed"),
    ],
)
def test_pins(installed: dict[str, str], pinned: dict[str, str], status: str, told: str) -> None:
    check = packages.check_pins(installed, pinned)
    assert check.status == status and told in check.message
    assert bool(check.fix) == (status != "ok")


def test_pins_come_from_the_installed_project_without_its_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        packages, "requires", lambda name: ["torch==2.13.0", "Pyre_Extensions==0.0.32", 'pytest==9; extra == "dev"']
    )
    assert packages.pinned_versions() == {"torch": "2.13.0", "pyre-extensions": "0.0.32"}


@pytest.mark.parametrize(
    ("cuda_build", "devices", "fbgemm_cuda", "driver", "status", "fix"),
    [
        (None, [], False, False, "ok", ""),
        ("13.0", ["H200"], True, True, "ok", ""),
        ("13.0", ["H200"], False, True, "fail", "make setup DEVICE=cuda"),
        (None, [], False, True, "warn", "make setup DEVICE=cuda"),
        ("13.0", [], True, True, "fail", "nvidia-smi"),
        ("13.0", [], True, False, "fail", "make setup DEVICE=cpu"),
        ("13.0", [], False, False, "ok", "LIMELIGHT_TORCH_INDEX="),
    ],
)
def test_accelerator(
    cuda_build: str | None, devices: list[str], fbgemm_cuda: bool, driver: bool, status: str, fix: str
) -> None:
    check = packages.check_accelerator(cuda_build, devices, fbgemm_cuda, driver)
    assert check.status == status and fix in check.fix and bool(check.fix) == bool(fix)


@pytest.mark.parametrize(
    ("cuda_build", "devices", "version", "status", "message", "fix"),
    [
        (
            "13.0",
            [],
            "570.124.06",
            "fail",
            "CUDA 13.0 needs an NVIDIA driver of 580 or newer, and",
            "driver 580 or newer",
        ),
        ("13.0", [], "579.99", "fail", "this machine has 579.99", "make setup DEVICE=cpu"),
        ("12.6", [], "470.256.02", "fail", "CUDA 12.6 needs an NVIDIA driver of 525", "driver 525 or newer"),
        (None, [], "550.54.15", "warn", "this is the CPU build, and CUDA 13.0 needs", "driver 580 or newer, then make"),
        ("13.0", [], "580.65.06", "fail", "driver 580.65.06 is loaded, but torch (CUDA 13.0) finds no", "nvidia-smi"),
        ("13.0", [], None, "fail", "an NVIDIA driver is loaded, but torch", "CUDA_VISIBLE_DEVICES"),
        (None, [], "580.65.06", "warn", "this is the CPU build", "make setup DEVICE=cuda"),
        # With NVIDIA's compatibility package an older driver works.
        ("13.0", ["H200"], "570.124.06", "ok", "1 x H200", ""),
    ],
)
def test_the_driver_that_the_build_needs_is_named(
    cuda_build: str | None, devices: list[str], version: str | None, status: str, message: str, fix: str
) -> None:
    check = packages.check_accelerator(cuda_build, devices, True, True, version)
    assert check.status == status and message in check.message and fix in check.fix


def test_loops_are_told_by_what_computes_them() -> None:
    loops = {"attention": "PyTorch's operations", "rows": "compiled loops", "experts": "PyTorch's operations"}
    check = packages.check_loops(loops)
    assert check.message == "attention, experts: PyTorch's operations; rows: compiled loops" and check.status == "ok"


def test_a_wrong_abi_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "fbgemm_gpu"
    broken.mkdir()
    # What comes before it in a probe takes seconds to import.
    (tmp_path / "torch.py").touch()
    (broken / "__init__.py").write_text("raise OSError('fbgemm_gpu_py.so: undefined symbol: _ZN3c10')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.getcwd()]))
    check, seen = packages.check_lookup()
    assert check.status == "fail" and check.fix and not seen
    assert check.message.startswith("fbgemm was built for another torch (") and "_ZN3c10" in check.message


def test_a_probe_that_crashes_or_hangs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.getcwd()]))
    with pytest.raises(ProbeError, match="killed by signal 6"):
        probe.run_probe("lookup")
    (tmp_path / "torch.py").write_text("import time; time.sleep(600)")
    monkeypatch.setattr(probe, "TIMEOUT_SECONDS", 1.0)
    with pytest.raises(ProbeError, match="no answer within 1 s"):
        probe.run_probes("all_reduce", "gloo", ranks=2)


@pytest.mark.parametrize(
    ("sums", "status", "told"),
    [([3.0, 3.0], "ok", "went through"), ([3.0, 2.0], "fail", "gave 2.0"), (None, "fail", "failed: no such interface")],
)
def test_collectives(sums: list[float] | None, status: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_probes(*arguments: str, ranks: int) -> list[dict[str, Any]]:
        if sums is None:
            raise ProbeError("no such interface")
        return [{"sum": value} for value in sums]

    monkeypatch.setattr(host, "run_probes", run_probes)
    check = host.check_collectives("gloo", 2)
    assert check.status == status and told in check.message


def test_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert host.check_port().status == "ok"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        check = host.check_port()
        assert check.status == "fail" and str(port) in check.message and check.fix == "unset MASTER_PORT"
    assert host.check_port().status == "ok"
    monkeypatch.setenv("MASTER_PORT", "http")
    assert host.check_port().status == "fail"


@pytest.mark.parametrize(("free", "status"), [(64e6, "fail"), (500e6, "warn"), (8e9, "ok")])
def test_shared_memory(free: float, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free))
    check = host.check_shared_memory()
    assert check.status == status and ("--shm-size" in check.fix) == (status != "ok")


def test_no_shared_memory(tmp_path: Path) -> None:
    assert host.check_shared_memory(str(tmp_path / "absent")).status == "warn"


@pytest.mark.parametrize(
    ("here", "temporary", "status"), [(9e11, 5e8, "fail"), (5e9, 9e11, "warn"), (9e11, 9e11, "ok")]
)
def test_disk(here: float, temporary: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, here if path == tmp_path else temporary))
    check = host.check_disk(tmp_path)
    assert check.status == status
    assert ("TMPDIR" in check.fix) == (status == "fail")


@pytest.mark.parametrize(("soft", "status"), [(256, "warn"), (1024, "ok"), (resource.RLIM_INFINITY, "ok")])
def test_open_files(soft: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, 4096))
    check = host.check_open_files()
    assert check.status == status and check.fix == ("ulimit -n 4096" if status == "warn" else "")


@pytest.mark.parametrize(("given", "status"), [(None, "ok"), ("1", "ok"), ("4", "ok"), ("5", "warn"), ("many", "warn")])
def test_threads(given: str | None, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_cores", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert host.check_threads().status == status


def test_placement_names_the_cores_near_each_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert host.check_placement(tmp_path).message == "no GPU: ranks are not bound to cores"
    for node, cpus in enumerate(("0-3", "4-7")):
        directory = tmp_path / f"devices/system/node/node{node}"
        directory.mkdir(parents=True)
        (directory / "cpulist").write_text(cpus)
        device = tmp_path / f"bus/pci/devices/0000:0{node}:00.0"
        device.mkdir(parents=True)
        for name, text in (("vendor", "0x10de"), ("class", "0x030200"), ("numa_node", str(node))):
            (device / name).write_text(text)
    monkeypatch.setattr(host, "available_cores", lambda: 8)
    assert host.check_placement(tmp_path).message == (
        "with a rank for each GPU: 4 cores of NUMA node 0 of GPU 0000:00:00.0; 4 cores of NUMA node 1 of GPU "
        "0000:01:00.0; loader processes of a rank: 3"
    )
    (tmp_path / "devices/system/node/node1/cpulist").write_text("")
    assert "with a rank for each GPU: the machine has one NUMA node; " in host.check_placement(tmp_path).message


@pytest.mark.parametrize(
    ("own", "shared", "status", "told"),
    [
        (
            "madvise",
            "never",
            "ok",
            "tables on a CPU are in large pages (madvise); search vectors that loader processes share are in small "
            "ones (shmem_enabled: never), and each process reads a copy in large ones if memory allows",
        ),
        ("always", "advise", "ok", "share are too (shmem_enabled: advise)"),
        ("madvise", None, "ok", "share are in small ones (no shmem_enabled)"),
        ("never", "never", "warn", "switched off"),
        (None, None, "ok", "this system has none"),
    ],
)
def test_large_pages(
    own: str | None, shared: str | None, status: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (host, large_pages):
        monkeypatch.setattr(
            module, "large_pages_setting", lambda memory="enabled": own if memory == "enabled" else shared
        )
    check = host.check_large_pages()
    assert check.status == status and told in check.message
    assert bool(check.fix) == (status != "ok")


def test_compiler_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    check = host.check_compiler()
    assert check.status == "ok" and check.message.startswith("no g++ and no ninja, not needed")


@pytest.mark.parametrize(("statuses", "expected"), [(["ok", "warn"], 0), (["ok", "fail", "ok"], 1)])
def test_exit_status_and_output(
    statuses: list[Any], expected: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [
        Check(f"part {i}", status, "found", "" if status == "ok" else "type this") for i, status in enumerate(statuses)
    ]
    monkeypatch.setattr(report, "all_checks", lambda: iter(checks))
    assert report.examine(as_json=False) == expected
    text = capsys.readouterr().out
    assert all(check.name in text for check in checks) and "-> type this" in text
    assert report.examine(as_json=True) == expected
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] == (expected == 0)
    assert [entry["status"] for entry in told["checks"]] == statuses


class ForkedProbe:
    """Replacement of ``subprocess.Popen`` for a probe: a process of the nursery, which has imported torch."""

    def __init__(self, nursery: Nursery, folder: Path, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
        self.returncode: int | None = None
        self._files = [folder / f"{environment.get('RANK', 0)}.{name}" for name in ("out", "err")]
        self._nursery = nursery
        self._process = nursery.start("launch.doctor.probe", arguments, 0, environment, *self._files)

    def communicate(self, timeout: float) -> list[str]:
        self.returncode = self._nursery.wait(self._process, timeout)
        assert self.returncode is not None
        return [file.read_text() for file in self._files]

    def kill(self) -> None:
        """Do nothing: the process has ended."""


@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forked", "started"])
def test_this_installation_is_well(
    own: bool, nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real probes: one fused lookup, one all-reduce between two processes; the slow form starts interpreters."""
    monkeypatch.delenv("MASTER_PORT", raising=False)
    if not own:
        monkeypatch.setattr(probe, "_start", partial(ForkedProbe, nursery, tmp_path))
    found = {check.name: check for check in report.all_checks()}
    for name in ("torch, fbgemm, torchrec", "fused lookup", "compiled loops", "gloo"):
        assert found[name].status == "ok", found[name]
    assert all(family in found["compiled loops"].message for family in computed_on_this_cpu())
