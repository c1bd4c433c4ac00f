"""Files of a user that cannot be read or decoded: one line with the file, never a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.launch.one_line import DAMAGED, as_nobody, assert_one_line, command, write_text
from tests.paths import ROOT
from trainer.config.load import load_deepspeed
from trainer.config.toml import read_toml
from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec
from trainer.data.importers.table_files import read_batches
from trainer.serving.scoring import read_candidates


@pytest.fixture
def public(tmp_path: Path) -> Iterator[Path]:
    """A folder that any user can enter."""
    for folder in (tmp_path, *tmp_path.parents[: len(tmp_path.parents) - 2]):
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(0o755)
    yield tmp_path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "world"
    assert command("data", "simulate", path, "--users", "20", "--days", "2", "--partitions", "2").startswith("0")
    return path


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ("job.toml", ["train", "{}/job.toml"]),
        ("job.toml", ["config", "check", "{}/job.toml"]),
        ("job.toml", ["finetune", "{}/job.toml"]),
        ("dataset.json", ["data", "describe", "{}"]),
        ("config.json", ["evaluate", "{}"]),
        ("config.json", ["score", "{}", "c.parquet", "{}/../results/out.parquet"]),
        ("config.json", ["explain", "{}", "--user", "1", "--candidate", "2"]),
        ("config.json", ["export", "{}", "out"]),
        ("checkpoints/step-1/manifest.json", ["checkpoint", "show", "{}"]),
        ("checkpoints/step-1/manifest.json", ["checkpoint", "verify", "{}"]),
        ("export.json", ["score", "{}", "c.parquet", "{}/../results/out.parquet"]),
        ("codebook.json", ["quantize", "report", "{}"]),
        ("map.toml", ["data", "import", "events", "{}", "{}/out", "--mapping", "{}/map.toml"]),
    ],
)
def test_a_file_without_permission(public: Path, file: str, arguments: list[str]) -> None:
    path = write_text(public / "it" / file)
    (public / "results").mkdir()
    (public / "results").chmod(0o777)
    hidden = path if "checkpoints" not in file else public / "it" / "checkpoints"
    hidden.chmod(0)
    try:
        told = as_nobody(lambda: command(*(word.format(public / "it") for word in arguments)))
    finally:
        hidden.chmod(0o755)
    assert_one_line(told, hidden.name)
    assert "Permission denied" in told or "is not readable" in told, told


@pytest.mark.parametrize("name", ["l" * 256, "loop", "loop/inner"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "{}"],
        ["data", "describe", "{}"],
        ["data", "simulate", "{}", "--users", "5"],
        ["evaluate", "{}"],
        ["score", "{}", "c.parquet", "out.parquet"],
        ["export", "{}", "out"],
        ["checkpoint", "show", "{}"],
        ["data", "import", "kuairand", "{}", "out"],
        ["data", "instructions", "{}", "out", "--evaluate-from", "2024-03-02"],
        ["quantize", "report", "{}"],
    ],
    ids=lambda arguments: " ".join(arguments[:3]),
)
def test_a_long_name_and_a_loop_of_links(tmp_path: Path, name: str, arguments: list[str]) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert_one_line(command(*(word.format(tmp_path / name) for word in arguments)), name[:100])


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: content[:8].decode(errors="replace"))
@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ("dataset.json", ["data", "describe", "{}"]),
        ("config.json", ["evaluate", "{}"]),
        ("config.json", ["score", "{}", "c.parquet", "{}/../results/out.parquet"]),
        ("config.json", ["export", "{}", "{}/out"]),
        ("export.json", ["score", "{}", "c.parquet", "{}/../results/out.parquet"]),
        ("codebook.json", ["quantize", "report", "{}"]),
    ],
)
def test_damaged_json(tmp_path: Path, file: str, arguments: list[str], content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    assert_one_line(command(*(word.format(tmp_path) for word in arguments)), str(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"partitions": float("1e400")},
        {"partitions": "2"},
        {"partitions": 0},
        {"rows": -1},
        {"span_ms": [0]},
        {"span_ms": None},
        {"behaviours": 3},
        {"behaviours": [3]},
        {"applies": []},
        {"ids": {"user": 3}},
        {"side": [[]]},
        {"extra": []},
        {"timezone": None},
    ],
    ids=str,
)
def test_a_dataset_description_with_other_types(world: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    content = json.loads((world / "dataset.json").read_text()) | changes
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert_one_line(command("data", "describe", tmp_path), "dataset.json")


def test_an_empty_array(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "copy")
    for name in ("offsets", "item_id", "user_id"):
        file = tmp_path / "copy" / "history" / f"{name}.npy"
        kept = file.read_bytes()
        file.write_bytes(b"")
        assert_one_line(command("data", "describe", tmp_path / "copy"), "histor")
        file.write_bytes(kept)


@pytest.mark.parametrize("text", ["a = " + "[" * 3000, "a = " + "{a=" * 3000, "[" * 3000, "a" + ".a" * 3000 + " = 1"])
def test_a_deeply_nested_job_file(tmp_path: Path, text: str) -> None:
    file = write_text(tmp_path / "job.toml", text)
    assert_one_line(command("train", file), "job.toml")
    assert_one_line(command("config", "check", file), "job.toml")
    with contextlib.suppress(UserError):
        read_toml(file, "job file")
    file.write_text("")
    assert_one_line(command("train", file, f"run.name={text.removeprefix('a = ')}"))


def test_a_deeply_nested_deepspeed_file(tmp_path: Path) -> None:
    for content in (b"[" * 100_000, b"\xff", b"null"):
        (tmp_path / "deepspeed.json").write_bytes(content)
        with pytest.raises(UserError, match=r"deepspeed\.json"):
            load_deepspeed(str(tmp_path / "deepspeed.json"))


def test_text_files_are_utf8_in_any_locale(tmp_path: Path) -> None:
    folder = tmp_path / "täglich"
    write_text(folder / "job.toml", '[run]\nname = "täglich"\n')
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    for arguments in (
        ["config", "check", folder / "job.toml"],
        ["data", "simulate", folder / "welt", "--users", "5", "--days", "1"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "launch.cli.main", *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            timeout=600,
            check=False,
        )
        told = (done.stdout + done.stderr).decode(errors="replace")
        assert done.returncode in (0, 1, 2) and "Traceback" not in told, told


@pytest.mark.parametrize("ending", ["\r", "\n\r", "\r\r\n"])
@pytest.mark.parametrize("multiline", [False, True])
def test_bare_carriage_returns_in_csv(tmp_path: Path, ending: str, multiline: bool) -> None:
    file = write_text(tmp_path / "log.csv", "")
    file.write_bytes(ending.join(["a,b", "1,2", "3,4", ""]).encode())
    try:
        batches = list(read_batches(file, {"a": pa.int64(), "b": pa.int64()}, multiline=multiline))
    except UserError as error:
        assert str(error).startswith(f"{file}: ") and "\n" not in str(error) and "\r" not in str(error)
    else:
        assert pa.Table.from_batches(batches).to_pydict() == {"a": [1, 3], "b": [2, 4]}


def test_a_corrupt_parquet_page_names_the_input(tmp_path: Path) -> None:
    file = tmp_path / "log.parquet"
    pq.write_table(pa.table({"a": np.arange(50_000)}), file, use_dictionary=False)
    content = bytearray(file.read_bytes())
    for first in (4, 30, 2000):
        damaged = bytearray(content)
        damaged[first : first + 600] = b"\xff" * 600
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"log\.parquet: damaged after row"):
            list(read_batches(file, {"a": pa.int64()}))


def test_candidates_with_other_types(world: Path, tmp_path: Path) -> None:
    spec, file = DatasetSpec.load(world), tmp_path / "candidates.parquet"
    good: dict[str, Any] = {"user_id": [1, 2], "item_id": [1, 2], "author_id": [1, 2]} | {
        "request_ms": [1_700_000_000_000] * 2
    }
    features = [feature.name for feature in (*spec.side, *spec.dense) if feature.of == "context"]
    assert features
    for name in (*good, *features):
        for values in (
            [Decimal("1.00"), Decimal("2.00")],
            [Decimal("1.50"), Decimal("2.25")],
            [[1], [2]],
            [b"1", b"2"],
        ):
            pq.write_table(pa.table(good | {name: values}), file)
            try:
                columns = read_candidates(file, spec)
            except UserError as error:
                assert name in str(error) and "\n" not in str(error)
            else:
                assert columns[name].dtype.kind in "if"
    pq.write_table(pa.table(good | {"corrupt": [1, 2]}), file)
    file.write_bytes(file.read_bytes().replace(b"corrupt", b"\xff\xfe\xff\xfe\xff\xfe\xff"))
    with pytest.raises(UserError, match=r"candidates\.parquet: not a readable Parquet file"):
        read_candidates(file, spec)


def test_loops_compile_without_a_place_for_the_cache(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (public / "loops.py").write_text(
        "from modules.compiled import compiled\n@compiled('doubling', nogil=True)\ndef twice(x):\n    return 2 * x\n"
    )
    for variable in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    namespace = runpy.run_path(str(public / "loops.py"))
    assert namespace["twice"](3) == 6

    def without_a_place() -> str:
        loops = runpy.run_path(str(public / "loops.py"))
        return f"{loops['twice'](3)} {type(loops['twice']._cache).__name__}"

    assert as_nobody(without_a_place) == "6 NullCache"


def test_the_description_that_is_read_is_the_one_that_was_written(world: Path) -> None:
    spec = DatasetSpec.load(world)
    assert json.loads(spec.to_json()) == json.loads((world / "dataset.json").read_text())
