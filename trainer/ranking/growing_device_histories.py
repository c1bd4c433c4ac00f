"""Histories of a stream on a rank's device: a copy that follows them, and their searches by dot product there.

A stream trains in turns: it takes events, which change the histories on the host, and then makes the batches of a
flush, which read them as of their requests. So the copy is brought up to date once before each flush. Visits that are
new travel from page-locked memory on the stream on which batches are copied and searched; visits that moved on the host
move on the device. Batches of the flush before are searched earlier on that stream, and the host waits for nothing.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from trainer.config.ranker import JobConfig
from trainer.console.errors import UserError
from trainer.console.text_table import size_text
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.growing_places import GrowingPlaces, PlaceChanges
from trainer.data.features.search_vectors import SearchSpace
from trainer.data.format.growing_history import GrowingHistories
from trainer.engine.hybrid_engine import HybridEngine
from trainer.ranking.device_entries import CHUNK_ENTRIES, entry_bytes
from trainer.ranking.device_histories import DeviceSearches, is_wanted, memory_for, vector_bytes
from trainer.runtime.distributed import World
from trainer.sparse.exchange import on_stream

logger = logging.getLogger(__name__)


class GrowingDeviceHistories(DeviceSearches):
    """Growing histories of a rank on its device; :meth:`update` brings them up to date.

    Args:
        features: feature map of the model.
        histories: histories of the rank's users.
        space: search vectors.
        device: device of the rank.
        stream: CUDA stream on which batches are copied and searched; None without a GPU.
        limit: largest number of bytes that histories and search vectors may take.
        required: True if the loader must not search instead.

    Attributes:
        places: places of the entries on the device.
    """

    def __init__(
        self,
        features: FeatureMap,
        histories: GrowingHistories,
        space: SearchSpace,
        device: torch.device,
        *,
        stream: torch.cuda.Stream | None,
        limit: int,
        required: bool,
    ) -> None:
        with on_stream(stream):
            super().__init__(features, 0, space, device)
        self.places = GrowingPlaces(histories)
        self._features, self._histories, self._stream = features, histories, stream
        self._limit, self._required = limit, required

    def update(self) -> bool:
        """Bring the copy up to date with the histories, before batches are made that read them.

        Returns:
            False if they have become too large; then nothing is left on the device, and the loader must search.

        Raises:
            UserError: they have become too large, and the job asks for searches on the device; or a direct id is
                negative.
        """
        changes = self.places.changes()
        size = len(self.entries.request_ms)
        if changes.afresh or changes.size > size:
            # Columns grow by an eighth or more, so that few updates copy them.
            size = places_for(changes.size)
        needed = size * entry_bytes(self._features) + vector_bytes(self._space)
        if needed <= self._limit and self._follow(changes, size):
            return True
        self.release()
        what = f"the visits of the stream and the search vectors take {size_text(needed)} by now"
        if self._required:
            raise UserError(
                f'features.search.device = "device": {what}, and {self._device} has too little memory; the same '
                "command with features.search.device=cpu resumes from the last checkpoint"
            )
        logger.info(f"histories are searched by the loader from now on: {what}, too much for the GPU")
        return False

    def _follow(self, changes: PlaceChanges, size: int) -> bool:
        """Make changes on the device, in columns of ``size`` places; False if it has too little memory."""
        try:
            with on_stream(self._stream):
                self.entries.move(size, changes.moves, afresh=changes.afresh)
                for begin in range(0, len(changes.added), CHUNK_ENTRIES):
                    at, domain = (column[begin : begin + CHUNK_ENTRIES] for column in (changes.added, changes.domain))
                    self.entries.write(at, self._histories.take(at, np.ones(len(at), np.int64), domain))
        except torch.OutOfMemoryError:
            return False
        return True

    def release(self) -> None:
        """Free the memory of the device; nothing can be searched after that."""
        with on_stream(self._stream):
            self.entries.move(0, np.zeros((3, 0), np.int64), afresh=True)
        self._vectors, self._version = {}, None
        if self._device.type == "cuda":
            # Memory that is kept for this stream would not count as free.
            torch.cuda.empty_cache()


def open_growing_histories(
    config: JobConfig,
    features: FeatureMap,
    histories: GrowingHistories,
    space: SearchSpace | None,
    world: World,
    engine: HybridEngine,
) -> GrowingDeviceHistories | None:
    """Prepare the copy of a stream's histories on a rank's device; None if the loader searches. Collective.

    Args:
        config: the job, which ``device_histories.refusal`` accepts.
        features: feature map of the model.
        histories: histories of the rank's users, at the position of the stream.
        space: search vectors; None if no history searches by dot product.
        world: ranks of the job.
        engine: the model, whose memory comes first.

    Raises:
        UserError: the job asks for searches on a GPU whose memory is too small already.
    """
    if space is None or not is_wanted(config, world):
        return None
    _, visits = histories.lengths()
    needed = places_for(histories.places) * entry_bytes(features) + vector_bytes(space)
    limit = memory_for(config, f"{visits.sum():,} visits so far and the search vectors", needed, world, engine)
    if limit is None:
        return None
    return GrowingDeviceHistories(
        features,
        histories,
        space,
        world.device,
        stream=engine.copy_stream,
        limit=limit,
        required=config.features.search.device == "device",
    )


def places_for(used: int) -> int:
    """Return the number of places on the device for a number of places in use."""
    return used + used // 8
