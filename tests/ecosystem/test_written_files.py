"""Tests of other tools that read the files of Limelight: WebDataset, readers of Parquet, torch, TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch
import torch.distributed.checkpoint as dcp
import webdataset
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from torch.utils.data import DataLoader

from launch.cli.main import main
from trainer.checkpoint.manifest import checkpoints_at
from trainer.data.format.schema import DatasetSpec, row_columns
from trainer.data.format.shards import read_rows
from trainer.data.simulator.write_dataset import simulate
from trainer.serving.exported_model import WEIGHTS

JOB = (
    "configs/simulated.toml",
    "data.eval_from=2024-03-06",
    "model.expert_layers=[[16], [8]]",
    "model.tower=[8]",
    "train.batch_size=128",
    "train.log_every=1",
    "train.device=cpu",
)
STAYTIME = ("train.epochs=1", "input.dim=8", "base.widths=[8]", "lcu.heads=2", "lcu.hidden=8", "train.device=cpu")


@dataclass(frozen=True)
class Written:
    """Files of Limelight.

    Attributes:
        directory: directory of all files.
        world: dataset with texts and comments.
        run: run of a ranker on two ranks.
    """

    directory: Path
    world: Path
    run: Path


@pytest.fixture(scope="module")
def written(limelight: Any, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Return a dataset, a run on two ranks, and what the other commands make of them."""
    out = tmp_path_factory.mktemp("ecosystem")
    world, run = out / "world", out / "run"
    simulate(world, users=40, days=3, partitions=4, seed=5, texts=True)
    limelight("train", *JOB, f"data.path={world}", f"run.directory={run}", "--ranks", 2)
    limelight("evaluate", run, "--predictions", out / "predictions.parquet")
    rows = read_rows(world, DatasetSpec.load(world))
    columns = {name: rows[name][:50] for name in ("user_id", "author_id", "item_id", "request_ms")}
    pq.write_table(pa.table(columns), out / "candidates.parquet")
    assert main(["score", str(run), str(out / "candidates.parquet"), str(out / "scores.parquet")]) == 0
    # Without time to arrive out of order, some events are late and go to the file of unused events.
    assemble = ("--policy", "realtime", "--mode", "incremental", "--idle-seconds", "60")
    assert main(["stream", "assemble", str(world), *assemble, str(out / "rows.parquet")]) == 0
    settings = [f"data.path={world}", "data.eval_from=2024-03-06", f"run.directory={out / 'staytime'}"]
    assert main(["staytime", "configs/staytime.toml", *settings, "lcu.enabled=false", *STAYTIME]) == 0
    return Written(out, world, run)


NODES, WORKERS = 2, 2


