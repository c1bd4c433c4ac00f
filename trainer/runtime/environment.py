"""Versions and machine of a run."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = (
    *("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "deepspeed", "webdataset", "numpy", "pyarrow"),
    *("transformers", "peft", "accelerate", "tokenizers"),
)


def environment(world: int) -> dict[str, Any]:
    """Collect versions and machine, for the record of a run or a benchmark with ``world`` ranks."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "ranks": world,
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
