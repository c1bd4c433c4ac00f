"""Differences between two checkpoints, against direct comparisons of the tensors that were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.cli.main import main
from tests.checkpoint.stored_checkpoint import write_checkpoint
from trainer.checkpoint.diff import diff_checkpoints
from trainer.checkpoint.manifest import ADAPTER, ALIGN, FORESIGHT
from trainer.checkpoint.reader import Checkpoint
from trainer.console.errors import UserError


def tensors(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return tables, states of their optimizer, and dense parameters."""
    generator = torch.Generator().manual_seed(seed)
    tables = {name: torch.randn(rows, 4, generator=generator) for name, rows in (("user", 13), ("item", 30))}
    states = {name: torch.rand(len(weight), generator=generator) for name, weight in tables.items()}
    return tables, states, {"w": torch.randn(3, 5, generator=generator), "b": torch.randn(3, generator=generator)}


@pytest.mark.parametrize("seed", range(3))
def test_equal_values_in_other_pieces_are_equal(tmp_path: Path, seed: int) -> None:
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name, *tensors(seed), seed=ord(name) + seed, ranks=ord(name))
    found = diff_checkpoints(tmp_path / "a", tmp_path / "b", block_bytes=64)
    assert found["equal"]
    assert found["settings"] == {"ranks": [97, 98]}
    assert len(found["tensors"]) == 4 + 6 + 2
    assert all(entry["differing"] == 0 and entry["largest"] == 0 for entry in found["tensors"].values())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
def test_differences_are_counted_and_measured(tmp_path: Path, seed: int, block_bytes: int) -> None:
    tables, states, dense = tensors(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    changed = {}
    for name, weight in tables.items():
        noise = torch.randn(weight.shape, generator=generator) * (torch.rand(weight.shape, generator=generator) < 0.2)
        changed[name] = weight + noise
    other_states = {"user": states["user"].clone(), "item": states["item"]}
    other_states["user"][5] = 9.0
    write_checkpoint(tmp_path / "a", tables, states, dense, seed=1)
    write_checkpoint(tmp_path / "b", changed, other_states, dense, seed=2)
    found = diff_checkpoints(tmp_path / "a", tmp_path / "b", block_bytes)
    assert not found["equal"]
    for name, weight in tables.items():
        expected = (weight.double() - changed[name].double()).abs()
        entry = found["tensors"][f"table {name}"]
        assert (entry["elements"], entry["differing"]) == (weight.numel(), int((expected > 0).sum()))
        assert entry["largest"] == float(expected.max()) > 0
    state = found["tensors"]["table user: momentum1"]
    assert (state["differing"], state["largest"]) == (1, pytest.approx(9.0 - float(states["user"][5]), rel=1e-6))
    assert found["tensors"]["table item: momentum1"]["differing"] == 0
    assert found["tensors"]["dense w: exp_avg"]["differing"] == 0


def test_nan_equals_nan_and_nothing_else(tmp_path: Path) -> None:
    tables, states, dense = tensors(0)
    tables["user"][3, 1] = torch.nan
    write_checkpoint(tmp_path / "a", tables, states, dense)
    write_checkpoint(tmp_path / "b", tables, states, dense, seed=1)
    assert diff_checkpoints(tmp_path / "a", tmp_path / "b")["equal"]
    tables["user"][4, 1] = torch.nan
    write_checkpoint(tmp_path / "c", tables, states, dense)
    entry = diff_checkpoints(tmp_path / "a", tmp_path / "c")["tensors"]["table user"]
    assert (entry["differing"], entry["largest"]) == (1, None)


def test_what_only_one_has_and_other_shapes_are_listed(tmp_path: Path) -> None:
    tables, states, dense = tensors(0)
    write_checkpoint(tmp_path / "a", {**tables, "side": torch.ones(2, 4)}, {**states, "side": torch.ones(2)}, dense)
    write_checkpoint(tmp_path / "b", tables, {}, {"w": torch.ones(3, 6), "b": dense["b"], "c": torch.ones(1)})
    found = diff_checkpoints(tmp_path / "a", tmp_path / "b")
    assert set(found["only_first"]) == {
        "table side",
        *(f"table {name}: momentum1" for name in ("user", "item", "side")),
    }
    assert set(found["only_second"]) == {"dense c", "dense c: exp_avg", "dense c: exp_avg_sq"}
    assert set(found["shapes"]) == {"dense w", "dense w: exp_avg", "dense w: exp_avg_sq"}
    assert found["shapes"]["dense w"] == [[3, 5], [3, 6]]
    assert not found["equal"] and not any(entry["differing"] for entry in found["tensors"].values())


def test_the_command_prints_what_differs_and_ends_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables, states, dense = tensors(0)
    write_checkpoint(tmp_path / "a", tables, states, dense, config={"train": {"epochs": 1}})
    tables["item"][0] += 0.5
    write_checkpoint(tmp_path / "b", tables, states, dense, config={"train": {"epochs": 3}}, step=9)
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["checkpoint", "diff", *paths]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["train.epochs", "1", "3"] in lines and ["step", "7", "9"] in lines
    assert ["table", "item", "120", "3.33%", "0.5"] in lines
    assert not any(line[:2] == ["table", "user"] for line in lines)
    assert lines[-1][:4] == ["different:", "11", "of", "12"]
    assert main(["checkpoint", "diff", *paths, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["settings"]["train.epochs"] == [1, 3]
    assert main(["checkpoint", "diff", paths[0], paths[0], "--all"]) == 0
    shown = capsys.readouterr().out
    assert "table user" in shown and "equal: 12 of 12" in shown
    assert main(["checkpoint", "diff", paths[0], str(tmp_path / "c")]) == 2


@pytest.mark.parametrize(
    "kind, job, command",
    [
        (ALIGN, {"data": {"path": "nowhere"}, "towers": {"dim": 8}}, "align"),
        (FORESIGHT, {"data": {"path": "nowhere", "codes": "codes.parquet", "codebook": "book"}}, "foresight"),
        (
            ADAPTER,
            {"model": {"path": "base"}, "data": {"train": ["t.jsonl"]}, "lora": {"rank": 4}},
            "finetune",
        ),
    ],
)
def test_checkpoints_of_other_jobs_are_compared_too(
    tmp_path: Path, kind: str, job: dict[str, Any], command: str
) -> None:
    for name, epochs in (("a", 1), ("b", 3)):
        settings = {**job, "train": {"epochs": epochs}}
        write_checkpoint(tmp_path / name, *tensors(1), seed=1, kind=kind, job=settings)
    found = diff_checkpoints(tmp_path / "a", tmp_path / "b")
    assert found["equal"] and found["settings"] == {"train.epochs": [1, 3]}
    write_checkpoint(tmp_path / "ranker", *tensors(1), seed=1)
    mixed = diff_checkpoints(tmp_path / "ranker", tmp_path / "a")
    assert mixed["equal"] and mixed["settings"]["kind"] == ["ple", kind]
    with pytest.raises(UserError, match=f"a checkpoint of `limelight {command}`, and one of a ranker is needed"):
        _ = Checkpoint.open(tmp_path / "a").config
