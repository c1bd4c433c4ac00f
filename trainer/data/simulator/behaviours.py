"""True probability of every behaviour of a visit.

A visit is a small tree of decisions. The user clicks or not. The user watches until ``effective_view`` or not, and then
until ``long_view`` or not, both more often after a click. Only after a click the user may like, comment, give a gift or
follow, with probabilities that depend on the depth of the view. The probability of every branch is a logistic function
of the same world state at request time, so the unconditional probability of each behaviour is a finite sum over the
branches: ``BehaviourProbabilities.marginal`` is exact, and no predictor can be better.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from trainer.data.simulator.config import BEHAVIOURS
from trainer.data.simulator.exposure import SCENES

CLICK, EFFECTIVE_VIEW, LONG_VIEW = 0, 1, 2
INTERACTIONS = slice(3, 7)
GIFT, FOLLOW = BEHAVIOURS.index("gift"), BEHAVIOURS.index("follow")

CONTEXTS: tuple[str, ...] = ("video", "talent", "games", "shopping")
"""Contexts that have weights of their own: videos, and live rooms by category."""

FACTORS: tuple[str, ...] = (
    "constant", "taste", "hold", "social", "mood", "following", "repeat", "novelty", "quality", "bait", "warmth",
    "popularity", "category", "intensity", "topic", "quiet", "hour", "fatigue", "generosity",
)  # fmt: skip
"""Factors of the log-odds, which are linear in them.

* ``taste``, ``hold`` and ``social``: dot products of user and item in the three subspaces.
* ``mood``: 1 if the genre is the one that the user currently prefers.
* ``following``, ``repeat``: the follow relation and the earlier views of the author.
* ``novelty``: the user's interest in new authors, if there is no earlier view of this one.
* ``quality``, ``bait``, ``warmth``, ``popularity``: traits of item and author.
* ``category``: the user's interest in the category.
* ``intensity``, ``topic``, ``quiet``: intensity of the segment, alone and times the user's taste for its topic, and one
  minus the intensity.
