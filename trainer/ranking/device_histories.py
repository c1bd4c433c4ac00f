"""Histories on a rank's device, and their searches there.

The loader leaves searches to the device: a batch has the runs to search and zeros in place of the ids of their entries.
The number of entries of each row is known without the search, so a batch has its sizes already, and the host waits for
nothing. A search by dot product finds the best entries of a run; of the other searches the run itself is what they
find, in an order that suits them (``trainer/data/features/device_listings.py``). Of a dataset all searches are left to
the device, of a stream those by dot product.

Each version of the search vectors is copied to the device before its first batch. The first use decides, and not the
training step, so that a run that continues, an evaluation and a training take one path.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from modules.search import tensor_search
from modules.search.tensor_search import DevicePart
from trainer.config.ranker import JobConfig
from trainer.console.errors import UserError
from trainer.console.text_table import size_text
from trainer.data.features.content_inputs import SegmentReadings
from trainer.data.features.device_listings import ListingKey, listing_of
from trainer.data.features.device_places import DevicePlaces
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.missing_inputs import CODE, VECTOR
from trainer.data.features.packed_side import AGE_PLACE, GAP_BUCKETS
from trainer.data.features.search_vectors import SearchSpace
from trainer.data.format.history import Histories
from trainer.data.loading.batch import RankingBatch
from trainer.data.loading.batch_plan import partitions_of_rank
from trainer.engine.hybrid_engine import HybridEngine
from trainer.ranking.device_entries import DeviceEntries, entry_bytes
from trainer.ranking.device_segments import DeviceCodes
from trainer.ranking.device_vectors import DeviceVectors
from trainer.runtime.distributed import World

logger = logging.getLogger(__name__)

AUTO_SHARE = 0.5
"""Largest share of a GPU's free memory that histories and search vectors take with ``device = "auto"``."""

UNLIMITED = 1 << 62
"""Bytes that a job lets its histories take on a CPU."""


class DeviceSearches:
    """Entries of histories and search vectors on a device, which complete the batches whose searches were left to it.

    Args:
        features: feature map of the model.
        size: number of places of entries.
        space: search vectors.
        device: device of the rank.

    Attributes:
        entries: the entries, which a subclass writes.
    """

    def __init__(self, features: FeatureMap, size: int, space: SearchSpace, device: torch.device) -> None:
        self.entries = DeviceEntries(features, size, device)
        self._space, self._reads, self._device = space, features.reads, device
        self._tables = [name for name in ("item", "author") if name in space.tables(0)]
        self._direct = features.direct
        self._version: int | None = None
        self._vectors: dict[str, Tensor] = {}
        self._search = _kernel(device)
        # What only the entries of a dataset have.
        self._listings: dict[ListingKey, Tensor] = {}
        self._codes: dict[str, DeviceCodes] = {}
        self._content: list[DeviceVectors] = []

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
        entries = self.entries
        parts = [DevicePart(entries.ids[name], ids[name], self._vectors[name]) for name in self._tables]
        beyond = []
        missing = {name: torch.zeros(2, dtype=torch.int64, device=self._device) for name in batch.missing}
        keys: dict[str, dict[str, Tensor]] = {of_table.name: {} for of_table in self._content}
        for name, longest in left.longest.items():
            first, stop = left.run(name)
            read, found = self._reads[name], len(ids[f"{name}_item"])
            if read.search == "top":
                best = self._search(first, stop, read.length, *parts, longest=longest)
                row, within = _rows((stop - first).clamp(max=best.shape[1]), found)
                at = best[row, within]
            else:
                row, within = _rows(stop - first, found)
                key = listing_of(read)
                at = first[row] + within if key is None else self._listings[key][first[row] + within].long()
            for table, column in entries.ids.items():
                ids[f"{name}_{table}"].copy_(column[at])
                if entries.has_beyond and table in self._direct:
                    # Row 0 of a table with direct ids is that of ids beyond it.
                    beyond.append((ids[f"{name}_{table}"] == 0).sum())
            as_of_ms = left.as_of_ms[row]
            context = entries.context[at].long()
            context[:, AGE_PLACE] += _gap_bucket(as_of_ms - entries.request_ms[at])
            ids[f"{name}_context"].copy_(context.view(-1))
            for code_set, codes in self._codes.items():
                missing[code_set] += codes.fill(name, at, as_of_ms, ids)
            for of_table in self._content:
                keys[of_table.name][name], counts = of_table.keys(at, as_of_ms)
                missing[f"{VECTOR}{of_table.name}"] += counts
        late = {
            of_table.name: of_table.of_batch(batch.content[of_table.name], left.keys(place), keys[of_table.name])
            for place, of_table in enumerate(self._content)
        }
        return replace(
            batch,
            left=None,
            late=late,
            searched_beyond=torch.stack(beyond).sum() if beyond else None,
            searched_missing=torch.stack(list(missing.values())) if self._codes or self._content else None,
        )


