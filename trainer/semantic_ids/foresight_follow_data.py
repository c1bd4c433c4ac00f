"""Data of a job that follows codes: the segments and rows of each step, and the predictor that it starts from.

``trainer/semantic_ids/foresight_follow.py`` says how time is divided into ticks and steps.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.checkpoint.manifest import DatasetEntry
from trainer.config.diff import differences, flat_settings
from trainer.config.foresight import ForesightConfig
from trainer.config.iso_time import time_text
from trainer.console.errors import UserError
from trainer.data.format.content_vectors import Origin
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.segment_codes import CodeFile
from trainer.semantic_ids.code_files import read_codes
from trainer.semantic_ids.foresight_data import CodedRows, fingerprint, make_rows, open_version
from trainer.semantic_ids.foresight_forecast import ForecastSegments, forecast_origins
from trainer.semantic_ids.foresight_model import TrainedPredictor
from trainer.semantic_ids.foresight_rows import ForesightRows, SegmentContexts
from trainer.semantic_ids.segments import NO_LIMIT_MS, TimeRange, parse_range

logger = logging.getLogger(__name__)


class FollowSchedule:
    """Segments and rows of each step, as a function of what became known before.

    Args:
        contexts: segments in the order in which they became known.
        rows: all rows.
        first, stop: places of the segments that have a forecast.
        since_ms: targets that became known earlier are not trained on.
        tick_ms: length of a tick.
        batch_size: rows of a step.

    Attributes:
        steps: number of steps.
        spans: ``[steps] float64``, event time in seconds from the step before to each step; 0 inside of a tick.
    """

    def __init__(
        self,
        contexts: SegmentContexts,
        rows: ForesightRows,
        first: int,
        stop: int,
        since_ms: int,
        tick_ms: float,
        batch_size: int,
    ) -> None:
        self._batch_size = batch_size
        # Stable: of targets that became known together the order is that of the rows, which are ordered by their times.
        order = np.argsort(rows.target_ms, kind="stable")
        target_ms = rows.target_ms[order]
        begin, end = np.searchsorted(target_ms, [since_ms, contexts.as_of_ms[stop - 1] + 1])
        self._earlier, self._order = order[:begin], order[begin:end]
        tick = contexts.as_of_ms[first:stop] // tick_ms
        due = target_ms[begin:end][batch_size - 1 :: batch_size] // tick_ms
        due = due[: np.searchsorted(due, tick[-1])]
        self.steps = len(due)
        self.spans = np.diff(due, prepend=tick[0] - 1) * tick_ms / 1000
        # A segment is forecast after the steps of earlier ticks.
        self._bounds = first + np.searchsorted(np.searchsorted(due, tick), np.arange(self.steps + 2))

    def step(self, step: int) -> np.ndarray:
        """Return the rows of step number ``step``, counted from 0."""
        return self._order[step * self._batch_size : (step + 1) * self._batch_size]

    def segments(self, step: int) -> tuple[int, int]:
        """Return the places ``[first, stop)`` of the segments that are forecast before a step; the last ones after."""
        return int(self._bounds[step]), int(self._bounds[step + 1])

    def targets_before(self, step: int) -> np.ndarray:
        """Return the rows whose targets became known before those of a step."""
        return np.concatenate([self._earlier, self._order[: step * self._batch_size]])


@dataclass(frozen=True)
class FollowData(CodedRows):
    """Data of a job. The fingerprint is of all segments that became known before ``until_ms``.

    Attributes:
        file: the code file.
        segments: its segments.
        first, stop: places of the segments that have a forecast.
        until_ms: end of the time of the segments that are read.
        schedule: segments and rows of each step.
        timezone: IANA name of the dataset's time zone.
        trained: predictor that the job starts from; None from scratch.
    """

    file: CodeFile
    segments: ForecastSegments
    first: int
    stop: int
    until_ms: int
    schedule: FollowSchedule
    timezone: str
    trained: TrainedPredictor | None

    @staticmethod
    def open(config: ForesightConfig) -> FollowData:
        """Open the data of a job.

        Raises:
            UserError: dataset, codes or codebook are missing or damaged, the codes are of another codebook version, a
                time is wrong, no segment is in the range, or the run to start from does not fit.
        """
        data, follow = config.data, config.follow
        assert follow is not None
        timezone = DatasetSpec.load(data.path).timezone
        version = open_version(data.codebook)
        trained = _open_trained(config, version.name) if follow.init_from else None
        first_ms = 0
        if trained is not None and not follow.since:
            trained.check_from("", NO_LIMIT_MS)
            first_ms = trained.seen_until_ms
        since, until = ("follow.since", follow.since), ("follow.until", follow.until)
        times = parse_range((*since, first_ms), (*until, NO_LIMIT_MS), timezone)
        if trained is not None:
            trained.check_from(f"follow.since = {follow.since}", times.from_ms)
        codes = read_codes(Path(data.codes), version)
        segments = ForecastSegments.of(codes)
        first, stop = segments.since(times.from_ms), segments.since(times.until_ms)
        if first == stop:
            last = f"the last one at {time_text(int(segments.contexts.as_of_ms[-1]), timezone)}" if first else "none"
            raise UserError(
                f"{data.codes}: no segment of a known author became known from {time_text(times.from_ms, timezone)} to "
                f"follow.until = {follow.until!r} ({last}), so there is nothing to forecast"
            )
        until_ms = int(segments.contexts.as_of_ms[stop - 1]) + 1
        rows = make_rows(codes, data.target)
        tick_ms = 1000 * follow.tick_seconds
        return FollowData(
            version,
            rows,
            DatasetEntry(path=data.codes, fingerprint=fingerprint(codes, TimeRange(0, until_ms))),
            codes,
            segments,
            first,
            stop,
            until_ms,
            FollowSchedule(segments.contexts, rows, first, stop, times.from_ms, tick_ms, config.train.batch_size),
            timezone,
            trained,
        )

    def log(self, runs: int) -> None:
        """Log the numbers of segments, and what is special about some of them."""
        known_ms = self.segments.contexts.as_of_ms
        first, last = (time_text(int(known_ms[at]), self.timezone) for at in (self.first, self.stop - 1))
        logger.info(
            f"{self.entry.path}: {self.stop - self.first:,} segments with codes of {self.version.name} to forecast, "
            f"from {first} to {last}; {self.schedule.steps:,} steps"
        )
        counts = self.counts(runs)
        logger.info(
            f"with fewer than {runs} runs: {counts['short_contexts']:,}; without a forecast: {counts['earlier']:,} "
            f"earlier segments, {counts['without_author']:,} without an author"
        )
        if not self.schedule.steps:
            logger.warning(f"{self.entry.path}: has fewer targets than train.batch_size; nothing is trained")

    def counts(self, runs: int) -> dict[str, int]:
        """Return the numbers of segments, for ``metrics.json``."""
        found = self.segments.contexts.run_counts(np.arange(self.first, self.stop))
        return {
            "forecast": self.stop - self.first,
            "earlier": self.first,
            "later": len(self.segments) - self.stop,
            "without_author": self.segments.without_author,
            "short_contexts": int((found < runs).sum()),
        }

    def origins(self, config: ForesightConfig, directory: Path) -> dict[str, Origin]:
        """Return the origins of a run's tables, which do not change when later segments are added."""
        assert config.follow is not None
        follow = config.follow.model_dump(mode="json", exclude={"until", "init_from", "pooling"})
        settings = {
            **{"seed": config.run.seed, "model": config.model.model_dump(), "follow": follow},
            **{"optimizer": config.optimizer.model_dump(), "codebook": self.version.name},
            "train": config.train.model_dump(
                include={"batch_size", "sampled_codes", "sampling_power", "without_context"}
            ),
            "data": config.data.model_dump(include={"target", "runs"}),
            "init_from": self.trained.hash if self.trained else "",
        }
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
        return forecast_origins(self.version, directory.resolve().name, digest, config.follow.pooling)


def _open_trained(config: ForesightConfig, version: str) -> TrainedPredictor:
    """Open the run that a job starts from.

    Raises:
        UserError: it cannot be used, or its predictor is another one than that of the job.
    """
    assert config.follow is not None
    place = config.follow.init_from
    trained = TrainedPredictor.open(Path(place))
    if trained.version.name != version:
        raise UserError(
            f"follow.init_from = {place!r}: is of the codebook version {trained.version.name}, data.codebook is "
            f"{version}"
        )
    then, now = (
        flat_settings({"model": of.model.model_dump(), "data": of.data.model_dump(include={"target", "runs"})})
        for of in (trained.config, config)
    )
    if changes := differences(then, now, ()):
        raise UserError(f"follow.init_from = {place!r}: its predictor is another one ({'; '.join(changes)})")
    return trained
