"""Masked loss against a loop over labels."""

from __future__ import annotations

import math

import pytest
import torch

from modules.losses import masked_bce, report_loss, retraction


@pytest.mark.parametrize("seed", range(5))
def test_sums_are_those_of_a_loop_over_labels_that_count(seed: int) -> None:
    torch.manual_seed(seed)
    batch, behaviours = 17, 4
    logits = torch.randn(batch, behaviours, requires_grad=True)
    label, mask = torch.randint(0, 2, (2, batch, behaviours)).float()
    weight = torch.rand(behaviours)

    total, sums = masked_bce(logits, label, mask, weight)

    expected = [0.0] * behaviours
    slope = torch.zeros(batch, behaviours)
    for row in range(batch):
        for k in range(behaviours):
            if mask[row, k]:
                p = 1 / (1 + math.exp(-logits[row, k].item()))
                expected[k] -= math.log(p if label[row, k] else 1 - p)
                slope[row, k] = weight[k] * (p - float(label[row, k]))
    torch.testing.assert_close(sums, torch.tensor(expected))
    torch.testing.assert_close(total, (torch.tensor(expected) * weight).sum())
    assert not sums.requires_grad
    torch.testing.assert_close(torch.autograd.grad(total, logits)[0], slope)


@pytest.mark.parametrize("nonsense", [math.inf, -math.inf, 1e30])
def test_masked_labels_have_neither_loss_nor_gradient(nonsense: float) -> None:
    logits = torch.tensor([[0.3, nonsense]], requires_grad=True)
    total, sums = masked_bce(logits, torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.ones(2))
    assert sums[1] == 0
    torch.testing.assert_close(total, torch.tensor(math.log1p(math.exp(-0.3))))
    slope = torch.autograd.grad(total, logits)[0]
    assert torch.isfinite(slope).all() and slope[0, 1] == 0


def test_confident_logits_stay_finite() -> None:
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    total, _ = masked_bce(logits, torch.tensor([[0.0, 1.0]]), torch.ones(1, 2), torch.ones(2))
    assert float(total) == 400
    assert torch.autograd.grad(total, logits)[0].tolist() == [[1.0, -1.0]]


def test_low_precision_logits_are_summed_in_float32() -> None:
    logits = torch.zeros(5000, 1, dtype=torch.bfloat16)
    total, sums = masked_bce(logits, torch.zeros(5000, 1), torch.ones(5000, 1), torch.ones(1))
    assert total.dtype == sums.dtype == torch.float32
    assert float(total) == pytest.approx(5000 * math.log(2), rel=1e-5)


def test_a_batch_of_no_rows_loses_nothing() -> None:
    logits = torch.zeros(0, 3, requires_grad=True)
    total, sums = masked_bce(logits, torch.zeros(0, 3), torch.zeros(0, 3), torch.ones(3))
    assert float(total.detach()) == 0 and sums.tolist() == [0, 0, 0]
    total.backward()


@pytest.mark.parametrize("seed", range(5))
def test_a_denied_positive_and_its_retraction_pull_like_a_positive(seed: int) -> None:
    """Equations 2 and 3: the gradients of a fast and a slow row add up to that of one row with label 1."""
    torch.manual_seed(seed)
    logits = (5 * torch.randn(40, 3)).requires_grad_()
    denied, weight = torch.randint(0, 2, (40, 3)).float(), torch.rand(3)
    everything = torch.ones(40, 3)

    fast, _ = masked_bce(logits, torch.zeros(40, 3), everything, weight)
    slow, _ = retraction(logits, denied, weight)
    at_once, _ = masked_bce(logits, denied, everything, weight)
    slope = torch.autograd.grad(fast + slow, logits, retain_graph=True)[0]
    torch.testing.assert_close(slope, torch.autograd.grad(at_once, logits)[0])


@pytest.mark.parametrize("probability", [0.001, 0.3, 0.5, 0.97])
def test_the_retraction_is_the_papers_formula(probability: float) -> None:
    logit = torch.tensor([[math.log(probability / (1 - probability))]])
    total, sums = retraction(logit, torch.ones(1, 1), torch.tensor([3.0]))
    printed = -(math.log(probability) - math.log(1 - probability))
    assert float(sums[0]) == pytest.approx(printed, rel=1e-5) and float(total) == pytest.approx(3 * printed, rel=1e-5)


@pytest.mark.parametrize("extreme", [200.0, -200.0, 1e30, -1e30, math.inf, -math.inf])
def test_slopes_of_fast_and_slow_rows_stay_finite(extreme: float) -> None:
    logits = torch.full((2, 2), extreme, requires_grad=True)
    label, mask = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    total, _ = report_loss(logits, label, mask, torch.tensor([False, True]), torch.ones(2))
    slope = torch.autograd.grad(total, logits)[0]
    assert slope.tolist() == [[float(extreme > 0), 0], [-1, 0]]


