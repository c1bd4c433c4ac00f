"""Cross layers of the Deep & Cross Network, version 2.

Layer l computes ``x_{l+1} = x_0 * (W_l x_l + b_l) + x_l`` from the input ``x_0``, where ``*`` multiplies element by
element. Each layer raises the degree of the polynomial in the inputs by one. With a rank r, ``W_l = U_l V_l^T`` where
``U_l`` and ``V_l`` are ``[width, r]``; that saves time if r is below half of the width.

Source: DCN V2, Wang et al. (WWW 2021), equations 1 and 2. These layers have nothing to do with the Cross model of
Moment&Cross, or with TWIN's cross features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class CrossLayers(nn.Module):
    """Stack of cross layers that keep the width of their input.

    Weights have the initial values of ``nn.Linear``, biases are zero.

    Args:
        width: number of inputs.
        layers: number of layers.
        rank: rank r of the matrices; 0 for full matrices.
    """

    def __init__(self, width: int, layers: int, rank: int = 0) -> None:
        super().__init__()
        # V_l, and U_l^T or W_l^T.
        self.reductions = nn.ParameterList(_linear_weight(width, rank) for _ in range(layers if rank else 0))
        self.weights = nn.ParameterList(_linear_weight(rank or width, width) for _ in range(layers))
        self.biases = nn.ParameterList(torch.zeros(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, width]`` to the same shape."""
        crossed = x
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            reduced = crossed @ self.reductions[layer] if self.reductions else crossed
            crossed = torch.addcmul(crossed, x, torch.addmm(bias, reduced, weight))
        return crossed


def _linear_weight(in_features: int, out_features: int) -> nn.Parameter:
    """Return a weight ``[in_features, out_features]`` with the initial values of ``nn.Linear``."""
    bound = 1 / math.sqrt(in_features)
    return nn.Parameter(torch.empty(in_features, out_features).uniform_(-bound, bound))
