"""Free memory of a described machine, with and without the limit of a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.runtime.free_memory import free_memory

MEMORY = "MemTotal:       1000 kB\nMemFree:         10 kB\nMemAvailable:    600 kB\nHugePages_Total:       0\n"
OF_MACHINE = 600 * 1024


def write(root: Path, limit: str | None, used: int = 0, inactive: int | None = 0) -> tuple[Path, Path]:
    """A machine with 600 KiB available, and the files of a container's cgroup."""
    proc, cgroup = root / "proc", root / "sys/fs/cgroup"
    proc.mkdir()
    (proc / "meminfo").write_text(MEMORY)
    cgroup.mkdir(parents=True)
    if limit is not None:
        (cgroup / "memory.max").write_text(limit + "\n")
        (cgroup / "memory.current").write_text(f"{used}\n")
    if inactive is not None:
        (cgroup / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")
    return proc, root / "sys"


@pytest.mark.parametrize(
    ("limit", "used", "inactive", "free"),
    [
        (None, 0, None, OF_MACHINE),
        ("max", 10, 5, OF_MACHINE),
        ("100000", 40000, 0, 60000),
        ("100000", 40000, 30000, 90000),
        ("100000", 40000, None, 60000),
        ("100000", 120000, 0, 0),
        ("90000000", 40000, 0, OF_MACHINE),
    ],
)
def test_the_smaller_of_machine_and_container(
    limit: str | None, used: int, inactive: int | None, free: int, tmp_path: Path
) -> None:
    assert free_memory(*write(tmp_path, limit, used, inactive)) == free


def test_nothing_is_known_without_the_files(tmp_path: Path) -> None:
    assert free_memory(tmp_path, tmp_path) is None
    (tmp_path / "meminfo").write_text("MemAvailable: many kB\n")
    assert free_memory(tmp_path, tmp_path) is None


def test_this_machine_has_some() -> None:
    free = free_memory()
    assert free is None or free > 0
