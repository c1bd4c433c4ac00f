"""From the states of a text's tokens to one vector."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["last", "mean", "query"]


def pool(states: Tensor, lengths: Tensor, pooling: Pooling, query: Tensor | None = None) -> Tensor:
    """One vector for each text; what stands behind a text's end has no part in it.

    Args:
        states: ``[n, length, dim]`` of the tokens, any float type; texts begin at place 0.
        lengths: ``[n]`` int64 tokens of each text, 1 or more.
        pooling: ``last``: the last token's state, which in a causal model has seen all others. ``mean``: of all
            tokens. ``query``: mean weighted with softmax(states @ query / sqrt(dim)).
        query: ``[dim]``, for ``query``.

    Returns:
        ``[n, dim]`` float32.
    """
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), lengths - 1].float()
    there = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
    if pooling == "mean":
        weights = there / lengths[:, None]
    else:
        assert query is not None
        scores = states.float() @ query / math.sqrt(states.shape[2])
        weights = scores.masked_fill(~there, -math.inf).softmax(dim=1)
    # a state behind the end may be anything, NaN too: 0 times it must be 0
    return torch.einsum("nl,nld->nd", weights, states.float().masked_fill(~there[:, :, None], 0))
