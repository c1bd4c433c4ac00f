"""Set-up of ``.venv``: the order of the pins, one install only, recovery, and the line a failure is told in."""

from __future__ import annotations

import ast
import re
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from launch import setup
from launch.setup import Environment, SetupError
from tests.paths import ROOT

FAKE_PYTHON = """#!/bin/sh
case "$2" in
  venv)
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
    if [ -e "{calls}.tree" ]; then cp -r "{calls}.tree" "$3/lib"; fi ;;
  pip)
    [ "$3" = install ] || exit 0
    echo "$@" >> "{calls}"
    if [ -e "{fail}" ] && echo "$@" | grep -q "$(cat "{fail}")"; then echo "ERROR: no such luck"; exit 1; fi ;;
esac
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(requirements: list[str]) -> dict[str, str]:
    return {normal(name): pin for name, pin in (requirement.split("==") for requirement in requirements)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with the real pins and nothing else."""
    checkout = tmp_path / "checkout"
    (checkout / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", checkout)
    for name in ("__init__.py", "setup.py", "machine.py", "constraints.txt"):
        shutil.copy(ROOT / "launch" / name, checkout / "launch")
    return checkout


class FakePip:
    """A Python that makes environments and 'installs' by writing its arguments down."""

    def __init__(self, directory: Path) -> None:
        self.calls_file, self.fail_file = directory / "calls", directory / "fail"
        self.python = directory / "python"
        self.python.write_text(FAKE_PYTHON.format(calls=self.calls_file, fail=self.fail_file))
        self.python.chmod(0o755)

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    def fail_on(self, pattern: str) -> None:
        self.fail_file.write_text(pattern)

    def install_wheels(self, *names: str) -> None:
        """Leave the metadata of these wheels in the next environment."""
        for name in names:
            wheels = self.calls_file.with_name("calls.tree") / "python3.11" / "site-packages"
            (wheels / f"{name}.dist-info").mkdir(parents=True)

    def succeed(self) -> None:
        self.fail_file.unlink()


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip(tmp_path)
    monkeypatch.setattr(sys, "executable", str(fake.python))
    monkeypatch.setattr(setup, "GIGABYTES_NEEDED", {"cpu": 0, "cuda": 0})
    return fake


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_steps_come_in_the_order_the_libraries_need(device: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIMELIGHT_TORCH_INDEX", raising=False)
    torch, fbgemm, torchrec, rest, project = [arguments for _, arguments in Environment(root, ["dev"]).steps(device)]
    assert torch[-1] == "torch==2.13.0"
    assert fbgemm[-1] == {"cpu": "fbgemm-gpu-cpu==1.8.0", "cuda": "fbgemm-gpu==1.8.0"}[device]
    assert torchrec == ["--no-deps", "torchrec==1.8.0"]
    assert {"deepspeed==0.19.8", "webdataset==1.0.2", "pytest==9.2.0"} <= set(rest)
    assert not [item for item in rest if item.startswith(("torch==", "torchrec", "fbgemm", "transformers"))]
    assert project[:2] == ["--no-deps", "--no-build-isolation"]


def test_a_further_index_is_for_torch_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMELIGHT_TORCH_INDEX", "https://wheels.example/cpu")
    named = ["https://wheels.example/cpu" in arguments for _, arguments in Environment(root, []).steps("cpu")]
    assert named == [True, False, False, False, False]


def test_what_torchrec_needs_is_named() -> None:
    project = Environment(ROOT, []).project
    needed = [Requirement(item) for item in requires("torchrec") or []]
    needed = [item for item in needed if item.marker is None or item.marker.evaluate({"extra": ""})]
    assert {normal(item.name) for item in needed} - {"fbgemm-gpu"} <= set(pins(project["dependencies"]))


def test_pins_are_what_is_installed_and_leave_nothing_open() -> None:
    project = Environment(ROOT, []).project
    direct = pins(
        project["dependencies"]
        + [item for extra in ("cpu", "llm", "dev") for item in project["optional-dependencies"][extra]]
    )
    lines = (ROOT / "launch" / "constraints.txt").read_text().splitlines()
    indirect = pins([line for line in lines if not line.startswith("#")])
    assert not direct.keys() & indirect.keys()
    reached, waiting = set(), set(direct)
    while waiting:
        name = waiting.pop()
        reached.add(name)
        try:
            needed = [Requirement(item) for item in distribution(name).requires or []]
        except PackageNotFoundError:
            continue
        waiting |= {
            normal(item.name) for item in needed if not item.marker or item.marker.evaluate({"extra": ""})
        } - reached
    # torch's CUDA build brings its own libraries, each at the version that its wheel names.
    cuda = {name for name in reached if name.startswith(("nvidia-", "cuda-", "triton", "fbgemm-gpu"))}
    assert reached - cuda - direct.keys() == indirect.keys() - cuda
    installed = {name: version(name).split("+")[0] for name in (reached - cuda)}
    assert installed == {name: pin for name, pin in (direct | indirect).items() if name not in cuda}


def test_digest_changes_with_everything_an_install_depends_on(root: Path, tmp_path: Path) -> None:
    digests = [Environment(root, []).digest("cpu")]
    assert digests[0] == Environment(root, []).digest("cpu")
    digests += [Environment(root, []).digest("cuda"), Environment(root, ["dev"]).digest("cpu")]
    constraints, description = root / "launch" / "constraints.txt", root / "pyproject.toml"
    constraints.write_text(constraints.read_text().replace("absl-py==2.5.1", "absl-py==2.5.0"))
    digests.append(Environment(root, []).digest("cpu"))
    description.write_text(description.read_text().replace("webdataset==1.0.2", "webdataset==1.0.1"))
    digests.append(Environment(root, []).digest("cpu"))
    digests.append(Environment(root.rename(tmp_path / "moved"), []).digest("cpu"))
    assert len(set(digests)) == len(digests)


def test_an_install_is_done_once(root: Path, pip: FakePip) -> None:
    environment = Environment(root, ["dev"])
    environment.install("cpu")
    assert [bool(re.search(r"torch==|fbgemm|torchrec|deepspeed|--editable", call)) for call in pip.calls()] == [
        True
    ] * 5
    assert environment.installed()["digest"] == environment.digest("cpu")
    assert setup.pick_device("auto", environment) == "cpu"


def test_auto_stays_with_the_installed_build(root: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = Environment(root, [])
    environment.install("cuda")
    monkeypatch.setattr(setup, "has_nvidia_driver", lambda: False)
    assert setup.pick_device("auto", environment) == "cuda"
    assert setup.pick_device("cpu", environment) == "cpu"


@pytest.mark.parametrize(("driver", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto_picks_by_the_driver_and_says_so(
    driver: bool, device: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "has_nvidia_driver", lambda: driver)
    assert setup.pick_device("auto", Environment(root, [])) == device
    assert f"{device.upper()} build" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "wheels", "message"),
    [
        ("cuda", ["torch-2.13.0+cpu", "fbgemm_gpu-1.8.0"], r"torch 2.13.0\+cpu for DEVICE=cuda.* CUDA 13.0: an index"),
        ("cuda", ["torch-2.13.0+cu126", "fbgemm_gpu-1.8.0"], r"torch 2.13.0\+cu126 for DEVICE=cuda"),
        ("cuda", ["torch-2.13.0", "fbgemm_gpu-1.8.0", "fbgemm_gpu_cpu-1.8.0"], "are both installed"),
        ("cuda", ["torch-2.13.0", "fbgemm_gpu-1.8.0"], None),
        ("cuda", ["torch-2.13.0+cu130", "fbgemm_gpu-1.8.0"], None),
        ("cpu", ["torch-2.13.0+cpu", "fbgemm_gpu_cpu-1.8.0"], None),
        ("cpu", ["torch-2.13.0", "fbgemm_gpu_cpu-1.8.0"], None),
    ],
)
def test_the_installed_builds_are_those_of_the_device(
    device: str, wheels: list[str], message: str | None, root: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIMELIGHT_TORCH_INDEX", raising=False)
    pip.install_wheels(*wheels)
    environment = Environment(root, [])
    if message is None:
        environment.install(device)
        assert environment.installed()["device"] == device
        return
    with pytest.raises(SetupError, match=message) as refused:
        environment.install(device)
    assert "\n" not in str(refused.value) and not environment.installed()


def test_the_index_that_a_wrong_build_comes_from_is_named(
    root: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIMELIGHT_TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
    pip.install_wheels("torch-2.13.0+cpu")
    with pytest.raises(SetupError, match=r"LIMELIGHT_TORCH_INDEX=https://download\.pytorch\.org/whl/cpu leads to it"):
        Environment(root, []).install("cuda")


def test_a_driver_that_is_too_old_is_named_before_the_download(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "has_nvidia_driver", lambda: True)
    for driver, named in (("550.54.15", True), ("580.65.06", False), (None, False)):
        monkeypatch.setattr(setup, "nvidia_driver_version", lambda driver=driver: driver)
        assert setup.pick_device("auto", Environment(root, [])) == "cuda"
        assert ("needs an NVIDIA driver of 580 or newer" in capsys.readouterr().out) == named


def test_an_interrupted_install_starts_afresh(root: Path, pip: FakePip) -> None:
    environment = Environment(root, [])
    pip.fail_on("deepspeed")
    with pytest.raises(SetupError, match="no such luck"):
        environment.install("cpu")
    assert environment.installed() == {}
    half_installed = environment.directory / "half-a-package"
    half_installed.touch()
    pip.succeed()
    environment.install("cpu")
    assert not half_installed.exists()
    assert environment.installed()["digest"] == environment.digest("cpu")


def test_changed_pins_are_installed_into_the_same_environment(root: Path, pip: FakePip) -> None:
    Environment(root, []).install("cpu")
    kept = root / ".venv" / "kept"
    kept.touch()
    description = root / "pyproject.toml"
    description.write_text(description.read_text().replace("webdataset==1.0.2", "webdataset==1.0.1"))
    environment = Environment(root, [])
    assert environment.installed()["digest"] != environment.digest("cpu")
    environment.install("cpu")
    assert kept.exists() and "webdataset==1.0.1" in pip.calls()[-2]


def test_an_environment_made_by_hand_is_kept_and_a_broken_one_is_not(root: Path, pip: FakePip) -> None:
    environment = Environment(root, [])
    environment.python.parent.mkdir(parents=True)
    shutil.copy(pip.python, environment.python)
    own = environment.directory / "own"
    own.touch()
    environment.install("cpu")
    assert own.exists()
    environment.python.unlink()
    assert environment.installed() == {}
    environment.install("cpu")
    assert not own.exists()


def test_another_build_or_place_starts_afresh(root: Path, tmp_path: Path, pip: FakePip) -> None:
    Environment(root, []).install("cpu")
    (root / ".venv" / "old").touch()
    Environment(root, []).install("cuda")
    assert not (root / ".venv" / "old").exists()
    (root / ".venv" / "old").touch()
    moved = root.rename(tmp_path / "moved")
    Environment(moved, []).install("cuda")
    assert not (moved / ".venv" / "old").exists()


def test_too_little_disk_is_told_before_anything_is_written(
    root: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "GIGABYTES_NEEDED", {"cpu": 10**9})
    with pytest.raises(SetupError, match=r"GB free, the cpu install needs 1000000000: free some space"):
        Environment(root, []).install("cpu")
    assert not (root / ".venv").exists()


def test_an_unknown_extra_is_told_with_the_known_ones(root: Path) -> None:
    with pytest.raises(SetupError, match="'kafak'; known: cpu, cuda, llm, s3, kafka, redis, mlflow, dev"):
        Environment(root, ["kafak"])


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError(...)'\n"
            "ERROR: No matching distribution found for torch==2.13.0",
            r"no package index can be reached \(needed: torch==2.13.0\)",
        ),
        ("ERROR: No matching distribution found for fbgemm-gpu-cpu==1.8.0", r"the index has no fbgemm-gpu-cpu==1.8.0"),
        ("Error: ensurepip is not available", r"install python3.\d+-venv"),
        ("Collecting x\nERROR: metadata is bad\n", "^ERROR: metadata is bad"),
        ("", "no output"),
    ],
)
def test_a_failure_is_told_in_one_line(output: str, told: str, tmp_path: Path) -> None:
    line = setup._explain(output, tmp_path / ".venv")
    assert re.search(told, line) and "\n" not in line


def test_the_command_ends_with_one_line_and_status_2(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.setup", "--device", "cpu"],
        cwd=root,
        env={"PATH": "/usr/bin:/bin", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("limelight: error: the index has no torch==2.13.0")
    assert (root / ".venv" / "limelight-setup.unfinished").exists()


def test_an_old_python_is_told_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source = ROOT / "launch" / "__init__.py"
    ast.parse(source.read_text(), feature_version=(3, 4))
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(source))
    assert stop.value.code == 2
    assert "is Python 3.10, Limelight needs 3.11 or newer" in capsys.readouterr().err


def test_a_python_without_wheels_is_told_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "NEWEST_PYTHON", (3, 10))
    with pytest.raises(SetupError, match=r"no wheels for Python 3\.\d+: make PYTHON=python3.11"):
        Environment(root, [])
