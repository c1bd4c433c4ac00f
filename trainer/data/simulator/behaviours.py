"""The true probability of every behaviour, and what comes of an exposure.

A visit is a small tree. The user clicks or not; watches until ``effective_view`` or not, and then until ``long_view``
or not, more often after a click; and, only after a click, likes, comments, gives or follows with probabilities that
depend on how far the watching went. Every branch is a logistic function of the same world state at request time, so
the unconditional probability of each behaviour is a finite sum over the branches: ``Chances.marginal`` is exact, and
no predictor can do better.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.simulator.config import BEHAVIOURS
from trainer.data.simulator.exposure import SCENES

CLICK, EFFECTIVE_VIEW, LONG_VIEW = 0, 1, 2
INTERACTIONS = slice(3, 7)
GIFT, FOLLOW = BEHAVIOURS.index("gift"), BEHAVIOURS.index("follow")

CONTEXTS: tuple[str, ...] = ("video", "talent", "games", "shopping")
"""Videos, and live rooms by category, each weigh the state in their own way."""

FACTORS: tuple[str, ...] = (
    "constant", "taste", "hold", "social", "mood", "following", "repeat", "novelty", "quality", "bait", "warmth",
    "popularity", "category", "intensity", "topic", "quiet", "hour", "fatigue", "generosity",
)  # fmt: skip
"""What a log-odds is linear in: dot products of user and item in three subspaces; whether the genre is what the user is
after now; follow relation and earlier views of the author, or their absence times the user's appetite for the new;
traits of item and author; interest in the category; the segment's intensity, alone and times the user's taste for its
topic, and its absence; the category's hour; position in the session; and generosity towards a followed author."""

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
"""Added to ``LIVE_WEIGHTS``: category -> factor -> behaviour."""

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
"""Added to the log-odds of effective_view and of long_view (rows) without and with a click (columns)."""

DEPTH_OFFSET = np.array([[-1.4, -2.0, -2.6, -1.2], [-0.3, -0.4, -0.8, -0.2], [0.4, 0.5, 0.6, 0.3]], np.float32)
"""Added to the log-odds of the interactions by how far the watching went: neither view, effective only, long."""

# All branches of a visit in one array: click, effective and long view (twice each), and the interactions by depth.
BRANCH_OF = np.array([CLICK, *2 * [EFFECTIVE_VIEW], *2 * [LONG_VIEW], *3 * [*range(len(BEHAVIOURS))[INTERACTIONS]]])
BRANCH_OFFSET = np.concatenate([[0], *UNCLICKED_OFFSET, *DEPTH_OFFSET], dtype=np.float32)[:, None]


def _context_weights() -> np.ndarray:
    """``[contexts, behaviours, factors] float32``."""
    weights = np.stack([VIDEO_WEIGHTS, *(LIVE_WEIGHTS.copy() for _ in CONTEXTS[1:])])
    for category, factors in CATEGORY_WEIGHTS.items():
        for factor, behaviours in factors.items():
            for behaviour, weight in behaviours.items():
                weights[CONTEXTS.index(category), FACTORS.index(factor), BEHAVIOURS.index(behaviour)] += weight
    return np.ascontiguousarray(weights.transpose(0, 2, 1))


WEIGHTS = _context_weights()


@dataclass(frozen=True)
class Chances:
    """True probabilities of ``n`` exposures, float32.

    Attributes:
        click: ``[n]``.
        effective: ``[2, n]`` without and with a click.
        long: ``[2, n]`` given an effective view, without and with a click.
        interaction: ``[3, 4, n]`` given a click, by how far the watching went.
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


def log_odds(factors: np.ndarray, context: np.ndarray, scene: np.ndarray, trait: np.ndarray) -> np.ndarray:
    """Log-odds of each branch before the offsets of click and depth.

    Args:
        factors: ``[factors, n] float32`` in the order of ``FACTORS``.
        context: ``[n]`` position in ``CONTEXTS``.
        scene: ``[n]`` position in ``SCENES``.
        trait: ``[behaviours, n] float32`` the users' inclinations.

    Returns:
        ``[behaviours, n] float32``.
    """
    # not a BLAS product, whose last bit depends on the processor
    of_all = np.einsum("ckf,fn->ckn", WEIGHTS, factors)
    # nine of ten are videos, so only the rooms' are picked one by one
    logits = of_all[CONTEXTS.index("video")]
    live = np.flatnonzero(context)
    logits[:, live] = of_all[context[live], :, live].T
    logits += SCENE_OFFSET.take(scene, axis=1)
    logits += trait
    return logits


def chances(logits: np.ndarray, allowed: np.ndarray) -> Chances:
    """Probabilities of every branch of a visit, and their sums.

    Args:
        logits: ``[behaviours, n]`` of ``log_odds``.
        allowed: ``[4, n] float32``, 0 for an interaction that cannot happen (a gift for a video, following again).
    """
    n = logits.shape[1]
    branch = logits.take(BRANCH_OF, axis=0)
    branch += BRANCH_OFFSET
    # the logistic function, in place
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
    return Chances(click, effective, long, interaction, marginal, marginal_long)