def test_each_kind_of_row_has_its_own_loss() -> None:
    torch.manual_seed(0)
    logits, weight = torch.randn(12, 4, requires_grad=True), torch.rand(4)
    label, mask = torch.randint(0, 2, (2, 12, 4)).float()
    slow = torch.arange(12) % 3 == 0

    total, sums = report_loss(logits, label, mask, slow, weight)
    late, late_sums = retraction(logits[slow], mask[slow], weight)
    plain, plain_sums = masked_bce(logits[~slow], label[~slow], mask[~slow], weight)
    torch.testing.assert_close(total, late + plain)
    torch.testing.assert_close(sums, late_sums + plain_sums)
    assert not sums.requires_grad


@pytest.mark.parametrize("limit", [0.4, 1.0, 2.0, 5.0])
def test_a_limited_retraction_has_a_bounded_importance_weight(limit: float) -> None:
    # 0.5 and 0.8 are the edges of limits 2 and 5.
    p = torch.tensor([1e-6, 0.01, 0.4999, 0.5, 0.5001, 0.79, 0.8, 0.99, 1 - 1e-6], dtype=torch.float64)
    logits = torch.logit(p)[:, None].float().requires_grad_()
    total, sums = retraction(logits, torch.ones(9, 1), torch.tensor([3.0]), limit)
    slope = torch.autograd.grad(total, logits)[0][:, 0]
    expected = -(limit * (1 - p)).clamp(max=1)
    torch.testing.assert_close(slope, 3 * expected.float(), rtol=1e-4, atol=1e-6)
    # The loss is the integral of this slope that is 0 for a certain positive.
    each = torch.cat([retraction(row[None], torch.ones(1, 1), torch.ones(1), limit)[1] for row in logits.detach()])
    edge = max(limit - 1, 0)
    below = limit * math.log(limit / edge) + math.log(edge) - torch.logit(p) if edge else torch.zeros_like(p)
    closed = torch.where(p < 1 - 1 / limit, below, -limit * torch.log(p)) if edge else -limit * torch.log(p)
    torch.testing.assert_close(each, closed.float(), rtol=1e-3, atol=1e-5)
    assert (each > 0).all() and float(sums[0]) == pytest.approx(float(each.sum()), rel=1e-5)


@pytest.mark.parametrize(("limit", "probability"), [(0.0, 0.3), (1.0, 0.3 / 1.06), (2.0, 0.3)])
def test_a_fast_and_a_limited_slow_row_are_balanced_where_the_docstring_says(limit: float, probability: float) -> None:
    q, s = 0.3, 0.8
    # Of all visits: positives that the fast row has, those that only the slow row has, and negatives.
    logit = torch.full((4, 1), math.log(probability / (1 - probability)), requires_grad=True)
    share = torch.tensor([q * s, q * (1 - s), 1 - q * s])
    mask, label = torch.ones(4, 1), torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    slow = torch.tensor([False, True, False, False])
    slopes = [
        torch.autograd.grad(
            report_loss(logit, label, mask * (torch.arange(4) == row)[:, None], slow, torch.ones(1), limit)[0], logit
        )[0][row, 0]
        for row in range(3)
    ]
    assert float((torch.stack(slopes) * share).sum()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [0.0, 1.0, 2.0, 5.0])
def test_bias_and_variance_of_a_slow_row_are_those_of_the_docstring(limit: float, seed: int) -> None:
    """Mean and second moment over the outcomes of visits, for random true, seen and predicted probabilities."""
    p, q, s = torch.rand(3, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).clamp(0.01, 0.99)
    logits = torch.logit(p).float()[:, None]
    ones = torch.ones(30, 1)

    def slope(label: float, slow: bool) -> torch.Tensor:
        at = logits.clone().requires_grad_()
        total, _ = report_loss(at, label * ones, ones, torch.full((30,), slow), torch.ones(1), limit)
        return torch.autograd.grad(total, at)[0][:, 0].double()

    late = q * (1 - s)
    fast = q * s * slope(1, False) + (1 - q * s) * slope(0, False)
    mean, square = fast + late * slope(1, True), late * slope(1, True).square()
    bounded = (limit * (1 - p)).clamp(max=1) if limit else torch.ones_like(p)
    torch.testing.assert_close(mean, p - q * s - late * bounded, rtol=1e-4, atol=1e-5)
    # The gradient without bias is p - q.
    torch.testing.assert_close(mean - (p - q), late * (1 - bounded), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(square, late * bounded.square(), rtol=1e-4, atol=1e-5)
    assert (square <= late * (1 + 1e-6)).all()


@pytest.mark.parametrize("extreme", [200.0, -200.0, 1e30, -1e30])
@pytest.mark.parametrize("limit", [1.0, 3.0])
def test_a_limited_retraction_stops_at_a_certain_positive(extreme: float, limit: float) -> None:
    logits = torch.tensor([[extreme]], requires_grad=True)
    total, _ = retraction(logits, torch.ones(1, 1), torch.ones(1), limit)
    slope = torch.autograd.grad(total, logits)[0]
    assert slope.item() == (0 if extreme > 0 else -1) and total.item() >= 0
