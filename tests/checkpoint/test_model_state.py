"""State of a model in blocks on disk, and the differences between two states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from trainer.checkpoint import model_state as trainer_state
from trainer.checkpoint.model_state import LISTED, in_blocks, list_differences, read_state, write_state
from trainer.checkpoint.snapshot_memory import SnapshotMemory
from trainer.console.errors import UserError
from trainer.runtime.distributed import World


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    with World.join("cpu") as alone:
        yield alone.control


def sharded(whole: Tensor) -> DTensor:
    """Return a table in TorchRec's representation on a single rank."""
    mesh = init_device_mesh("cpu", (1,))
    held = LocalShardsWrapper([whole], [(0,) * whole.dim()])
    return DTensor.from_local(held, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


@pytest.mark.parametrize("shape", [(37, 8), (37,), (5, 100), (0, 8)])
def test_shards_are_written_in_blocks(
    shape: tuple[int, ...], group: dist.ProcessGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_state, "BLOCK_BYTES", 200)
    values, plain = torch.randn(shape), torch.randn(1000)
    write_state(in_blocks({"table": sharded(values), "plain": {"x": plain}}), tmp_path / "model", group)
    stored = FileSystemReader(tmp_path / "model").read_metadata().state_dict_metadata
    table = stored["table"]
    assert isinstance(table, TensorStorageMetadata)
    row = shape[1] * 4 if len(shape) > 1 else 4
    for chunk in table.chunks:
        assert chunk.sizes.numel() * 4 <= max(200, row)
    assert sum(chunk.sizes.numel() for chunk in table.chunks) == values.numel()
    assert len(stored["plain.x"].chunks) == 1
    into = {"table": sharded(torch.full(shape, torch.nan)), "plain": {"x": torch.zeros(1000)}}
    read_state(into, tmp_path / "model", group)
    (shard,) = into["table"].to_local().local_shards()  # type: ignore[attr-defined]
    assert torch.equal(shard, values) and torch.equal(into["plain"]["x"], plain)  # type: ignore[index]


@pytest.mark.parametrize("block_bytes", [1, 40, 1000])
def test_shards_keep_their_place_in_the_table(
    group: dist.ProcessGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    """A rank may hold shards that begin in the middle of a table, in its rows and in its columns."""
    monkeypatch.setattr(trainer_state, "BLOCK_BYTES", block_bytes)
    whole, into = torch.arange(77.0).view(11, 7), torch.full((11, 7), torch.nan)
    places = [(0, 0, 4, 5), (4, 0, 7, 5), (0, 5, 11, 2)]

    def shards(of: Tensor) -> DTensor:
        parts = [of[row : row + rows, column : column + columns] for row, column, rows, columns in places]
        held = LocalShardsWrapper(parts, [(row, column) for row, column, *_ in places])
        mesh = init_device_mesh("cpu", (1,))
        return DTensor.from_local(held, mesh, [Shard(0)], run_check=False, shape=of.shape, stride=of.stride())

    write_state(
        in_blocks({"table": shards(whole)}, SnapshotMemory() if block_bytes == 40 else None), tmp_path / "model", group
    )
    read_state({"table": sharded(into)}, tmp_path / "model", group)
    assert torch.equal(into, whole)
    again = torch.full((11, 7), torch.nan)
    read_state({"table": shards(again)}, tmp_path / "model", group)
    assert torch.equal(again, whole)


def test_a_copy_does_not_change_with_its_source(
    group: dist.ProcessGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_state, "BLOCK_BYTES", 64)
    values, plain = torch.randn(9, 4), torch.randn(3)
    before = values.clone(), plain.clone()
    copied = in_blocks({"table": sharded(values), "plain": plain}, SnapshotMemory())
    values.fill_(123.0), plain.fill_(123.0)
    write_state(copied, tmp_path / "model", group)
    into = {"table": sharded(torch.zeros(9, 4)), "plain": torch.zeros(3)}
    read_state(into, tmp_path / "model", group)
    assert torch.equal(into["table"].to_local().local_shards()[0], before[0])  # type: ignore[attr-defined]
    assert torch.equal(into["plain"], before[1])


def test_a_copy_stays_in_host_memory_with_a_mesh_of_another_device(
    group: dist.ProcessGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``meta`` stands for a GPU: DTensor.from_local moves what it gets to the device type of the mesh."""
    monkeypatch.setattr(trainer_state, "BLOCK_BYTES", 64)
    values = torch.randn(9, 4)
    table = sharded(values)
    monkeypatch.setattr(table.device_mesh, "_device_type", "meta")
    moved = DTensor.from_local(torch.zeros(1), table.device_mesh, [Shard(0)], run_check=False)
    assert moved.to_local().device.type == "meta", "the stand-in is moved to, as a GPU would be"
    copied = in_blocks({"table": table}, SnapshotMemory())
    blocks = copied["table"].to_local().local_shards()
    assert [len(block) for block in blocks] == [4, 4, 1]
    assert all(block.device.type == "cpu" for block in blocks)
    assert torch.equal(torch.cat(blocks), values)
    write_state(copied, tmp_path / "model", group)
    into = {"table": sharded(torch.zeros(9, 4))}
    read_state(into, tmp_path / "model", group)
    assert torch.equal(into["table"].to_local().local_shards()[0], values)  # type: ignore[attr-defined]


def test_a_state_of_another_model_is_refused_and_loads_nothing(group: dist.ProcessGroup, tmp_path: Path) -> None:
    write_state({"a": torch.ones(3), "b": torch.ones(2, 2)}, tmp_path / "model", group)
    for state, message in (
        ({"a": torch.zeros(3)}, "b 2 x 2 only there"),
        ({"a": torch.zeros(3), "b": torch.zeros(2, 2), "c": torch.zeros(())}, "c (a number) only here"),
        ({"a": torch.zeros(4), "b": torch.zeros(2, 2)}, "a 3 there, 4 here"),
    ):
        with pytest.raises(UserError) as refused:
            read_state(state, tmp_path / "model", group)
        assert str(refused.value) == f"{tmp_path / 'model'}: a checkpoint of another model: {message}"
        assert not any(tensor.any() for tensor in state.values()), "nothing was loaded"


def test_many_differences_are_counted() -> None:
    there = {f"t{i:02d}": (i,) for i in range(LISTED + 3)}
    assert list_differences(there, there) == ""
    message = list_differences(there, {})
    assert message.count("only there") == LISTED and message.endswith("; and 3 more")
    assert list_differences({"x": (1000, 2)}, {"x": (1000, 3), "y": ()}) == (
        "y (a number) only here; x 1,000 x 2 there, 1,000 x 3 here"
    )
