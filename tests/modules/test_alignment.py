"""Contrastive loss against its formula, one pair at a time, and its effect on tables."""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from modules.alignment import SCORE_BYTES, Detached, contrastive_gradient, contrastive_loss
from modules.pooling import mean_by_row
from tests.modules.alignment_reference import alignment_loss
from tests.peak_memory import peak_bytes

TEMPERATURE = 0.3


def make_histories(rows: int, users: int, seed: int) -> tuple[list[list[Tensor]], Tensor]:
    """Three histories of float64 entries, many of them empty, of users with several rows each."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (3, rows), generator=random).tolist()
    histories = [[torch.randn(n, 5, dtype=torch.float64, generator=random) for n in of_rows] for of_rows in lengths]
    return histories, torch.randint(0, users, (rows,), generator=random)


def sides_of(histories: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    means, present = [], []
    for rows in histories:
        lengths = torch.tensor([len(entries) for entries in rows], dtype=torch.int64)
        means.append(mean_by_row(torch.cat(rows), lengths))
        present.append(lengths > 0)
    return torch.stack(means), torch.stack(present)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("detached", ["none", "anchor", "others"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_loss_and_gradients_equal_the_formula(symmetric: bool, detached: Detached, seed: int) -> None:
    histories, user_id = make_histories(17, 6, seed)
    leaves = [entries.requires_grad_() for rows in histories for entries in rows]
    sides, present = sides_of(histories)
    mine = contrastive_loss(sides, present, user_id, slice(0, 17), TEMPERATURE, symmetric=symmetric, detached=detached)
    reference = alignment_loss(histories, user_id.tolist(), TEMPERATURE, symmetric=symmetric, detached=detached)
    torch.testing.assert_close(mine, reference)
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    gradients = [
        torch.autograd.grad((loss * weights).sum(), leaves, materialize_grads=True) for loss in (mine, reference)
    ]
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bounds", [(0, 17), (0, 9, 17), (0, 0, 5, 16, 17, 17)])
def test_the_parts_of_a_batch_add_up_to_it(bounds: tuple[int, ...], seed: int) -> None:
    histories, user_id = make_histories(17, 6, seed)
    sides, present = sides_of(histories)
    sides.requires_grad_()
    whole = contrastive_loss(sides, present, user_id, slice(0, 17), TEMPERATURE)
    (expected,) = torch.autograd.grad(whole.sum(), sides)
    summed, gradient = torch.zeros_like(whole), torch.zeros_like(sides)
    for start, stop in pairwise(bounds):
        part = contrastive_loss(sides, present, user_id, slice(start, stop), TEMPERATURE)
        summed += part.detach()
        gradient += torch.autograd.grad(part.sum(), sides)[0]
    torch.testing.assert_close(summed, whole.detach())
    torch.testing.assert_close(gradient, expected)


def test_gradients_are_those_of_finite_differences() -> None:
    histories, user_id = make_histories(6, 4, 0)
    sides, present = sides_of(histories)
    sides.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda given: contrastive_loss(given, present, user_id, slice(1, 5), TEMPERATURE), sides
    )


def test_rows_without_a_side_neither_lose_nor_compare() -> None:
    sides, user_id = torch.randn(2, 4, 3), torch.arange(4)
    present = torch.tensor([[True, True, False, True], [True, True, True, False]])

    def loss(given: Tensor) -> Tensor:
        return contrastive_loss(given, present, user_id, slice(0, 4), TEMPERATURE, symmetric=False)

    changed = sides.clone()
    changed[1, 3], changed[0, 2] = 100.0, 100.0
    assert torch.equal(loss(sides), loss(changed)), "sides that rows do not have are not looked at"
    changed[1, 2] = 10 * sides[0, 0]
    changed[1, 0] = -sides[0, 0]
    nearer = changed.clone()
    nearer[1, 2] = -sides[0, 0]
    assert loss(changed) > loss(nearer), "a side whose row has no anchor is a negative still"


def test_rows_of_the_same_user_are_not_negatives() -> None:
    sides = torch.randn(2, 3, 4)
    present = torch.ones(2, 3, dtype=torch.bool)
    assert not contrastive_loss(sides, present, torch.tensor([7, 7, 7]), slice(0, 3), TEMPERATURE).any()
    alone = contrastive_loss(sides[:, ::2], present[:, ::2], torch.tensor([7, 8]), slice(0, 2), TEMPERATURE)
    among = contrastive_loss(sides, present, torch.tensor([7, 7, 8]), slice(0, 1), TEMPERATURE, symmetric=False)
    expected = contrastive_loss(
        sides[:, ::2], present[:, ::2], torch.tensor([7, 8]), slice(0, 1), TEMPERATURE, symmetric=False
    )
    torch.testing.assert_close(among, expected)
    assert (alone >= expected / 2).all()


def test_no_rows_and_tables_of_zeros_give_finite_gradients() -> None:
    empty = torch.zeros(3, 0, 4, requires_grad=True)
    nothing = contrastive_loss(empty, torch.zeros(3, 0, dtype=torch.bool), torch.zeros(0), slice(0, 0), TEMPERATURE)
    assert nothing.shape == (2,) and not nothing.any()
    sides = torch.zeros(3, 5, 4, requires_grad=True)
    loss = contrastive_loss(sides, torch.ones(3, 5, dtype=torch.bool), torch.arange(5), slice(0, 5), TEMPERATURE)
    (gradient,) = torch.autograd.grad(loss.sum(), sides)
    assert gradient.isfinite().all() and gradient.abs().max() < 1e4


@pytest.mark.parametrize("seed", range(2))
def test_alignment_pulls_the_sides_of_a_taste_together(seed: int) -> None:
    """Users of four tastes see items of their taste, with other ids in each history: only the loss connects them."""
    random = torch.Generator().manual_seed(seed)
    tastes, items, users = 4, 12, 96
    taste = torch.arange(users) % tastes
    tables = [torch.randn(tastes * items, 8, generator=random).mul_(0.1).requires_grad_() for _ in range(3)]
    seen = [taste[:, None] * items + torch.randint(0, items, (users, 5), generator=random) for _ in tables]
    present, user_id = torch.ones(3, users, dtype=torch.bool), torch.arange(users)

    def sides() -> Tensor:
        return torch.stack([table[ids].mean(1) for table, ids in zip(tables, seen, strict=True)])

    def margin() -> float:
        """Return the anchor's mean similarity to sides of its taste minus that to others, the least over histories."""
        anchor, *others = functional.normalize(sides().detach(), dim=2)
        same = taste[:, None] == taste
        cosines = [anchor @ other.t() for other in others]
        return min(float(cosine[same].mean() - cosine[~same].mean()) for cosine in cosines)

    before, optimizer = margin(), torch.optim.Adagrad(tables, lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        contrastive_loss(sides(), present, user_id, slice(0, users), 0.1).sum().backward()
        optimizer.step()
    assert abs(before) < 0.3
    assert margin() > before + 0.4


def random_sides(batch: int, dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return float32 sides of three histories, many of them absent, and users with several rows each."""
    random = torch.Generator().manual_seed(seed)
    present = torch.rand(3, batch, generator=random) < 0.8
    return (
        torch.randn(3, batch, dim, generator=random),
        present,
        torch.randint(0, batch // 2, (batch,), generator=random),
    )


@pytest.mark.parametrize("detached", ["none", "anchor", "others"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "chunk"), [((3, 37), 64), ((3, 37), 34), ((3, 37), 7), ((0, 40), 1), ((5, 5), 4)])
def test_a_gradient_in_chunks_is_that_of_autograd(
    rows: tuple[int, int], chunk: int, symmetric: bool, detached: Detached
) -> None:
    sides, present, user_id = random_sides(40, 6, 1)
    sides.requires_grad_()
    way: dict[str, Any] = {"symmetric": symmetric, "detached": detached}
    expected = contrastive_loss(sides, present, user_id, slice(*rows), TEMPERATURE, **way)
    (gradient,) = torch.autograd.grad(0.3 * expected.sum(), sides)
    budget = chunk * SCORE_BYTES * 2 * 40
    loss, found = contrastive_gradient(
        sides, present, user_id, slice(*rows), TEMPERATURE, weight=0.3, budget_bytes=budget, **way
    )
    if chunk >= rows[1] - rows[0]:
        assert torch.equal(loss, expected) and torch.equal(found, gradient), "one chunk: bit for bit"
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", [256, 1024])
def test_chunks_stay_within_their_budget(rows: int) -> None:
    """The plain loss keeps memory for its backward pass that grows with the rows; the chunks do not."""
    sides, present, user_id = random_sides(2048, 8, 2)
    kept: list[int] = []
    alive: set[int] = set()

    def pack(tensor: Tensor) -> tuple[Tensor, Tensor]:
        token = torch.empty(0)
        alive.add(id(token))
        weakref.finalize(token, alive.discard, id(token))
        sizes[id(token)] = tensor.numel() * tensor.element_size()
        kept.append(sum(sizes[each] for each in alive))
        return token, tensor

    sizes: dict[int, int] = {}
    score = 2 * rows * 2048
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved[1]):
        contrastive_loss(sides.requires_grad_(), present, user_id, slice(0, rows), TEMPERATURE)
        assert max(kept) > 8 * score, "two float32 tensors of all scores at least"
        kept.clear()
        alive.clear()
        budget = 2 << 20
        contrastive_gradient(sides.detach(), present, user_id, slice(0, rows), TEMPERATURE, budget_bytes=budget)
    assert max(kept) < budget
    assert (
        peak_bytes(
            lambda: contrastive_gradient(
                sides.detach(), present, user_id, slice(0, rows), TEMPERATURE, budget_bytes=budget
            )
        )
        < budget + 12 * sides.numel() * 4
    )
