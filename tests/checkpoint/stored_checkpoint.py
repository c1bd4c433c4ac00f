"""Checkpoints made by hand from known tensors in arbitrary pieces, for tests of readers without any training."""

from __future__ import annotations

import io
import json
import pickle
import random
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from trainer.checkpoint.manifest import DatasetEntry, Manifest, TableEntry, file_entry, rank_file, write_manifest
from trainer.config.ranker import parse_config

Cuts = Mapping[str, list[list[int]]]
"""Tensor -> for each of its dimensions, the indices where pieces begin."""


def random_cuts(tensors: Mapping[str, Tensor], seed: int, most: int = 4) -> dict[str, list[list[int]]]:
    """Return random cuts into up to ``most`` parts in each of the first two dimensions."""
    choose = random.Random(seed)
    return {
        name: [
            [0, *sorted(choose.sample(range(1, size), min(choose.randrange(most), size - 1)))] if depth < 2 else [0]
            for depth, size in enumerate(tensor.shape)
        ]
        for name, tensor in tensors.items()
    }


def write_model(directory: Path, tensors: Mapping[str, Tensor], cuts: Cuts, files: int = 2) -> None:
    """Write a model in the format of torch.distributed.checkpoint; test_reader.py checks it with that library."""
    directory.mkdir(parents=True)
    entries, places, contents = {}, {}, [io.BytesIO() for _ in range(files)]
    for name, tensor in tensors.items():
        chunks = []
        spans = [
            list(zip(starts, [*starts[1:], size], strict=True))
            for starts, size in zip(cuts.get(name, [[0]] * tensor.ndim), tensor.shape, strict=True)
        ]
        for number, part in enumerate(product(*spans)):
            offsets, sizes = torch.Size(a for a, _ in part), torch.Size(b - a for a, b in part)
            values = tensor[tuple(slice(a, b) for a, b in part)].clone()
            chunks.append(ChunkStorageMetadata(offsets, sizes))
            file = contents[(number + len(entries)) % files]
            start = file.tell()
            blob = io.BytesIO()
            torch.save(values, blob)
            file.write(blob.getvalue())
            place = _StorageInfo(f"__{contents.index(file)}_0.distcp", start, file.tell() - start)
            places[MetadataIndex(name, offsets, number)] = place
        entries[name] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.size(), chunks)
    for number, file in enumerate(contents):
        (directory / f"__{number}_0.distcp").write_bytes(file.getvalue())
    with (directory / ".metadata").open("wb") as index:
        pickle.dump(Metadata(entries, planner_data={}, storage_data=places), index)


def model_tensors(
    tables: Mapping[str, Tensor],
    states: Mapping[str, Tensor],
    dense: Mapping[str, Tensor],
    ids: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Return tensors under the names that the engine saves them as.

    Args:
        tables: name -> weight.
        states: table -> the single state of its optimizer.
        dense: parameter -> value; its two moments are computed from it.
        ids: dynamic table -> columns and counts.
    """
    named = {f"tables.collections.0.embeddings.{name}.weight": weight for name, weight in tables.items()}
    for name, state in states.items():
        named[f"table_optimizer.collections.0.embeddings.{name}.weight.{name}.momentum1"] = state
    named |= {f"dynamic.{name}.{column}": value for name, columns in ids.items() for column, value in columns.items()}
    for name, parameter in dense.items():
        slots = {"parameter": parameter, "exp_avg": parameter * 0.1, "exp_avg_sq": parameter**2}
        named |= {f"dense.{name}.{slot}": value for slot, value in slots.items()}
    return named | {"dense_step": torch.tensor(7.0), "steps": torch.tensor(7)}


def write_checkpoint(
    run: Path,
    tables: Mapping[str, Tensor],
    states: Mapping[str, Tensor],
    dense: Mapping[str, Tensor],
    *,
    step: int = 7,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    job: Mapping[str, Any] | None = None,
    cuts: Cuts | None = None,
    ids: Mapping[str, Mapping[str, Tensor]] | None = None,
    **manifest: Any,
) -> Path:
    """Write a whole checkpoint of a run, and return its directory.

    The tensors are cut by ``cuts`` or at random. ``config`` has sections of a ranker's job; ``job`` is the whole job
    of another kind, which ``kind`` names then. Further arguments are fields of the manifest.
    """
    directory = run / "checkpoints" / f"step-{step:08d}"
    tensors = model_tensors(tables, states, dense, ids or {})
    write_model(directory / "model", tensors, cuts or random_cuts(tensors, seed))
    ranker = parse_config({"data": {"path": "nowhere"}, **(config or {})}, "test")
    stored = {"config": job or ranker.model_dump(mode="json"), "trace": []}
    (directory / "job.json").write_text(json.dumps(stored))
    for rank in range(manifest.get("ranks", 2)):
        torch.save({}, directory / rank_file(rank))
    files = {
        str(file.relative_to(directory)): file_entry(file) for file in sorted(directory.rglob("*")) if file.is_file()
    }
    fields: dict[str, Any] = {
        "step": step,
        "number": 1,
        "finished": False,
        "created": "2026-03-04T05:06:07+0000",
        "ranks": 2,
        "zero_stage": 1,
        "rows_done": 300,
        "rows_total": 1200,
        "kind": ranker.model.kind,
        "behaviours": ("click", "gift"),
        "table_optimizer": "rowwise_adagrad",
        "tables": tuple(
            TableEntry(
                table=name,
                rows=len(weight),
                dim=weight.shape[1],
                module="collections.0",
                sharding="table_wise",
                kernel="fused",
                ranks=(0,),
                shards=(tuple(weight.shape),),
            )
            for name, weight in tables.items()
        ),
        "dense": {name: tuple(parameter.shape) for name, parameter in dense.items()},
        "buffers": {},
        "dataset": DatasetEntry(path="nowhere", fingerprint="0"),
        "positions": {0: (0, 5, 200), 1: (1, 0, 100)},
    }
    write_manifest(directory, Manifest(**{**fields, **manifest}, files=files))
    return directory
