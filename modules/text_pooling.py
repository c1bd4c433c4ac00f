"""Pools the states of a text's tokens into one vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modules.choices import TextPooling


def pool(states: Tensor, lengths: Tensor, pooling: TextPooling, query: Tensor | None = None) -> Tensor:
    """Return one vector for each text; padding after the end of a text does not contribute.

    Args:
        states: ``[n, length, dim]`` of the tokens, any float type; texts begin at place 0.
        lengths: ``[n]`` int64, number of tokens of each text, 1 or more.
        pooling: ``last``: state of the last token, which in a causal model attends to all others. ``mean``: mean over
            all tokens. ``query``: mean weighted with softmax(states @ query / sqrt(dim)).
        query: ``[dim]``, for ``query``.

    Returns:
        ``[n, dim]`` float32.
    """
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), lengths - 1].float()
    is_token = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
    if pooling == "mean":
        weights = is_token / lengths[:, None]
    else:
        assert query is not None
        scores = states.float() @ query / math.sqrt(states.shape[2])
        weights = scores.masked_fill(~is_token, -math.inf).softmax(dim=1)
    # A state after the end may be anything, also NaN, and 0 times NaN is not 0.
    return torch.einsum("nl,nld->nd", weights, states.float().masked_fill(~is_token[:, :, None], 0))
