"""Dataset specification of a simulated world, and the tables of its users, authors, items and segments."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from trainer.data.format.schema import DOMAINS, DatasetSpec, DenseFeature, SideFeature
from trainer.data.simulator import population
from trainer.data.simulator.config import BEHAVIOURS, TIMEZONE, WorldConfig
from trainer.data.simulator.content import DURATION_BANDS
from trainer.data.simulator.exposure import SCENES
from trainer.data.simulator.user_days import POSITIONS
from trainer.data.simulator.world import SimulatedWorld

SEGMENTS_AT_ONCE = 1 << 20


def dataset_spec(config: WorldConfig, partitions: int, candidates: tuple[str, ...] = ("live",)) -> DatasetSpec:
    """Return the content of ``dataset.json`` before the log is written; ``candidates`` are the domains of the rows."""
    return DatasetSpec(
        name="simulated",
        source="Limelight's simulated world (`limelight data simulate`)",
        licence="Apache-2.0",
        partitions=partitions,
        timezone=TIMEZONE,
        behaviours=BEHAVIOURS,
        applies={name: ("live",) if name == "gift" else DOMAINS for name in BEHAVIOURS},
        candidates=candidates,
        side=(
            SideFeature("age_band", "user", 1 + population.AGE_BANDS),
            SideFeature("gender", "user", 1 + population.GENDERS),
            SideFeature("city_tier", "user", 1 + population.CITY_TIERS),
            SideFeature("device", "user", 1 + population.DEVICES),
            SideFeature("activity_band", "user", 1 + population.BANDS),
            SideFeature("spend_band", "user", 1 + population.BANDS),
            SideFeature("user_tenure", "user", 1 + population.TENURE_BANDS),
            SideFeature("author_category", "author", 1 + len(population.CATEGORIES)),
            SideFeature("author_genre", "author", 1 + population.GENRES),
            SideFeature("fans_band", "author", 1 + population.BANDS),
            SideFeature("author_tenure", "author", 1 + population.TENURE_BANDS),
            SideFeature("item_genre", "item", 1 + population.GENRES),
            SideFeature("duration_band", "item", 1 + DURATION_BANDS),
            SideFeature("scene", "context", len(SCENES)),
            SideFeature("position", "context", 1 + POSITIONS),
            SideFeature("hour", "context", 1 + 24),
            SideFeature("weekday", "context", 1 + 7),
        ),
        dense=(DenseFeature("log_room_age_s", "context"), DenseFeature("log_viewers", "context")),
        statistics=(
            ("user",),
            ("author",),
            ("item",),
            ("user", "author"),
            ("user", "author_category"),
            ("user", "author_genre"),
            ("author", "hour"),
            ("scene", "author_category"),
        ),
        tag="item_genre",
        extra={
            "users": config.users,
            "days": config.days,
            "seed": config.seed,
            "exposures_per_day": config.exposures_per_day,
            "categories": population.CATEGORIES,
            "topics": population.TOPICS,
            "scenes": SCENES,
        },
    )


def entity_tables(world: SimulatedWorld) -> dict[str, pa.Table]:
    """Return the tables ``users``, ``authors`` and ``items``.

    ``items`` has ``item_id, author_id, domain, start_ms, end_ms`` and side features. The end of a room is in the future
    when the room is ranked, so it must not become a feature.
    """
    items = world.items
    n = len(items.author)
    seconds = (items.end_ms - items.start_ms) / 1_000
    band = 1 + np.searchsorted([8, 15, 25, 40, 60, 100, 180], seconds)
    return {
        "users": pa.table({"user_id": np.arange(world.config.users), **world.users.side}),
        "authors": pa.table({"author_id": np.arange(world.config.authors), **world.authors.side}),
        "items": pa.table(
            {
                "item_id": np.arange(n),
                "author_id": items.author,
                "domain": (np.arange(n) >= items.videos).astype(np.int8),
                "start_ms": items.start_ms,
                "end_ms": items.end_ms,
                "item_genre": (1 + items.genre).astype(np.int32),
                # the length of a room is not known before it ends
                "duration_band": np.where(np.arange(n) < items.videos, band, 0).astype(np.int32),
            }
        ),
    }


def segment_tables(world: SimulatedWorld, vectors: bool = False) -> Iterator[pa.Table]:
    """Yield the table ``segments`` in parts: ``item_id, segment, start_ms, known_ms, topic, intensity``.

    The topic is a position in ``extra["topics"]``, the intensity is in [0, 1]. A segment may become a feature from
    ``known_ms`` on (``text_schema.with_known_ms``). With ``vectors`` there is a column ``vector``, the id of the
    segment's vector in ``embeddings/segments``; it is the number of the row, as in KuaiLive-M3.
    """
    items = world.items
    for first in range(0, len(items.topic), SEGMENTS_AT_ONCE):
        last = min(first + SEGMENTS_AT_ONCE, len(items.topic))
        columns = {"topic": items.topic[first:last], "intensity": items.intensity[first:last]}
        if vectors:
            columns["vector"] = np.arange(first, last)
        yield pa.table(items.segment_times(first, last) | columns)
