"""The state of a model on disk: one ``torch.distributed.checkpoint``, written and read in blocks.

A shard is written in blocks of rows, because readers of that format load stored pieces as a whole. So several ranks can
read parts of a table that one rank wrote, and a rank never holds more than its shards and one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from trainer.checkpoint.model_index import DAMAGED, SafeReader, read_index
from trainer.checkpoint.snapshot_memory import SnapshotMemory
from trainer.console.errors import UserError, one_line
from trainer.console.text_table import shape_text

State = Mapping[str, Any]
"""Nested mappings of tensors: DTensors for sharded tensors, plain tensors for values that all ranks share."""

BLOCK_BYTES = 64 << 20
"""Size of a block; a larger row is a block of its own."""

LISTED = 8
"""Most differences that an error lists; the others are counted."""


def in_blocks(state: State, memory: SnapshotMemory | None = None) -> dict[str, Any]:
    """Cut the shards of a state into blocks of rows, for writing.

    Args:
        state: nested mappings of tensors.
        memory: host memory to copy the values to, so that training can continue; its copies from before become
            invalid. None: blocks are views.
    """
    if memory is None:
        return _in_blocks(state, lambda block: block)
    memory.begin()
    blocks = _in_blocks(state, memory.copy)
    memory.wait()
    return blocks


def write_state(state: State, path: str | Path, group: dist.ProcessGroup) -> None:
    """Write a state to a directory and flush it to disk; each rank writes its shards. Collective.

    Raises:
        UserError: on every rank, if one of them cannot write.
    """
    try:
        dcp.save(state, storage_writer=FileSystemWriter(path, sync_files=True), process_group=group)
    except (CheckpointException, OSError) as error:
        raise UserError(f"{path}: cannot write the model: {_reason(error)}") from None


def read_state(state: State, path: str | Path, group: dist.ProcessGroup) -> None:
    """Load a state in place, written by :func:`write_state` on any number of ranks with any sharding. Collective.

    Raises:
        UserError: there is no state, or its tensors differ; the differences are listed.
    """
    found = read_index(Path(path)).state_dict_metadata
    try:
        stored = {name: tuple(entry.size) for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}
        differences = list_differences(stored, _shapes_of_all_ranks(state, group))
        if differences:
            raise UserError(f"{path}: a checkpoint of another model: {differences}")
        dcp.load(dict(state), storage_reader=SafeReader(path), process_group=group)
    except (CheckpointException, OSError, *DAMAGED) as error:
        raise UserError(f"{path}: cannot read the model: {_reason(error)}") from None


def list_differences(there: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]]) -> str:
    """List the differences in names and shapes between a checkpoint (``there``) and a model (``here``) as one line."""
    lines = [f"{name} {shape_text(there[name])} only there" for name in sorted(there.keys() - here.keys())]
    lines += [f"{name} {shape_text(here[name])} only here" for name in sorted(here.keys() - there.keys())]
    lines += [
        f"{name} {shape_text(there[name])} there, {shape_text(here[name])} here"
        for name in sorted(there.keys() & here.keys())
        if there[name] != here[name]
    ]
    more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "; ".join(lines[:LISTED] + more)


def flat(state: State, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a state with their names in the checkpoint."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _in_blocks(state: State, copied: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {
        key: _in_blocks(value, copied) if isinstance(value, Mapping) else _tensor_in_blocks(value, copied)
        for key, value in state.items()
    }


def _tensor_in_blocks(tensor: Tensor, copied: Callable[[Tensor], Tensor]) -> Tensor:
    if not isinstance(tensor, DTensor):
        return copied(tensor)
    held: Any = tensor.to_local()
    blocks, offsets = [], []
    for shard, offset in zip(held.local_shards(), held.local_offsets(), strict=False):
        rows = max(1, BLOCK_BYTES * len(shard) // max(1, shard.nbytes))
        for start in range(0, len(shard), rows):
            block = shard[start : start + rows]
            blocks.append(copied(block))
            offsets.append((offset[0] + start, *offset[1:]))
    if not blocks:
        return tensor
    # DTensor.from_local would copy the blocks to the device of the mesh: a second copy of the tables in GPU memory.
    return DTensor(LocalShardsWrapper(blocks, offsets), tensor._spec, requires_grad=False)


def _shapes_of_all_ranks(state: State, group: dist.ProcessGroup) -> dict[str, tuple[int, ...]]:
    """Collect the shapes from all ranks, since a rank has optimizer state only for tables with a shard on it."""
    shapes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(shapes, {name: tuple(tensor.shape) for name, tensor in flat(state)}, group=group)
    return {name: shape for of_rank in shapes for name, shape in of_rank.items()}


def _reason(error: BaseException) -> str:
    """Format the first failure of a rank as one line."""
    failures = list(getattr(error, "failures", {}).values())
    return one_line(failures[0][0] if failures else error)
