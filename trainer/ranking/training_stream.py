"""The stream that a model is trained on, on one rank: its source, and the state built from its events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.config.ranker import JobConfig
from trainer.data.features.feature_map import FeatureMap
from trainer.data.format.dataset import Dataset
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.growing_history import GrowingHistories
from trainer.data.format.parquet_files import read_table
from trainer.data.format.schema import DatasetSpec, partition_of
from trainer.data.loading.batch_plan import partitions_of_rank
from trainer.metrics.behaviour_metrics import ProgressiveMetrics
from trainer.ranking.setup import Split
from trainer.runtime.distributed import World
from trainer.stream.live.freshness import Freshness
from trainer.stream.live.live_stream import LiveStream, PredictedOutcomes
from trainer.stream.live.unused_events import UnusedEventLog
from trainer.stream.live.user_partitions import UserPartitions
from trainer.stream.sources.source import EventBatch, Source, StreamReader, check_identity

OutcomeObserver = Callable[[PredictedOutcomes], None]
"""Function that each rank calls with new outcomes and their predictions."""


@dataclass
class TrainingStream:
    """Stream of a model's training, on one rank.

    Attributes:
        source: source of the events.
        partitions: partitions that this rank reads.
        since_ms: earlier events are skipped.
        slice_ms: length of a slice of event time, which all ranks process together.
        features: feature map that makes batches.
        histories: histories of this rank's users.
        live: state of the stream on this rank.
        unused_events: log of the events that change no row.
        freshness: delays from events to training steps; None in a replay at full speed, where they mean nothing.
        users: users by partition; None if the source guarantees that a user is in one partition.
        observe: function called with new outcomes.
        seen_until_ms: event time before which all events of this rank have arrived.
        flushed_ms: event time of the last training; the same on all ranks.
    """

    source: Source
    partitions: Sequence[int]
    since_ms: int
    slice_ms: int
    features: FeatureMap
    histories: GrowingHistories
    live: LiveStream
    unused_events: UnusedEventLog
    freshness: Freshness | None
    users: UserPartitions | None = None
    observe: OutcomeObserver = field(default=lambda outcomes: None)
    seen_until_ms: int = 0
    flushed_ms: int = 0

    def take(self, batches: Sequence[EventBatch], until_ms: int) -> int:
        """Add the next events and advance to ``until_ms``, before which all have arrived; return their number."""
        for batch in batches:
            # Events before the start of the stream are in the dataset's histories already.
            kept = batch.since(self.since_ms)
            self.live.counts["before_start"] += len(batch) - len(kept)
            if self.users is not None:
                self.users.add(kept.events["user_id"], kept.partition)
            self.unused_events.write(self.live.push(kept))
        self.unused_events.write(self.live.advance(until_ms))
        self.seen_until_ms = until_ms
        return sum(map(len, batches))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank as tensors, numbers and strings."""
        return {
            "identity": self.source.identity,
            "seen_until_ms": self.seen_until_ms,
            "flushed_ms": self.flushed_ms,
            "live": as_tensors(self.live.state_dict()),
            **({} if self.users is None else {"users": as_tensors(self.users.state_dict())}),
        }

    def load_state_dicts(self, states: Sequence[dict[str, Any]], counted: Sequence[int]) -> None:
        """Load the states of any number of ranks; see :meth:`LiveStream.load_state_dict`.

        Raises:
            UserError: the states are of another source, or of another policy or other timeouts.
        """
        # Every rank saved the same source, so the first state is enough.
        check_identity(states[0]["identity"], self.source.identity)
        # Ranks may differ if one had no newer events; the earliest time is safe for all.
        self.seen_until_ms = min(state["seen_until_ms"] for state in states)
        self.flushed_ms = states[0]["flushed_ms"]
        self.live.load_state_dict([as_arrays(state["live"]) for state in states], counted)
        # Runs of earlier versions have not counted users.
        if self.users is not None and "users" in states[0]:
            self.users.load_state_dict(as_arrays(states[0]["users"]))

    def open(self, position: Mapping[int, Sequence[int]] | None) -> StreamReader:
        """Start to read this rank's partitions from a position of all partitions; None starts at the beginning.

        Raises:
            UserError: the position does not fit the source, or its messages are gone.
        """
        return self.source.open(self.partitions, position, self.slice_ms)

    def summary(self, world: World, progressive: ProgressiveMetrics) -> dict[str, Any]:
        """Return the stream's part of ``metrics.json``. Collective.

        Returns:
            ``progressive``: metrics of the predictions that were made at the requests; ``counts`` over all ranks, see
            ``live_stream.COUNTS``; ``freshness_seconds``: see :class:`Freshness`, or null; ``users``: see
            :meth:`UserPartitions.summary`, or null.
        """
        return {
            "progressive": progressive.compute(world.control),
            "counts": {name: world.sum(count) for name, count in self.live.counts.items()},
            "freshness_seconds": None if self.freshness is None else self.freshness.summary(world),
            "users": None if self.users is None else self.users.summary(),
        }


