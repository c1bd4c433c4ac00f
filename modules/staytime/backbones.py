"""Feature interaction over the embeddings of fields: a plain MLP, DCN, DeepFM and AutoInt behind one interface.

Every backbone takes ``[batch, fields, dim]`` and returns one representation for each row, ``[batch, width]``, with the
width in its attribute ``out_features``; a linear layer on top of it makes any number of logits.

Sources: DCN, Wang et al. (ADKDD 2017); DeepFM, Guo et al. (IJCAI 2017); AutoInt, Song et al. (CIKM 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from modules.choices import BackboneKind


class PlainMLP(nn.Module):
    """MLP over the concatenated fields, with a ReLU and dropout after each layer."""

    def __init__(self, fields: int, dim: int, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise((fields * dim, *widths)):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers)
        self.out_features = widths[-1] if widths else fields * dim

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, fields, dim]`` to ``[batch, out_features]``."""
        hidden: Tensor = self.layers(x.flatten(1))
        return hidden


class CrossNetwork(nn.Module):
    """Cross layers of DCN: ``x_{l+1} = x_0 (x_l . w_l) + b_l + x_l``; each raises the polynomial's degree by one."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.weights = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(layers))
        self.biases = nn.ParameterList(torch.zeros(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, width]`` to the same shape."""
        crossed = x
        for weight, bias in zip(self.weights, self.biases, strict=True):
            crossed = x * weight(crossed) + bias + crossed
        return crossed


class DCN(nn.Module):
    """Deep & Cross Network: cross layers and an MLP, whose outputs are concatenated."""

    def __init__(self, fields: int, dim: int, widths: Sequence[int], depth: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.cross = CrossNetwork(fields * dim, depth)
        self.deep = PlainMLP(fields, dim, widths, dropout)
        self.out_features = fields * dim + self.deep.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, fields, dim]`` to ``[batch, out_features]``."""
        return torch.cat([self.cross(x.flatten(1)), self.deep(x)], 1)


class DeepFM(nn.Module):
    """Factorisation machine and an MLP, whose outputs are concatenated.

    The representation has three parts: the fields themselves (first order); the sum over all pairs of fields of their
    elementwise product (second order, whose values add up to the machine's pairwise term); and the MLP's output. A
    linear layer on top whose weights on the second part are all one is the paper's model; free weights let it weigh the
    dimensions of the embedding.
    """

    def __init__(self, fields: int, dim: int, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.deep = PlainMLP(fields, dim, widths, dropout)
        self.out_features = fields * dim + dim + self.deep.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, fields, dim]`` to ``[batch, out_features]``."""
        pairs = (x.sum(1).square() - x.square().sum(1)) / 2
        return torch.cat([x.flatten(1), pairs, self.deep(x)], 1)


class AutoInt(nn.Module):
    """Layers of multi-head self-attention over the fields, each with a residual: ``relu(attention(x) + W x)``.

    Raises:
        ValueError: the number of heads does not divide the dimension.
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
        """Map ``[batch, fields, dim]`` to ``[batch, out_features]``."""
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
    """Build a backbone by its name.

    Args:
        kind: name of the backbone.
        fields: number of fields.
        dim: width of an embedding.
        widths: widths of the MLP's layers; AutoInt has no MLP.
        depth: number of DCN's cross layers or of AutoInt's attention layers.
        heads: number of heads of AutoInt's attention.
        dropout: dropout in MLP and attention.

    Raises:
        ValueError: the kind is unknown.
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
