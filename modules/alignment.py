"""Contrastive alignment of a user's interests: the mixed history against each of the others (Moment&Cross, eq. 6).

A side of a row is the mean of its entries, ``l2norm(mean_L(V))``. The two sides of a row are a positive pair; the other
side of every other row of the batch is a negative (InfoNCE, van den Oord et al., 2018). The paper gives no temperature,
no weight, and does not say whether the loss is symmetric or a side detached: all four are arguments.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Detached = Literal["none", "anchor", "others"]
"""Which sides the loss does not move."""

SHORTEST = 1e-3
"""A mean shorter than this is divided by it and not by its length: tables may start at zero."""


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
    """InfoNCE of the anchor against each other side, summed over some rows, with the whole batch as negatives.

    Of row i with anchor a and other side b, both unit vectors, and temperature t:

        - log( exp(a_i b_i / t) / sum_j exp(a_i b_j / t) )

    where j is i itself and every row of another user that has the side b: what the same user's other rows hold is
    not to be pushed away. Symmetric is the mean of this and the same with a and b exchanged. Rows that lack one of the
    two sides have no loss; the side that they have is a negative for others.

    A batch that is spread over ranks is given whole to each, with ``rows`` its own part; the gradients of ``sides``,
    summed over the ranks, are then those of the whole batch.

    Args:
        sides: ``[S, batch, dim]`` float32, means of each row's entries, the anchor's first; of any length.
        present: ``[S, batch]`` bool, which rows have entries.
        user_id: ``[batch]`` int64.
        rows: those whose loss is asked for.
        temperature: above 0.
        symmetric: both directions, each with half the weight, or from the anchor to the others only.
        detached: sides to take as given.

    Returns:
        ``[S - 1]`` float32, for each side but the anchor, in nats.
    """
    anchor, others = (functional.normalize(part, dim=2, eps=SHORTEST) for part in (sides[:1], sides[1:]))
    anchor = anchor.detach() if detached == "anchor" else anchor
    others = others.detach() if detached == "others" else others
    place = torch.arange(len(user_id), device=user_id.device)
    own = place[rows]
    itself, other_user = own[:, None] == place, user_id[rows, None] != user_id
    both = present[:1, rows] & present[1:, rows]

    def towards(query: Tensor, keys: Tensor, held: Tensor) -> Tensor:
        """Sums over the rows that have both sides, ``[S - 1]``."""
        scores = torch.matmul(query[:, rows], keys.transpose(1, 2)) / temperature  # [S - 1, rows, batch]
        positive = scores.gather(2, own[None, :, None].expand(len(scores), -1, -1))[..., 0]
        compared = scores.masked_fill(~(itself | (other_user & held[:, None])), -torch.inf)
        return (compared.logsumexp(2) - positive).where(both, scores.new_zeros(())).sum(1)

    loss = towards(anchor, others, present[1:])
    return (loss + towards(others, anchor, present[:1])) / 2 if symmetric else loss
