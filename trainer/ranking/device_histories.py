"""Histories on a rank's device, and their searches by dot product there.

The loader leaves these searches to the device: a batch has the runs to search and zeros in place of the ids of their
entries. The number of entries of each row is known without the search, so a batch has its sizes already, and the host
waits for nothing. The other searches stay in the loader: they are cheap, and what ``author`` finds has no known number.

Each version of the search vectors is copied to the device before its first batch. The first use decides, and not the
training step, so that a run that continues, an evaluation and a training take one path.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from modules.search import tensor_search
from modules.search.tensor_search import DevicePart
from trainer.config.features import FeatureConfig
from trainer.config.ranker import JobConfig
from trainer.console.errors import UserError
from trainer.console.text_table import size_text
from trainer.data.features.device_places import DevicePlaces
from trainer.data.features.feature_map import AGE_PLACE, GAP_BUCKETS, FeatureMap
from trainer.data.features.search_vectors import SearchSpace
from trainer.data.format.history import Histories
from trainer.data.loading.batch import RankingBatch
from trainer.data.loading.batch_plan import partitions_of_rank
from trainer.runtime.distributed import World

logger = logging.getLogger(__name__)

AUTO_SHARE = 0.5
"""Largest share of a GPU's free memory that histories and search vectors take with ``device = "auto"``."""


class DeviceHistories:
    """Entries of a rank's users on its device, which completes the batches whose searches were left to it.

    Args:
        features: feature map of the model.
        places: places of the entries on the device.
        space: search vectors.
        lengths: history that searches by dot product -> largest number of entries.
        device: device of the rank.

    Attributes:
        places: as given.
    """

    def __init__(
        self,
        features: FeatureMap,
        places: DevicePlaces,
        space: SearchSpace,
        lengths: dict[str, int],
        device: torch.device,
    ) -> None:
        self.places = places
        self._space, self._lengths, self._device = space, lengths, device
        self._tables = [name for name in ("item", "author") if name in space.tables(0)]
        self._direct = features.direct
        entries = places.entries
        self._columns = {
            name: torch.empty(entries, dtype=_id_type(features, name), device=device) for name in ("item", "author")
        }
        self._context = torch.empty(entries, features.context_ids, dtype=torch.int32, device=device)
        self._request_ms = torch.empty(entries, dtype=torch.int64, device=device)
        begin, self._has_beyond = 0, False
        for visits in places.read():
            rows = features.entry_rows(visits)
            here = slice(begin, begin + len(rows.item))
            parts = (self._columns["item"], rows.item), (self._columns["author"], rows.author)
            for target, values in (*parts, (self._context, rows.context), (self._request_ms, visits.request_ms)):
                target[here] = torch.from_numpy(np.asarray(values)).to(target.dtype).to(device)
            begin, self._has_beyond = here.stop, self._has_beyond or rows.beyond > 0
        self._version: int | None = None
        self._vectors: dict[str, Tensor] = {}
        self._search = _kernel(device)
        if device.type == "cuda":
            # Batches are searched on a stream of their own.
            torch.cuda.synchronize(device)

    @staticmethod
    def bytes_needed(features: FeatureMap, places: DevicePlaces, space: SearchSpace) -> int:
        """Return the bytes of memory that the histories and a version of the search vectors take on the device."""
        vectors = sum(values.nbytes for values in space.at(0).values())
        later = sum(values.nbytes for values in space.at(1).values()) if space.refresh_steps else 0
        return places.entries * entry_bytes(features) + max(vectors, later)

    def complete(self, batch: RankingBatch) -> RankingBatch:
        """Make the searches that are left to the device, on the current stream, and write the ids of their entries.

        Args:
            batch: batch on the device; its ids are written in place.
        """
        left = batch.left
        if left is None:
            return batch
        if self._version != left.version:
            # The old version is freed first: two would be in memory otherwise.
            self._vectors = {}
            values = self._space.at(left.version)
            self._vectors = {
                name: torch.from_numpy(values[name]).to(self._device, non_blocking=True) for name in self._tables
            }
            self._version = left.version
        ids = {
            key: keyed.values()[begin:end]
            for keyed in batch.ids
            for key, begin, end in zip(
                keyed.keys(), keyed.offset_per_key()[:-1], keyed.offset_per_key()[1:], strict=True
            )
        }
        parts = [DevicePart(self._columns[name], ids[name], self._vectors[name]) for name in self._tables]
        beyond = []
        for name, longest in left.longest.items():
            first, stop = left.run(name)
            length = self._lengths[name]
            at, row = _found(self._search(first, stop, length, *parts, longest=longest), stop - first, ids, name)
            for table, column in self._columns.items():
                ids[f"{name}_{table}"].copy_(column[at])
                if self._has_beyond and table in self._direct:
                    # Row 0 of a table with direct ids is that of ids beyond it.
                    beyond.append((ids[f"{name}_{table}"] == 0).sum())
            context = self._context[at].long()
            context[:, AGE_PLACE] += _gap_bucket(left.as_of_ms[row] - self._request_ms[at])
            ids[f"{name}_context"].copy_(context.view(-1))
        return replace(batch, left=None, searched_beyond=torch.stack(beyond).sum() if beyond else None)


