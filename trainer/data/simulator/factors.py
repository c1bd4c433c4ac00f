"""True factors of every exposure: the terms whose sum is the log-odds of a behaviour.

``truth/factors-P.parquet`` has a line for each exposure, in the order of ``truth/part-P.parquet``: its context and a
number for each factor. ``truth/factor_weights.parquet`` has the weight of each factor by context and behaviour. The
log-odds of a behaviour, before the offsets of click and depth (``behaviours.behaviour_probabilities``), are the sum of
weight times factor.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from trainer.data.format.text_schema import FACTOR_WEIGHTS
from trainer.data.simulator.behaviours import CONTEXTS, FACTORS, SCENE_OFFSET, weights_of
from trainer.data.simulator.config import BEHAVIOURS, WorldConfig
from trainer.data.simulator.content import LIVE
from trainer.data.simulator.exposure import SCENES
from trainer.data.simulator.lookahead import MEAN_APPEAL, appeal_ahead
from trainer.data.simulator.lookahead import WEIGHTS as AHEAD_WEIGHTS
from trainer.data.simulator.user_days import VisitColumns, visit_factors, visits_at
from trainer.data.simulator.world import SimulatedWorld

VISITS_AT_ONCE = 1 << 15
KEYS = ("visit_id", "user_id", "request_ms")
AHEAD = "ahead"
"""Factor of a world with ``lookahead``: ``appeal_ahead`` less its mean."""

SCENE_FACTORS = {f"scene_{SCENES[code]}": code for code in np.flatnonzero(SCENE_OFFSET.any(axis=0)).tolist()}
"""Factors that are 1 in a scene and 0 elsewhere -> position in ``SCENES``."""

INCLINATIONS = {f"inclination_{name}": k for k, name in enumerate(BEHAVIOURS)}
"""Factors that are the user's inclination to a behaviour -> position in ``BEHAVIOURS``."""


def factor_names(config: WorldConfig) -> tuple[str, ...]:
    """Return the names of the factors of a world, which are the columns of its files."""
    return (*FACTORS, *SCENE_FACTORS, *INCLINATIONS, *([AHEAD] if config.lookahead else []))


def factor_weights(config: WorldConfig) -> pa.Table:
    """Return the weights that are not 0, as ``text_schema.FACTOR_WEIGHTS``."""
    names = factor_names(config)
    weights = np.zeros((len(CONTEXTS), len(BEHAVIOURS), len(names)), np.float32)
    weights[:, :, : len(FACTORS)] = weights_of(config.conflict)
    for name, code in SCENE_FACTORS.items():
        weights[:, :, names.index(name)] = SCENE_OFFSET[:, code]
    for name, k in INCLINATIONS.items():
        weights[:, k, names.index(name)] = 1
    if config.lookahead:
        for k, weight in AHEAD_WEIGHTS.items():
            weights[:, k, names.index(AHEAD)] = weight
    context, behaviour, factor = np.nonzero(weights)
    columns = {
        "context": context,
        "behaviour": np.array(BEHAVIOURS)[behaviour],
        "factor": np.array(names)[factor],
        "weight": weights[context, behaviour, factor],
    }
    return pa.table(columns).cast(FACTOR_WEIGHTS)


def factor_tables(world: SimulatedWorld, visits: VisitColumns) -> Iterator[pa.Table]:
    """Yield the factors of visits in parts: the keys of a visit, its context, and ``factor_names`` in float32."""
    for first in range(0, len(visits["visit_id"]), VISITS_AT_ONCE):
        rows = np.arange(first, min(first + VISITS_AT_ONCE, len(visits["visit_id"])))
        shown, known = visits_at(visits, rows)
        values, context = visit_factors(world, shown, known)
        inclination = world.users.inclination(shown.domain, shown.user)
        columns = {name: visits[name][rows] for name in KEYS} | {"context": context.astype(np.int8)}
        columns |= dict(zip(FACTORS, values, strict=True))
        columns |= {name: (shown.scene == code).astype(np.float32) for name, code in SCENE_FACTORS.items()}
        columns |= {name: inclination[:, k] for name, k in INCLINATIONS.items()}
        if world.config.lookahead:
            live = np.flatnonzero(shown.domain == LIVE)
            taste = world.users.topic_taste[shown.user[live]]
            ahead = np.zeros(len(rows), np.float32)
            ahead[live] = appeal_ahead(world.items, taste, shown.item[live], shown.time_ms[live])
            ahead[live] -= np.float32(MEAN_APPEAL)
            columns[AHEAD] = ahead
        yield pa.table(columns)
