"""k-means: the same centroids for any chunks, bad input, and what a fit reaches."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.console.errors import UserError
from trainer.runtime.distributed import World
from trainer.semantic_ids import kmeans_start, vector_source
from trainer.semantic_ids.kmeans import Fit, KMeansSettings, fit
from trainer.semantic_ids.vector_source import StoredVectors


def fitted(source: StoredVectors, settings: KMeansSettings, **options: object) -> Fit:
    with World.join("cpu") as world:
        return fit(source, settings, world, **options)


def bits(result: Fit) -> tuple[object, ...]:
    return (*(level.numpy().tobytes() for level in result.codebook.levels), result.codebook.scales, result.history)


def blobs(count: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = random.standard_normal((20, dim)) * 3
    return (centres[random.integers(0, 20, count)] + random.standard_normal((count, dim))).astype(np.float32)


@pytest.mark.parametrize("batch", [0, 300])
def test_chunks_do_not_change_a_bit(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = StoredVectors("v", blobs(1000), "hash")
    settings = KMeansSettings((16, 8), iterations=3, batch=batch, normalize=True)
    whole = bits(fitted(source, settings))
    monkeypatch.setattr(vector_source, "CHUNK_VALUES", 100)
    monkeypatch.setattr(kmeans_start, "_NUMBERS_AT_ONCE", 64)
    assert bits(fitted(source, settings)) == whole


def test_fewer_distinct_vectors_than_centroids_are_refused_with_both_numbers() -> None:
    source = StoredVectors("table", np.repeat(blobs(10), 3, 0), "hash")
    with pytest.raises(UserError, match="table: 10 distinct vectors for 11 centroids"):
        fitted(source, KMeansSettings((11,)))
