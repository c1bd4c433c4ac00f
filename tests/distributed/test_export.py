"""Exported models give the scores of their runs, in one process that cannot import TorchRec or DeepSpeed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from launch.cli.main import main
from tests.distributed.export_ranks import RUNS
from tests.paths import ROOT, files_of_their_owner_alone
from tests.serving.plain_scores import plain_probabilities, row_documents
from trainer.checkpoint.reader import Checkpoint
from trainer.console.errors import UserError
from trainer.console.outputs import Output
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.shards import read_rows
from trainer.data.simulator.write_dataset import simulate
from trainer.runtime.checksums import CHECKSUMS
from trainer.serving.exported_model import open_export
from trainer.serving.scoring import read_candidates, score_candidates, score_file
from trainer.sparse.dynamic_ids import IdCounts

MODELS = [(precision, kind) for precision, kinds in RUNS.items() for kind in kinds]

_made: list[Path] = []


@pytest.fixture
def out(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory with the results of export_ranks.py and the export of each model as PRECISION-KIND."""
    if not _made:
        directory = tmp_path_factory.mktemp("export")
        simulate(directory / "world", 50, 2, 2, 3)
        write_candidates(directory / "world", directory / "candidates.parquet")
        run_ranks("tests.distributed.export_ranks", directory, directory / "world", directory / "candidates.parquet")
        for precision, kind in MODELS:
            run = directory / precision if kind == "ple" else directory / precision / "baselines" / kind
            assert main(["export", str(run), str(directory / f"{precision}-{kind}")]) == 0
        _made.append(directory)
    return _made[0]


def write_candidates(world: Path, file: Path) -> None:
    """Write the last exposures of a dataset as candidates, with the features of their requests."""
    spec = DatasetSpec.load(world)
    rows = read_rows(world, spec)
    last = np.argsort(rows["request_ms"])[-80:]
    columns: dict[str, Any] = {name: rows[name][last] for name in ("user_id", "item_id", "author_id", "request_ms")}
    for k, side in enumerate(spec.side):
        if side.of == "context":
            columns[side.name] = rows["side"][last, k].astype(np.int32)
    for k, dense in enumerate(spec.dense):
        if dense.of == "context":
            columns[dense.name] = rows["dense"][last, k]
    pq.write_table(pa.table(columns), file)


def largest_difference(one: pa.Table, other: pa.Table) -> float:
    """Return the largest difference of the probabilities over all behaviours."""
    assert one.column_names == other.column_names and one.num_rows == other.num_rows == 80
    names = [name for name in one.column_names if name.startswith("p_")]
    return max(float(np.abs(one[name].to_numpy() - other[name].to_numpy()).max()) for name in names)


@pytest.mark.parametrize(("precision", "kind"), MODELS)
def test_probabilities_are_those_of_the_run(out: Path, precision: str, kind: str) -> None:
    model = open_export(out / f"{precision}-{kind}")
    candidates = read_candidates(out / "candidates.parquet", model.data.spec)
    scores = score_candidates(model, str(out / "world"), candidates)
    expected = pq.read_table(out / f"{precision}-{kind}.parquet")
    assert largest_difference(scores, expected) <= 1e-6
    # Logits in bfloat16 have few distinct values.
    assert len(np.unique(scores["p_click"].to_numpy())) > {"float32": 60, "bfloat16": 10}[precision]


def test_the_plain_scripts_compute_the_probabilities_of_the_runs(out: Path) -> None:
    rows = {}
    for precision, kind in MODELS:
        model = open_export(out / f"{precision}-{kind}")
        candidates = read_candidates(out / "candidates.parquet", model.data.spec)
        rows[out / f"{precision}-{kind}"] = row_documents(model, str(out / "world"), candidates)
    for (precision, kind), found in zip(MODELS, plain_probabilities(rows), strict=True):
        table = pq.read_table(out / f"{precision}-{kind}.parquet")
        expected = np.stack([table[name].to_numpy() for name in table.column_names if name.startswith("p_")], 1)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 if precision == "float32" else 0.02)