def decoded(sample: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the rows of one sample, as a user of WebDataset reads them."""
    rows: dict[str, np.ndarray] = safetensors.numpy.load(sample["safetensors"])
    return rows


def test_readers_with_workers_on_several_nodes_see_every_row_once(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = DatasetSpec.load(written.world)
    urls = sorted(str(path) for path in Path(written.world).glob("rows/*.tar"))
    assert len(urls) >= NODES * WORKERS
    parts: list[list[dict[str, np.ndarray]]] = []
    for node in range(NODES):
        monkeypatch.setenv("RANK", str(node))
        monkeypatch.setenv("WORLD_SIZE", str(NODES))
        data = webdataset.WebDataset(
            urls, shardshuffle=False, nodesplitter=webdataset.split_by_node, workersplitter=webdataset.split_by_worker
        ).map(decoded)
        parts.append(list(DataLoader(data, batch_size=None, num_workers=WORKERS)))
    assert all(parts)
    read = {name: np.concatenate([rows[name] for part in parts for rows in part]) for name in row_columns(spec)}
    expected = read_rows(written.world, spec)
    assert len(read["visit_id"]) == spec.rows
    orders = [np.lexsort([rows[name] for name in ("emit_ms", "user_id", "visit_id")]) for rows in (read, expected)]
    for name in read:
        np.testing.assert_array_equal(read[name][orders[0]], expected[name][orders[1]], err_msg=name)


Columns = dict[str, list[object]]

KINDS = ("events", "truth", "items", "texts", "rows", "unused_events", "scores", "predictions", "staytime")
"""Parts of the names of the files that must be among those that are read."""


def pandas(path: Path) -> Columns:
    frame = pytest.importorskip("pandas", reason="needs pandas, of the extra dev").read_parquet(path)
    return {str(name): frame[name].tolist() for name in frame.columns}


def fastparquet(path: Path) -> Columns:
    reader = pytest.importorskip("fastparquet", reason="needs fastparquet, of the extra dev")
    frame = reader.ParquetFile(str(path)).to_pandas()
    return {str(name): frame[name].tolist() for name in frame.columns}


def polars(path: Path) -> Columns:
    frame = pytest.importorskip("polars", reason="needs polars, of the extra dev").read_parquet(path)
    return {name: frame[name].to_list() for name in frame.columns}


def duckdb(path: Path) -> Columns:
    library = pytest.importorskip("duckdb", reason="needs duckdb, of the extra dev")
    with library.connect() as connection:
        found = connection.execute("SELECT * FROM read_parquet(?)", [str(path)])
        names = [entry[0] for entry in found.description]
        rows = found.fetchall()
    return {name: [row[at] for row in rows] for at, name in enumerate(names)}


def plain(value: object) -> object:
    """Return a value without the types of a library."""
    if isinstance(value, np.ndarray | list):
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode()
    # Readers without nullable types have NaN for a missing value.
    return None if value != value else value


@pytest.mark.parametrize("read", [pandas, fastparquet, polars, duckdb])
def test_every_file_is_read_with_the_same_values(written: Written, read: Callable[[Path], Columns]) -> None:
    files = sorted(written.directory.rglob("*.parquet"))
    names = " ".join(str(file.relative_to(written.directory)) for file in files)
    assert [kind for kind in KINDS if kind not in names] == [], names
    for file in files:
        expected = pq.read_table(file)
        found = read(file)
        assert list(found) == expected.column_names, file
        for name in found:
            right = [plain(value) for value in expected[name].to_pylist()]
            assert [plain(value) for value in found[name]] == right, (file, name)


def flat(state: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the tensors of nested dictionaries by their path."""
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def test_a_checkpoint_of_two_ranks_becomes_one_file_of_torch(written: Written, tmp_path: Path) -> None:
    model = checkpoints_at(written.run)[-1] / "model"
    dcp_to_torch_save(str(model), tmp_path / "model.pt")
    state = flat(torch.load(tmp_path / "model.pt", weights_only=True))
    listed = FileSystemReader(str(model)).read_metadata().state_dict_metadata
    assert {name.replace(".", "") for name in state} == {name.replace(".", "") for name in listed}

    # The tensors are those of the model, as an export has them.
    assert main(["export", str(written.run), str(tmp_path / "export")]) == 0
    exported = load_file(tmp_path / "export" / WEIGHTS)
    compared = 0
    for name, tensor in exported.items():
        kind, _, rest = name.partition(".")
        stored = {
            "tables": f"tables.collections.0.embeddings.{rest}.weight",
            "dense": f"dense.{rest}.parameter",
        }.get(kind, name)
        assert torch.equal(state[stored].reshape(tensor.shape), tensor), name
        compared += 1
    assert compared == len(exported) > 10


def test_a_part_of_a_checkpoint_is_loaded_by_its_name(written: Written, tmp_path: Path) -> None:
    model = checkpoints_at(written.run)[-1] / "model"
    dcp_to_torch_save(str(model), tmp_path / "model.pt")
    state = flat(torch.load(tmp_path / "model.pt", weights_only=True))
    name = "tables.collections.0.embeddings.user.weight"
    part = {name: torch.zeros_like(state[name])}
    dcp.load(part, checkpoint_id=str(model), no_dist=True)
    assert torch.equal(part[name], state[name]) and part[name].any()
    # And the file of torch becomes a checkpoint of the same tensors.
    torch_save_to_dcp(tmp_path / "model.pt", str(tmp_path / "again"))
    again = {name: torch.zeros_like(state[name])}
    dcp.load(again, checkpoint_id=str(tmp_path / "again"), no_dist=True)
    assert torch.equal(again[name], state[name])


def test_tensorboard_sees_the_metric_history(written: Written) -> None:
    history = json.loads((checkpoints_at(written.run)[-1] / "job.json").read_text())["trace"]
    assert len(history) > 1
    events = EventAccumulator(str(written.run / "tensorboard"))
    events.Reload()
    for name in ("loss", "rows_per_second"):
        points = [(point.step, point.value) for point in events.Scalars(name)]
        assert points == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in history], name
    points = [(point.step, point.value) for point in events.Scalars("progressive_auc/click")]
    expected = [(entry["step"], entry["auc"]["click"]) for entry in history if entry["auc"]["click"] is not None]
    assert points == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected] and points
