"""Checks of the installation: versions, the torch / fbgemm / torchrec triple, and a real lookup."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distributions, requires
from typing import Any

from launch.doctor.check import Check
from launch.doctor.probe import ProbeError, run_probe
from launch.machine import CUDA_BUILD, OLDEST_DRIVER, driver_too_old
from trainer.console.setup_advice import setup_command

MEASURED_TRIPLES = (("2.13.0", "1.8.0", "1.8.0"), ("2.11.0", "1.6.0", "1.6.1"))
"""Versions of torch, fbgemm and torchrec that were measured to work together: the pinned ones, and one on a GPU."""


def installed_versions() -> dict[str, str]:
    """Return normalised name -> version of every distribution that this Python finds."""
    return {_normal(item.metadata["Name"]): item.version for item in distributions()}


def pinned_versions() -> dict[str, str]:
    """Return normalised name -> pinned version of the dependencies that every build has; empty if unknown."""
    try:
        requirements = requires("limelight") or []
    except PackageNotFoundError:
        return {}
    pins = {}
    for requirement in requirements:
        match = re.fullmatch(r"([\w.-]+)==([^;\s]+)", requirement)
        if match:
            pins[_normal(match[1])] = match[2]
    return pins


def check_python() -> Check:
    """Report the interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("python", "ok", f"{version} ({sys.executable})")


def check_pins(installed: Mapping[str, str], pinned: Mapping[str, str]) -> Check:
    """Check that every dependency is installed at its pinned version."""
    if not pinned:
        return Check("packages", "fail", "limelight is not installed in this Python", setup_command())
    missing = [name for name in pinned if name not in installed]
    if missing:
        return Check("packages", "fail", f"not installed: {', '.join(missing)}", setup_command())
    others = [
        f"{name} {installed[name]} (measured: {pin})" for name, pin in pinned.items() if _public(installed[name]) != pin
    ]
    if others:
        return Check("packages", "warn", f"not at the pinned version: {', '.join(others)}", setup_command(clean=True))
    return Check("packages", "ok", f"all {len(pinned)} dependencies at their pinned versions")


def check_triple(installed: Mapping[str, str]) -> Check:
    """Check that torch, fbgemm and torchrec were built for each other."""
    name = "torch, fbgemm, torchrec"
    builds = [build for build in ("fbgemm-gpu", "fbgemm-gpu-cpu") if build in installed]
    lacking = [package for package in ("torch", "torchrec") if package not in installed]
    if len(builds) == 2:
        message = "fbgemm-gpu and fbgemm-gpu-cpu are both installed and overwrite each other's files"
        return Check(name, "fail", message, setup_command(clean=True))
    if lacking or not builds:
        missing = ", ".join(lacking + ([] if builds else ["fbgemm-gpu or fbgemm-gpu-cpu"]))
        return Check(name, "fail", f"not installed: {missing}", setup_command(clean=True))
    torch, fbgemm, torchrec = (_public(installed[package]) for package in ("torch", builds[0], "torchrec"))
    found = f"torch {installed['torch']}, {builds[0]} {fbgemm}, torchrec {torchrec}"
    if _minor(fbgemm) != _minor(torchrec):
        return Check(
            name, "fail", f"{found}: fbgemm and torchrec must have the same minor version", setup_command(clean=True)
        )
    if (torch, fbgemm, torchrec) not in MEASURED_TRIPLES:
        measured = " or ".join("/".join(triple) for triple in MEASURED_TRIPLES)
        return Check(name, "warn", f"{found}: not among the measured triples {measured}", setup_command(clean=True))
    if builds[0] == "fbgemm-gpu-cpu":
        found += "; pip check misses fbgemm-gpu for torchrec: expected with the CPU build"
    return Check(name, "ok", found)


def check_lookup() -> tuple[Check, dict[str, Any]]:
    """Run one fused lookup and update. Returns the check and the probe's result, empty if it failed."""
    name = "fused lookup"
    try:
        seen = run_probe("lookup")
    except ProbeError as error:
        message = str(error)
        if "undefined symbol" in message:
            message = f"fbgemm was built for another torch ({message})"
        return Check(name, "fail", message, setup_command(clean=True)), {}
    return Check(name, "ok", "fbgemm looked up and updated a table, equal to plain torch"), seen


def check_loops(computed_by: Mapping[str, str]) -> Check:
    """Report what computes each family of compiled loops on this CPU, as family -> phrase."""
    phrases = dict.fromkeys(computed_by.values())
    found = ((phrase, [family for family in computed_by if computed_by[family] == phrase]) for phrase in phrases)
    message = "; ".join(f"{', '.join(families)}: {phrase}" for phrase, families in found)
    return Check("compiled loops", "ok", message)


def check_accelerator(
    cuda_build: str | None, devices: list[str], fbgemm_cuda: bool, driver: bool, driver_version: str | None = None
) -> Check:
    """Check that the installed builds fit the machine.

    Args:
        cuda_build: CUDA version that torch was built for, None for a CPU build.
        devices: GPUs that torch can use.
        fbgemm_cuda: True if fbgemm's CUDA build is installed.
        driver: True if an NVIDIA driver is loaded.
        driver_version: of this driver; None if unknown.
    """
    name = "accelerator"
    if devices and not fbgemm_cuda:
        message = f"{devices[0]} is usable by torch, but fbgemm-gpu-cpu is installed"
        return Check(name, "fail", message, setup_command("DEVICE=cuda"))
    if devices:
        return Check(name, "ok", f"{len(devices)} x {devices[0]}, CUDA {cuda_build}")
    too_old = driver_too_old(driver_version, cuda_build or CUDA_BUILD)
    if driver and too_old:
        newer = f"install driver {OLDEST_DRIVER[int((cuda_build or CUDA_BUILD).split('.')[0])]} or newer"
        if cuda_build is None:
            return Check(
                name, "warn", f"this is the CPU build, and {too_old}", f"{newer}, then {setup_command('DEVICE=cuda')}"
            )
        return Check(name, "fail", too_old, f"{newer} (nvidia-smi shows the version), or {setup_command('DEVICE=cpu')}")
    if driver and cuda_build is None:
        return Check(
            name, "warn", "an NVIDIA driver is loaded, but this is the CPU build", setup_command("DEVICE=cuda")
        )
    if driver:
        found = f"NVIDIA driver {driver_version}" if driver_version else "an NVIDIA driver"
        message = f"{found} is loaded, but torch (CUDA {cuda_build}) finds no usable GPU"
        return Check(name, "fail", message, "nvidia-smi: does it list the GPUs? Is CUDA_VISIBLE_DEVICES empty?")
    if cuda_build is not None and not fbgemm_cuda:
        message = f"CPU only; torch is the large CUDA {cuda_build} build, which works"
        index = "https://download.pytorch.org/whl/cpu"
        return Check(
            name, "ok", message, f"for the small one: LIMELIGHT_TORCH_INDEX={index} {setup_command(clean=True)}"
        )
    if fbgemm_cuda:
        return Check(name, "fail", "the CUDA build on a machine without an NVIDIA driver", setup_command("DEVICE=cpu"))
    return Check(name, "ok", "CPU only")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _public(version: str) -> str:
    """Return a version without its build tag: 2.13.0 for 2.13.0+cpu."""
    return version.split("+")[0]


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
