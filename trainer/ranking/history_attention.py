"""Attention of a ranker to the entries of a user's histories, for one candidate: its values, and its document.

``limelight explain`` shows it for any candidate, and the evaluation keeps it for a few held-out rows
(``trainer/ranking/attention_examples.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.data.features.feature_map import FeatureMap
from trainer.data.format.history import HistorySlice
from trainer.data.format.schema import DOMAINS, Rows

SHOWN = 10
"""Entries of a history that the text shows, those with the most attention."""


@dataclass(frozen=True)
class HistoryAttention:
    """The entries of one history and the attention that each of them receives.

    Attributes:
        entries: the n entries of one row, oldest first.
        weights: ``[n, heads]`` float32, attention of each entry; the weights of a head add up to 1.
        same_value: feature that entries carry -> ``[n]`` bool, True for entries with the candidate's value.
    """

    entries: HistorySlice
    weights: np.ndarray
    same_value: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def attention(self) -> np.ndarray:
        """Mean attention over the heads, ``[n]``."""
        return self.weights.mean(1)


@dataclass(frozen=True)
class Explanation:
    """Prediction for one user, one candidate and one time, with the attention to each history.

    Attributes:
        user_id: id of the user.
        item_id: id of the candidate.
        author_id: author of the candidate.
        at_ms: time of the request, UTC.
        probabilities: behaviour -> predicted probability.
        histories: name -> entries of that history and their attention.
    """

    user_id: int
    item_id: int
    author_id: int
    at_ms: int
    probabilities: dict[str, float]
    histories: dict[str, HistoryAttention]


def same_values(features: FeatureMap, rows: Rows, entries: HistorySlice) -> dict[str, np.ndarray]:
    """Return for the tag, each author feature and each code set which entries have the value of the row in ``rows``."""
    spec, author_side = features.spec, features.fitted.author_side
    values = {spec.tag: entries.tag} if spec.tag else {}
    if author_side is not None:
        values |= dict(zip(features.author_side, author_side.lookup(entries.author_id).T, strict=True))
    candidate = dict(zip((side.name for side in spec.side), rows["side"][0].tolist(), strict=True))
    # 0 stands for an unknown value; two unknown values are not the same.
    same = {name: (column == candidate[name]) & (column > 0) for name, column in values.items()}
    return same | {f"code {name}": of_set for name, of_set in features.codes.same_code(rows, entries).items()}


def explanation_document(explanation: Explanation, behaviours: Sequence[str], shown: int = SHOWN) -> dict[str, Any]:
    """Return an explanation as a JSON document.

    Args:
        explanation: the explanation to convert.
        behaviours: behaviours of the dataset, in the order of the bits.
        shown: maximum number of entries of a history, those with the most attention first.
    """
    histories: dict[str, Any] = {}
    for name, history in explanation.histories.items():
        entries, attention = history.entries, history.attention
        histories[name] = {
            "found": len(attention),
            "entries": [
                {
                    "attention": round(float(attention[place]), 6),
                    "domain": DOMAINS[entries.domain[place]],
                    "item_id": int(entries.item_id[place]),
                    "author_id": int(entries.author_id[place]),
                    "request_ms": int(entries.request_ms[place]),
                    "behaviours": [b for bit, b in enumerate(behaviours) if entries.bits[place] >> bit & 1],
                    "as_the_candidate": [feature for feature, same in history.same_value.items() if same[place]],
                }
                for place in by_attention(attention, shown)
            ],
        }
    return {
        "user_id": explanation.user_id,
        "item_id": explanation.item_id,
        "author_id": explanation.author_id,
        "at_ms": explanation.at_ms,
        "probabilities": explanation.probabilities,
        "histories": histories,
    }


def by_attention(attention: np.ndarray, shown: int) -> np.ndarray:
    """Return the positions of the ``shown`` entries with the most attention; among equal ones the latest first."""
    order: np.ndarray = np.lexsort((-np.arange(len(attention)), -attention))[:shown]
    return order
