"""Feature interaction over the embeddings of fields: a plain MLP, DCN, DeepFM and AutoInt behind one interface.

Every backbone takes ``[batch, fields, dim]`` and returns one representation a row, ``[batch, width]``, with the width
in its attribute ``out_features``; a linear layer on top of it makes any number of logits.

Sources: DCN, Wang et al. (ADKDD 2017); DeepFM, Guo et al. (IJCAI 2017); AutoInt, Song et al. (CIKM 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

BackboneKind = Literal["mlp", "dcn", "deepfm", "autoint"]


class PlainMLP(nn.Module):
    """The fields side by side, through layers with a ReLU and dropout after each."""

    def __init__(self, fields: int, dim: int, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise((fields * dim, *widths)):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers)
        self.out_features = widths[-1] if widths else fields * dim

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, fields, dim]`` -> ``[batch, out_features]``."""
        hidden: Tensor = self.layers(x.flatten(1))
        return hidden


class CrossNetwork(nn.Module):
    """DCN's cross layers: ``x_{l+1} = x_0 (x_l . w_l) + b_l + x_l``; each raises the polynomial's degree by one."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.weights = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(layers))
        self.biases = nn.ParameterList(torch.zeros(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, width]`` -> the same shape."""
        crossed = x
        for weight, bias in zip(self.weights, self.biases, strict=True):
            crossed = x * weight(crossed) + bias + crossed
        return crossed


class DCN(nn.Module):
    """Cross layers beside an MLP; the representation is both."""

    def __init__(self, fields: int, dim: int, widths: Sequence[int], depth: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.cross = CrossNetwork(fields * dim, depth)
        self.deep = PlainMLP(fields, dim, widths, dropout)
        self.out_features = fields * dim + self.deep.out_features

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, fields, dim]`` -> ``[batch, out_features]``."""
        return torch.cat([self.cross(x.flatten(1)), self.deep(x)], 1)


class DeepFM(nn.Module):
    """A factorisation machine beside an MLP.

    The representation is the fields themselves (the first order), the sum over all pairs of fields of their elementwise
    product (the second; its entries add up to the machine's pairwise term), and the MLP. A linear layer whose weights
    on the second part are all one is the paper's model; left free, they weigh the dimensions of the embedding.
    """

    def __init__(self, fields: int, dim: int, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.deep = PlainMLP(fields, dim, widths, dropout)
        self.out_features = fields * dim + dim + self.deep.out_features

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, fields, dim]`` -> ``[batch, out_features]``."""
        pairs = (x.sum(1).square() - x.square().sum(1)) / 2
        return torch.cat([x.flatten(1), pairs, self.deep(x)], 1)


class AutoInt(nn.Module):
    """Layers of multi-head self-attention over the fields, each with its residual: ``relu(attention(x) + W x)``.

    Raises:
        ValueError: the heads do not divide the dimension.
    """

    def __init__(self, fields: int, dim: int, depth: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide a dimension of {dim}")
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True) for _ in range(depth)
        )
        self.residual = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(depth))
        self.out_features = fields * dim

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, fields, dim]`` -> ``[batch, out_features]``."""
        for attention, residual in zip(self.attention, self.residual, strict=True):
            x = (attention(x, x, x, need_weights=False)[0] + residual(x)).relu()
        return x.flatten(1)


def build_backbone(
    kind: BackboneKind,
    fields: int,
    dim: int,
    *,
    widths: Sequence[int],
    depth: int = 3,
    heads: int = 2,
    dropout: float = 0.0,
) -> PlainMLP | DCN | DeepFM | AutoInt:
    """A backbone by its name.

    Args:
        kind: which.
        fields: number of fields.
        dim: of an embedding.
        widths: layers of the MLP (all but AutoInt, which has none).
        depth: cross layers of DCN, attention layers of AutoInt.
        heads: of AutoInt's attention.
        dropout: in MLP and attention.

    Raises:
        ValueError: no such kind.
    """
    match kind:
        case "mlp":
            return PlainMLP(fields, dim, widths, dropout)
        case "dcn":
            return DCN(fields, dim, widths, depth, dropout)
        case "deepfm":
            return DeepFM(fields, dim, widths, dropout)
        case "autoint":
            return AutoInt(fields, dim, depth, heads, dropout)
    raise ValueError(f"no backbone is called {kind!r}")
