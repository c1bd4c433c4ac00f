"""Best estimates of a simulated world's hidden factors from the events before each request.

``benchmarks/quality/gap.py`` tells a run one true factor. What it gains is more than a model could ever learn. Told the
factor's estimate instead, it gains what the past says of this factor and the run does not know. The estimates are those
of the attainable bound (``hidden_state.py``), with its assumptions:

* ``mood``: the probability that the genre is the user's mood;
* ``taste``, ``hold``, ``social``, ``category``, ``novelty``, ``generosity`` and the inclinations: the traits of the
  user that earlier visits make likely; with the room's vector that ended visits to the room make likely;
* ``quality``, ``bait``: the author's, and what ended visits make likely of the room's difference from it;
* ``intensity``, ``quiet``, ``topic``: means over continuations of the segments that were known at the request.

All other factors are known in the bound.
"""

from __future__ import annotations

import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.quality.attainable_bound import TOLERANCE
from benchmarks.quality.hidden_state import (
    CATEGORY_INTEREST,
    NOVELTY,
    TOPIC_TASTE,
    TRAIT,
    SimulatedLog,
    draw_content,
    mood_probability,
    room_beliefs,
    user_beliefs,
)
from benchmarks.quality.world_factors import WorldFactors
from trainer.console.errors import UserError
from trainer.data.simulator.behaviours import GIFT
from trainer.data.simulator.config import BEHAVIOURS, WorldConfig
from trainer.data.simulator.content import LIVE, TRAIT_SPREAD, VECTOR_SPREAD
from trainer.data.simulator.factors import INCLINATIONS
from trainer.data.simulator.population import DIM, GENRES_PER_CATEGORY
from trainer.data.simulator.user_days import ROW, SUBSPACES
from trainer.data.simulator.world import make_world

DRAWS = 32
ROWS_AT_ONCE = 2_048

ESTIMATED: tuple[str, ...] = (
    *("mood", "taste", "hold", "social", "category", "novelty", "generosity", "quality", "bait"),
    *("intensity", "quiet", "topic", *INCLINATIONS),
)
"""Factors that have an estimate."""


def with_estimates(file: Path, config: WorldConfig, visit_id: np.ndarray, factors: WorldFactors) -> WorldFactors:
    """Return the factors of live visits with estimates in place of the hidden ones.

    They are computed once, in minutes, and kept in a file.

    Args:
        file: an ``.npz`` file; written if it is missing.
        config: of the world, which is simulated again.
        visit_id: ``[n]`` visits.
        factors: their true factors.

    Raises:
        UserError: the file is damaged or about other visits, or the world has other factors.
    """
    if not file.exists():
        print("estimates of the factors", file=sys.stderr, flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}")
        with open(partial, "wb") as target:
            np.savez(target, visit_id=visit_id, values=estimate(config, visit_id, factors))
        partial.rename(file)
    try:
        with np.load(file, allow_pickle=False) as stored:
            kept, values = stored["visit_id"], stored["values"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{file}: damaged, or no estimates of factors; remove it") from None
    known = [row for row, name in enumerate(factors.names) if name not in ESTIMATED]
    # Visits have the same ids in all worlds, so the factors without an estimate are compared, too.
    if not np.array_equal(kept, visit_id) or values.shape != factors.values.shape:
        raise UserError(f"{file}: is about other rows; remove it, or name another file")
    if not np.allclose(values[known], factors.values[known], atol=TOLERANCE):
        raise UserError(f"{file}: is about another world; remove it, or name another file")
    return replace(factors, values=values)


def estimate(config: WorldConfig, visit_id: np.ndarray, factors: WorldFactors) -> np.ndarray:
    """Return the factors of live visits, ``[F, n]`` float32, with the estimates in place of the hidden ones.

    Raises:
        UserError: the world has other factors.
    """
    log = SimulatedLog(make_world(config))
    order = np.argsort(log.columns["visit_id"])
    rows = order[np.searchsorted(log.columns["visit_id"], visit_id, sorter=order) % len(order)]
    inputs = log.inputs(rows)
    true = {name: inputs.factors[row] for name, row in ROW.items()} | {
        name: inputs.trait[k] for name, k in INCLINATIONS.items()
    }
    for row, name in enumerate(factors.names):
        if name in true and not np.allclose(true[name], factors.values[row], atol=1e-4):
            raise UserError(f"the visits are of another world than {config}")
    user, room = user_beliefs(log, rows).mean, room_beliefs(log, rows).mean
    shown, items = inputs.shown, log.world.items
    found = {"mood": mood_probability(log)[rows]}
    vector = log.world.authors.vector[shown.author] + VECTOR_SPREAD * room[:, :DIM]
    for name, part, scale in SUBSPACES:
        interest = user[:, LIVE * DIM + np.arange(part.start, part.stop)]
        found[name] = scale * np.einsum("nd,nd->n", interest, vector[:, part])
    place = np.arange(len(rows))
    found["category"] = user[place, CATEGORY_INTEREST.start + items.genre[shown.item] // GENRES_PER_CATEGORY]
    found["novelty"] = user[:, NOVELTY] * (true["repeat"] == 0)
    first = TRAIT.start + LIVE * len(BEHAVIOURS)
    found |= {name: user[:, first + k] for name, k in INCLINATIONS.items()}
    found["generosity"] = user[:, first + GIFT] * true["following"]
    for trait, name in enumerate(("quality", "bait"), DIM):
        found[name] = getattr(log.world.authors, name)[shown.author] + TRAIT_SPREAD * room[:, trait]
    rng = np.random.default_rng(config.seed)
    intensity, topic = np.empty(len(rows)), np.empty(len(rows))
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(begin, begin + ROWS_AT_ONCE)
        content = draw_content(log.world, shown.item[part], shown.time_ms[part], DRAWS, rng)
        liking = np.take_along_axis(user[part, TOPIC_TASTE], content.topic[0].astype(np.int64), axis=1)
        intensity[part] = content.intensity[0].mean(axis=1)
        topic[part] = (content.intensity[0] * liking).mean(axis=1)
    found |= {"intensity": intensity, "quiet": 1 - intensity, "topic": topic}
    assert found.keys() == set(ESTIMATED)
    values = factors.values.copy()
    for row, name in enumerate(factors.names):
        if name in found:
            values[row] = found[name]
    return values
