"""Flags and sizes of the memory of a tensor, as the kernel lists them."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor

from trainer.runtime.large_pages import LARGE_PAGE


def own_memory(size: int) -> Tensor:
    """Return about ``size`` large pages of new memory as float32 values.

    A small page before and behind them keeps the kernel from joining their mapping to another one.
    """
    memory = mmap.mmap(-1, size * LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.float32)[mmap.PAGESIZE : -mmap.PAGESIZE]


def memory_fields(values: Tensor) -> dict[str, str]:
    """Return the fields of the mapping that the middle of a tensor is in, such as ``AnonHugePages`` -> ``2048 kB``."""
    middle, within = values.data_ptr() + values.numel() * values.element_size() // 2, False
    fields: dict[str, str] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            begin, end = (int(bound, 16) for bound in name.split("-"))
            within = begin <= middle < end
        elif within:
            fields[name.removesuffix(":")] = rest.strip()
    if not fields:
        raise AssertionError("no mapping holds the tensor")
    return fields


def memory_flags(values: Tensor) -> list[str]:
    """Return the flags of this mapping; ``hg``: large pages were requested, ``dc``: forked processes do not get it."""
    return memory_fields(values)["VmFlags"].split()


def kilobytes(values: Tensor, field: str) -> int:
    """Return the size in a field of this mapping, in units of 1024 bytes."""
    return int(memory_fields(values)[field].removesuffix("kB"))
