"""Dataset specification of a cross world, its tables of users, authors and items, and its visits in canonical form."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from trainer.data.format.schema import DatasetSpec, DenseFeature, SideFeature, visit_schema
from trainer.data.simulator.behaviours import GIFT
from trainer.data.simulator.config import BEHAVIOURS, DAY_MS, START_MS, TIMEZONE, local_hour
from trainer.data.simulator.content import LIVE
from trainer.data.simulator.cross.config import ACTIVITY_BANDS, AUTHORS, GENRES, NICHES, STYLES, CrossConfig
from trainer.data.simulator.cross.exposures import INTERESTS
from trainer.data.simulator.cross.population import CrossCatalogue, CrossUsers, genre_of, style_of

QUALITY_BANDS = 6
MEAN_PRICE = 12.0


def dataset_spec(config: CrossConfig, partitions: int) -> DatasetSpec:
    """Return the content of ``dataset.json`` before the log is written.

    There are no statistics of users crossed with niches or authors: such counts would contain the information that the
    searches have to find.
    """
    return DatasetSpec(
        name="simulated-cross",
        source="Limelight's simulated world of two domains (`limelight data simulate --world cross`)",
        licence="Apache-2.0",
        partitions=partitions,
        timezone=TIMEZONE,
        behaviours=BEHAVIOURS,
        applies={name: ("live",) if name == "gift" else ("video", "live") for name in BEHAVIOURS},
        candidates=("live",),
        side=(
            SideFeature("activity_band", "user", 1 + ACTIVITY_BANDS),
            SideFeature("author_genre", "author", 1 + GENRES),
            SideFeature("author_style", "author", 1 + STYLES),
            SideFeature("quality_band", "author", 1 + QUALITY_BANDS),
            SideFeature("item_niche", "item", 1 + NICHES),
            SideFeature("hour", "context", 1 + 24),
            SideFeature("weekday", "context", 1 + 7),
        ),
        dense=(DenseFeature("log_room_age_s", "context"),),
        statistics=(("user",), ("author",), ("item",), ("item_niche",)),
        tag="item_niche",
        extra={
            "users": config.users,
            "days": config.days,
            "seed": config.seed,
            "exposures_per_day": config.exposures_per_day,
            "interests": INTERESTS,
        },
    )


def entity_tables(config: CrossConfig, catalogue: CrossCatalogue, users: CrossUsers) -> dict[str, pa.Table]:
    """Return the tables ``users``, ``authors`` and ``items``."""
    author = np.arange(AUTHORS)
    quality = catalogue.quality + 0.3 * config.generator("bands").standard_normal(AUTHORS)
    # the rank puts equal numbers of users in each band
    rank = np.argsort(np.argsort(users.daily, kind="stable"), kind="stable")
    item = np.arange(config.items)
    return {
        "users": pa.table(
            {
                "user_id": np.arange(config.users),
                "activity_band": (1 + ACTIVITY_BANDS * rank // config.users).astype(np.int32),
            }
        ),
        "authors": pa.table(
            {
                "author_id": author,
                "author_genre": (1 + genre_of(author)).astype(np.int32),
                "author_style": (1 + style_of(author)).astype(np.int32),
                "quality_band": (1 + np.searchsorted([-1.2, -0.5, 0, 0.5, 1.2], quality)).astype(np.int32),
            }
        ),
        "items": pa.table(
            {
                "item_id": item,
                "author_id": catalogue.author,
                "domain": (item >= config.videos).astype(np.int8),
                "start_ms": catalogue.start_ms,
                "item_niche": (1 + catalogue.niche).astype(np.int32),
            }
        ),
    }


def visit_table(
    spec: DatasetSpec, catalogue: CrossCatalogue, visits: dict[str, np.ndarray], rng: np.random.Generator
) -> pa.Table:
    """Return the visits as ``schema.visit_schema``."""
    request, on_air = visits["request_ms"], visits["domain"] == LIVE
    columns = {name: visits[name] for name in ("visit_id", "user_id", "author_id", "item_id", "domain", "play_ms")}
    columns |= {"request_ms": request, "exit_ms": request + visits["play_ms"]}
    columns |= {f"delay_{name}": visits["delay"][k] for k, name in enumerate(BEHAVIOURS)}
    price = MEAN_PRICE * np.exp(0.8 * rng.standard_normal(len(request)) - 0.32)
    columns["value_gift"] = np.where(visits["delay"][GIFT] >= 0, price, 0)
    columns["hour"] = 1 + local_hour(request)
    columns["weekday"] = 1 + (request - START_MS) // DAY_MS % 7
    age_ms = np.where(on_air, request - catalogue.start_ms[visits["item_id"]], 0)
    columns["log_room_age_s"] = np.log1p(age_ms / 1_000)
    schema = visit_schema(spec)
    return pa.table([pa.array(columns[field.name]).cast(field.type, safe=False) for field in schema], schema=schema)
