"""One-to-one matching of the codes of two codebook versions, by the segments that both have coded.

Another start gives other numbers to the same clusters: with the same data and another seed, about one segment in a
thousand keeps its number. So the codes of a new version are renumbered: the pairs (old code, new code) are taken in the
order of their number of segments, the largest first, and a pair is a match if neither code has one yet. That is greedy:
it keeps at least half as many segments as the best matching, and in practice nearly as many (a test compares it with
scipy's). It is deterministic: of equal pairs the one with the smaller old code comes first, then the smaller new one. A
code that shares no segment with a free code gets the smallest free number. Where the numbers of the fit keep as many
segments already, as after a warm start, they stay.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class KeptShares(NamedTuple):
    """Shares of segments that keep their code.

    Attributes:
        levels: for each level.
        tuple: of segments that keep the codes of all levels.
    """

    levels: tuple[float, ...]
    tuple: float

    def document(self) -> dict[str, Any]:
        """Return the shares as a JSON object."""
        return {"levels": list(self.levels), "tuple": self.tuple}


def match_codes(old: np.ndarray, new: np.ndarray, size: int) -> np.ndarray:
    """Return the number ``[size] int64`` of each code of a new level.

    Args:
        old: ``[n]``, codes of segments by the old level, below ``size``.
        new: ``[n]``, codes of the same segments by the new level, below ``size``.
        size: number of codes of both levels.
    """
    pairs, counts = np.unique(old.astype(np.int64) * size + new, return_counts=True)
    # Stable, and pairs ascend by old and then new code.
    order = np.argsort(-counts, kind="stable")
    number, taken = np.full(size, -1, np.int64), np.zeros(size, bool)
    for pair in pairs[order].tolist():
        old_code, new_code = divmod(pair, size)
        if number[new_code] < 0 and not taken[old_code]:
            number[new_code], taken[old_code] = old_code, True
    number[number < 0] = np.flatnonzero(~taken)
    kept = (number[pairs % size] == pairs // size) @ counts
    unchanged = (pairs % size == pairs // size) @ counts
    return np.arange(size) if unchanged >= kept else number


def match_levels(old: np.ndarray, new: np.ndarray, levels: tuple[int, ...]) -> list[np.ndarray]:
    """Return the numbers of each level's new codes; ``old`` and ``new`` are codes ``[n, levels]``."""
    return [match_codes(old[:, level], new[:, level], size) for level, size in enumerate(levels)]


def renumber(codes: np.ndarray, numbers: list[np.ndarray]) -> np.ndarray:
    """Return codes ``[n, levels]`` with the numbers that :func:`match_levels` gave."""
    return np.stack([number[codes[:, level]] for level, number in enumerate(numbers)], axis=1).astype(codes.dtype)


def reorder(centroids: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Return the centroids ``[N, dim]`` of a level at the places of their new numbers."""
    ordered = np.empty_like(centroids)
    ordered[number] = centroids
    return ordered


def kept_shares(old: np.ndarray, new: np.ndarray) -> KeptShares:
    """Return the shares of segments with equal codes; ``old`` and ``new`` are codes ``[n, levels]``, n above 0."""
    equal = old == new
    return KeptShares(tuple(equal.mean(axis=0).tolist()), float(equal.all(axis=1).mean()))
