"""Flags of the memory of a tensor, as the kernel lists them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor


def memory_flags(values: Tensor) -> list[str]:
    """Return the flags of the mapping that the middle of a tensor is in; ``hg``: large pages were requested."""
    middle, within = values.data_ptr() + values.numel() * values.element_size() // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            begin, end = (int(bound, 16) for bound in name.split("-"))
            within = begin <= middle < end
        elif within and name == "VmFlags:":
            return rest.split()
    raise AssertionError("no mapping holds the tensor")
