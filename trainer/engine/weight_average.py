"""Exponential moving average of a network's parameters over the event time of a stream.

With a constant learning rate the last steps stay in the parameters as noise, which a mean over many steps takes out
(Polyak and Juditsky, 1992). A stream has no end at which its rate could fall, so it has a mean over a time instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """Mean of the parameters of a module over time, in float32; older ones count exponentially less.

    Parameters ``w_i`` that were trained on the rows of a time ``d_i``, in units of the mean's horizon, count with
    ``(1 - exp(-d_i)) exp(-(d_i+1 + ... + d_n))``, and the weights are divided by their sum. So the initial parameters
    count nothing. All ranks compute the same mean of the same parameters, without any communication.

    Args:
        module: the module; its parameters must be whole on this rank.

    Attributes:
        values: parameter -> mean; the parameter itself as long as none was added.
        weight: float64 scalar, sum of the weights before their division.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.values = {name: parameter.detach().float().clone() for name, parameter in module.named_parameters()}
        self.weight = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def add(self, elapsed: float) -> None:
        """Add the parameters as they are; ``elapsed`` is the time of the rows since the last call, in horizons."""
        share = -math.expm1(-elapsed)
        weight = float(self.weight) * (1 - share) + share
        if not weight:
            return
        for name, parameter in self._module.named_parameters():
            self.values[name].lerp_(parameter.float(), share / weight)
        self.weight.fill_(weight)

    def restart(self) -> None:
        """Take the parameters as the mean if none was added, after they were set from outside."""
        if not self.weight:
            for name, parameter in self._module.named_parameters():
                self.values[name].copy_(parameter)

    def load(self, values: Mapping[str, Tensor], weight: Tensor) -> None:
        """Load a saved mean and its weight."""
        for name, value in self.values.items():
            value.copy_(values[name])
        self.weight.copy_(weight)
