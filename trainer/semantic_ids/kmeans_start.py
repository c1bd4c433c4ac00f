"""First centroids of k-means: vectors drawn at random, and k-means++ on a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modules.codebook import nearest, row_sums
from trainer.runtime.distributed import World
from trainer.semantic_ids.vector_source import VectorSource

DRAWS_AT_ONCE = 256
"""Candidates of k-means++ that are drawn before the distances of the sample are computed again."""

_NUMBERS_AT_ONCE = 1 << 20


def mixed(numbers: np.ndarray, *seeds: int) -> np.ndarray:
    """Return a random uint64 for each number: a permutation of all 64-bit numbers that depends on the seeds.

    The steps are those of the generator splitmix64, once for each seed and once for the numbers.
    """
    state: Any = np.uint64(0)
    with np.errstate(over="ignore"):
        for seed in seeds:
            state = _mix(np.asarray(state + np.uint64(seed & 0xFFFFFFFFFFFFFFFF)))[()]
        return _mix(numbers.astype(np.uint64) + state)


def _mix(words: np.ndarray) -> np.ndarray:
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def draw_numbers(source: VectorSource, world: World, count: int, *seeds: int) -> np.ndarray:
    """Draw ``count`` different vectors of all ranks at random; return their numbers. Collective.

    Every vector has the same chance, whatever its weight. The draw depends on the seeds and the number of vectors only:
    the vectors with the smallest random keys are taken, in the order of the keys.
    """
    numbers, keys = np.empty(0, np.int64), np.empty(0, np.uint64)
    for begin in range(0, source.count, _NUMBERS_AT_ONCE):
        new = np.arange(begin, min(begin + _NUMBERS_AT_ONCE, source.count))
        numbers, keys = np.concatenate((numbers, new)), np.concatenate((keys, mixed(new, *seeds)))
        if len(keys) > count:
            best = np.argpartition(keys, count - 1)[:count]
            numbers, keys = numbers[best], keys[best]
    return numbers[np.argsort(keys)]


def plus_plus(sample: Tensor, weights: np.ndarray, codes: int, seed: Sequence[int]) -> Tensor:
    """Choose centroids among the vectors of a sample by k-means++ (Arthur and Vassilvitskii, 2007).

    Each centroid is drawn with a probability in proportion to weight times squared distance to the nearest centroid
    that was chosen before. Candidates are drawn in proportion to distances that were computed some centroids ago, and
    a candidate is accepted with the probability of the ratio of its present to its old distance, so accepted ones have
    exactly the distribution of k-means++. One product then brings all distances up to date.

    Args:
        sample: ``[m, d]`` vectors.
        weights: ``[m]`` integers.
        codes: number of centroids. If all vectors of the sample are chosen before, the rest is drawn by weight.
        seed: of the draws.

    Returns:
        The centroids, ``[codes, d]`` on the CPU.
    """
    random = np.random.default_rng(list(seed))
    chosen = [int(_draw(weights.cumsum(dtype=np.float64), random.random(1))[0])]
    distances = np.full(len(sample), np.inf)
    new = 0
    while len(chosen) < codes:
        latest = nearest(sample, sample[chosen[new:]])[1].double().cpu().numpy()
        distances, new = np.minimum(distances, latest), len(chosen)
        mass = (distances * weights).cumsum()
        if mass[-1] == 0:
            rest = _draw(weights.cumsum(dtype=np.float64), random.random(codes - len(chosen)))
            chosen += rest.tolist()
            break
        candidates = _draw(mass, random.random(DRAWS_AT_ONCE))
        chances = random.random(DRAWS_AT_ONCE)
        values, present = sample[candidates].double(), distances[candidates].copy()
        refused = 0
        for place, candidate in enumerate(candidates):
            if len(chosen) == codes or refused > place // 2 + 2:
                break
            if chances[place] * distances[candidate] < present[place]:
                chosen.append(int(candidate))
                present = np.minimum(present, row_sums((values - values[place]) ** 2).cpu().numpy())
            else:
                refused += 1
    return sample[torch.tensor(chosen, device=sample.device)].cpu()


def _draw(mass: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Return places drawn in proportion to the steps of a cumulative sum."""
    places = np.searchsorted(mass, uniform * mass[-1], side="right")
    # Rounding may give the end itself; the last place with a mass is the first one that reaches the sum.
    return np.minimum(places, np.searchsorted(mass, mass[-1], side="left"))
