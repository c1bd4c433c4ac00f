"""Compilers that a library needs while a job runs."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch


def triton_compiles(device: torch.device) -> bool:
    """True if the device is a GPU and Triton can compile kernels for it, for which it needs a C compiler."""
    compilers = (os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang"))
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None and any(compilers)
