"""Every collective names a process group that takes tensors of its device: NCCL's takes none of the host, gloo's none
of a GPU. The jobs run on a stand-in for a GPU, see ``device_ranks.py``."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from tests.distributed import device_ranks
from tests.distributed.device_ranks import COLLECTIVES, DEVICE, Marks, WrongGroup, checked, marked
from tests.distributed.launches import SETTINGS
from tests.llm.tiny import write_samples
from tests.nursery import Nursery
from tests.paths import ROOT
from trainer.data.simulator.write_dataset import simulate

STANDIN = "tests.distributed.device_ranks"
OBJECT_COLLECTIVES = ("all_gather_object", "barrier", "broadcast_object_list", "gather_object", "scatter_object_list")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("device") / "world"
    simulate(path, users=60, days=3, partitions=2, seed=5, texts=True)
    return path


def run_standin(run_ranks: Any, module: str, *arguments: object) -> str:
    """Run a job on two ranks of the stand-in, and return the part of its output that lists the collectives."""
    printed = run_ranks(STANDIN, module, *arguments)
    collectives = printed.rpartition("collectives:\n")[2]
    assert collectives != printed
    return str(collectives)


@pytest.fixture(scope="module")
def trained(nursery: Nursery, world: Path) -> Path:
    """Return a finished run of the ranker, with aligned histories and a search in the trained vectors."""
    run = world.parent / "run"
    job = (
        *("trainer.rank", *SETTINGS, f"data.path={world}", f"run.directory={run}", "data.workers=0"),
        *("alignment.anchor=live", 'features.history.alike={domain="video", search="top", length=5}'),
        *('features.search.tables=["item"]', "features.search.refresh_steps=4"),
        "train.deepspeed=configs/deepspeed/zero1.json",
    )
    nursery.compile_search()
    ended = nursery.run(STANDIN, job, ranks=2)
    assert ended.status == 0, ended.stderr[-4000:]
    # The losses and the alignment are summed on the device, everything else on the host.
    for call in ("all_reduce on the device", "all_gather_into_tensor on the device", "all_to_all_single on the host"):
        assert call in ended.stdout
    return run


def test_the_ranker_trains_and_evaluates(run_ranks: Any, trained: Path) -> None:
    assert json.loads((trained / "metrics.json").read_text())["behaviours"]["click"]["rows"] > 0
    called = run_standin(run_ranks, "trainer.evaluate", trained)
    assert "all_reduce on the host" in called and "on the device" not in called


@pytest.mark.slow
def test_the_ranker_scores(run_ranks: Any, trained: Path, tmp_path: Path) -> None:
    candidates, out = tmp_path / "candidates.parquet", tmp_path / "scores.parquet"
    columns = {"user_id": [1, 2], "item_id": [1, 2], "author_id": [1, 1], "request_ms": [1709700000000] * 2}
    pq.write_table(pa.table(columns), candidates)
    run_ranks(STANDIN, "trainer.score", trained, candidates, out, ranks=1)
    assert pq.read_table(out).num_rows == 2


def test_a_language_model_is_fine_tuned_and_encodes_texts(run_ranks: Any, world: Path, tmp_path: Path) -> None:
    write_samples(tmp_path)
    run, vectors = tmp_path / "run", tmp_path / "vectors"
    job = (
        *("configs/finetune_small.toml", f'data.train=["{tmp_path}/train.jsonl"]', "data.general=[]"),
        *(f'data.evaluate=["{tmp_path}/eval.jsonl"]', "data.length=64", "data.general_share=0", "small.hidden=32"),
        *("small.vocabulary=300", "lora.rank=4", "train.batch_size=8", "train.epochs=1", "checkpoint.every_steps=2"),
        f"run.directory={run}",
    )
    assert "all_reduce on the host" in run_standin(run_ranks, "trainer.finetune", *job)
    (run / "metrics.json").unlink()
    # The run is loaded from its last checkpoint.
    run_standin(run_ranks, "trainer.finetune", *job)
    embed = ("configs/embed.toml", f"data.path={world}", 'data.kinds=["authors"]', f"model.path={run / 'base'}")
    run_standin(run_ranks, "trainer.embed", *embed, f"model.adapter={run / 'adapter'}", f"embed.directory={vectors}")
    assert (vectors / "authors").is_dir()


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Yield the device's and the host's group of one rank, with a check as in ``device_ranks.py``."""
    dist.Backend.register_backend(device_ranks.BACKEND, device_ranks.gloo, devices=["cpu"])
    dist.init_process_group(device_ranks.BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(device_ranks, "OWN_CODE", (__file__,))
    monkeypatch.setattr(device_ranks, "calls", [])
    yield {"device": dist.group.WORLD, "host": dist.new_group(backend="gloo")}
    dist.destroy_process_group()


def test_a_tensor_in_the_group_of_another_device_is_refused(groups: dict[str, Any]) -> None:
    all_reduce = checked("all_reduce", dist.all_reduce)
    with Marks():
        host = torch.ones(2)
        device = host.to(DEVICE)
        derived = {"device": (device * host)[:1], "host": (device + 1).cpu()}
        for here, tensor in derived.items():
            all_reduce(tensor, group=groups[here])
            with pytest.raises(WrongGroup, match="a tensor that is not on"):
                all_reduce(tensor, group=groups["host" if here == "device" else "device"])
            with pytest.raises(WrongGroup, match="names no group"):
                all_reduce(tensor)
        assert marked(torch.zeros_like(device)) and marked(torch.empty(1, device=device.device)) and not marked(host)


def collectives_without_group() -> Iterator[str]:
    for package in ("trainer", "modules", "launch"):
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text()
            for node in ast.walk(ast.parse(text)) if "dist." in text else ():
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                of_dist = isinstance(node.func.value, ast.Name) and node.func.value.id == "dist"
                named = any(keyword.arg == "group" for keyword in node.keywords)
                if of_dist and not named and node.func.attr in COLLECTIVES + OBJECT_COLLECTIVES:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}: dist.{node.func.attr}"


def test_every_collective_names_its_group() -> None:
    assert list(collectives_without_group()) == []


def test_no_module_imports_a_collective_by_its_name() -> None:
    """The rule above and the stand-in see ``dist.all_reduce`` only."""
    for package in ("trainer", "modules", "launch"):
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text()
            for node in ast.walk(ast.parse(text)) if "torch.distributed import" in text else ():
                if isinstance(node, ast.ImportFrom) and node.module == "torch.distributed":
                    assert not {alias.name for alias in node.names} & {*COLLECTIVES, *OBJECT_COLLECTIVES}, path
