"""Cross layers of DCN against the definition, element by element, and against TorchRec's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.modules.crossnet import CrossNet, LowRankCrossNet

from modules.dcn import CrossLayers


def layers_with_biases(width: int, layers: int, rank: int, seed: int) -> CrossLayers:
    torch.manual_seed(seed)
    crossing = CrossLayers(width, layers, rank).double()
    with torch.no_grad():
        for bias in crossing.biases:
            bias.normal_()
    return crossing


def defined(crossing: CrossLayers, x: np.ndarray) -> np.ndarray:
    """Compute equation 1 (equation 2 with a rank) for one row, in float64, element by element."""
    weights = [weight.detach().numpy().T for weight in crossing.weights]
    if crossing.reductions:
        weights = [u @ v.detach().numpy().T for u, v in zip(weights, crossing.reductions, strict=True)]
    crossed = list(x)
    for weight, bias in zip(weights, crossing.biases, strict=True):
        crossed = [
            x[i] * (sum(weight[i, j] * crossed[j] for j in range(len(x))) + float(bias[i])) + crossed[i]
            for i in range(len(x))
        ]
    return np.array(crossed)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_cross_layers_compute_the_definition(layers: int, rank: int) -> None:
    crossing = layers_with_biases(6, layers, rank, seed=layers)
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = np.stack([defined(crossing, row) for row in x.numpy()])
    np.testing.assert_allclose(crossing(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 3])
def test_outputs_and_gradients_equal_those_of_torchrec(rank: int) -> None:
    crossing = layers_with_biases(7, 3, rank, seed=1)
    theirs = (LowRankCrossNet(7, 3, rank) if rank else CrossNet(7, 3)).double()
    kernels = theirs.W_kernels if rank else theirs.kernels
    with torch.no_grad():
        for layer in range(3):
            kernels[layer].copy_(crossing.weights[layer].t())
            theirs.bias[layer].copy_(crossing.biases[layer].view_as(theirs.bias[layer]))
            if rank:
                theirs.V_kernels[layer].copy_(crossing.reductions[layer].t())
    results: list[tuple[Tensor, Tensor]] = []
    x = torch.randn(11, 7, dtype=torch.float64)
    for network in (crossing, theirs):
        leaf = x.clone().requires_grad_()
        out = network(leaf)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        assert leaf.grad is not None
        results.append((out.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    for layer in range(3):
        torch.testing.assert_close(crossing.weights[layer].grad, kernels[layer].grad.t(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            crossing.biases[layer].grad, theirs.bias[layer].grad.flatten(), rtol=1e-12, atol=1e-12
        )


def test_full_rank_and_rank_of_the_width_span_the_same_functions() -> None:
    full, low = layers_with_biases(5, 2, 0, seed=2), CrossLayers(5, 2, 5).double()
    with torch.no_grad():
        for layer in range(2):
            low.reductions[layer].copy_(torch.eye(5))
            low.weights[layer].copy_(full.weights[layer])
            low.biases[layer].copy_(full.biases[layer])
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(low(x), full(x), rtol=1e-12, atol=1e-12)


def test_each_layer_raises_the_degree_by_one() -> None:
    crossing = CrossLayers(3, 2).double()
    x = torch.randn(1, 3, dtype=torch.float64)
    # Biases are zero at the start, so the output is a polynomial of degree 3 without a constant.
    scales = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    values = torch.cat([crossing(scale * x) for scale in scales])
    powers = torch.stack([scales**degree for degree in (1, 2, 3)], 1)
    coefficients = torch.linalg.lstsq(powers, values).solution
    torch.testing.assert_close(powers @ coefficients, values, rtol=1e-9, atol=1e-9)
    assert bool((coefficients[2].abs() > 1e-6).all())


@pytest.mark.parametrize("rank", [0, 2])
def test_first_values_are_those_of_linear_layers_with_biases_of_zero(rank: int) -> None:
    torch.manual_seed(0)
    crossing = CrossLayers(400, 2, rank and 50)
    fan_in = {"reductions": 400, "weights": 50 if rank else 400}
    for name, inputs in fan_in.items():
        for weight in getattr(crossing, name):
            bound = inputs**-0.5
            assert 0.99 * bound < float(weight.detach().abs().max()) <= bound
    assert len(crossing.reductions) == (2 if rank else 0)
    assert not any(bias.any() for bias in crossing.biases)
