"""Tests of the copies of job files and templates: they name each other, and nothing of the user is replaced."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from launch.cli.main import main
from launch.own_files import copy_own_files
from tests.paths import ROOT
from trainer.config.load import load_deepspeed
from trainer.console.errors import UserError


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_copy_named_configs_is_what_the_checkout_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "configs"]) == 0
    found = contents(tmp_path / "configs")
    expected = contents(ROOT / "configs")
    assert {name: found[name] for name in expected} == expected
    own = {name for name in found if name.startswith("cluster/")}
    assert own == {f"cluster/{path.name}" for path in (ROOT / "launch" / "cluster").iterdir()}
    assert set(found) == set(expected) | own
    assert b"configs/cluster/slurm.sbatch configs/kuairand.toml" in found["cluster/slurm.sbatch"]


@pytest.mark.parametrize("absolute", [False, True])
def test_paths_in_the_copies_name_the_copies(absolute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = str(tmp_path / "my jobs") if absolute else "my jobs"
    copy_own_files(directory)
    for path in (tmp_path / "my jobs").rglob("*.toml"):
        job = tomllib.loads(path.read_text())
        assert not re.search(r"\bconfigs/", path.read_text()), path
        if "deepspeed" in job.get("train", {}):
            assert job["train"]["deepspeed"].startswith(f"{directory}/deepspeed/")
            (tmp_path / job["train"]["deepspeed"]).write_text('{"gradient_clipping": 0.5}')
            assert load_deepspeed(job["train"]["deepspeed"]) == {"gradient_clipping": 0.5}


def test_nothing_is_written_over_a_changed_file_unless_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "jobs"
    copy_own_files(str(target))
    (target / "simulated.toml").write_text("# mine\n")
    (target / "embed.toml").unlink()
    before = contents(target)
    with pytest.raises(UserError, match=r"simulated.toml: exists with another content; --overwrite replaces it"):
        copy_own_files(str(target))
    assert contents(target) == before
    assert main(["configs", str(target), "--overwrite"]) == 0
    assert "2 files written" in capsys.readouterr().out
    assert copy_own_files(str(target)) == []


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be written"):
        copy_own_files(str(tmp_path / "file"))
