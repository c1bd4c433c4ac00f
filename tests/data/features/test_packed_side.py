"""Tests of the packed table ``side``; ``test_feature_map.py`` compares its ids with a reference row by row."""

from __future__ import annotations

import numpy as np

from trainer.data.features.packed_side import GAP_BUCKETS, gap_bucket


def test_gap_buckets_are_half_octaves_of_seconds():
    edges = [0.0, 0.5, *(2**k - 1 + half * 2 ** (k - 1) for k in range(1, 31) for half in (0, 1))]
    for bucket, edge in enumerate(edges):
        assert gap_bucket(np.array([round(edge * 1000)]))[0] == bucket
        if edge and edge < 10_000:
            assert gap_bucket(np.array([round(edge * 1000) - 1]))[0] == bucket - 1
    assert gap_bucket(np.array([-5, 2**62])).tolist() == [0, GAP_BUCKETS - 1]