* ``hour``: effect of the hour on the category.
* ``fatigue``: grows with the position in the session.
* ``generosity``: the user's inclination to give, if the user follows the author.
"""

LIVE_WEIGHTS = np.array(
    [  # click effective long  like comment gift follow
        [-2.55, -0.25, -0.25, -3.1, -3.05, -5.65, -4.05],  # constant
        [0.75, 0.25, 0.15, 0.55, 0.05, 0.1, 0.65],  # taste
        [0.0, 0.6, 0.8, -0.35, 0.25, 0.3, -0.1],  # hold
        [-0.1, 0.0, 0.2, 0.1, 0.95, 0.8, 0.2],  # social
        [1.3, 0.5, 0.3, 0.5, 0.0, 0.2, 0.5],  # mood
        [0.6, 0.3, 0.4, 0.5, 0.7, 0.9, 0.0],  # following
        [0.35, 0.1, 0.15, 0.1, 0.35, 0.55, 0.4],  # repeat
        [0.5, -0.3, -0.4, 0.1, -0.3, -0.4, 0.7],  # novelty
        [0.1, 0.45, 0.5, 0.3, 0.1, 0.2, 0.35],  # quality
        [0.6, -0.5, -0.7, 0.05, -0.25, -0.35, -0.2],  # bait
        [0.0, 0.0, 0.15, 0.1, 0.5, 0.45, 0.35],  # warmth
        [0.3, 0.0, 0.1, 0.1, -0.4, -0.5, 0.2],  # popularity
        [0.45, 0.2, 0.2, 0.1, 0.0, 0.2, 0.0],  # category
        [1.0, 0.4, -0.3, 0.9, -0.5, 0.9, 0.3],  # intensity
        [0.9, 0.4, 0.2, 0.5, 0.1, 0.4, 0.2],  # topic
        [0.0, 0.0, 0.2, -0.2, 0.5, 0.0, 0.0],  # quiet
        [0.5, 0.2, 0.3, 0.1, 0.1, 0.3, 0.0],  # hour
        [-0.25, -0.1, -0.2, -0.1, -0.1, 0.0, -0.1],  # fatigue
        [0.0, 0.0, 0.0, 0.0, 0.1, 0.5, 0.0],  # generosity
    ],
    np.float32,
)
CATEGORY_WEIGHTS: dict[str, dict[str, dict[str, float]]] = {
    "talent": {"constant": {"gift": 0.6, "like": 0.3}, "social": {"click": 0.35}},
    "games": {"constant": {"long_view": 0.4, "gift": -0.2}, "intensity": {"comment": 1.3}, "hold": {"like": 0.5}},
    "shopping": {
        "constant": {"gift": -1.2, "like": -0.6, "long_view": -0.3},
        "taste": {"click": -0.25, "effective_view": 0.3},
        "hold": {"click": 0.45, "comment": -0.5},
        "quiet": {"comment": 0.4},
    },
}
"""Weights by category, factor and behaviour that are added to ``LIVE_WEIGHTS``."""

VIDEO_WEIGHTS = np.array(
    [
        [-1.8, -0.5, -0.5, -4.4, -6.2, 0.0, -5.5],  # constant
        [0.7, 0.3, 0.3, 0.5, 0.1, 0.0, 0.6],  # taste
        [0.1, 0.5, 0.7, -0.2, 0.2, 0.0, 0.0],  # hold
        [0.0, 0.0, 0.1, 0.1, 0.8, 0.0, 0.2],  # social
        [1.2, 0.8, 0.6, 0.6, 0.2, 0.0, 0.5],  # mood
        [0.5, 0.3, 0.3, 0.5, 0.5, 0.0, 0.0],  # following
        [0.25, 0.1, 0.1, 0.1, 0.2, 0.0, 0.5],  # repeat
        [0.4, -0.2, -0.3, 0.1, -0.2, 0.0, 0.6],  # novelty
        [0.1, 0.4, 0.5, 0.3, 0.1, 0.0, 0.3],  # quality
        [0.6, -0.4, -0.6, 0.0, -0.2, 0.0, -0.2],  # bait
        [0.0, 0.0, 0.0, 0.1, 0.4, 0.0, 0.3],  # warmth
        [0.2, 0.0, 0.0, 0.1, -0.2, 0.0, 0.2],  # popularity
        [0.3, 0.1, 0.1, 0.1, 0.0, 0.0, 0.0],  # category
        [0.0] * 7,  # intensity
        [0.0] * 7,  # topic
        [0.0] * 7,  # quiet
        [0.0] * 7,  # hour
        [-0.15, -0.15, -0.15, -0.1, -0.1, 0.0, -0.1],  # fatigue
        [0.0] * 7,  # generosity
    ],
    np.float32,
)

SCENE_OFFSET = np.zeros((len(BEHAVIOURS), len(SCENES)), np.float32)
SCENE_OFFSET[:, SCENES.index("following")] = [0.5, 0.1, 0.2, 0.2, 0.3, 0.4, 0.0]
SCENE_OFFSET[:, SCENES.index("nearby")] = [-0.2, -0.2, 0.0, 0.0, 0.3, -0.2, 0.2]
SCENE_OFFSET[:, SCENES.index("plaza")] = [0.7, -0.3, -0.2, -0.2, 0.0, 0.2, 0.1]

UNCLICKED_OFFSET = np.array([[-3.2, 0.0], [-2.0, 0.0]], np.float32)
"""Offsets of the log-odds of effective_view and long_view (rows) without and with a click (columns)."""

DEPTH_OFFSET = np.array([[-1.4, -2.0, -2.6, -1.2], [-0.3, -0.4, -0.8, -0.2], [0.4, 0.5, 0.6, 0.3]], np.float32)
"""Offsets of the log-odds of the interactions by the depth of the view: none, effective only, long."""

# All branches of a visit are computed in one array: click, effective and long view (twice each, without and with a
# click), and the interactions by depth (three times each).
BRANCH_OF = np.array([CLICK, *2 * [EFFECTIVE_VIEW], *2 * [LONG_VIEW], *3 * [*range(len(BEHAVIOURS))[INTERACTIONS]]])
BRANCH_OFFSET = np.concatenate([[0], *UNCLICKED_OFFSET, *DEPTH_OFFSET], dtype=np.float32)[:, None]


def _context_weights() -> np.ndarray:
    """Return the weights of all contexts, ``[contexts, behaviours, factors] float32``."""
    weights = np.stack([VIDEO_WEIGHTS, *(LIVE_WEIGHTS.copy() for _ in CONTEXTS[1:])])
    for category, factors in CATEGORY_WEIGHTS.items():
        for factor, behaviours in factors.items():
            for behaviour, weight in behaviours.items():
                weights[CONTEXTS.index(category), FACTORS.index(factor), BEHAVIOURS.index(behaviour)] += weight
    return np.ascontiguousarray(weights.transpose(0, 2, 1))


WEIGHTS = _context_weights()

CONFLICT_FACTORS: tuple[str, ...] = ("taste", "mood", "category", "topic", "hour")
"""Factors that a conflict is about: how well user and room match."""
CONFLICT_OFFSET = np.array([2.6, 2.0, 2.9, 1.75], np.float32)
"""Added to the log-odds of the interactions at a conflict of 1, so that they are about as frequent as without."""


@lru_cache
def weights_of(conflict: float) -> np.ndarray:
    """Return the weights of a world, ``[contexts, behaviours, factors] float32``; they must not be changed.

    An interaction needs a click, so a factor with weight u for the click and w for the interaction moves the log-odds
    of both together by about u + w. A conflict c makes this (1 - 2 c)(u + w): with 0.5 the factor says nothing about
    the interaction, and with 1 it repels the interaction as much as it attracts it without a conflict.

    Args:
        conflict: from 0 to 1; 0 for ``WEIGHTS``.
    """
    if not conflict:
        return WEIGHTS
    weights = WEIGHTS.copy()
    for factor in map(FACTORS.index, CONFLICT_FACTORS):
        own = weights[:, INTERACTIONS, factor]
        own -= np.float32(2 * conflict) * (own + weights[:, CLICK, None, factor])
    # Most of the loss of frequency comes with the first half of the conflict.
    weights[:, INTERACTIONS, FACTORS.index("constant")] += CONFLICT_OFFSET * np.float32(conflict * (2 - conflict))
    return weights


@dataclass(frozen=True)
class BehaviourProbabilities:
    """True probabilities of ``n`` exposures, float32.

    Attributes:
        click: ``[n]``.
        effective: ``[2, n]`` without and with a click.
        long: ``[2, n]`` given an effective view, without and with a click.
        interaction: ``[3, 4, n]`` given a click, by the depth of the view.
        marginal: ``[behaviours, n]`` unconditional, given the world at request time.
        marginal_long: ``[behaviours, n]`` jointly with a click and a long view; rows ``EFFECTIVE_VIEW`` and
            ``LONG_VIEW`` are not used and zero.
    """

    click: np.ndarray
    effective: np.ndarray
    long: np.ndarray
    interaction: np.ndarray
    marginal: np.ndarray
    marginal_long: np.ndarray


def log_odds(
    factors: np.ndarray, context: np.ndarray, scene: np.ndarray, trait: np.ndarray, weights: np.ndarray = WEIGHTS
) -> np.ndarray:
    """Return the log-odds of each behaviour before the offsets of click and depth.

    Args:
        factors: ``[factors, n] float32`` in the order of ``FACTORS``.
        context: ``[n]`` positions in ``CONTEXTS``.
        scene: ``[n]`` positions in ``SCENES``.
        trait: ``[behaviours, n] float32`` inclinations of the users.
        weights: ``[contexts, behaviours, factors] float32``.

    Returns:
        ``[behaviours, n] float32``.
    """
    # einsum instead of a BLAS product: the last bit of the latter depends on the processor
    all_contexts = np.einsum("ckf,fn->ckn", weights, factors)
    # nine of ten exposures are videos, so the slow selection by context is done for rooms only
    logits = all_contexts[CONTEXTS.index("video")]
    live = np.flatnonzero(context)
    logits[:, live] = all_contexts[context[live], :, live].T
    logits += SCENE_OFFSET.take(scene, axis=1)
    logits += trait
    return logits


def behaviour_probabilities(logits: np.ndarray, allowed: np.ndarray) -> BehaviourProbabilities:
    """Return the probability of every branch of a visit, and their sums.

    Args:
        logits: ``[behaviours, n]`` from ``log_odds``.
        allowed: ``[4, n] float32``, 0 for an interaction that cannot happen (a gift for a video, following again).
    """
    n = logits.shape[1]
    branch = logits.take(BRANCH_OF, axis=0)
    branch += BRANCH_OFFSET
    # the logistic function, in place to save memory traffic
    np.exp(np.negative(branch, out=branch), out=branch)
    branch += 1
    np.divide(1, branch, out=branch)
    click, effective, long = branch[0], branch[1:3], branch[3:5]
    interaction = branch[5:].reshape(3, 4, n)
    interaction *= allowed

    depth = np.empty((3, n), np.float32)
    np.subtract(1, effective[1], out=depth[0])
    np.multiply(effective[1], 1 - long[1], out=depth[1])
    np.multiply(effective[1], long[1], out=depth[2])
    depth *= click
    unclicked_effective = (1 - click) * effective[0]
    acted = depth[:, None] * interaction
    marginal = np.empty_like(logits)
    marginal[CLICK] = click
    marginal[EFFECTIVE_VIEW] = click * effective[1] + unclicked_effective
    marginal[LONG_VIEW] = depth[2] + unclicked_effective * long[0]
    marginal[INTERACTIONS] = acted.sum(axis=0)
    marginal_long = np.zeros_like(logits)
    marginal_long[CLICK] = depth[2]
    marginal_long[INTERACTIONS] = acted[2]
    return BehaviourProbabilities(click, effective, long, interaction, marginal, marginal_long)
