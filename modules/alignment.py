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
    anchor, others = (functional.normalize(part, dim=2, eps=SHORTEST) for part in (sides[:1], sides[1:]))
    anchor = anchor.detach() if detached == "anchor" else anchor
    others = others.detach() if detached == "others" else others
    place = torch.arange(len(user_id), device=user_id.device)
    own = place[rows]
    itself, other_user = own[:, None] == place, user_id[rows, None] != user_id
    both = present[:1, rows] & present[1:, rows]

    def direction(query: Tensor, keys: Tensor, held: Tensor) -> Tensor:
        """Return the loss of one direction, summed over the rows that have both sides, ``[S - 1]``."""
        scores = torch.matmul(query[:, rows], keys.transpose(1, 2)) / temperature  # [S - 1, rows, batch]
        positive = scores.gather(2, own[None, :, None].expand(len(scores), -1, -1))[..., 0]
        compared = scores.masked_fill(~(itself | (other_user & held[:, None])), -torch.inf)
        return (compared.logsumexp(2) - positive).where(both, scores.new_zeros(())).sum(1)

    loss = direction(anchor, others, present[1:])
    return (loss + direction(others, anchor, present[:1])) / 2 if symmetric else loss