class DeviceHistories(DeviceSearches):
    """Histories of a dataset on the device of a rank: the entries of its users.

    Args:
        features: feature map of the model.
        places: places of the entries on the device.
        space: search vectors.
        device: device of the rank.

    Attributes:
        places: as given.
    """

    def __init__(
        self,
        features: FeatureMap,
        places: DevicePlaces,
        space: SearchSpace,
        device: torch.device,
    ) -> None:
        super().__init__(features, places.entries, space, device)
        self.places, begin = places, 0
        for visits in places.read():
            stop = begin + len(visits.item_id)
            self.entries.write(np.arange(begin, stop), visits)
            begin = stop
        self._listings = {key: _listing(places, key, device) for key in listings_of(features)}
        self._codes = {
            f"{CODE}{code_set.name}": DeviceCodes(code_set, reader, places, device)
            for code_set, reader in features.codes.of_histories()
        }
        self._content = [
            DeviceVectors(layout, reader, places, device) for layout, reader in features.vectors_of_histories()
        ]
        if device.type == "cuda":
            # Batches are searched on a stream of their own.
            torch.cuda.synchronize(device)

    @staticmethod
    def bytes_needed(features: FeatureMap, places: DevicePlaces, space: SearchSpace) -> int:
        """Return the bytes of memory that the histories and a version of the search vectors take on the device."""
        entries = places.entries
        codes = sum(
            DeviceCodes.bytes_needed(code_set, len(reader.rows_of_places()[0]) - 1, entries)
            for code_set, reader in features.codes.of_histories()
        )
        content = sum(
            DeviceVectors.bytes_needed(
                entries,
                len(reader.vectors),
                reader.vectors[:1].nbytes,
                of_segments=isinstance(reader, SegmentReadings),
            )
            for _, reader in features.vectors_of_histories()
        )
        of_entry = entry_bytes(features) + listing_bytes(features, entries)
        return entries * of_entry + vector_bytes(space) + codes + content


def open_device_histories(
    config: JobConfig,
    features: FeatureMap,
    histories: Histories,
    space: SearchSpace | None,
    world: World,
    engine: HybridEngine,
) -> DeviceHistories | None:
    """Copy the histories of a rank to its device, if the job searches there; None if the loader searches. Collective.

    Args:
        config: the job, which :func:`refusal` accepts.
        features: feature map of the model.
        histories: histories of the dataset.
        space: search vectors; None if no history searches by dot product.
        world: ranks of the job.
        engine: the model, whose memory comes first.

    Raises:
        UserError: the job asks for searches on a device whose memory is too small.
    """
    if space is None or not is_wanted(config, world):
        return None
    partitions = features.spec.partitions
    places = DevicePlaces(histories, partitions, partitions_of_rank(partitions, world.rank, world.size))
    needed = DeviceHistories.bytes_needed(features, places, space)
    what = f"{places.entries:,} visits and the search vectors"
    if memory_for(config, what, needed, world, engine) is None:
        return None
    with suppress(torch.OutOfMemoryError):
        return DeviceHistories(features, places, space, world.device)
    # A copy takes more memory for a moment, and so do visits whose segments change more often than once.
    if config.features.search.device == "device":
        raise UserError(
            f'features.search.device = "device": {world.device} ran out of memory while {what} were copied to it; '
            'use "cpu"'
        )
    logger.info(f"histories are searched by the loader: the GPU ran out of memory while {what} were copied to it")
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def is_wanted(config: JobConfig, world: World) -> bool:
    """True if the searches of a job by dot product are to be made on its device, if that has the memory."""
    where = config.features.search.device
    return where == "device" or (where == "auto" and world.device.type == "cuda" and not refusal(config))


