"""Commands `limelight checkpoint show` and `verify`, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launch.cli.main import main
from tests.checkpoint.stored_checkpoint import write_checkpoint

TABLES = {"user": torch.randn(6, 4), "item": torch.randn(9, 4)}
STATES = {"user": torch.rand(6), "item": torch.rand(9)}
DENSE = {"network.weight": torch.randn(3, 5), "network.bias": torch.randn(3)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run with two checkpoints."""
    for step in (7, 12):
        write_checkpoint(tmp_path, TABLES, STATES, DENSE, step=step, seed=step)
    return tmp_path


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-00000012"


def test_show_lists_progress_model_and_tables(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "show", str(run)]) == 0
    shown = capsys.readouterr().out
    for words in (
        "step-00000012",
        "12 (training has not finished)",
        "300 of 1,200 (25.0 %)",
        "2 ranks, ZeRO stage 1",
        "ple for click, gift",
        "2 parameters of 18 values",
        "2 partitions in epochs 0 to 1",
    ):
        assert words in shown
    (user,) = (line.split() for line in shown.splitlines() if line.startswith("user"))
    # Each of the 6 rows has 4 float32 values, and one of the optimizer.
    assert user == ["user", "table_wise", "1", "of", "6", "x", "4", "momentum1", "6", "6", "4", "120", "B"]
    assert "network.weight" not in shown


def test_show_counts_admitted_and_evicted_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = torch.tensor([2000, 500, 11, 4])
    ids = {"item": {"id": torch.arange(9), "seen": torch.arange(9, dtype=torch.int32), "counts": counts}}
    write_checkpoint(tmp_path, TABLES, STATES, DENSE, ids=ids)
    assert main(["checkpoint", "show", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "7 of 8 rows taken; 11 admitted, 4 evicted; 25.0 % of 2,000 look-ups unserved" in shown
    assert shown.count("rows taken") == 1
    (item,) = (line.split() for line in shown.splitlines() if line.startswith("item"))
    # Each of the 9 rows has 4 float32 values, one of the optimizer, and an int64 and an int32 of the id; plus 4 counts.
    assert item[-2:] == [str(9 * 20 + 9 * 12 + 32), "B"]
    assert main(["checkpoint", "show", str(tmp_path), "--json"]) == 0
    item = json.loads(capsys.readouterr().out)["tables"][1]["ids"]
    assert item == {"looked_up": 2000, "unserved": 500, "admitted": 11, "evicted": 4, "bytes": 140}


def test_show_all_lists_parameters_positions_and_files(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "show", str(run), "--all"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["network.weight", "3", "x", "5"] in lines
    assert ["1", "1", "0", "100"] in lines
    assert ["model/__0_0.distcp", f"{(newest(run) / 'model/__0_0.distcp').stat().st_size:,}"] in lines


def test_show_as_json_has_the_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "show", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["rows_done"], found["dense_values"]) == (12, 300, 18)
    # A parameter and its two moments are float32.
    assert found["dense_bytes"] == 18 * 4 * 3
    assert found["tables"][1]["states"] == {"momentum1": {"shape": [9], "bytes": 36}}
    files = {
        str(path.relative_to(newest(run))): path.stat().st_size for path in newest(run).rglob("*") if path.is_file()
    }
    files.pop("manifest.json")
    assert found["files"] == files and found["bytes"] == sum(files.values())


def test_verify_reads_every_checkpoint_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {line[0] for line in lines[1:]} == {"step-00000007", "step-00000012"}
    assert all(line[-1] == "ok" for line in lines[1:]) and len(lines) == 1 + 2 * 6
    assert main(["checkpoint", "verify", str(newest(run))]) == 0
    assert "step-00000007" not in capsys.readouterr().out


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "zero":
        file.write_bytes(bytes(len(content)))
    elif how == "cut":
        file.write_bytes(content[:-3])
    else:
        file.unlink()


@pytest.mark.parametrize(
    ("how", "problem"),
    [("flip", "another content"), ("zero", "another content"), ("cut", "bytes instead of"), ("remove", "is missing")],
)
@pytest.mark.parametrize("name", ["model/__1_0.distcp", "model/.metadata", "job.json"])
def test_verify_names_a_broken_file(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, how: str, problem: str
) -> None:
    damage(newest(run) / name, how)
    assert main(["checkpoint", "verify", str(run)]) == 1
    printed = capsys.readouterr()
    (error,) = printed.err.splitlines()
    assert error.startswith("limelight: error: 1 of 2 checkpoints broken: step-00000012: ")
    assert name in error and problem in error
    (line,) = (line for line in printed.out.splitlines() if not line.endswith(" ok") and line.startswith("step"))
    assert line.split()[:2] == ["step-00000012", name]


@pytest.mark.parametrize("how", ["flip", "zero", "cut", "remove"])
def test_verify_names_a_broken_manifest(run: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    damage(newest(run) / "manifest.json", how)
    assert main(["checkpoint", "verify", str(run), "--json"]) == 1
    printed = capsys.readouterr()
    assert "manifest.json" in printed.err and len(printed.err.splitlines()) == 1
    whole, broken = json.loads(printed.out)
    assert whole["problems"] == [] and len(broken["problems"]) == 1


@pytest.mark.parametrize("command", ["show", "verify"])
def test_a_path_without_checkpoints_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for path in (tmp_path, tmp_path / "none"):
        assert main(["checkpoint", command, str(path)]) == 2
        assert "no checkpoint and no run with checkpoints here" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["show", "verify", "diff"])
def test_help_has_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main(["checkpoint", command, "--help"]) == 0
    assert f"Example:\n    limelight checkpoint {command} " in capsys.readouterr().out
