"""Base losses against plain formulas, and on known distributions."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch

from modules.choices import BaseKind
from modules.staytime.base_losses import NDT_CEILING, NDT_SCALE_S, NDT_SHIFT, BaseLoss, fit_base

KINDS: tuple[BaseKind, ...] = get_args(BaseKind)
SEEDS = range(3)


def stays(seed: int, rows: int = 4000, opened: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Seconds, most of them zero, and durations, some of them unknown."""
    random = np.random.default_rng(seed)
    duration = random.lognormal(3, 0.8, rows)
    seconds = np.where(random.random(rows) < opened, random.lognormal(1.5, 0.7, rows), 0.0)
    duration[random.random(rows) < 0.05] = 0
    return seconds.astype(np.float32), duration.astype(np.float32)


def train_constant(base: BaseLoss, seconds: np.ndarray, duration: np.ndarray, steps: int = 400) -> torch.Tensor:
    """Return the logits, the same for every row, that minimise the loss, ``[outputs]``."""
    logits = torch.zeros(base.outputs, requires_grad=True)
    s, d = torch.from_numpy(seconds), torch.from_numpy(duration)
    optimizer = torch.optim.LBFGS([logits], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = base.loss(logits.expand(len(s), -1), s, d).mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return logits.detach()


def sigmoid(x: np.ndarray | float) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def plain(kind: str, base: BaseLoss, z: np.ndarray, s: float, d: float, training: tuple[np.ndarray, ...]) -> float:
    """Return the loss of one row by the formulas, fitted again on the training rows."""
    seconds, duration = (column.astype(np.float64) for column in training)
    if kind == "vr":
        return ((z[0] * seconds.std() + seconds.mean() - s) / seconds.std()) ** 2
    if kind == "pcr":
        median = np.median(duration[duration > 0])
        ratio = seconds / np.where(duration > 0, duration, median)
        return (z[0] - (s / (d or median) - ratio.mean()) / ratio.std()) ** 2
    if kind == "ndt":
        logs = np.log(seconds[seconds > 0])

        def transform(x: np.ndarray | float) -> np.ndarray:
            return NDT_CEILING * sigmoid((x - np.exp(logs.mean() - logs.std())) / NDT_SCALE_S) - NDT_SHIFT

        all_rows = transform(seconds)
        return float((z[0] - (transform(s) - all_rows.mean()) / all_rows.std()) ** 2)
    if kind == "wlr":
        p, q = sigmoid(z)
        return -(s * math.log(p) + math.log(q)) if s > 0 else -(math.log(1 - p) + math.log(1 - q))
    if kind == "tpm":
        bounds = base.facts["bounds"]
        leaf = sum(s > np.float32(bound) for bound in bounds)
        low, high, node, likelihood = 0, len(bounds) + 1, 0, 1.0
        # The nodes are numbered depth first, the right half before the left.
        while high - low > 1:
            middle = (low + high) // 2
            right = leaf >= middle
            likelihood *= sigmoid(z[node]) if right else 1 - sigmoid(z[node])
            node += 1 if right else high - middle
            low, high = (middle, high) if right else (low, middle)
        return -math.log(likelihood)
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "d2q"])
@pytest.mark.parametrize("seed", SEEDS)
def test_losses_are_the_plain_formulas(kind: BaseKind, seed: int) -> None:
    training = stays(seed)
    base = fit_base(kind, *training, leaves=9)
    seconds, duration = (column[:40] for column in stays(seed + 100, opened=0.6))
    logits = torch.randn(40, base.outputs, generator=torch.Generator().manual_seed(seed))
    found = base.loss(logits, torch.from_numpy(seconds), torch.from_numpy(duration))
    expected = [
        plain(kind, base, logits[row].numpy().astype(np.float64), float(seconds[row]), float(duration[row]), training)
        for row in range(40)
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_d2q_learns_the_share_of_no_longer_stays_in_the_group(seed: int) -> None:
    seconds, duration = stays(seed)
    base = fit_base("d2q", seconds, duration, duration_groups=4)
    edges = np.asarray(base.facts["duration_edges"])
    assert len(edges) == 3
    group = (duration[:, None] > edges).sum(1)
    rows = np.random.default_rng(seed).choice(len(seconds), 200)
    shares = np.array([(seconds[group == group[row]] <= seconds[row]).mean() for row in rows])
    s, d = torch.from_numpy(seconds[rows]), torch.from_numpy(duration[rows])
    z = torch.randn(200, 1, generator=torch.Generator().manual_seed(seed))
    all_shares = np.concatenate([(np.searchsorted(np.sort(seconds[group == g]), seconds[group == g], "right"))
                                 / (group == g).sum() for g in range(4)])  # fmt: skip
    expected = (sigmoid(z[:, 0].numpy()) - shares) ** 2 / all_shares.var()
    # Between the 200 points of a group the distribution is taken as linear.
    np.testing.assert_allclose(base.loss(z, s, d).numpy(), expected, rtol=0.02, atol=0.02)
    # The decoder is the inverse: the true share gives the seconds back, and less than any opened one gives zero.
    decoded = base.seconds(torch.logit(torch.from_numpy(shares).float())[:, None], d).numpy()
    inside = (seconds[rows] > 0) & (shares < 1)
    np.testing.assert_allclose(decoded[inside], seconds[rows][inside], rtol=0.03, atol=0.1)
    assert (decoded[seconds[rows] == 0] < 0.01).all()


@pytest.mark.parametrize("kind", ["vr", "wlr", "tpm"])
@pytest.mark.parametrize("opened", [0.05, 0.5, 0.95])
def test_the_mean_of_a_known_distribution_is_recovered(kind: BaseKind, opened: float) -> None:
    seconds, duration = stays(7, rows=20_000, opened=opened)
    base = fit_base(kind, seconds, duration)
    said = base.seconds(train_constant(base, seconds, duration)[None], torch.zeros(1)).item()
    truth = opened * math.exp(1.5 + 0.7**2 / 2)
    assert said == pytest.approx(float(seconds.mean()), rel=2e-3)
    assert said == pytest.approx(truth, rel=0.06)


def test_pcr_recovers_a_stay_that_is_a_share_of_the_duration() -> None:
    random = np.random.default_rng(1)
    duration = random.uniform(5, 300, 20_000).astype(np.float32)
    seconds = (duration * random.choice([0.0, 0.2, 0.6], 20_000)).astype(np.float32)
    base = fit_base("pcr", seconds, duration)
    logits = train_constant(base, seconds, duration)
    said = base.seconds(logits.expand(2, 1), torch.tensor([30.0, 90.0]))
    np.testing.assert_allclose(said.numpy(), [30 * 0.8 / 3, 90 * 0.8 / 3], rtol=0.02)


def test_d2q_recovers_a_quantile_of_each_duration_group() -> None:
    """Stays are uniform in [0, duration], so the median of a group is half of its duration."""
    random = np.random.default_rng(1)
    duration = random.choice(np.float32([20, 100]), 20_000)
    seconds = (duration * random.random(20_000)).astype(np.float32)
    base = fit_base("d2q", seconds, duration, duration_groups=4)
    logits = train_constant(base, seconds, duration)
    assert torch.sigmoid(logits).item() == pytest.approx(0.5, abs=0.01)
    said = base.seconds(logits.expand(2, 1), torch.tensor([20.0, 100.0]))
    np.testing.assert_allclose(said.numpy(), [10, 50], rtol=0.03)


def test_ndt_recovers_the_mean_of_the_transform() -> None:
    seconds, duration = stays(3)
    base = fit_base("ndt", seconds, duration)
    offset = base.facts["offset"]
    mean = (NDT_CEILING * sigmoid((seconds - offset) / NDT_SCALE_S) - NDT_SHIFT).mean()
    expected = offset + NDT_SCALE_S * -math.log(NDT_CEILING / (mean + NDT_SHIFT) - 1)
    said = base.seconds(train_constant(base, seconds, duration)[None], torch.zeros(1)).item()
    assert said == pytest.approx(expected, rel=1e-3)
    logs = np.log(seconds[seconds > 0])
    assert offset == pytest.approx(math.exp(logs.mean() - logs.std()), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_logits_predict_the_average_of_training(kind: BaseKind) -> None:
    seconds, duration = stays(2)
    base = fit_base(kind, seconds, duration)
    s, d = torch.from_numpy(seconds), torch.from_numpy(duration)
    best = base.loss(train_constant(base, seconds, duration).expand(len(s), -1), s, d).mean()
    assert base.loss(base.start.expand(len(s), -1), s, d).mean().item() == pytest.approx(best.item(), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_predictions_stay_between_zero_and_the_longest_stay(kind: BaseKind, scale: float) -> None:
    seconds, duration = stays(4)
    base = fit_base(kind, seconds, duration)
    logits = scale * torch.randn(500, base.outputs, generator=torch.Generator().manual_seed(1))
    said = base.seconds(logits, torch.from_numpy(duration[:500]))
    assert said.isfinite().all() and (said >= 0).all() and (said <= base.limit).all()
    assert base.limit == seconds.max()
    assert base.loss(logits, torch.from_numpy(seconds[:500]), torch.from_numpy(duration[:500])).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["one row", "one stay of all", "no duration", "one long one"])
def test_few_or_equal_rows_fit(kind: BaseKind, case: str) -> None:
    seconds = {
        "one row": [3.0],
        "one stay of all": [3.0, 3, 3],
        "no duration": [0.0, 2, 5],
        "one long one": [0, 0, 300],
    }
    duration = {"no duration": [0.0, 0, 0]}.get(case, [10.0, 20, 10][: len(seconds[case])])
    s, d = np.asarray(seconds[case], np.float32), np.asarray(duration, np.float32)
    base = fit_base(kind, s, d)
    logits = base.start.expand(len(s), -1).clone().requires_grad_()
    base.loss(logits, torch.from_numpy(s), torch.from_numpy(d)).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert base.seconds(logits, torch.from_numpy(d)).isfinite().all()


def test_nothing_opened_and_unknown_bases_are_refused() -> None:
    with pytest.raises(ValueError, match="no row has a stay above zero"):
        fit_base("wlr", np.zeros(3), np.ones(3))
    with pytest.raises(ValueError, match="no base loss is called 'svr'"):
        fit_base("svr", np.ones(3), np.ones(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("leaves", [2, 3, 5])
def test_leaves_of_a_tree_are_zero_and_equal_parts_of_the_stays(leaves: int) -> None:
    """Stays of 1 to 20 seconds, and as many of zero: each leaf has as many stays, and their mean."""
    stays = np.concatenate([np.zeros(20), np.arange(1.0, 21.0)])
    base: Any = fit_base("tpm", stays, np.ones(40), leaves=leaves)
    cuts = [0.0, *(float(np.quantile(stays[20:], part / (leaves - 1))) for part in range(1, leaves - 1))]
    assert base.bounds.tolist() == pytest.approx(cuts)
    edges = [-1.0, *cuts, np.inf]
    means = [stays[(stays > low) & (stays <= high)].mean() for low, high in pairwise(edges)]
    assert len(means) == leaves and base.means.tolist() == pytest.approx(means)
