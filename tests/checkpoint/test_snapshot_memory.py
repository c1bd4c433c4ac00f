"""Memory of a snapshot is used again by the next one, and the files are those of the model itself."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

from trainer.checkpoint.model_state import flat, in_blocks, write_state
from trainer.checkpoint.snapshot_memory import SnapshotMemory, host_like
from trainer.checkpoint.store import CheckpointStore
from trainer.config.sections import CheckpointConfig
from trainer.runtime.distributed import World


class Counted:
    """Allocation of host memory that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        self.calls += 1
        return host_like(tensor)


def state(seed: int, rows: int = 6) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "tables": {"a": torch.randn(rows, 4, generator=generator), "b": torch.randn(rows, 4, generator=generator)},
        # The transposed one has other strides.
        "dense": {"w": torch.randn(5, 3, generator=generator).T, "half": torch.randn(7).bfloat16()},
        "steps": torch.tensor(seed),
    }


def test_the_next_snapshot_uses_the_same_memory() -> None:
    allocate = Counted()
    memory = SnapshotMemory(allocate)
    places = set()
    for seed in range(3):
        live = state(seed)
        copies = dict(flat(in_blocks(live, memory)))
        expected = {name: tensor.clone() for name, tensor in flat(live)}
        for _, tensor in flat(live):
            tensor.zero_()
        for name, tensor in expected.items():
            assert torch.equal(copies[name], tensor) and copies[name].stride() == tensor.stride(), name
        assert len({copy.data_ptr() for copy in copies.values()}) == len(copies), "no two copies share memory"
        places.add(frozenset(copy.data_ptr() for copy in copies.values()))
    assert allocate.calls == 5 and len(places) == 1


def test_memory_that_is_not_needed_any_more_is_released() -> None:
    allocate = Counted()
    memory = SnapshotMemory(allocate)
    first = {name: ref(copy) for name, copy in flat(in_blocks(state(1), memory))}
    in_blocks(state(2, rows=9), memory)
    assert allocate.calls == 7, "tables of another size need other memory"
    assert {name for name, copy in first.items() if copy() is None} >= {"tables.a", "tables.b"}


def test_files_of_a_snapshot_are_those_of_the_model_itself(tmp_path: Path) -> None:
    memory = SnapshotMemory()
    in_blocks(state(1), memory)
    with World.join("cpu") as world:
        torch.manual_seed(1)
        live = state(2)
        write_state(in_blocks(live), tmp_path / "views", world.control)
        write_state(in_blocks(live, memory), tmp_path / "copies", world.control)
    files = sorted(path.name for path in (tmp_path / "views").glob("*.distcp"))
    assert files
    for name in files:
        assert (tmp_path / "views" / name).read_bytes() == (tmp_path / "copies" / name).read_bytes()


def test_a_snapshot_is_written_before_the_next_one_takes_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, may_write = SnapshotMemory(), threading.Event()
    written: list[list[float]] = []

    def snapshot(value: float) -> Any:
        assert len(written) == value, "the snapshot before was written"
        blocks = in_blocks({"x": torch.full((3,), value)}, memory)

        def write() -> tuple[Path, int]:
            may_write.wait()
            written.append(blocks["x"].tolist())
            return tmp_path, 0

        return SimpleNamespace(write=write)

    with World.join("cpu") as world:
        store = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(), world)
        store._save(lambda copy: snapshot(0.0), wait=False)
        wait = store.wait
        # The first snapshot is written as soon as somebody waits for it, and not before.
        monkeypatch.setattr(store, "wait", lambda: (may_write.set(), wait()))
        store._save(lambda copy: snapshot(1.0), wait=False)
        store.close()
    assert written == [[0.0] * 3, [1.0] * 3]


@pytest.mark.gpu
def test_copies_of_a_gpu_are_in_page_locked_memory_and_do_not_change_later() -> None:
    allocate = Counted()
    memory = SnapshotMemory(allocate)
    for value in (1.0, 2.0):
        live = {"x": torch.full((1 << 20,), value, device="cuda"), "step": torch.tensor(3)}
        blocks = in_blocks(live, memory)
        live["x"].zero_()
        assert blocks["x"].is_pinned() and not blocks["step"].is_pinned()
        assert bool((blocks["x"] == value).all())
    assert allocate.calls == 2