@pytest.mark.parametrize(("precision", "kind"), MODELS)
def test_a_candidate_changes_no_other_result(out: Path, tmp_path: Path, precision: str, kind: str) -> None:
    model = open_export(out / f"{precision}-{kind}")
    table = pq.read_table(out / "candidates.parquet")
    changes = {
        "request_ms": [int(table["request_ms"][0].as_py()) - 86_400_000, 946_684_800_000],
        "user_id": [int(table["user_id"][40].as_py()), 2**63 - 1],
        "author_id": [2**40],
        "item_id": [int(table["item_id"][40].as_py()), 2**62],
    }

    def scores(changed: pa.Table) -> np.ndarray:
        pq.write_table(changed, tmp_path / "candidates.parquet")
        candidates = read_candidates(tmp_path / "candidates.parquet", model.data.spec)
        scored = score_candidates(model, str(out / "world"), candidates).drop_columns(["request_ms", "user_id"])
        return np.stack([column.to_numpy() for column in scored.drop_columns(["item_id", "author_id"])], axis=1)

    expected = scores(table)
    for name, values in changes.items():
        for value in values:
            column = table[name].to_numpy().copy()
            column[33] = value
            found = scores(table.set_column(table.column_names.index(name), name, pa.array(column)))
            np.testing.assert_array_equal(
                np.delete(found, 33, 0), np.delete(expected, 33, 0), err_msg=f"{name} {value}"
            )


def test_times_of_candidates_may_have_any_unit(out: Path, tmp_path: Path) -> None:
    spec, table = DatasetSpec.load(out / "world"), pq.read_table(out / "candidates.parquet")
    expected = table["request_ms"].to_numpy()
    milliseconds = table["request_ms"].combine_chunks()
    place = table.column_names.index("request_ms")

    def read(column: pa.Array) -> np.ndarray:
        pq.write_table(table.set_column(place, "request_ms", column), tmp_path / "candidates.parquet")
        return read_candidates(tmp_path / "candidates.parquet", spec)["request_ms"]

    stamps = milliseconds.cast(pa.timestamp("ms"))
    zoned = milliseconds.cast(pa.timestamp("ms", "Asia/Shanghai"))
    text = pc.strftime(stamps.cast(pa.timestamp("ms", "UTC")), "%Y-%m-%d %H:%M:%S UTC")
    for column in (
        *(stamps.cast(pa.timestamp(unit)) for unit in ("us", "ns")),
        zoned,
        milliseconds.cast(pa.float64()),
        text,
    ):
        np.testing.assert_array_equal(read(column), expected)
    for column in (
        pc.divide(milliseconds, 1000),
        pc.multiply(milliseconds, 1000),
        pa.array(expected.astype(np.float32)),
    ):
        with pytest.raises(UserError, match=r"candidates.parquet: row 1: column 'request_ms' is"):
            read(column)
    for wrong in (2**53, -1.0, 7.5):
        users = table["user_id"].to_numpy().astype(float)
        users[5] = wrong
        changed = table.set_column(table.column_names.index("user_id"), "user_id", pa.array(users))
        pq.write_table(changed, tmp_path / "candidates.parquet")
        with pytest.raises(UserError, match=r"candidates.parquet: row 6: column 'user_id' is .*2\^53"):
            read_candidates(tmp_path / "candidates.parquet", spec)


