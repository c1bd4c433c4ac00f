"""Probabilities that a model could know at best from the events before each request of a simulated world.

The true probability of a behaviour knows everything, also what nobody can see. The attainable probability is its
expectation over what is hidden, given the past:

* the user's **mood**, the genre that a user currently prefers: a Bayes filter over the genres, with what the user did
  in all earlier visits;
* the **room**'s own traits, by which it differs from its author: a Kalman filter over the ended visits to the room;
* the **user**'s interests and inclinations: a Kalman filter over all earlier visits of the user;
* the **content** on air and in the next minutes: continuations of the phases of the room, drawn from their true
  distribution given the segments that were known at the request.

All other parts are as in the truth: styles and traits of authors, vectors of videos, favourite genres, popularity,
follow relations, earlier views, the end of a room, hour and scene. No model knows all of them. Each filter also knows
the hidden parts of past visits that the other three are about, and all weights of the world. This makes the bound too
high. It is too low by what the filters do not use, the choice of the items that were shown, and by the approximation of
the Kalman filters, whose beliefs are normal distributions.

The sizes of these errors are not known. So each benchmark that has the bound compares its models with it: a model
whose AUC is above the bound by more than the noise of the users (``room_below``, ``exceeds``) shows that the bound is
too low.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.hidden_state import (
    TOPIC_TASTE,
    ContentDraws,
    SimulatedLog,
    VisitInputs,
    draw_content,
    mood_probability,
    room_beliefs,
    segments_there,
    true_content,
    user_beliefs,
)
from benchmarks.quality.paired_users import PairedDifference, UserMetric, paired_difference
from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec
from trainer.data.simulator.behaviours import behaviour_probabilities, log_odds, weights_of
from trainer.data.simulator.config import BEHAVIOURS, WorldConfig
from trainer.data.simulator.content import LIVE, VECTOR_SPREAD
from trainer.data.simulator.lookahead import add_appeal, mean_appeal
from trainer.data.simulator.population import DIM
from trainer.data.simulator.user_days import ROW, SUBSPACES
from trainer.data.simulator.world import make_world

DRAWS = 64
"""Draws of what is hidden, for each visit."""

ROWS_AT_ONCE = 512
TOLERANCE = 1e-5
"""Largest difference between two computations of a true probability."""

MOOD, ROOM, CONTENT, USER = "mood", "room", "content", "user"
HIDDEN = (MOOD, ROOM, CONTENT, USER)
ATTAINABLE = "attainable"
VARIANTS: dict[str, tuple[str, ...]] = {
    ATTAINABLE: HIDDEN,
    "users known": (MOOD, ROOM, CONTENT),
    **{f"only the {name} hidden": (name,) for name in HIDDEN},
}
"""Name of a bound -> what is hidden."""


def world_of(spec: DatasetSpec) -> WorldConfig:
    """Return the world of a dataset of ``limelight data simulate``."""
    extra = spec.extra
    names = ("exposures_per_day", "lookahead", "newcomers", "interest_correlation", "conflict")
    options = {name: extra[name] for name in names if name in extra}
    return WorldConfig(extra["users"], extra["days"], extra["seed"], **options)


def kept_probabilities(
    file: Path,
    config: WorldConfig,
    visit_id: np.ndarray,
    truth: np.ndarray,
    behaviours: Sequence[str],
    variants: Mapping[str, tuple[str, ...]] = VARIANTS,
) -> dict[str, np.ndarray]:
    """Return :func:`attainable_probabilities`, which are computed once and kept in a file.

    Args:
        file: an ``.npz`` file; written if it is missing.
        config, visit_id, truth, behaviours, variants: as there.

    Raises:
        UserError: the file is damaged, lacks a variant, or is about other rows.
    """
    if not file.exists():
        print("attainable bound", file=sys.stderr, flush=True)
        found: dict[str, Any] = {**attainable_probabilities(config, visit_id, truth, behaviours, variants)}
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}")
        with open(partial, "wb") as target:
            np.savez(target, visit_id=visit_id, truth=truth, **found)
        partial.rename(file)
    try:
        with np.load(file, allow_pickle=False) as stored:
            kept = {name: stored[name] for name in ("visit_id", *variants)}
            # Files of the first versions have no true probabilities.
            known = stored["truth"] if "truth" in stored.files else truth
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{file}: damaged, or no attainable bound with {', '.join(variants)}; remove it") from None
    # Visits have the same ids in all worlds, so their true probabilities are compared, too.
    if not np.array_equal(kept.pop("visit_id"), visit_id) or not np.allclose(known, truth, atol=TOLERANCE):
        raise UserError(f"{file}: is about other rows; remove it, or name another file")
    return kept


def room_below(
    bound: np.ndarray, models: Sequence[np.ndarray], label: np.ndarray, user_id: np.ndarray
) -> PairedDifference:
    """Return the AUC of the bound minus that of a model, in points, with its interval over users.

    Args:
        bound: ``[n]`` attainable probabilities of a behaviour.
        models: ``[n]`` predictions by each seed of a model, in any scale that keeps their order.
        label: ``[n]``, 0 or 1.
        user_id: ``[n]`` int64.
    """
    users, index = np.unique(user_id, return_inverse=True)
    best, *found = (UserMetric(index, scores, label).auc for scores in (bound, *models))
    return paired_difference(found, [best] * len(found), len(users))


def exceeds(room: PairedDifference) -> bool:
    """True if a model is above the bound by more than the noise of the users, so that the bound is too low."""
    return room.high is not None and room.high < 0


def attainable_probabilities(
    config: WorldConfig,
    visit_id: np.ndarray,
    truth: np.ndarray,
    behaviours: Sequence[str],
    variants: Mapping[str, tuple[str, ...]] = VARIANTS,
) -> dict[str, np.ndarray]:
    """Return the probabilities of live visits under each of some variants, ``[n, behaviours] float32``.

    Args:
        config: of the world, which is simulated again.
        visit_id: ``[n]`` visits.
        truth: ``[n, behaviours]``, their true probabilities, to check that this is the same world.
        behaviours: names of the columns.
        variants: of ``VARIANTS``.

    Raises:
        ValueError: the world has other probabilities.
    """
    columns = [BEHAVIOURS.index(name) for name in behaviours]
    log = SimulatedLog(make_world(config))
    order = np.argsort(log.columns["visit_id"])
    rows = order[np.searchsorted(log.columns["visit_id"], visit_id, sorter=order) % len(order)]
    if not np.allclose(log.columns["truth"][columns][:, rows].T, truth, atol=1e-6):
        raise ValueError(f"the visits are of another world than {config}")
    moods, of_rooms, of_users = mood_probability(log)[rows], room_beliefs(log, rows), user_beliefs(log, rows)
    rng = np.random.default_rng(config.seed)
    found = {name: np.empty((len(rows), len(columns)), np.float32) for name in variants}
    for first in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        inputs = log.inputs(rows[part])
        shown = inputs.shown
        traits, users = of_rooms[part].draw(rng, DRAWS), of_users[part].draw(rng, DRAWS)
        content = draw_content(log.world, shown.item, shown.time_ms, DRAWS, rng)
        for name, hidden in variants.items():
            expected = expected_probabilities(
                inputs,
                moods[part] if MOOD in hidden else None,
                traits if ROOM in hidden else None,
                content if CONTENT in hidden else None,
                users if USER in hidden else None,
            )
            found[name][part] = expected[columns].T
    return found


def expected_probabilities(
    inputs: VisitInputs,
    mood: np.ndarray | None = None,
    traits: np.ndarray | None = None,
    content: ContentDraws | None = None,
    users: np.ndarray | None = None,
) -> np.ndarray:
    """Return the mean of the probabilities over draws of what is hidden, ``[behaviours, n]``.

    Args:
        inputs: of the live visits; what is None below is as it is there.
        mood: ``[n]`` probabilities that the genre is the user's mood.
        traits: ``[n, draws, ROOM_TRAITS]`` drawn standardised traits of the rooms.
        content: drawn topics and intensities.
        users: ``[n, draws, USER_TRAITS]`` drawn traits of the users.
    """
    n, world, shown = len(inputs.context), inputs.world, inputs.shown
    drawn = [
        *(one.shape[1] for one in (traits, users) if one is not None),
        *([content.topic.shape[2]] if content else []),
    ]
    draws = max(drawn, default=1)
    # The draws of a visit are neighbours.
    lane = np.repeat(np.arange(n), draws)
    factors, allowed = inputs.factors[:, lane], inputs.allowed[:, lane]
    shift = np.zeros((len(BEHAVIOURS), n, draws), np.float32)
    if traits is not None:
        shift += np.einsum("ktn,ndt->knd", inputs.room_weights(), traits - inputs.room_traits().T[:, None])
    taste = inputs.topic_taste[lane]
    if users is not None:
        weights = inputs.user_weights()
        # Tastes for topics act on the segments below, which may be drawn themselves.
        weights[:, TOPIC_TASTE] = 0
        shift += np.einsum("ktn,ndt->knd", weights, users - inputs.user_traits().T[:, None])
        taste = users[..., TOPIC_TASTE].reshape(n * draws, -1)
    if traits is not None and users is not None:
        shift += _shift_of_both(inputs, traits, users)
    shows = content or true_content(world, shown.item, shown.time_ms)
    topic, intensity = (
        np.broadcast_to(values, (len(values), n, draws)).reshape(len(values), -1)
        for values in (shows.topic.astype(np.int64), shows.intensity)
    )
    liking = taste[np.arange(len(lane)), topic]
    for name, values in (("intensity", intensity[0]), ("topic", intensity[0] * liking[0]), ("quiet", 1 - intensity[0])):
        factors[ROW[name]] = values
    slopes = weights_of(world.config.conflict)
    found = np.zeros((len(BEHAVIOURS), n))
    for match, weight in [(None, np.ones(n))] if mood is None else [(0, 1 - mood), (1, mood)]:
        if match is not None:
            factors[ROW["mood"]] = match
        logits = log_odds(factors, inputs.context[lane], shown.scene[lane], inputs.trait[:, lane], slopes)
        if world.config.lookahead:
            there = segments_there(world, shown.item, shown.time_ms)[:, lane]
            add_appeal(logits, np.arange(len(lane)), mean_appeal(intensity[1:], liking[1:], there))
        logits += shift.reshape(len(BEHAVIOURS), -1)
        marginal = behaviour_probabilities(logits, allowed).marginal
        found += weight * marginal.reshape(len(BEHAVIOURS), n, draws).mean(axis=2, dtype=np.float64)
    return found


def _shift_of_both(inputs: VisitInputs, traits: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Return what other rooms and other users change together in the log-odds, ``[behaviours, n, draws]`` float32.

    Tastes are products of both. They are linear in the traits of each, but the weights of one are traits of the other:
    the weights that are used are those of the true other one. Their sum lacks the product of the two changes.

    Args:
        inputs: of the live visits.
        traits: ``[n, draws, ROOM_TRAITS]`` standardised traits of the rooms.
        users: ``[n, draws, USER_TRAITS]`` traits of the users.
    """
    slopes = weights_of(inputs.world.config.conflict)[inputs.context].transpose(1, 2, 0)
    of_rooms = VECTOR_SPREAD * (traits - inputs.room_traits().T[:, None])
    live = slice(LIVE * DIM, (LIVE + 1) * DIM)
    of_users = users[..., live] - inputs.user_traits()[live].T[:, None]
    found = np.zeros((len(BEHAVIOURS), *traits.shape[:2]), np.float32)
    for name, part, scale in SUBSPACES:
        product = scale * np.einsum("ndt,ndt->nd", of_users[..., part], of_rooms[..., part])
        found += slopes[:, ROW[name], :, None] * product
    return found
