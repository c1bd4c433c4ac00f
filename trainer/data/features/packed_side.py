"""The packed table ``side``: side features, domains and the contexts of history entries have ranges of its rows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.config.features import FeatureConfig
from trainer.console.errors import UserError
from trainer.data.features.author_features import AuthorSide
from trainer.data.features.fit import feature_layout
from trainer.data.format.history import HistorySlice
from trainer.data.format.schema import DOMAINS, DatasetSpec, Rows, SideFeature

ACTION_BITS = 12
"""Number of behaviours that are an input of a past visit: the first ones of the dataset, one bit each."""

GAP_BUCKETS = 64
"""Number of buckets for the age of a past visit."""

AGE_PLACE = 1
"""Position of the age in the context of a history entry."""

DOMAIN_RANGE, ACTIONS_RANGE, AGE_RANGE = "domain", "behaviours of a past visit", "age of a past visit"
PAST_DOMAIN_RANGE = "domain of a past visit"
"""Names of the ranges of the table ``side`` that do not belong to a side feature."""


class PackedSide:
    """Ranges of the packed table ``side``, and the ids that rows and history entries have in it.

    Attributes:
        rows: number of rows of the table.
        width: number of ids of a row of the batch.
        context_ids: number of ids in the context of a history entry: its behaviours and its age; depending on the
            settings also its domain, the tag of its item and features of its author.
        alike: features that rows and contexts share, as pairs of the position in each.
    """

    def __init__(self, spec: DatasetSpec, config: FeatureConfig, author_side: AuthorSide | None) -> None:
        self._columns = [k for k, side in enumerate(spec.side) if side.name not in config.exclude]
        self._features: list[SideFeature] = [spec.side[k] for k in self._columns]
        ranges = side_ranges(feature_layout(spec), config)
        self._has_domain = DOMAIN_RANGE in ranges
        self.width = len(self._features) + self._has_domain
        self._offsets = np.array([rows.start for rows in ranges.values()], np.int64)
        self.rows = max((rows.stop for rows in ranges.values()), default=1)
        self._limits = np.array([feature.rows for feature in self._features])
        self._actions, self._age, self._past_domain = (
            np.int64(ranges[name].start if name in ranges else 0)
            for name in (ACTIONS_RANGE, AGE_RANGE, PAST_DOMAIN_RANGE)
        )
        # A past visit's tag and features of its author use the rows of the candidate's tag and author.
        self._tag = np.int64(ranges[f"feature {spec.tag}"].start if config.tags else 0)
        self._author_side = author_side if config.author_side else None
        self._author_offsets = np.array([ranges[f"feature {name}"].start for name in config.author_side], np.int64)
        self._tag_place = 2 + (PAST_DOMAIN_RANGE in ranges)
        self.context_ids = self._tag_place + config.tags + len(config.author_side)
        names = [feature.name for feature in self._features]
        shared = [spec.tag] * config.tags + list(config.author_side)
        self.alike = [(names.index(name), self._tag_place + place) for place, name in enumerate(shared)]

    def fill(self, rows: Rows, out: np.ndarray) -> None:
        """Write the ids of each row into ``[n, width]`` int64."""
        features = len(self._features)
        # Selecting columns copies the array, which is not needed if no feature is excluded.
        values = rows["side"] if features == rows["side"].shape[1] else rows["side"][:, self._columns]
        if len(values) and features and (values.min() < 0 or (values.max(axis=0) >= self._limits).any()):
            row, column = np.argwhere((values < 0) | (values >= self._limits))[0]
            feature = self._features[column]
            raise UserError(
                f"side feature {feature.name!r} is {values[row, column]} in visit {rows['visit_id'][row]}; the dataset "
                f"declares values 0 to {feature.rows - 1}"
            )
        np.add(values, self._offsets[:features], out=out[:, :features])
        if self._has_domain:
            np.add(rows["domain"], self._offsets[features], out=out[:, features])

    def fill_context(self, visits: HistorySlice, age_ms: np.ndarray, out: np.ndarray) -> None:
        """Write the context ids of each history entry into ``[n, context_ids]`` int64."""
        # All behaviours of a visit together are one id: each combination has a row of its own.
        np.bitwise_and(visits.bits, (1 << ACTION_BITS) - 1, out=out[:, 0])
        out[:, 0] += self._actions
        np.add(gap_bucket(age_ms), self._age, out=out[:, AGE_PLACE])
        if self._past_domain:
            np.add(visits.domain, self._past_domain, out=out[:, 2])
        if self._tag:
            np.add(visits.tag, self._tag, out=out[:, self._tag_place])
        if self._author_side is not None:
            own = out[:, -len(self._author_offsets) :]
            np.add(self._author_side.lookup(visits.author_id), self._author_offsets, out=own)


def side_ranges(layout: Mapping[str, Any], config: FeatureConfig) -> dict[str, range]:
    """Return the ranges of rows of the table ``side`` by name, in order. Row 0 belongs to no range.

    Args:
        layout: layout of the dataset, see :func:`trainer.data.features.fit.feature_layout`.
        config: the ``[features]`` section of the job.

    Returns:
        ``feature NAME`` for each side feature, and those of :data:`DOMAIN_RANGE`, :data:`ACTIONS_RANGE`,
        :data:`AGE_RANGE` and :data:`PAST_DOMAIN_RANGE` that the model has.
    """
    sizes = {f"feature {name}": rows for name, rows in layout["side"] if name not in config.exclude}
    if len(layout["candidates"]) > 1 and "domain" not in config.exclude:
        sizes[DOMAIN_RANGE] = len(DOMAINS)
    if config.history:
        sizes |= {ACTIONS_RANGE: 1 << min(len(layout["behaviours"]), ACTION_BITS), AGE_RANGE: GAP_BUCKETS}
    if any(history.domain == "both" for history in config.history.values()):
        sizes[PAST_DOMAIN_RANGE] = len(DOMAINS)
    # The order of the ranges is part of every checkpoint: rows of the table are known only by their position.
    ends = itertools.accumulate(sizes.values(), initial=1)
    return {name: range(end, end + size) for (name, size), end in zip(sizes.items(), ends, strict=False)}


def gap_bucket(age_ms: np.ndarray) -> np.ndarray:
    """Return the bucket of an age, in half octaves of seconds: edges at 0, 0.5, 1, 2, 3, 5, 7, 11, ... seconds.

    Args:
        age_ms: ``[n]`` int64, milliseconds; negative ages count as 0.

    Returns:
        ``[n]`` int32 in ``[0, GAP_BUCKETS)``.
    """
    seconds = (np.maximum(age_ms, 0) * np.float32(0.001)).astype(np.float32) + np.float32(1)
    # Exponent and first bit of the mantissa are the same on every machine; a logarithm near an edge may not be.
    return np.minimum((seconds.view(np.int32) >> 22) - (127 << 1), GAP_BUCKETS - 1)