def test_new_users_and_items_are_counted_in_a_line(out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = pq.read_table(out / "candidates.parquet")
    users = table["user_id"].to_numpy().copy()
    users[[3, 70]] = 10**6
    pq.write_table(table.set_column(table.column_names.index("user_id"), "user_id", pa.array(users)), tmp_path / "c")
    with caplog.at_level("INFO"):
        score_file(open_export(out / "float32-ple"), tmp_path / "c", Output.of(tmp_path / "scores.parquet"))
    assert [line for line in caplog.messages if "unknown ids: 2 of user (direct" in line]
    found = pq.read_table(tmp_path / "scores.parquet")
    assert found.num_rows == 80 and found["user_id"].to_pylist() == users.tolist()


def test_a_model_is_scored_in_the_precision_of_its_run(out: Path) -> None:
    model = open_export(out / "bfloat16-ple")
    candidates = read_candidates(out / "candidates.parquet", model.data.spec)
    wider = replace(model, ranker=model.ranker.float())
    expected = pq.read_table(out / "bfloat16-ple.parquet")
    assert largest_difference(score_candidates(wider, str(out / "world"), candidates), expected) > 1e-5


def test_others_may_read_the_files_of_an_export(out: Path) -> None:
    assert files_of_their_owner_alone(out / "float32-ple") == []


def test_the_models_differ(out: Path) -> None:
    scores = [pq.read_table(out / f"{precision}-{kind}.parquet") for precision, kind in MODELS]
    for k, one in enumerate(scores):
        assert all(largest_difference(one, other) > 1e-4 for other in scores[:k])


def test_the_command_scores_without_torchrec_and_deepspeed(limelight: Any, out: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torchrec', 'fbgemm_gpu', 'deepspeed'):\n"
        "    sys.modules[name] = None\n"
        "from trainer.score import main\n"
        "sys.exit(main())\n"
    )

    candidates, of_export, scored = out / "candidates.parquet", tmp_path / "export.parquet", tmp_path / "run.parquet"
    done = subprocess.run(
        [sys.executable, "-c", program, str(out / "float32-ple"), str(candidates), str(of_export)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "80 candidates scored" in done.stdout
    assert "80 candidates scored" in limelight("score", out / "float32", candidates, scored).stdout
    plain, of_run = pq.read_table(of_export), pq.read_table(scored)
    assert largest_difference(plain, of_run) <= 1e-6
    np.testing.assert_allclose(plain["score"].to_numpy(), of_run["score"].to_numpy(), rtol=1e-5)


@pytest.mark.parametrize(("precision", "kind"), MODELS)
def test_an_export_has_whole_tables_and_float32_parameters(out: Path, precision: str, kind: str) -> None:
    directory = out / f"{precision}-{kind}"
    origin = json.loads((directory / "export.json").read_text())
    checkpoint = Checkpoint.open(origin["checkpoint"])
    assert (origin["precision"], origin["kind"], origin["step"]) == (precision, kind, checkpoint.manifest.step)
    weights, model = load_file(directory / "model.safetensors"), checkpoint.model
    expected = {f"tables.{name}": table.weight for name, table in model.tables.items()}
    expected |= {f"dense.{name}": slots["parameter"] for name, slots in model.dense.items()}
    expected |= {f"buffers.{name}": buffer for name, buffer in model.buffers.items()}
    item = model.tables["item"].ids
    expected |= {"ids.item.id": item["id"], "ids.item.seen": item["seen"]}
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert tensor.equal(expected[name].read()), name
        assert name.startswith(("buffers.", "ids.")) or str(tensor.dtype) == "torch.float32"
    counts = IdCounts.of(item["counts"].read())
    assert counts.evicted > 0
    last = json.loads((checkpoint.directory / "job.json").read_text())["trace"][-1]
    assert last["ids"] == {"item": asdict(counts)}
    assert json.loads((directory / "config.json").read_text())["model"]["kind"] == kind


def test_an_impossible_export_is_one_line_and_leaves_no_files(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, target = tmp_path / "run", tmp_path / "model"
    shutil.copytree(out / "float32", run)
    (file,) = (run / "checkpoints").rglob("__1_0.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (tmp_path / "file").write_text("")
    for source, place, message in (
        (out / "float32", out / "float32-ple", "exists already; choose another directory or remove it"),
        (run, target, "damaged (model/__1_0.distcp has another content than was written)"),
        (tmp_path, target, "no checkpoint and no run with checkpoints here"),
        (out / "float32", tmp_path / "file" / "model", "cannot be written (Not a directory)"),
    ):
        assert main(["export", str(source), str(place)]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.safetensors", lambda content: content[:-5], "model.safetensors: damaged"),
        ("model.safetensors", lambda content: b"", "model.safetensors: damaged"),
        ("model.safetensors", None, "model.safetensors: no such file"),
        ("config.json", lambda content: content[:9], "config.json: not valid JSON"),
        (
            "config.json",
            lambda content: content.replace(b'"ple"', b'"cgc"'),
            "the tensors do not fit the model of config.json",
        ),
        ("features/features.json", None, "features.json is missing"),
        ("export.json", lambda content: content.replace(b'version": 1', b'version": 2'), "by a newer version"),
    ],
)
def test_a_damaged_export_is_named_in_one_line(
    out: Path, tmp_path: Path, name: str, change: Callable[[bytes], bytes] | None, message: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(out / "float32-ple", model)
    if change is None:
        (model / name).unlink()
    else:
        before = (model / name).read_bytes()
        (model / name).write_bytes(change(before))
        assert (model / name).read_bytes() != before
    with pytest.raises(UserError) as error:
        open_export(model)
    assert name in str(error.value) and "\n" not in str(error.value)
    # An export of an earlier version has no checksums, and must name the damage too.
    (model / CHECKSUMS).unlink()
    (model / "features" / CHECKSUMS).unlink()
    with pytest.raises(UserError) as error:
        open_export(model)
    assert message in str(error.value) and "\n" not in str(error.value)
