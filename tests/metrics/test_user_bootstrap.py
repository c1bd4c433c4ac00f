"""The weighted resampling equals copying the rows of the drawn users."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from trainer.metrics.behaviour_metrics import grouped_auc
from trainer.metrics.user_bootstrap import draw_users, interval, resample_auc, resample_gauc


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_resamples_equal_copied_rows(seed: int) -> None:
    random = np.random.default_rng(seed)
    user = random.integers(100, 140, 600)
    scores = np.round(random.random(600), 2)  # ties
    labels = (random.random(600) < 0.2 + 0.5 * scores).astype(np.uint8)
    index, counts = draw_users(user, 60, seed)
    auc = resample_auc(index, counts, scores, labels)
    gauc = resample_gauc(index, counts, scores, labels)
    assert auc.value == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert gauc.value == pytest.approx(grouped_auc(user, scores, labels), abs=1e-12)
    for draw in (0, 17, 59):
        copies = counts[draw + 1]
        rows = np.repeat(np.arange(600), copies[index])
        assert auc.draws[draw] == pytest.approx(roc_auc_score(labels[rows], scores[rows]), abs=1e-12)
        # A user drawn twice counts as two users with the same AUC.
        twin = np.concatenate(
            [np.full((index == u).sum(), u * 1000 + c) for u in np.unique(index) for c in range(copies[u])]
        )
        twin_rows = np.concatenate([np.flatnonzero(index == u) for u in np.unique(index) for _ in range(copies[u])])
        assert gauc.draws[draw] == pytest.approx(grouped_auc(twin, scores[twin_rows], labels[twin_rows]), abs=1e-12)


def test_the_interval_covers_the_middle() -> None:
    low, high = interval(np.arange(1001.0))
    assert (low, high) == pytest.approx((25.0, 975.0))