def open_stream(
    config: JobConfig, data: Dataset, split: Split, features: FeatureMap, world: World, model_dir: Path
) -> TrainingStream:
    """Open the source of a job's stream, with an empty state.

    Args:
        config: config of the job, with a section ``[stream]``.
        data: dataset of the job.
        split: times at which the stream starts and ends.
        features: feature map of the model.
        world: ranks of the job.
        model_dir: directory of the model's files.

    Raises:
        UserError: the source cannot be opened, or has fewer partitions than there are ranks.
    """
    settings = config.stream
    assert settings is not None
    # Sources bring Kafka, codecs and pandas along, which a job on stored rows does not load.
    from trainer.stream.sources.open_source import open_source

    source = open_source(settings, data.spec, config.data.path, split.stream_from, split.train_until)
    partitions = partitions_of_rank(source.partitions, world.rank, world.size)

    producers_own = settings.source == "kafka" and settings.partitioner == "producer"

    def is_own(user_id: np.ndarray) -> np.ndarray:
        if producers_own:
            # The users of a partition are known only when their events arrive.
            return np.ones(len(user_id), bool)
        return np.isin(partition_of(user_id, source.partitions), partitions)

    histories = GrowingHistories(data.histories, is_own, partitions, split.stream_from)
    # In a replay at full speed an event "arrives" when it is read, so a delay would mean nothing.
    in_time = settings.source == "kafka" or settings.speed > 0
    live = LiveStream(
        data.spec,
        config.labels,
        partitions,
        histories,
        _tags(config.data.path, data.spec),
        len(features.behaviours),
        in_time,
    )
    return TrainingStream(
        source=source,
        partitions=partitions,
        since_ms=split.stream_from,
        slice_ms=round(settings.slice_seconds * 1000),
        features=features,
        histories=histories,
        live=live,
        unused_events=UnusedEventLog(model_dir, data.spec, world.rank),
        freshness=Freshness() if in_time else None,
        users=UserPartitions() if producers_own and source.partitions > 1 else None,
    )


def _tags(path: str, spec: DatasetSpec) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from item ids to the tags that histories keep; 0 for items that the dataset does not have."""
    if not spec.tag:
        return lambda item_id: np.zeros(len(item_id), np.int32)
    table = read_table(DatasetFiles(path), "items.parquet", ["item_id", spec.tag])
    item, tag = (table.column(name).to_numpy() for name in ("item_id", spec.tag))
    order = np.argsort(item)
    item, tag = item[order], tag[order].astype(np.int32)

    def look_up(item_id: np.ndarray) -> np.ndarray:
        if not len(item):
            return np.zeros(len(item_id), np.int32)
        # A position beyond the last item is clipped; the comparison below then gives tag 0.
        place = np.minimum(np.searchsorted(item, item_id), len(item) - 1)
        return np.where(item[place] == item_id, tag[place], 0).astype(np.int32)

    return look_up


def as_tensors(state: Any) -> Any:
    """Convert the arrays in nested mappings to tensors that share their memory."""
    if isinstance(state, dict):
        return {key: as_tensors(value) for key, value in state.items()}
    return torch.from_numpy(np.ascontiguousarray(state)) if isinstance(state, np.ndarray) else state


def as_arrays(state: Any) -> Any:
    """Convert the tensors in nested mappings to arrays: the inverse of :func:`as_tensors`."""
    if isinstance(state, dict):
        return {key: as_arrays(value) for key, value in state.items()}
    return state.numpy() if isinstance(state, torch.Tensor) else state
