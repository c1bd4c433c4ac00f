"""Auxiliary losses of LCU against plain formulas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from modules.staytime.comment_losses import (
    listmle,
    mean_over,
    ranked_rows,
    released_listmle,
    released_touched_bce,
    touched_bce,
)

SEEDS = range(5)


def random_batch(seed: int, batch: int = 20, comments: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, popularity with ties, touched and present."""
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(batch, comments, generator=generator)
    popularity = torch.randint(0, 4, (batch, comments), generator=generator)
    present = torch.rand(batch, comments, generator=generator) < 0.7
    touched = (torch.rand(batch, comments, generator=generator) < 0.3) & present
    return scores, popularity, touched, present


def plain_listmle(scores: np.ndarray, popularity: np.ndarray) -> float:
    """One row without padding."""
    order = np.argsort(-popularity, kind="stable")
    s = scores[order]
    return -sum(math.log(math.exp(s[i]) / np.exp(s[i:]).sum()) for i in range(len(s)))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_listmle_is_the_plain_formula_over_the_present_comments(seed: int) -> None:
    scores, popularity, _, present = random_batch(seed)
    for loss, prepare in ((listmle, lambda s: s), (released_listmle, softmax)):
        found = loss(scores, popularity, present).numpy()
        for row in range(len(scores)):
            there = present[row].numpy()
            s, p = scores[row].numpy().astype(np.float64)[there], popularity[row].numpy()[there]
            expected = plain_listmle(prepare(s), p) if len(s) else 0.0
            assert found[row] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_listmle_is_the_likelihood_of_an_order() -> None:
    """Over all orders of the comments the probabilities add up to one."""
    scores = torch.tensor([[0.3, -1.2, 2.0, 0.1]])
    present = torch.ones(1, 4, dtype=torch.bool)
    total = sum(
        math.exp(-listmle(scores, torch.tensor([order]), present).item()) for order in itertools.permutations(range(4))
    )
    assert total == pytest.approx(1.0, abs=1e-5)


def test_probabilities_leave_listmle_hardly_any_room() -> None:
    """Defect of the released code: for six comments the best loss is 5.83, and equal scores already give 6.58."""
    popularity, present = torch.arange(6, 0, -1)[None], torch.ones(1, 6, dtype=torch.bool)
    scores = torch.zeros(1, 6, requires_grad=True)
    assert released_listmle(scores, popularity, present).item() == pytest.approx(math.log(720), abs=1e-4)
    optimizer = torch.optim.Adam([scores], lr=0.2)
    for _ in range(500):
        optimizer.zero_grad()
        released_listmle(scores, popularity, present).sum().backward()
        optimizer.step()
    assert released_listmle(scores, popularity, present).item() == pytest.approx(5.83, abs=0.01)
    assert listmle(torch.tensor([[60.0, 50, 40, 30, 20, 10]]), popularity, present).item() < 0.001


@pytest.mark.parametrize("seed", SEEDS)
def test_touched_bce_is_the_plain_formula(seed: int) -> None:
    scores, _, touched, present = random_batch(seed)
    plain, released = touched_bce(scores, touched, present), released_touched_bce(scores, touched, present)
    for row in range(len(scores)):
        there, hit = present[row].numpy(), touched[row].numpy()
        s = scores[row].numpy().astype(np.float64)
        losses = {True: np.log1p(np.exp(-s)), False: np.log1p(np.exp(s))}
        expected = np.where(hit, losses[True], losses[False])[there].mean() if hit.any() else 0.0
        assert plain[row].item() == pytest.approx(expected, rel=1e-4)
        if hit.any():
            share = softmax(s[there])
            expected = -np.where(hit[there], np.log(share), np.log1p(-share)).mean()
            assert released[row].item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("loss", [listmle, released_listmle, touched_bce, released_touched_bce])
@pytest.mark.parametrize("seed", SEEDS)
def test_padding_and_empty_rows_change_nothing_and_get_no_gradient(loss: object, seed: int) -> None:
    scores, popularity, touched, present = random_batch(seed)
    present[0] = False
    touched &= present
    target = touched if "touched" in loss.__name__ else popularity  # type: ignore[attr-defined]
    scores = (1e3 * scores).requires_grad_()
    value = loss(scores, target, present)  # type: ignore[operator]
    value.sum().backward()
    assert scores.grad is not None and scores.grad.isfinite().all()
    assert (scores.grad[~present] == 0).all()
    assert value[0] == 0
    other = torch.where(present, scores.detach(), torch.full_like(scores, 77.0))
    assert torch.equal(loss(other, target, present), value.detach())  # type: ignore[operator]


def test_softmax_cannot_say_that_two_comments_were_touched() -> None:
    touched = torch.tensor([[1, 1, 0, 0]], dtype=torch.bool)
    present = torch.ones(1, 4, dtype=torch.bool)
    scores = torch.tensor([[30.0, 30, -30, -30]])
    assert touched_bce(scores, touched, present).item() < 1e-6
    # Best possible: half of the mass each, two times log 2 over four comments ...
    assert released_touched_bce(scores, touched, present).item() == pytest.approx(math.log(2) / 2, abs=1e-4)


def test_rows_without_an_order_are_recognised() -> None:
    popularity = torch.tensor([[3, 3, 3], [3, 3, 1], [2, 2, 9], [5, 0, 0], [4, 4, 4]])
    present = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    assert ranked_rows(popularity, present).tolist() == [False, True, False, False, False]


def test_mean_over_some_rows() -> None:
    losses = torch.tensor([1.0, float("nan"), 5.0])
    assert mean_over(losses, torch.tensor([True, False, True])).item() == 3
    assert mean_over(losses, torch.tensor([False, False, False])).item() == 0
