"""Contrastive alignment of a user's histories: the mixed one against each of the others (Moment&Cross, equation 6).

A side of a row is the mean of one history's entries, ``l2norm(mean_L(V))``. The two sides of a row are a positive pair;
the other sides of the other rows of the batch are negatives (InfoNCE, van den Oord et al., 2018). The paper gives no
temperature and no weight, and leaves open whether the loss is symmetric or a side detached: all four are arguments.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Detached = Literal["none", "anchor", "others"]
"""Sides that the loss does not train."""

SHORTEST = 1e-3
"""Smallest divisor when a mean is normalised by its length: tables may start at zero."""

SCORE_BYTES = 32
"""Upper bound of the memory of one score of a row with another one, forward and backward, in float32 (measured)."""


def contrastive_loss(
    sides: Tensor,
    present: Tensor,
    user_id: Tensor,
    rows: slice,
    temperature: float,
    *,
    symmetric: bool = True,
    detached: Detached = "none",
) -> Tensor:
    """Return the InfoNCE loss of the anchor against each other side, summed over some rows of the batch.

    The loss of row i with anchor a and other side b, both unit vectors, and temperature t is

        - log( exp(a_i b_i / t) / sum_j exp(a_i b_j / t) )

    where j is i itself and every row of another user that has the side b. Other rows of the same user are not
    negatives: they should not be pushed away. The symmetric loss is the mean of this and of the same with a and b
    exchanged. A row that lacks one of the two sides has no loss; the side that it has is a negative for others.

    If the batch is distributed over ranks, each rank calls this with the whole batch and with ``rows`` set to its own
    rows. The gradients of ``sides``, summed over the ranks, are then those of the whole batch.

    Args:
        sides: ``[S, batch, dim]`` float32, means of each row's entries, not normalised; the anchor comes first.
        present: ``[S, batch]`` bool, True for rows that have entries.
        user_id: ``[batch]`` int64.
        rows: rows whose loss is returned; the negatives are those of the whole batch.
        temperature: above 0.
        symmetric: True for both directions with half the weight each; False for anchor to others only.
        detached: sides that get no gradient.

    Returns:
        ``[S - 1]`` float32, the loss of each side but the anchor, in nats.
    """
    anchor, others = _unit_sides(sides, detached)
    loss = _one_way(anchor, others, present[1:], present, user_id, rows, temperature)
    if not symmetric:
        return loss
    return (loss + _one_way(others, anchor, present[:1], present, user_id, rows, temperature)) / 2


def contrastive_gradient(
    sides: Tensor,
    present: Tensor,
    user_id: Tensor,
    rows: slice,
    temperature: float,
    *,
    symmetric: bool = True,
    detached: Detached = "none",
    weight: float = 1.0,
    budget_bytes: int = 1 << 30,
) -> tuple[Tensor, Tensor]:
    """Return the loss of :func:`contrastive_loss` and the gradient of ``weight`` times its sum, in bounded memory.

    Autograd would keep several tensors ``[S - 1, rows, batch]`` until the backward pass. Here the rows are taken in
    chunks, one direction at a time, and each chunk is forgotten when its gradient is added. If all rows fit into one
    chunk, loss and gradient equal those of autograd bit for bit, otherwise up to rounding: the same terms are added in
    another order.

    Args:
        sides, present, user_id, rows, temperature, symmetric, detached: see :func:`contrastive_loss`.
        weight: factor of the gradient.
        budget_bytes: memory of a chunk, beside the sides and their gradients. A chunk has at least one row, which takes
            :data:`SCORE_BYTES` ``* (S - 1) * batch`` bytes.

    Returns:
        The loss ``[S - 1]`` without the weight, and the gradient in the shape of ``sides``.
    """
    others, batch = len(sides) - 1, sides.shape[1]
    start, stop, _ = rows.indices(batch)
    chunk = max(1, budget_bytes // max(1, SCORE_BYTES * others * batch))
    leaf = sides.detach().requires_grad_()
    with torch.enable_grad():
        units = _unit_sides(leaf, detached)
        parts = [unit.detach().requires_grad_(unit.requires_grad) for unit in units]
    trained = [(unit, part) for unit, part in zip(units, parts, strict=True) if unit.requires_grad]
    totals: list[Tensor] = []
    loss = sides.new_zeros(others)
    share = torch.full_like(loss, weight)
    ways = [(parts[0], parts[1], present[1:])]
    if symmetric:
        # First, as in autograd's order of the backward pass.
        ways.insert(0, (parts[1], parts[0], present[:1]))
        share = share / 2
    for first in range(start, stop, chunk):
        within = slice(first, min(first + chunk, stop))
        of_chunk = []
        for query, keys, held in ways:
            with torch.enable_grad():
                one_way = _one_way(query, keys, held, present, user_id, within, temperature)
            found = torch.autograd.grad(one_way, [part for _, part in trained], share)
            # Not added to zeros: the memory layout of the first gradients decides the rounding of later sums.
            totals = [total + part for total, part in zip(totals, found, strict=True)] if totals else list(found)
            of_chunk.append(one_way.detach())
        loss += sum(of_chunk) / len(of_chunk)
    if not totals:
        return loss, torch.zeros_like(sides)
    (gradient,) = torch.autograd.grad([unit for unit, _ in trained], leaf, totals)
    return loss, gradient


def _unit_sides(sides: Tensor, detached: Detached) -> tuple[Tensor, Tensor]:
    """Return the unit vectors of the anchor, ``[1, batch, dim]``, and of the others, ``[S - 1, batch, dim]``."""
    anchor, others = (functional.normalize(part, dim=2, eps=SHORTEST) for part in (sides[:1], sides[1:]))
    anchor = anchor.detach() if detached == "anchor" else anchor
    others = others.detach() if detached == "others" else others
    return anchor, others


def _one_way(
    query: Tensor, keys: Tensor, held: Tensor, present: Tensor, user_id: Tensor, rows: slice, temperature: float
) -> Tensor:
    """Return the loss of one direction, summed over the rows that have both sides, ``[S - 1]``."""
    place = torch.arange(len(user_id), device=user_id.device)
    own = place[rows]
    itself, other_user = own[:, None] == place, user_id[rows, None] != user_id
    both = present[:1, rows] & present[1:, rows]
    scores = torch.matmul(query[:, rows], keys.transpose(1, 2)) / temperature  # [S - 1, rows, batch]
    positive = scores.gather(2, own[None, :, None].expand(len(scores), -1, -1))[..., 0]
    compared = scores.masked_fill(~(itself | (other_user & held[:, None])), -torch.inf)
    return (compared.logsumexp(2) - positive).where(both, scores.new_zeros(())).sum(1)
