"""Tensors read from checkpoints in arbitrary pieces, against the written ones and torch.distributed.checkpoint."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint.stored_checkpoint import random_cuts, write_checkpoint, write_model
from trainer.checkpoint.reader import Checkpoint, StoredModel
from trainer.console.errors import UserError

SHAPES = st.lists(st.integers(1, 9), max_size=3).map(tuple)
TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64])


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(SHAPES, TYPES), min_size=1, max_size=4), seed=st.integers(0, 99), rows=st.integers(1, 9)
)
def test_blocks_and_whole_tensors_are_what_was_written(
    shapes: list[tuple[tuple[int, ...], torch.dtype]], seed: int, rows: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"buffers.b{k}": (100 * torch.randn(shape, generator=generator)).to(dtype)
        for k, (shape, dtype) in enumerate(shapes)
    }
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory) / "model", tensors, random_cuts(tensors, seed))
        stored = StoredModel(Path(directory) / "model").buffers
        assert len(stored) == len(tensors)
        for name, tensor in tensors.items():
            found = stored[name.partition(".")[2]]
            assert (found.shape, found.dtype, found.bytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)
            assert torch.equal(found.read(), tensor)
            if not tensor.ndim:
                assert [(first, float(values)) for first, values in found.blocks()] == [(0, float(tensor))]
                continue
            blocks = list(found.blocks(rows * tensor[0].nbytes))
            assert [first for first, _ in blocks] == list(range(0, len(tensor), rows))
            assert torch.equal(torch.cat([values for _, values in blocks]), tensor)


@pytest.mark.parametrize("seed", range(3))
def test_the_files_are_those_of_torch_distributed_checkpoint(tmp_path: Path, seed: int) -> None:
    tensors = {"a": torch.randn(7, 5), "b": torch.randn(11), "c": torch.tensor(3)}
    write_model(tmp_path / "ours", tensors, random_cuts(tensors, seed))
    empty = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(empty, checkpoint_id=tmp_path / "ours", no_dist=True)
    assert all(torch.equal(empty[name], tensor) for name, tensor in tensors.items())
    dcp.save({"buffers": tensors}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    found = StoredModel(tmp_path / "theirs").buffers
    assert all(torch.equal(found[name].read(), tensor) for name, tensor in tensors.items())


def test_an_index_cannot_run_code(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match=r"\.metadata: damaged"):
        StoredModel(tmp_path / "model")
    assert not (tmp_path / "made").exists()
    pickle.loads((tmp_path / "model" / ".metadata").read_bytes())
    assert (tmp_path / "made").exists(), "the file would have"


def test_a_piece_that_is_missing_in_the_index_is_damage(tmp_path: Path) -> None:
    tensors = {"buffers.a": torch.randn(8, 3)}
    write_model(tmp_path / "model", tensors, {"buffers.a": [[0, 4], [0]]})
    index = pickle.loads((tmp_path / "model" / ".metadata").read_bytes())
    index.state_dict_metadata["buffers.a"].chunks.pop()
    (tmp_path / "model" / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match="damaged"):
        StoredModel(tmp_path / "model")


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    write_model(tmp_path / "model", {"buffers.a": torch.randn(8, 3)}, {}, files=1)
    file = tmp_path / "model" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"__0_0\.distcp: damaged"):
        StoredModel(tmp_path / "model").buffers["a"].read()


def test_a_run_means_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    weights = {"user": torch.randn(5, 4)}
    for step in (3, 12, 20):
        write_checkpoint(tmp_path, weights, {}, {}, step=step)
    (tmp_path / "checkpoints" / "step-00000020" / "job.json").unlink()
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "step-00000012"):
        assert Checkpoint.open(path).manifest.step == 12
    with pytest.raises(UserError, match=r"step-00000020: not a whole checkpoint \(job\.json is missing\)"):
        Checkpoint.open(tmp_path / "checkpoints" / "step-00000020")
    with pytest.raises(UserError, match="no checkpoint and no run"):
        Checkpoint.open(tmp_path / "nowhere")


def test_what_belongs_to_a_run_is_found_beside_its_checkpoints(tmp_path: Path) -> None:
    weights = {"user": torch.randn(5, 4)}
    of_run = write_checkpoint(tmp_path / "run", weights, {}, {})
    of_baseline = write_checkpoint(tmp_path / "run" / "baselines" / "cgc", weights, {}, {}, kind="cgc")
    with pytest.raises(UserError, match=r"features/ of its run are not beside"):
        _ = Checkpoint.open(of_run).run
    (tmp_path / "run" / "features").mkdir()
    assert Checkpoint.open(of_run).run == Checkpoint.open(of_baseline).run == tmp_path / "run"
    assert [Checkpoint.open(path).config.model.kind for path in (of_run, of_baseline)] == ["ple", "cgc"]
