"""A full /dev/shm ends a job at once, with one line that names it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.distributed.launches import job
from tests.nursery import Nursery


@pytest.mark.parametrize(
    ("size", "ranks", "need"),
    [
        (4096, 2, "the locks of 2 loader workers need "),
        # One rank: of two, the first could fill the memory with batches before the second one makes its locks.
        (200_000, 1, r"a batch has .* kB, and a rank keeps up to \d+"),
    ],
)
def test_full_shared_memory_is_one_line(
    nursery: Nursery, small_world: Path, tmp_path: Path, size: int, ranks: int, need: str
) -> None:
    if not nursery.can_mount:
        pytest.skip("this machine lets no user mount a file system")
    arguments = job(small_world, tmp_path / "run", "data.workers=2", "train.batch_size=512")
    # Far below the watchdog's time.
    ended = nursery.run("trainer.rank", arguments, ranks=ranks, shared_memory=size, timeout=600)
    assert ended.status == 2, ended
    lines = [line for line in (ended.stdout + ended.stderr).splitlines() if "error" in line]
    assert len(lines) == 1, ended
    assert re.match(
        rf"limelight: error: shared memory is full: /dev/shm has .* free of .*; {need}.*; give it more "
        r"\(docker run --shm-size=8g.*data\.workers=0$",
        lines[0],
    )
    assert "Traceback" not in ended.stdout + ended.stderr
