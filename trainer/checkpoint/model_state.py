"""The state of a model on disk: one ``torch.distributed.checkpoint``, written and read in blocks.

A shard is written in blocks of rows, since a reader takes the stored pieces whole: a table that one rank had can so be
read by many, each its part, and no rank ever holds more of it than its shards and a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from trainer.console.errors import UserError, one_line
from trainer.console.text_table import shape_text

State = Mapping[str, Any]
"""Nested mappings of tensors: DTensors where ranks hold shards, plain ones where all ranks hold the same."""

BLOCK_BYTES = 64 << 20
"""Size of a block; a row that is larger is a block of its own."""

LISTED = 8
"""Differences that an error names; it says how many more there are."""


def in_blocks(state: State, *, copy: bool) -> dict[str, Any]:
    """A state whose shards are cut into blocks of rows, to be written.

    Args:
        state: nested mappings of tensors.
        copy: into host memory of its own, which training does not change any more; otherwise blocks are views.
    """
    return {
        key: in_blocks(value, copy=copy) if isinstance(value, Mapping) else _tensor_in_blocks(value, copy)
        for key, value in state.items()
    }


def write_state(state: State, path: str | Path, group: dist.ProcessGroup) -> None:
    """Write a state to a directory and have it on disk, each rank its shards. Collective.

    Raises:
        UserError: on every rank, when one of them cannot write.
    """
    try:
        dcp.save(state, storage_writer=FileSystemWriter(path, sync_files=True), process_group=group)
    except (CheckpointException, OSError) as error:
        raise UserError(f"{path}: cannot write the model: {_reason(error)}") from None


def read_state(state: State, path: str | Path, group: dist.ProcessGroup) -> None:
    """Fill a state in place from :func:`write_state` of any number of ranks and any sharding. Collective.

    Raises:
        UserError: there is none, or one of other tensors; what differs is listed.
    """
    if not (Path(path) / ".metadata").is_file():
        raise UserError(f"{path}: no model here (.metadata is missing)")
    try:
        found = FileSystemReader(path).read_metadata().state_dict_metadata
        stored = {name: tuple(entry.size) for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}
        differences = list_differences(stored, _shapes_of_all_ranks(state, group))
        if differences:
            raise UserError(f"{path}: a checkpoint of another model: {differences}")
        dcp.load(dict(state), storage_reader=FileSystemReader(path), process_group=group)
    except (CheckpointException, OSError, EOFError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: cannot read the model: {_reason(error)}") from None


def list_differences(there: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]]) -> str:
    """Names and shapes that differ between a checkpoint (``there``) and a model (``here``); empty if none do."""
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
    """The tensors of a state under the names that they have in the checkpoint."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _tensor_in_blocks(tensor: Tensor, copy: bool) -> Tensor:
    if not isinstance(tensor, DTensor):
        return _copied(tensor) if copy else tensor
    held: Any = tensor.to_local()
    blocks, offsets = [], []
    for shard, offset in zip(held.local_shards(), held.local_offsets(), strict=False):
        rows = max(1, BLOCK_BYTES * len(shard) // max(1, shard.nbytes))
        for start in range(0, len(shard), rows):
            block = shard[start : start + rows]
            blocks.append(_copied(block) if copy else block)
            offsets.append((offset[0] + start, *offset[1:]))
    if not blocks:
        return tensor
    return DTensor.from_local(
        LocalShardsWrapper(blocks, offsets),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def _copied(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu").copy_(tensor.detach())


def _shapes_of_all_ranks(state: State, group: dist.ProcessGroup) -> dict[str, tuple[int, ...]]:
    """Of an optimizer's state a rank knows the tables that it has a shard of."""
    shapes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(shapes, {name: tuple(tensor.shape) for name, tensor in flat(state)}, group=group)
    return {name: shape for of_rank in shapes for name, shape in of_rank.items()}


def _reason(error: BaseException) -> str:
    """The first failure of a rank in one line."""
    failures = list(getattr(error, "failures", {}).values())
    return one_line(failures[0][0] if failures else error)
