"""Versions and machine of a run."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from modules.codebook_kernel import PAIRS
from modules.vector_code import instructions_for

PACKAGES = (
    *("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "deepspeed", "webdataset", "numpy", "pyarrow"),
    *("transformers", "peft", "accelerate", "tokenizers"),
)


def computed_by(device: torch.device, compiled: bool = True) -> str:
    """Return a phrase for what computes a part of a network on a device, if it is compiled where it can be, or not."""
    instructions = instructions_for(device) if compiled else None
    return f"compiled loops ({instructions})" if instructions else "PyTorch's operations"


def computed_on_this_cpu() -> dict[str, str]:
    """Return family of compiled loops -> a phrase for what computes it on this CPU, where a job leaves the choice open.

    The loops of tables, searches and codebooks are compiled for any CPU. Rows of tables are vectors of four values on
    each.
    """
    cpu = torch.device("cpu")
    of_search = instructions_for(cpu) or "no AVX2"
    of_codebook = f"{of_search}, pairs of bfloat16 values" if PAIRS else of_search
    return {
        "attention": computed_by(cpu),
        "experts and towers": computed_by(cpu),
        "rows of tables": "compiled loops (vectors of four values)",
        "searches of histories": f"compiled loops ({of_search})",
        "codebooks": f"compiled loops ({of_codebook})",
    }


@cache
def package_versions() -> Mapping[str, str]:
    """Return package -> installed version, of those of :data:`PACKAGES` that are installed.

    Their descriptions on the disk are read once by a process.
    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def environment(world: int) -> dict[str, Any]:
    """Collect versions and machine, for the record of a run or a benchmark with ``world`` ranks."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "packages": dict(package_versions()),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "ranks": world,
        "threads": torch.get_num_threads(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def rounding_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what changes the order of sums between two environments of the same number of ranks, one phrase each.

    Kernels on a CPU split a sum by the number of threads and by the width of the processor's vectors, and another
    version of a library may split it otherwise. Facts that one of the two does not hold are not compared.
    """
    phrases = {
        "threads": "{now} threads in each rank, {then} before (OMP_NUM_THREADS)",
        "kernels": "kernels for {now} processors, {then} before",
        "accelerator": "accelerator {now}, {then} before",
        "attention": "attention to histories by {now}, by {then} before",
        "experts": "experts and towers by {now}, by {then} before",
    }
    found = [
        phrase.format(then=then[key], now=now[key])
        for key, phrase in phrases.items()
        if key in then and key in now and then[key] != now[key]
    ]
    versions = then.get("packages", {}) if isinstance(then.get("packages"), dict) else {}
    for name in ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "deepspeed", "numpy"):
        before, present = versions.get(name), now["packages"].get(name)
        if before is not None and present is not None and before != present:
            found.append(f"{name} {present}, {before} before")
    return found
