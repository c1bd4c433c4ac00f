"""Behaviour metrics compared with scikit-learn, and the bounded variant with the exact one."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from trainer.console.errors import UserError
from trainer.metrics import behaviour_metrics
from trainer.metrics.behaviour_metrics import BehaviourMetrics, ProgressiveMetrics, auc, grouped_auc, user_auc

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def random_rows(seed: int, rows: int = 3000, users: int = 60, behaviours: int = 3, levels: int = 0) -> Rows:
    """Make rows whose labels depend on their scores; ``levels`` > 0 rounds the scores to make ties."""
    generator = np.random.default_rng(seed)
    probability = generator.beta(1, 3, (rows, behaviours))
    label = generator.random((rows, behaviours)) < probability
    logit = np.log(probability / (1 - probability)) + generator.normal(0, 0.5, probability.shape)
    score = 1 / (1 + np.exp(-logit))
    score = np.round(score * levels) / levels if levels else score
    mask = generator.random((rows, behaviours)) < 0.8
    user_id = generator.integers(0, users, rows) ** 3
    return torch.tensor(user_id), torch.tensor(score).float(), torch.tensor(label), torch.tensor(mask)


def add_in_batches(metrics: BehaviourMetrics | ProgressiveMetrics, rows: Rows, size: int = 257) -> None:
    for start in range(0, len(rows[0]), size):
        metrics.update(*(column[start : start + size] for column in rows))


@pytest.mark.parametrize("levels", [0, 2, 10])
@pytest.mark.parametrize("seed", range(3))
def test_exact_metrics_equal_scikit_learn(seed: int, levels: int) -> None:
    rows = random_rows(seed, levels=levels)
    metrics = BehaviourMetrics(["a", "b", "c"])
    add_in_batches(metrics, rows)
    user_id, score, label, mask = (column.numpy() for column in rows)
    for k, got in enumerate(metrics.compute().values()):
        kept = mask[:, k]
        users, scores, labels = user_id[kept], score[kept, k], label[kept, k]
        per_user = [
            (roc_auc_score(labels[users == user], scores[users == user]), (users == user).sum())
            for user in np.unique(users)
            if 0 < labels[users == user].mean() < 1
        ]
        areas, weights = np.array(per_user).T
        clipped = np.clip(scores.astype(np.float64), 2**-23, 1 - 2**-23)
        base = log_loss(labels, np.full(len(labels), labels.mean()))
        assert got["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        assert got["gauc"] == pytest.approx(np.average(areas, weights=weights), abs=1e-12)
        assert got["uauc"] == pytest.approx(areas.mean(), abs=1e-12)
        assert got["logloss"] == pytest.approx(log_loss(labels, clipped), rel=1e-9)
        assert got["ne"] == pytest.approx(log_loss(labels, clipped) / base, rel=1e-9)
        assert got["calibration"] == pytest.approx(scores.astype(np.float64).sum() / labels.sum(), rel=1e-9)
        assert (got["positives"], got["rows"]) == (labels.sum(), kept.sum())


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([-(2**63), -1, 0, 3, 2**63 - 1]),
            st.sampled_from([-1.0, -0.5, -0.0, 0.0, 1e-40, 0.5, 2.0]),
            st.booleans(),
        ),
        max_size=40,
    ),
    st.sampled_from([np.float32, np.float64]),
)
def test_auc_counts_pairs(rows: list[tuple[int, float, bool]], dtype: type[np.floating[Any]]) -> None:
    """Compare with the definition, pair by pair, with heavy ties, absent classes and no rows at all."""

    def by_pairs(part: list[tuple[int, float, bool]]) -> float | None:
        wins = [(p > n) + (p == n) / 2 for _, p, up in part if up for _, n, down in part if not down]
        return sum(wins) / len(wins) if wins else None

    user = np.array([row[0] for row in rows], np.int64)
    score, label = np.array([row[1] for row in rows], dtype), np.array([row[2] for row in rows], bool)
    expected = {u: by_pairs([row for row in rows if row[0] == u]) for u in sorted(set(user.tolist()))}
    expected = {u: area for u, area in expected.items() if area is not None}
    assert auc(score, label) == pytest.approx(by_pairs(rows))
    users, areas, counts = user_auc(user, score, label)
    assert users.tolist() == list(expected)
    assert areas.tolist() == list(expected.values()), "the same to the last bit"
    assert counts.tolist() == [(user == u).sum() for u in expected]
    mean = float(np.mean(list(expected.values()))) if expected else None
    assert grouped_auc(user, score, label, weighted=False) == pytest.approx(mean)


@pytest.mark.parametrize("kind", [BehaviourMetrics, ProgressiveMetrics])
def test_what_is_undefined_is_none(kind: type[BehaviourMetrics] | type[ProgressiveMetrics]) -> None:
    metrics = kind(["never", "always", "masked"])
    metrics.update(
        torch.tensor([1, 1, 2]),
        torch.full((3, 3), 0.25),
        torch.tensor([[0, 1, 1]] * 3),
        torch.tensor([[1, 1, 0]] * 3),
    )
    report = metrics.compute()
    undefined = dict.fromkeys(["auc", "gauc", "uauc", "ne"])
    never, always = {"logloss": -np.log(0.75), "calibration": None}, {"logloss": np.log(4), "calibration": 0.25}
    assert report["never"] == pytest.approx({**undefined, **never, "positives": 0, "rows": 3})
    assert report["always"] == pytest.approx({**undefined, **always, "positives": 3, "rows": 3})
    assert report["masked"] == {**undefined, "logloss": None, "calibration": None, "positives": 0, "rows": 0}
    assert kind(["x"]).compute()["x"] == report["masked"]


@pytest.mark.parametrize("kind", [BehaviourMetrics, ProgressiveMetrics])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_are_refused(
    kind: type[BehaviourMetrics] | type[ProgressiveMetrics], bad: float
) -> None:
    user_id, score, label, mask = random_rows(0, rows=20, behaviours=2)
    score[3, 1], mask[3, 1] = bad, True
    metrics = kind(["a", "b"])
    metrics.update(user_id, score, label, mask)
    with pytest.raises(UserError, match="predictions of b "):
        metrics.compute()
    mask[3, 1] = False
    masked = kind(["a", "b"])
    masked.update(user_id, score, label, mask)
    assert masked.compute()["b"]["rows"] == mask[:, 1].sum()


@pytest.mark.parametrize("bins", [16, 256, 16384])
@pytest.mark.parametrize("seed", range(3))
def test_progressive_auc_is_within_its_stated_resolution(seed: int, bins: int) -> None:
    rows = random_rows(seed)
    exact, bounded = BehaviourMetrics(["a", "b", "c"]), ProgressiveMetrics(["a", "b", "c"], bins=bins)
    add_in_batches(exact, rows)
    add_in_batches(bounded, rows)
    resolution, report = bounded.resolution(), bounded.compute()
    for behaviour, expected in exact.compute().items():
        got = report[behaviour]
        limit = resolution[behaviour]
        assert limit is not None and limit < 8 / bins
        assert abs(got.pop("auc") - expected.pop("auc")) <= limit
        assert got == pytest.approx(expected)


def test_progressive_user_sample_is_bounded_and_unbiased() -> None:
    rows = random_rows(5, rows=40_000, users=4000)
    exact, bounded = BehaviourMetrics(["a", "b", "c"]), ProgressiveMetrics(["a", "b", "c"], sampled_rows=8000)
    add_in_batches(exact, rows)
    add_in_batches(bounded, rows)
    sample = bounded.state_dict()["sample"]["user_id"]
    assert 2000 < len(sample) <= 8000
    assert torch.isin(rows[0], sample).sum() == len(sample), "a sampled user is kept with all rows"
    report = bounded.compute()
    for behaviour, expected in exact.compute().items():
        assert report[behaviour]["gauc"] != expected["gauc"]
        assert report[behaviour]["gauc"] == pytest.approx(expected["gauc"], abs=0.03)


def test_users_at_the_limit_are_not_in_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's bucket is its id here, of 16 buckets; two ranks have the same rows."""
    monkeypatch.setattr(behaviour_metrics, "_USER_BUCKETS", 16)
    monkeypatch.setattr(behaviour_metrics, "_user_bucket", np.asarray)
    metrics = ProgressiveMetrics(["a"], sampled_rows=6)
    for users in ([0, 1, 2, 4, 8, 8], [8], [8, 9]):
        ones = torch.ones(len(users), 1)
        metrics.update(torch.tensor(users), ones / 2, ones, ones)
    assert metrics.state_dict()["sample"]["user_id"].tolist() == [0, 1, 2, 4]
    ranks: Any = SimpleNamespace(gather=lambda values: np.stack([values, values]))
    assert metrics._shared_sample(ranks)[0].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("sampled_rows", [1 << 18, 500])
def test_state_continues_exactly_and_adds_up(sampled_rows: int) -> None:
    rows = random_rows(7)
    first, second = (tuple(column[part] for column in rows) for part in (slice(0, 5 * 257), slice(5 * 257, None)))
    for make in (
        lambda: BehaviourMetrics(["a", "b", "c"]),
        lambda: ProgressiveMetrics(["a", "b", "c"], sampled_rows=sampled_rows),
    ):
        whole, one, other, joined = make(), make(), make(), make()
        add_in_batches(whole, rows)
        add_in_batches(one, first)
        state = one.state_dict()
        other.load_state_dict(state)
        add_in_batches(other, second)
        assert other.compute() == whole.compute()
        tail = make()
        add_in_batches(tail, second)
        joined.load_state_dict(state, tail.state_dict())
        got = joined.compute()
        for behaviour, expected in whole.compute().items():
            assert got[behaviour]["auc"] == expected["auc"]
            assert got[behaviour] == pytest.approx(expected, rel=1e-12)
