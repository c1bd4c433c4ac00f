"""In-batch softmax of pairs of users and authors, one row and one negative at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def softmax_loss(
    user: Sequence[Tensor],
    author: Sequence[Tensor],
    log_q: Sequence[float],
    user_id: Sequence[int],
    author_id: Sequence[int],
    temperature: float,
) -> list[Tensor]:
    """Return the loss of each row; gradients flow into the vectors."""
    positives = set(zip(user_id, author_id, strict=True))
    losses = []
    for i, vector in enumerate(user):
        scores = {
            j: vector @ author[j] / temperature - log_q[j]
            for j in range(len(author))
            if j == i or (user_id[i], author_id[j]) not in positives
        }
        losses.append(-(scores[i] - torch.stack(list(scores.values())).logsumexp(0)))
    return losses
