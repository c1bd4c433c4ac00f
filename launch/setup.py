"""Create ``.venv`` and install the pinned versions into it, in the order that these libraries need.

``make`` runs ``python3 -m launch.setup`` before every job; if ``.venv`` is up to date, it prints and does nothing.
Standard library only. launch/README.md gives the reasons for the order.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from launch.machine import CUDA_BUILD, driver_too_old, has_nvidia_driver, nvidia_driver_version

NEWEST_PYTHON = (3, 14)
"""Newest Python for which torch, fbgemm and torchrec publish wheels at the pinned versions."""

GIGABYTES_NEEDED = {"cpu": 4, "cuda": 14}
"""Free disk space that an installation needs, downloads included."""

SHOW_DOWNLOADS_FROM_MB = 20.0

NETWORK_SIGNS = (
    "NewConnectionError",
    "NameResolutionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "Temporary failure in name resolution",
    "Network is unreachable",
    "Cannot connect to proxy",
    "Connection broken",
)


class SetupError(Exception):
    """An installation failed; the message is one line with the reason and what to type."""


class Environment:
    """The virtual environment of one checkout and the record of what was installed into it.

    Args:
        root: the checkout, which holds pyproject.toml.
        extras: optional dependencies to install beside the build's own (``cpu`` or ``cuda``).
    """

    def __init__(self, root: Path, extras: Sequence[str]) -> None:
        self.root = root
        self.directory = root / ".venv"
        self.python = self.directory / "bin" / "python"
        self.constraints = root / "launch" / "constraints.txt"
        self.log = self.directory / "setup.log"
        # Written last, so that it exists only after a complete installation.
        self.stamp = self.directory / "limelight-setup.json"
        # Exists from before the first file until after the stamp, and so marks an interrupted installation.
        self.unfinished = self.directory / "limelight-setup.unfinished"
        self.extras = tuple(extras)
        self.project: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text())["project"]
        if sys.version_info[:2] > NEWEST_PYTHON:
            version = f"{sys.version_info[0]}.{sys.version_info[1]}"
            raise SetupError(f"the pinned versions have no wheels for Python {version}: make PYTHON=python3.11 ...")
        unknown = [extra for extra in extras if extra not in self.project["optional-dependencies"]]
        if unknown:
            known = ", ".join(self.project["optional-dependencies"])
            raise SetupError(f"no extra is named {unknown[0]!r}; known: {known}")

    def installed(self) -> dict[str, str]:
        """Return the stamp of the last complete installation; empty if there is none."""
        try:
            stamp: dict[str, str] = json.loads(self.stamp.read_text())
        except (OSError, ValueError):
            return {}
        return stamp if self.python.exists() and not self.unfinished.exists() else {}

    def digest(self, device: str) -> str:
        """Return a hash of everything that an installation depends on."""
        parts = [self.project, self.constraints.read_text(), device, self.extras, str(self.root)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def steps(self, device: str) -> list[tuple[str, list[str]]]:
        """Return the name and the pip arguments of each step, in order."""
        requirements: list[str] = self.project["dependencies"]
        optional: dict[str, list[str]] = self.project["optional-dependencies"]
        torch = [item for item in requirements if item.startswith("torch==")]
        torchrec = [item for item in requirements if item.startswith("torchrec==")]
        rest = [item for item in requirements if item not in torch + torchrec]
        rest += [item for extra in self.extras for item in optional[extra]]
        index = os.environ.get("LIMELIGHT_TORCH_INDEX")
        constraints = ["--constraint", str(self.constraints)]
        return [
            (torch[0], [*constraints, *(["--extra-index-url", index] if index else []), *torch]),
            (optional[device][0], [*constraints, *optional[device]]),
            (torchrec[0] + " without its dependencies", ["--no-deps", *torchrec]),
            (f"{len(rest)} more packages and what they need", [*constraints, *rest]),
            ("limelight itself", ["--no-deps", "--no-build-isolation", "--editable", str(self.root)]),
        ]

    def install(self, device: str) -> None:
        """Install the pinned versions into ``.venv``.

        Raises:
            SetupError: no network, no disk space, no matching wheel, no venv module, or pip's own reason.
        """
        self._prepare(device)
        steps = self.steps(device)
        started = time.monotonic()
        for number, (name, arguments) in enumerate(steps, 1):
            _say(f"[{number}/{len(steps)}] {name}")
            self._pip(arguments)
        self._check_builds(device)
        stamp = {"digest": self.digest(device), "device": device, "root": str(self.root)}
        self.stamp.write_text(json.dumps(stamp) + "\n")
        self.unfinished.unlink()
        _say(f"done in {time.monotonic() - started:.0f} s; the log is {self.log}")

    def _check_builds(self, device: str) -> None:
        """Check that pip has installed the builds for a device.

        pip prefers a version with a build tag (``2.13.0+cpu``) to the same one without, wherever it finds it.

        Raises:
            SetupError: the build of torch or fbgemm is for another device.
        """
        found = {
            name: entry.name.removeprefix(f"{name}-").removesuffix(".dist-info")
            for name in ("torch", "fbgemm_gpu", "fbgemm_gpu_cpu")
            for entry in self.directory.glob(f"lib/python*/site-packages/{name}-*.dist-info")
        }
        if len(found.keys() - {"torch"}) > 1:
            raise SetupError("fbgemm-gpu and fbgemm-gpu-cpu are both installed: make clean setup")
        tag = found.get("torch", "").partition("+")[2]
        if device == "cpu" or not tag or tag.startswith("cu" + CUDA_BUILD.split(".")[0]):
            return
        index = os.environ.get("LIMELIGHT_TORCH_INDEX")
        where = f"LIMELIGHT_TORCH_INDEX={index} leads" if index else "an index or a folder of wheels leads"
        raise SetupError(
            f"pip has installed torch {found['torch']} for DEVICE=cuda, which needs the build for CUDA {CUDA_BUILD}: "
            f"{where} to it; unset it (pip config list, PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL) and repeat the command"
        )

    def _prepare(self, device: str) -> None:
        """Prepare an environment for pip; one that cannot be trusted is removed and created again."""
        held = self.installed()
        reason = None
        if self.unfinished.exists():
            # pip takes a package as installed if its metadata exists, whether its files are complete or not.
            reason = "an earlier set-up was interrupted"
        elif self.directory.exists() and not _runs([str(self.python), "-m", "pip", "--version"]):
            reason = "it has no working Python and pip"
        elif held.get("device", device) != device:
            # The CPU and the CUDA build of fbgemm install files of the same names.
            reason = f"it holds the {held['device']} build"
        elif held.get("root", str(self.root)) != str(self.root):
            # The commands in .venv/bin name their Python by its full path.
            reason = f"it was made in {held['root']}"
        if reason is not None:
            _say(f"starting {self.directory} afresh: {reason}")
            shutil.rmtree(self.directory)
        fresh = not self.directory.exists()
        free, need = shutil.disk_usage(self.root).free / 1e9, GIGABYTES_NEEDED[device]
        if fresh and free < need:
            raise SetupError(f"{self.root} has {free:.1f} GB free, the {device} install needs {need}: free some space")
        self.directory.mkdir(exist_ok=True)
        self.unfinished.touch()
        self.stamp.unlink(missing_ok=True)
        self.log.unlink(missing_ok=True)
        if fresh:
            _say(f"making {self.directory} with Python {sys.version.split()[0]}")
            made = subprocess.run(
                [sys.executable, "-m", "venv", str(self.directory)], capture_output=True, text=True, check=False
            )
            if made.returncode:
                raise SetupError(_explain(made.stdout + made.stderr, self.directory))

    def _pip(self, arguments: Sequence[str]) -> None:
        """Run ``pip install``, print its large downloads, and write all of its output to the log."""
        command = [str(self.python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
        command += ["--progress-bar", "off", *arguments]
        lines: list[str] = []
        with (
            self.log.open("a") as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip,
        ):
            assert pip.stdout is not None
            for line in pip.stdout:
                log.write(line)
                lines.append(line)
                download = re.match(r"\s*Downloading (\S+) \(([\d.]+) MB\)", line)
                if download and float(download[2]) >= SHOW_DOWNLOADS_FROM_MB:
                    _say(f"      downloading {download[1].rsplit('/', 1)[-1]}, {download[2]} MB")
        if pip.returncode:
            raise SetupError(_explain("".join(lines), self.directory))


def pick_device(wanted: str, environment: Environment) -> str:
    """Return ``cpu`` or ``cuda``, and print the choice with its reason if ``.venv`` does not hold that build yet.

    ``auto`` keeps the build that is installed: a login node without a GPU and the nodes with one can share a checkout.
    """
    held = environment.installed().get("device")
    if wanted == "auto" and held:
        return held
    if wanted != "auto":
        if wanted != held:
            _say(f"{wanted.upper()} build, as asked for")
        return wanted
    if has_nvidia_driver():
        _say("CUDA build: this machine has an NVIDIA driver (DEVICE=cpu takes the other one)")
        if too_old := driver_too_old(nvidia_driver_version(), CUDA_BUILD):
            _say(f"warning: no GPU can be used: {too_old}")
        return "cuda"
    _say("CPU build: this machine shows no NVIDIA driver (DEVICE=cuda takes the other one)")
    return "cpu"


def _explain(output: str, directory: Path) -> str:
    """Return one line with the reason why pip or venv failed."""
    if "No space left on device" in output or "[Errno 28]" in output:
        temporary = os.environ.get("TMPDIR", "/tmp")
        return f"the disk is full: free space at {directory.parent} or {temporary} (or point TMPDIR elsewhere)"
    if "ensurepip is not available" in output or "No module named venv" in output:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        return f"{sys.executable} cannot make environments: install python{version}-venv, or take another PYTHON=..."
    missing = re.search(r"No matching distribution found for ([^\s;]+)", output)
    if any(sign in output for sign in NETWORK_SIGNS):
        what = f" (needed: {missing[1]})" if missing else ""
        return f"no package index can be reached{what}: check the network, or name a mirror with PIP_INDEX_URL=..."
    if missing:
        version, machine = f"{sys.version_info[0]}.{sys.version_info[1]}", os.uname().machine
        wheels = "wheels are for Python 3.11 to 3.14 on x86_64 Linux; PIP_INDEX_URL=... names another index"
        return f"the index has no {missing[1]} for Python {version} on {machine} ({wheels})"
    errors = [line.strip() for line in output.splitlines() if line.lstrip().lower().startswith("error")]
    last = errors[-1] if errors else (output.strip().splitlines() or ["no output"])[-1]
    return f"{last} (the log is {directory / 'setup.log'})"


def _runs(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _say(line: str) -> None:
    print(f"limelight setup: {line}", flush=True)


def _fail(message: str, status: int) -> NoReturn:
    print(f"limelight: error: {message}", file=sys.stderr)
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> None:
    """Bring the ``.venv`` of this checkout up to date."""
    parser = argparse.ArgumentParser(prog="python3 -m launch.setup", description=main.__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="which build to install")
    parser.add_argument("--extras", default="", help="further extras of pyproject.toml, such as llm,dev")
    options = parser.parse_args(arguments)
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").exists():
        _fail(f"{root}: no checkout of Limelight, so there is nothing to set up; this is an installed wheel", 2)
    # Two `make` of one checkout take turns.
    turn = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)
        environment = Environment(root, [extra for extra in options.extras.split(",") if extra])
        device = pick_device(options.device, environment)
        if environment.installed().get("digest") != environment.digest(device):
            environment.install(device)
    except SetupError as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(_explain(str(error), root / ".venv"), 2)
    except KeyboardInterrupt:
        _fail("interrupted; the same command starts again cleanly", 130)
    finally:
        os.close(turn)


if __name__ == "__main__":
    main()
