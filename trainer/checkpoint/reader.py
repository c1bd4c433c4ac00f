"""Reads a checkpoint in a single process: its description, and its tensors by blocks of rows.

The model in a checkpoint is a ``torch.distributed.checkpoint``. It is opened here without ranks and without that
library's planner, which would need memory for whole tables. ``trainer.checkpoint.model_index`` reads the files.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from trainer.checkpoint.manifest import (
    ADAPTER,
    ALIGN,
    FORESIGHT,
    JOB,
    MODEL,
    Manifest,
    check_complete,
    check_files,
    find_checkpoint,
    rank_file,
    read_manifest,
)
from trainer.checkpoint.model_index import DAMAGED, load_archive, load_tensors, read_index
from trainer.config.align import AlignConfig
from trainer.config.finetune import FinetuneConfig
from trainer.config.foresight import ForesightConfig
from trainer.config.ranker import JobConfig
from trainer.config.sections import Section
from trainer.config.toml import validate_stored
from trainer.console.errors import UserError
from trainer.data.features.fit import FittedFeatures
from trainer.runtime.stored_files import read_json_object

BLOCK_BYTES = 64 << 20
"""Approximate size of a block of rows."""

_OTHER_JOBS: dict[str, type[Section]] = {
    ADAPTER: FinetuneConfig,
    ALIGN: AlignConfig,
    FORESIGHT: ForesightConfig,
}
"""Kind -> job, for the kinds of checkpoints that are not of a ranker."""

_COMMANDS = {ADAPTER: "finetune", ALIGN: "align", FORESIGHT: "foresight"}


@dataclass(frozen=True)
class StoredPiece:
    """A stored part of a tensor.

    Attributes:
        offsets: index of its first element in the tensor.
        sizes: shape.
        file: with the values.
        start, length: range of bytes in the file.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int

    @property
    def place(self) -> tuple[slice, ...]:
        """Return the part of the tensor that it covers."""
        return tuple(slice(at, at + size) for at, size in zip(self.offsets, self.sizes, strict=True))

    def read(self) -> Tensor:
        """Read the values.

        Raises:
            UserError: the file is damaged.
        """
        try:
            with self.file.open("rb") as file:
                file.seek(self.start)
                content = file.read(self.length)
            values = load_archive(io.BytesIO(content), len(content))
            if tuple(values.shape) != self.sizes:
                raise ValueError
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read ({error.strerror})") from None
        except DAMAGED:
            raise UserError(f"{self.file}: damaged; `limelight checkpoint verify` lists the damaged files") from None
        return values


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint that is read on request.

    Attributes:
        shape: of the whole tensor.
        dtype: of its elements.
        pieces: in the order of their first elements; together they cover the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[StoredPiece, ...]

    @property
    def elements(self) -> int:
        """Return the number of elements."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Return the size of the whole tensor."""
        return self.elements * self.dtype.itemsize

    def read(self) -> Tensor:
        """Read the whole tensor; meant for small ones."""
        whole = torch.empty(self.shape, dtype=self.dtype)
        for piece in self.pieces:
            whole[piece.place] = piece.read()
        return whole

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row and the values ``[rows, ...]`` of consecutive blocks; a scalar is one block.

        Only one block and the stored pieces with rows of it are in memory at a time.
        """
        if not self.shape:
            yield 0, self.read()
            return
        rows = max(1, block_bytes * self.shape[0] // max(1, self.bytes))
        held: dict[StoredPiece, Tensor] = {}
        for first in range(0, self.shape[0], rows):
            last = min(first + rows, self.shape[0])
            here = [piece for piece in self.pieces if piece.offsets[0] < last and first < _end(piece)]
            held = {piece: held[piece] for piece in here if piece in held}
            block = torch.empty((last - first, *self.shape[1:]), dtype=self.dtype)
            for piece in here:
                if piece not in held:
                    held[piece] = piece.read()
                start = piece.offsets[0]
                low, high = max(first, start), min(last, _end(piece))
                place = (slice(low - first, high - first), *piece.place[1:])
                block[place] = held[piece][low - start : high - start]
            yield first, block


def _end(piece: StoredPiece) -> int:
    return piece.offsets[0] + piece.sizes[0]


@dataclass(frozen=True)
class StoredTable:
    """An embedding table.

    Attributes:
        weight: ``[rows, dim]``.
        states: optimizer states by name, ``[rows]`` or ``[rows, dim]``.
        ids: for a dynamic table, its columns ``[rows]`` and counts; see ``trainer.sparse.dynamic_tables``.
    """

    weight: StoredTensor
    states: dict[str, StoredTensor] = field(default_factory=dict)
    ids: dict[str, StoredTensor] = field(default_factory=dict)


class StoredModel:
    """Tensors of a checkpoint's model.

    Args:
        directory: ``CHECKPOINT/model``.

    Attributes:
        tables: by name.
        dense: parameter of the dense network or an adapter -> ``parameter``, the moments of its optimizer, and
            ``average`` in a stream that keeps a mean over time.
        buffers: of the dense network.
        counters: numbers of steps.

    Raises:
        UserError: there is no model, or its index is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.tables: dict[str, StoredTable] = {}
        self.dense: dict[str, dict[str, StoredTensor]] = {}
        self.buffers: dict[str, StoredTensor] = {}
        self.counters: dict[str, StoredTensor] = {}
        tensors = sorted(_read_tensors(directory).items())
        # Tables come first, since optimizer states are added to them.
        for key, tensor in sorted(tensors, key=lambda item: not item[0].startswith("tables.")):
            section, _, rest = key.partition(".")
            owner, _, last = rest.rpartition(".")
            match section:
                case "tables":
                    self.tables[owner.rpartition(".")[2]] = StoredTable(tensor)
                case "table_optimizer":
                    self.tables[owner.rpartition(".")[2]].states[last] = tensor
                case "dynamic":
                    self.tables[owner].ids[last] = tensor
                case "dense" | "adapter":
                    self.dense.setdefault(owner, {})[last] = tensor
                case "buffers":
                    self.buffers[rest] = tensor
                case _:
                    self.counters[key] = tensor

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Return all tensors under descriptive names, such as ``table user: sum``."""
        found: dict[str, StoredTensor] = {}
        for name, table in self.tables.items():
            found[f"table {name}"] = table.weight
            found |= {f"table {name}: {state}": tensor for state, tensor in table.states.items()}
            found |= {f"table {name}: ids, {column}": tensor for column, tensor in table.ids.items()}
        for name, slots in self.dense.items():
            found[f"dense {name}"] = slots["parameter"]
            found |= {f"dense {name}: {slot}": tensor for slot, tensor in slots.items() if slot != "parameter"}
        found |= {f"buffer {name}": tensor for name, tensor in self.buffers.items()}
        return found | self.counters


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Its files exist with their sizes; checksums are not verified."""

    directory: Path
    manifest: Manifest

    @staticmethod
    def open(path: str | Path) -> Checkpoint:
        """Open the checkpoint that a path means, see :func:`trainer.checkpoint.manifest.find_checkpoint`.

        Raises:
            UserError: there is no checkpoint, or it is incomplete.
        """
        directory = find_checkpoint(path)
        manifest = read_manifest(directory)
        problems = check_files(directory, manifest, checksums=False) or check_complete(directory, manifest)
        if problems:
            raise UserError(f"{directory}: not a whole checkpoint ({problems[0]})")
        return Checkpoint(directory, manifest)

    @cached_property
    def model(self) -> StoredModel:
        """Open the model."""
        return StoredModel(self.directory / MODEL)

    @cached_property
    def job(self) -> Section:
        """Read the resolved job of any kind; see :attr:`config` for that of a ranker.

        Raises:
            UserError: the job is damaged, or has keys that this version does not know.
        """
        file, kind = self.directory / JOB, self.manifest.kind
        other = _OTHER_JOBS.get(kind)
        try:
            raw: dict[str, Any] = read_json_object(file)["config"]
            if other is None:
                raw["model"]["kind"] = kind
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from None
        except (KeyError, TypeError):
            raise UserError(f"{file}: damaged (it has no job)") from None
        return validate_stored(JobConfig if other is None else other, raw, str(file))

    @property
    def config(self) -> JobConfig:
        """Read the resolved job of a ranker; ``model.kind`` is the network of this checkpoint, maybe a baseline.

        Raises:
            UserError: the checkpoint is of another job; or see :attr:`job`.
        """
        if self.manifest.kind in _OTHER_JOBS:
            raise UserError(
                f"{self.directory}: a checkpoint of `limelight {_COMMANDS[self.manifest.kind]}`, and one of a ranker "
                "is needed"
            )
        job = self.job
        assert isinstance(job, JobConfig)
        return job

    @cached_property
    def run(self) -> Path:
        """Return the directory of the run, which has the fitted features and DeepSpeed's settings.

        Raises:
            UserError: the checkpoint was moved out of its run.
        """
        model_dir = self.directory.resolve().parent.parent
        # The directory of a baseline lies below that of its run.
        for run in (model_dir, model_dir.parent.parent):
            if (run / "features").is_dir():
                return run
        raise UserError(f"{self.directory}: the features/ of its run are not beside its checkpoints/")

    @cached_property
    def fitted(self) -> FittedFeatures:
        """Read the features as fitted on the training range.

        Raises:
            UserError: as :attr:`run`.
        """
        return FittedFeatures.load(self.run / "features")


def _read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Read the index: every tensor by its stored name."""
    index = read_index(directory)
    tensors = {}
    for key, entry in index.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata) and index.storage_data is not None
        pieces = []
        for chunk in entry.chunks:
            stored = index.storage_data[MetadataIndex(key, chunk.offsets)]
            where = directory / stored.relative_path, stored.offset, stored.length
            pieces.append(StoredPiece(tuple(chunk.offsets), tuple(chunk.sizes), *where))
        pieces.sort(key=lambda piece: piece.offsets)
        tensors[key] = StoredTensor(tuple(entry.size), entry.properties.dtype, tuple(pieces))
    return tensors


def stored_search(directory: Path) -> dict[str, dict[str, Tensor]]:
    """Read the search vectors of a checkpoint, see ``trainer.data.features.search_vectors.SearchSpace.state_dict``.

    Raises:
        UserError: the checkpoint has none.
    """
    try:
        return load_tensors(directory / rank_file(0))["search"]
    except KeyError:
        raise UserError(
            f"{directory}: has no search vectors, which features.history.* with search = 'top' needs"
        ) from None