def open_device_histories(
    config: JobConfig, features: FeatureMap, histories: Histories, space: SearchSpace | None, world: World
) -> DeviceHistories | None:
    """Copy the histories of a rank to its device, if the job searches there; None if the loader searches. Collective.

    Args:
        config: the job, which :func:`refusal` accepts.
        features: feature map of the model.
        histories: histories of the dataset.
        space: search vectors; None if no history searches by dot product.
        world: ranks of the job.

    Raises:
        UserError: the job asks for searches on a GPU whose memory is too small.
    """
    where = config.features.search.device
    if space is None or where == "cpu":
        return None
    if where == "auto" and (world.device.type != "cuda" or refusal(config)):
        return None
    partitions = features.spec.partitions
    places = DevicePlaces(histories, partitions, partitions_of_rank(partitions, world.rank, world.size))
    needed = DeviceHistories.bytes_needed(features, places, space)
    what = f"{places.entries:,} visits and the search vectors take {size_text(needed)}"
    if world.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(world.device)
        if where == "device":
            _refuse_if_too_large(what, needed, free, world)
        if where == "auto" and needed > AUTO_SHARE * free:
            logger.info(f"histories are searched by the loader: {what} of {size_text(free)} that are free on the GPU")
            return None
    logger.info(f"histories are searched on {world.device}: {what}")
    return DeviceHistories(features, places, space, searched_lengths(config.features), world.device)


def _refuse_if_too_large(what: str, needed: int, free: int, world: World) -> None:
    """Raise a UserError on every rank if a device of any rank has too little memory. Collective."""
    text = f'features.search.device = "device": {what}, and {world.device} has {size_text(free)} free; use "cpu"'
    problem = world.first_problem(text if needed > free else None)
    if problem:
        raise UserError(problem)


def searched_lengths(config: FeatureConfig) -> dict[str, int]:
    """Return history that searches by dot product -> largest number of entries."""
    return {name: history.length for name, history in config.history.items() if history.search == "top"}


def entry_bytes(features: FeatureMap) -> int:
    """Return the bytes of memory that an entry of the histories takes on the device."""
    ids = sum(_id_type(features, name).itemsize for name in ("item", "author"))
    return ids + torch.int64.itemsize + torch.int32.itemsize * features.context_ids


def refusal(config: JobConfig) -> str | None:
    """Return why a job's histories cannot be searched on a device; None if they can."""
    if config.stream is not None:
        return "the histories of a stream grow, and only the histories of a dataset can be searched on a device"
    for name, codes in config.features.codes.items():
        if codes.history != "none":
            return f"features.codes.{name}.history = {codes.history!r} needs the entries in the loader"
    for name, content in config.features.content.items():
        if content.histories:
            return f"features.content.{name}.histories = true needs the entries in the loader"
    return None


def check_device(config: JobConfig) -> None:
    """Check that histories are not to be searched on a device where they cannot be.

    Raises:
        UserError: they are.
    """
    search = config.features.search
    if search.device == "device" and config.features.needs_space and (reason := refusal(config)):
        raise UserError(f'features.search.device = "device": {reason}; use "auto" or "cpu"')


def _kernel(device: torch.device) -> Callable[..., Tensor]:
    """Return the search for a device."""
    if device.type != "cuda":
        return tensor_search.top
    # Only machines with a GPU have Triton.
    from modules.search import triton_kernel

    return triton_kernel.top


def _id_type(features: FeatureMap, name: str) -> torch.dtype:
    """Return the type of a column of ids: those of dynamic tables are any numbers, others are rows of a table."""
    return torch.int64 if name in features.dynamic else torch.int32


def _found(places: Tensor, sizes: Tensor, ids: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Return the place and the row of each entry that was found, row after row, each ``[entries]`` int64."""
    lengths, total = sizes.clamp(max=places.shape[1]), len(ids[f"{name}_item"])
    # With the number of entries from the batch, the host does not wait for the sum of the lengths.
    row = torch.repeat_interleave(lengths, output_size=total)
    begin = lengths.cumsum(0) - lengths
    return places[row, torch.arange(total, device=places.device) - begin[row]], row


def _gap_bucket(age_ms: Tensor) -> Tensor:
    """Return :func:`trainer.data.features.feature_map.gap_bucket` of ages, ``[n]`` int32, rounded as there."""
    seconds = (age_ms.clamp(min=0).double() * float(np.float32(0.001))).float() + 1
    return ((seconds.view(torch.int32) >> 22) - (127 << 1)).clamp(max=GAP_BUCKETS - 1)
