"""Auxiliary losses of LCU: popularity of comments, and comments that this user touches.

Each loss also has the variant of the paper's released code, which differs from the paper: it applies a softmax to the
scores first. ListMLE of six probabilities always lies between 5.83 and 6.58, and probabilities that add up to 1 cannot
express that a user touches two comments.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_ABSENT = -1e4
"""Score of padding: its exponential is zero, and its gradient is not NaN."""


def listmle(scores: Tensor, popularity: Tensor, present: Tensor) -> Tensor:
    """Return the ListMLE loss of the comments in order of popularity (Xia et al., 2008).

    The loss is ``-sum_i log(exp(s_i) / sum_{j >= i} exp(s_j))`` over the comments, the most popular first.

    Args:
        scores: ``[batch, comments]`` float.
        popularity: ``[batch, comments]``; of equally popular comments the one in the earlier place counts as the more
            popular, so callers shuffle the places.
        present: ``[batch, comments]`` bool, False for padding.

    Returns:
        ``[batch]``, in nats; 0 for a row with fewer than two comments.
    """
    least = torch.finfo(torch.float32).min
    order = popularity.float().masked_fill(~present, least).argsort(dim=1, descending=True, stable=True)
    ordered = scores.masked_fill(~present, _ABSENT).gather(1, order)
    rest = ordered.flip(1).logcumsumexp(1).flip(1)
    return (rest - ordered).where(present.gather(1, order), ordered.new_zeros(())).sum(1)


def touched_bce(scores: Tensor, touched: Tensor, present: Tensor) -> Tensor:
    """Return the sigmoid cross-entropy of touched comments, averaged over the comments of a row.

    Args:
        scores: ``[batch, comments]`` float.
        touched: ``[batch, comments]`` bool, True for comments that the user interacted with.
        present: ``[batch, comments]`` bool, False for padding.

    Returns:
        ``[batch]``; 0 for a row without touched comments.
    """
    losses = functional.binary_cross_entropy_with_logits(scores, touched.to(scores.dtype), reduction="none")
    return _of_touched_rows(losses, touched, present)


def released_listmle(scores: Tensor, popularity: Tensor, present: Tensor) -> Tensor:
    """Return :func:`listmle` of softmax probabilities, as the released code computes it."""
    return listmle(_probabilities(scores, present), popularity, present)


def released_touched_bce(scores: Tensor, touched: Tensor, present: Tensor) -> Tensor:
    """Return the cross-entropy of each comment's softmax probability, as the released code computes it."""
    shares = _probabilities(scores, present).clamp(1e-7, 1 - 1e-7)
    return _of_touched_rows(
        functional.binary_cross_entropy(shares, touched.to(scores.dtype), reduction="none"), touched, present
    )


def ranked_rows(popularity: Tensor, present: Tensor) -> Tensor:
    """Return ``[batch]`` bool, True for rows whose comments differ in popularity and so have an order to learn."""
    popularity = popularity.float()
    most = popularity.masked_fill(~present, -torch.inf).amax(1)
    least = popularity.masked_fill(~present, torch.inf).amin(1)
    return most > least


def mean_over(losses: Tensor, rows: Tensor) -> Tensor:
    """Return the mean of ``losses [batch]`` over the ``rows [batch]`` that are True; 0 if there is none."""
    return losses.where(rows, losses.new_zeros(())).sum() / rows.sum().clamp(min=1)


def _of_touched_rows(losses: Tensor, touched: Tensor, present: Tensor) -> Tensor:
    """Return the mean over the comments of each row, ``[batch]``; 0 for rows without touched comments."""
    kept = present & touched.any(1, keepdim=True)
    return losses.where(kept, losses.new_zeros(())).sum(1) / present.sum(1).clamp(min=1)


def _probabilities(scores: Tensor, present: Tensor) -> Tensor:
    """Return the softmax of the scores over the comments that are present."""
    return scores.masked_fill(~present, _ABSENT).softmax(1)
