"""Backbones against their papers' formulas in numpy."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from modules.staytime.backbones import DCN, AutoInt, DeepFM, PlainMLP, build_backbone

BATCH, FIELDS, DIM = 5, 4, 6


def embeddings(seed: int) -> Tensor:
    return torch.randn(BATCH, FIELDS, DIM, generator=torch.Generator().manual_seed(seed))


def mlp(network: PlainMLP, x: np.ndarray) -> np.ndarray:
    for layer in network.layers:
        if isinstance(layer, torch.nn.Linear):
            x = np.maximum(x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy(), 0)
    return x


@pytest.mark.parametrize("seed", range(3))
def test_dcn_is_cross_layers_beside_an_mlp(seed: int) -> None:
    torch.manual_seed(seed)
    network = DCN(FIELDS, DIM, (8, 3), depth=3)
    for bias in network.cross.biases:
        torch.nn.init.normal_(bias)
    x = embeddings(seed)
    first = x.flatten(1).numpy().astype(np.float64)
    crossed = first
    for weight, bias in zip(network.cross.weights, network.cross.biases, strict=True):
        w, b = weight.weight[0].detach().numpy(), bias.detach().numpy()
        crossed = np.stack([first[row] * (crossed[row] @ w) + b + crossed[row] for row in range(BATCH)])
    expected = np.concatenate([crossed, mlp(network.deep, first)], 1)
    np.testing.assert_allclose(network(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_deepfm_has_every_pair_of_fields_once(seed: int) -> None:
    torch.manual_seed(seed)
    network = DeepFM(FIELDS, DIM, (8,))
    x = embeddings(seed)
    v = x.numpy().astype(np.float64)
    pairs = sum(v[:, i] * v[:, j] for i, j in combinations(range(FIELDS), 2))
    flat = v.reshape(BATCH, -1)
    expected = np.concatenate([flat, pairs, mlp(network.deep, flat)], 1)
    np.testing.assert_allclose(network(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_autoint_is_attention_with_a_residual(seed: int) -> None:
    torch.manual_seed(seed)
    heads = 2
    network = AutoInt(FIELDS, DIM, depth=2, heads=heads)
    x = embeddings(seed)
    hidden = x.numpy().astype(np.float64)
    for attention, residual in zip(network.attention, network.residual, strict=True):
        weight, bias = attention.in_proj_weight.detach().numpy(), attention.in_proj_bias.detach().numpy()
        query, key, value = np.split(hidden @ weight.T + bias, 3, axis=2)
        mixed = np.zeros_like(hidden)
        for head in range(heads):
            part = slice(head * DIM // heads, (head + 1) * DIM // heads)
            scores = query[..., part] @ key[..., part].transpose(0, 2, 1) / np.sqrt(DIM / heads)
            shares = np.exp(scores) / np.exp(scores).sum(2, keepdims=True)
            mixed[..., part] = shares @ value[..., part]
        out = mixed @ attention.out_proj.weight.detach().numpy().T + attention.out_proj.bias.detach().numpy()
        hidden = np.maximum(out + hidden @ residual.weight.detach().numpy().T, 0)
    np.testing.assert_allclose(network(x).detach().numpy(), hidden.reshape(BATCH, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "dcn", "deepfm", "autoint"])
def test_the_width_is_what_it_says_and_every_parameter_learns(kind: str) -> None:
    torch.manual_seed(1)
    network = build_backbone(kind, FIELDS, DIM, widths=(8, 4), depth=2, heads=3, dropout=0.1)  # type: ignore[arg-type]
    out = network(embeddings(1))
    assert out.shape == (BATCH, network.out_features)
    out.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_wrong_name_or_number_of_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="no backbone is called 'fm'"):
        build_backbone("fm", FIELDS, DIM, widths=(8,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="4 heads do not divide a dimension of 6"):
        build_backbone("autoint", FIELDS, DIM, widths=(), heads=4)
