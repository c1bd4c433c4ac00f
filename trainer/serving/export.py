"""Export of a checkpoint: one safetensors file with whole tables and the network, the settings, the fitted features.

A table is copied one stored piece at a time, through a memory map of its place in the file; it is never in memory as a
whole. ``trainer/serving/exported_model.py`` reads the result.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.checkpoint.manifest import ADAPTER, FORESIGHT, check_files
from trainer.checkpoint.reader import Checkpoint, StoredModel, StoredTensor, stored_search
from trainer.config.deepspeed import is_enabled
from trainer.config.load import load_deepspeed
from trainer.config.paths import absolute, absolute_paths
from trainer.config.ranker import JobConfig
from trainer.console.errors import UserError, failure_reason
from trainer.data.features.content_tables import carry_tables, facts_now, inside_dataset, segment_files
from trainer.data.features.fit import FittedFeatures
from trainer.data.features.fitted_codes import carry_codes, check_dataset
from trainer.data.format.carried_dataset import carry_dataset, dataset_of
from trainer.data.format.safetensors_header import encode_header
from trainer.runtime.checksums import write_checksums
from trainer.runtime.files import reserve, set_usual_modes, sync, write_json
from trainer.serving.export_guide import README, SCRIPT, write_guide
from trainer.serving.exported_model import (
    CARRIED,
    CODES,
    CONFIG,
    FEATURES,
    ID_COLUMNS,
    ORIGIN,
    SCHEMA,
    SEARCH,
    VECTORS,
    WEIGHTS,
)

logger = logging.getLogger(__name__)

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Dtype -> its name in the header of a safetensors file."""


def export_checkpoint(
    path: str | Path, out: str | Path, data_path: str | None = None, *, with_dataset: bool = False
) -> dict[str, Any]:
    """Write the model of a checkpoint to a new directory, which appears only when it is complete.

    Args:
        path: a checkpoint, or a run, whose newest checkpoint is exported.
        out: directory to create.
        data_path: dataset; None for the one that the run stores.
        with_dataset: copy the part of the dataset that scoring reads, so that the export scores on any machine.

    Returns:
        The content of the export's ``export.json``: its checkpoint, dataset, precision and table shapes.

    Raises:
        UserError: there is no checkpoint, it is damaged, ``out`` exists already or cannot be written, or the dataset is
            to be copied and is not there.
    """
    checkpoint, target = Checkpoint.open(path), Path(out)
    if target.exists():
        raise UserError(f"{target}: exists already; choose another directory or remove it")
    if checkpoint.manifest.kind == ADAPTER:
        raise UserError(
            f"{checkpoint.directory}: this is a checkpoint of an adapter; `limelight export RUN OUT` exports the model "
            "of a finished fine-tuning run"
        )
    if checkpoint.manifest.kind == FORESIGHT:
        raise UserError(f"{checkpoint.directory}: this is a checkpoint of Foresight's predictor, and no ranker's")
    problems = check_files(checkpoint.directory, checkpoint.manifest)
    if problems:
        raise UserError(f"{checkpoint.directory}: damaged ({'; '.join(problems)})")
    origin, config, moved = _origin(checkpoint), absolute_paths(checkpoint.config), frozenset[str]()
    if data_path is not None or with_dataset:
        dataset = absolute(dataset_of(checkpoint.run, config.data.path, data_path))
        features, moved = inside_dataset(config.features, config.data.path, dataset)
        check_dataset(features.codes, config.data.path, dataset)
        data = config.data.model_copy(update={"path": dataset})
        config = config.model_copy(update={"data": data, "features": features})
    tmp_path = target.with_name(f".{target.name}.partial-{os.urandom(4).hex()}")
    try:
        tmp_path.mkdir(parents=True)
        _write_weights(tmp_path / WEIGHTS, checkpoint.model)
        write_json(tmp_path / CONFIG, config.model_dump(mode="json"))
        shutil.copytree(checkpoint.run / "features", tmp_path / FEATURES)
        if config.features.content and (moved or with_dataset):
            _keep_facts(tmp_path / FEATURES, config, moved, with_dataset)
        if config.features.needs_space:
            # Into an opened file: torch reports a failed write to a path without the system's reason.
            with open(tmp_path / SEARCH, "wb") as file:
                torch.save(stored_search(checkpoint.directory), file)
        write_json(tmp_path / ORIGIN, origin)
        _write_guide(tmp_path, target, config, origin)
        write_checksums(tmp_path)
        if with_dataset:
            # After the checksums: a dataset has its own, and rows and tables need not be read to open the model.
            carry_dataset(config.data.path, tmp_path / CARRIED, segment_files(config.features))
            fitted = FittedFeatures.load(tmp_path / FEATURES)
            carry_codes(config.features.codes, fitted.codes, tmp_path / CODES)
            carry_tables(config.features, tmp_path / VECTORS)
        set_usual_modes(tmp_path)
        sync(tmp_path)
        tmp_path.rename(target)
        sync(target.parent)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({failure_reason(error)})") from None
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
    return origin