def memory_for(config: JobConfig, what: str, needed: int, world: World, engine: HybridEngine) -> int | None:
    """Return the bytes that a job lets its histories take on its device; None if the loader searches. Collective.

    The first step of a job allocates more: the state of its optimizer is allocated here, before the free memory is
    read, and its gradients are left free. The size of its activations is not known yet.

    Args:
        config: the job, whose searches are wanted on the device.
        what: what would be copied, for messages.
        needed: its bytes.
        world: ranks of the job.
        engine: the model.

    Raises:
        UserError: the job asks for searches on a GPU whose memory is too small.
    """
    text = f"{what} take {size_text(needed)}"
    if world.device.type != "cuda":
        logger.info(f"histories are searched on {world.device}: {text}")
        return UNLIMITED
    gradients = engine.allocate()
    free = max(torch.cuda.mem_get_info(world.device)[0] - gradients, 0)
    if config.features.search.device == "device":
        _refuse_if_too_large(text, needed, free, world)
        limit = free
    else:
        limit = int(AUTO_SHARE * free)
        if needed > limit:
            logger.info(f"histories are searched by the loader: {text} of {size_text(free)} that are free on the GPU")
            return None
    logger.info(f"histories are searched on {world.device}: {text}")
    return limit


def _refuse_if_too_large(what: str, needed: int, free: int, world: World) -> None:
    """Raise a UserError on every rank if a device of any rank has too little memory. Collective."""
    text = f'features.search.device = "device": {what}, and {world.device} has {size_text(free)} free; use "cpu"'
    problem = world.first_problem(text if needed > free else None)
    if problem:
        raise UserError(problem)


def vector_bytes(space: SearchSpace) -> int:
    """Return the bytes of memory that a version of the search vectors takes on the device."""
    vectors = sum(values.nbytes for values in space.at(0).values())
    later = sum(values.nbytes for values in space.at(1).values()) if space.refresh_steps else 0
    return max(vectors, later)


def listings_of(features: FeatureMap) -> list[ListingKey]:
    """Return the orders of entries that the histories of a model need, each once."""
    return list(dict.fromkeys(key for read in features.reads.values() if (key := listing_of(read)) is not None))


def listing_bytes(features: FeatureMap, entries: int) -> int:
    """Return the bytes of memory that an entry takes in these orders on the device, at most.

    Args:
        features: feature map of the model.
        entries: number of entries on the device.
    """
    return len(listings_of(features)) * _place_type(entries).itemsize


def refusal(config: JobConfig) -> str | None:
    """Return why a job's histories cannot be searched on a device; None if they can."""
    if config.stream is None:
        return None
    for name, codes in config.features.codes.items():
        if codes.history != "none":
            return f"features.codes.{name}.history = {codes.history!r} of a stream needs the entries on the host"
    for name, content in config.features.content.items():
        if content.histories:
            return f"features.content.{name}.histories = true of a stream needs the entries on the host"
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


def _place_type(entries: int) -> torch.dtype:
    """Return the type of places on the device."""
    return torch.int32 if entries < 1 << 31 else torch.int64


def _listing(places: DevicePlaces, key: ListingKey, device: torch.device) -> Tensor:
    """Return the places of the entries of a listing, on the device."""
    listing = places.listing(key)
    out = torch.empty(len(listing), dtype=_place_type(places.entries), device=device)
    begin = 0
    for part in listing.places():
        out[begin : begin + len(part)] = torch.from_numpy(part).to(out.dtype).to(device)
        begin += len(part)
    return out


def _rows(lengths: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Return the row of each entry of a batch, and its number among the entries of the row, each ``[entries]`` int64.

    Args:
        lengths: ``[rows]`` int64, number of entries of each row.
        entries: their sum, for which the host does not wait.
    """
    row = torch.repeat_interleave(lengths, output_size=entries)
    begin = lengths.cumsum(0) - lengths
    return row, torch.arange(entries, device=lengths.device) - begin[row]


def _gap_bucket(age_ms: Tensor) -> Tensor:
    """Return :func:`trainer.data.features.packed_side.gap_bucket` of ages, ``[n]`` int32, rounded as there."""
    seconds = (age_ms.clamp(min=0).double() * float(np.float32(0.001))).float() + 1
    return ((seconds.view(torch.int32) >> 22) - (127 << 1)).clamp(max=GAP_BUCKETS - 1)
