"""Tests of the wheel: what is in it, and jobs in an environment that has the wheel and not the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.launch.test_python_path import make_traps
from tests.paths import ROOT

DATA = {
    "configs/": {".toml"},
    "configs/deepspeed/": {".json"},
    "configs/templates/": {".txt"},
    "launch/cluster/": {"", ".yaml", ".sbatch"},
    "trainer/planning/": {".py", ".toml"},
}
"""Folder -> kinds of files in it that are no modules; all of them belong to the wheel."""

JOB = """
[run]
name = "mine"
[data]
path = "world"
train_until = "2024-03-05"
eval_from = "2024-03-05"
workers = 0
[train]
batch_size = 256
device = "cpu"
[model]
kind = "shared_bottom"
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the checkout, since a build leaves folders behind, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("trainer", "modules", "launch", "configs", "tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    done = subprocess.run([sys.executable, "-P", "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the ``bin`` of an environment with the wheel, in which only the libraries come from this environment.

    A directory that a ``.pth`` file names adds its packages, but not its own ``.pth`` files: the checkout, which this
    environment may have as an editable package, cannot be imported.
    """
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, "--disable-pip-version-check", str(wheel)], check=True)
    return environment / "bin"


def run(command: Path, *arguments: object, directory: Path) -> str:
    """Run a command of the environment outside of the checkout, and return its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [command, *map(str, arguments)], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done.stdout


def test_the_wheel_has_every_module_and_data_file_and_nothing_else(wheel: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in ("trainer", "modules", "launch")
        for path in (ROOT / package).rglob("*.py")
    }
    for folder, kinds in DATA.items():
        files = [path for path in (ROOT / folder).iterdir() if path.is_file()]
        assert {path.suffix for path in files} <= kinds, (
            f"{folder} has files of another kind: does pyproject name them?"
        )
        expected |= {path.relative_to(ROOT).as_posix() for path in files}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "trainer").rglob("*.jinja")}
    expected |= {"launch/constraints.txt"}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    record = {name for name in names if ".dist-info/" in name}
    assert names - record == expected
    assert {re.sub(r"^limelight-[^/]*/", "", name) for name in record} == {
        *("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    }


def test_the_installed_command_finds_its_files(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import trainer, launch; print(trainer.__file__)", directory=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert run(installed / "limelight", "--version", directory=tmp_path).startswith("limelight 0.")
    run(installed / "limelight", "configs", "configs", directory=tmp_path)
    assert len(list((tmp_path / "configs").rglob("*.*"))) > 20
    assert (tmp_path / "configs" / "simulated.toml").read_bytes() == (ROOT / "configs" / "simulated.toml").read_bytes()


@pytest.mark.slow
def test_a_job_from_simulation_to_scores_in_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    # The working directory is a user's: it has modules with the names of Limelight's and of its libraries.
    make_traps(tmp_path)
    limelight = installed / "limelight"
    size = ("--users", 60, "--days", 6, "--partitions", 2, "--seed", 1)
    run(limelight, "data", "simulate", "world", *size, directory=tmp_path)
    (tmp_path / "mine.toml").write_text(JOB)
    run(limelight, "train", "mine.toml", "--ranks", 2, "run.directory=run", directory=tmp_path)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["train"]["deepspeed"].endswith("configs/deepspeed/zero1.json")
    shipped = json.loads((ROOT / "configs" / "deepspeed" / "zero1.json").read_text())
    assert json.loads((tmp_path / "run" / "deepspeed.json").read_text()) == shipped
    metrics = json.loads(run(limelight, "evaluate", "run", "--json", directory=tmp_path))
    assert metrics
    pair = {"user_id": np.array([1, 2]), "item_id": np.array([1, 1]), "author_id": np.array([1, 1])}
    pq.write_table(pa.table({**pair, "request_ms": np.full(2, 1_709_700_000_000)}), tmp_path / "pairs.parquet")
    run(limelight, "score", "run", "pairs.parquet", "of_run.parquet", directory=tmp_path)
    run(limelight, "export", "run", "exported", directory=tmp_path)
    run(limelight, "score", "exported", "pairs.parquet", "of_export.parquet", directory=tmp_path)
    scores = [pq.read_table(tmp_path / f"of_{name}.parquet") for name in ("run", "export")]
    assert scores[0].num_rows == 2 and scores[0].column_names == scores[1].column_names
    for name in scores[0].column_names:
        np.testing.assert_allclose(scores[0][name].to_numpy(), scores[1][name].to_numpy(), rtol=1e-5)
    # torchrun puts the working directory first, unless PYTHONSAFEPATH is set.
    done = subprocess.run(
        [
            *(installed / "python", "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"),
            *("-m", "trainer.rank", "mine.toml", "run.directory=by_torchrun"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    assert (tmp_path / "by_torchrun" / "metrics.json").exists()