def _keep_facts(directory: Path, config: JobConfig, moved: Collection[str], with_dataset: bool) -> None:
    """Check tables of pre-trained vectors that are copied or another dataset's, and keep their facts in the export."""
    fitted, every = FittedFeatures.load(directory), config.features.content
    accepted = every if config.resume.allow_new_data else moved
    names = every if with_dataset else moved
    content = facts_now(config.features, config.data.path, fitted.content, names, accepted)
    replace(fitted, content=content).save(directory)


def _write_guide(directory: Path, target: Path, config: JobConfig, origin: dict[str, Any]) -> None:
    """Write the guide for serving systems, or a line in the log that says why there is none."""
    try:
        write_guide(directory, config, origin, WEIGHTS, FEATURES)
    except UserError as error:
        # The model is whole without its guide, for which dataset.json must be there.
        logger.info(f"{target}: no {README} and no {SCRIPT} ({error})")


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
    manifest = checkpoint.manifest
    # The network computed in this type; the checkpoint has the float32 master parameters.
    bf16 = is_enabled(load_deepspeed(str(checkpoint.run / "deepspeed.json")).get("bf16"))
    return {
        "schema_version": SCHEMA,
        "checkpoint": str(checkpoint.directory.resolve()),
        **manifest.model_dump(
            mode="json", include={"step", "finished", "created", "rows_done", "rows_total", "kind", "behaviours"}
        ),
        "dataset": manifest.dataset.model_dump(mode="json"),
        "precision": "bfloat16" if bf16 else "float32",
        "tables": {name: list(table.weight.shape) for name, table in checkpoint.model.tables.items()},
    }


def _write_weights(file: Path, model: StoredModel) -> None:
    tensors = {f"tables.{name}": table.weight for name, table in model.tables.items()}
    for name, table in model.tables.items():
        tensors |= {f"ids.{name}.{column}": table.ids[column] for column in ID_COLUMNS if table.ids}
    tensors |= {f"dense.{name}": slots.get("average", slots["parameter"]) for name, slots in model.dense.items()}
    tensors |= {f"buffers.{name}": buffer for name, buffer in model.buffers.items()}
    header, size = encode_header((name, _TYPES[tensor.dtype], tensor.shape) for name, tensor in tensors.items())
    with file.open("wb") as opened:
        opened.write(header)
        opened.flush()
        reserve(opened, len(header) + size)
    start = len(header)
    for tensor in tensors.values():
        _copy(tensor, file, start)
        start += tensor.bytes
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _copy(tensor: StoredTensor, file: Path, start: int) -> None:
    """Write a tensor to its place in a file, as raw bytes of the same width, because numpy has no bfloat16."""
    for piece in tensor.pieces:
        values = piece.read()
        if not values.numel():
            continue
        plain = values.contiguous().reshape(-1).view(torch.uint8).numpy()
        # Each piece has a memory map of its own, so that written pages do not stay in this process's memory.
        mapped = np.memmap(file, np.uint8, "r+", start, (tensor.bytes,))
        whole = mapped.view(f"V{tensor.dtype.itemsize}").reshape(tensor.shape)
        whole[piece.place] = plain.view(f"V{tensor.dtype.itemsize}").reshape(piece.sizes)
        mapped.flush()
