"""The masked loss against a loop over labels."""

from __future__ import annotations

import math

import pytest
import torch

from modules.losses import masked_bce


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
def test_what_is_masked_has_neither_loss_nor_gradient(nonsense: float) -> None:
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
