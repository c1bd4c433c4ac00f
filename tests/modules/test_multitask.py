"""Batched networks against loops over experts, gates and behaviours, written like the papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from modules.multitask import (
    PLE,
    BatchedMLP,
    DeepCrossNetwork,
    GatedExperts,
    NetworkKind,
    SharedBottom,
    Towers,
    build_network,
)

SEEDS = range(3)


def looped_mlp(mlp: BatchedMLP, network: int, x: Tensor) -> Tensor:
    for weight, bias in zip(mlp.weights, mlp.biases, strict=True):
        x = torch.relu(nn.functional.linear(x, weight[network].t(), bias[network, 0]))
    return x


def looped_layer(layer: GatedExperts, inputs: list[Tensor], shared_input: Tensor) -> list[Tensor]:
    """Compute a CGC from one input for each behaviour and one for the shared part; the shared gate comes last."""
    behaviours, own_experts = layer.behaviours, layer.task_experts
    experts = layer.experts.weights[0].shape[0]
    outputs = []
    for expert in range(experts):
        owner = expert // own_experts if expert < behaviours * own_experts else None
        outputs.append(looped_mlp(layer.experts, expert, shared_input if owner is None else inputs[owner]))
    shared = outputs[behaviours * own_experts :]
    mixed = []
    for k in range(behaviours):
        seen = outputs[k * own_experts : (k + 1) * own_experts] + shared
        gate = torch.softmax(inputs[k] @ layer.task_gates[k], dim=1)
        mixed.append(sum((gate[:, i, None] * output for i, output in enumerate(seen)), torch.zeros_like(seen[0])))
    if layer.shared_gate is not None:
        gate = torch.softmax(shared_input @ layer.shared_gate[0], dim=1)
        mixed.append(sum((gate[:, i, None] * output for i, output in enumerate(outputs)), torch.zeros_like(outputs[0])))
    return mixed


def looped_network(network: SharedBottom | DeepCrossNetwork | PLE, x: Tensor) -> Tensor:
    if isinstance(network, DeepCrossNetwork):
        crossed = x
        for layer, (weight, bias) in enumerate(
            zip(network.cross_layers.weights, network.cross_layers.biases, strict=True)
        ):
            reduced = crossed @ network.cross_layers.reductions[layer] if network.cross_layers.reductions else crossed
            crossed = x * (nn.functional.linear(reduced, weight.t()) + bias) + crossed
        return torch.stack([looped_mlp(network.deep, 0, crossed)] * network.behaviours, dim=1)
    if isinstance(network, SharedBottom):
        return torch.stack([looped_mlp(network.bottom, 0, x)] * network.behaviours, dim=1)
    behaviours = network.layers[0].behaviours
    inputs, shared_input = [x] * behaviours, x
    for layer in network.layers:
        *inputs, shared_input = looped_layer(layer, inputs, shared_input) + (
            [] if layer.shared_gate is not None else [x]
        )
    return torch.stack(inputs, dim=1)


def looped_towers(towers: Towers, x: Tensor) -> Tensor:
    return torch.cat(
        [
            looped_mlp(towers.hidden, k, x[:, k]) @ towers.weight[k] + towers.bias[k]
            for k in range(towers.bias.shape[0])
        ],
        dim=1,
    )


def assert_same(
    module: nn.Module, batched: Callable[[Tensor], Tensor], looped: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    """Check that outputs and the gradients of the input and of every parameter are equal."""
    results = []
    for function in (batched, looped):
        module.zero_grad()
        given = x.clone().requires_grad_()
        out = function(given)
        (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append((out.detach(), given.grad, {name: p.grad for name, p in module.named_parameters()}))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("layers", [((12, 8),), ((12, 8), (6,)), ((12,), (8, 10), (6, 4))])
@pytest.mark.parametrize("kind", get_args(NetworkKind))
def test_networks_equal_their_loops(kind: NetworkKind, layers: tuple[tuple[int, ...], ...], seed: int) -> None:
    torch.manual_seed(seed)
    task, shared = [(2, 2), (1, 3), (3, 1)][seed]
    network = build_network(
        kind, 10, 3, task_experts=task, shared_experts=shared, layers=layers, dcn_rank=2 * seed
    ).double()
    x = torch.randn(33, 10, dtype=torch.float64)
    out = network(x)
    assert (
        out.shape == (33, 3, network.out_features)
        and network.out_features == (layers if kind == "ple" else layers[:1])[-1][-1]
    )
    assert_same(network, network, lambda given: looped_network(network, given), x)


@pytest.mark.parametrize("seed", SEEDS)
def test_networks_equal_their_loops_in_float32(seed: int) -> None:
    torch.manual_seed(seed)
    network = build_network("ple", 16, 4, task_experts=2, shared_experts=2, layers=((32, 16), (16, 8)))
    x = torch.randn(64, 16)
    torch.testing.assert_close(network(x), looped_network(network, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("widths", [(), (6,), (6, 5)])
@pytest.mark.parametrize("seed", SEEDS)
def test_towers_equal_their_loop(widths: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    towers = Towers(7, 4, widths).double()
    x = torch.randn(20, 4, 7, dtype=torch.float64)
    assert towers(x).shape == (20, 4)
    assert_same(towers, towers, lambda given: looped_towers(towers, given), x)


def test_gates_see_the_experts_that_the_paper_gives_them() -> None:
    """With one expert for each behaviour and one shared, each output shows the experts it was mixed from."""
    network = PLE(2, 3, 1, 1, [(4,), (4,)]).double()
    first, last = network.layers
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        first.experts.biases[0].copy_(torch.eye(4)[:, None])
    mixed = first(torch.randn(1, 5, 2, dtype=torch.float64))[:, 0]
    # Gates of weight zero mix evenly: behaviours their own and the shared expert, the shared gate all four.
    expected = torch.tensor([[0.5, 0, 0, 0.5], [0, 0.5, 0, 0.5], [0, 0, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(mixed, expected.double())
    assert last.shared_gate is None and last.task_gates.shape == (3, 4, 2)


def test_one_layer_of_ple_is_a_cgc() -> None:
    settings = {"task_experts": 2, "shared_experts": 1, "layers": ((8, 4),)}
    ple = build_network("ple", 6, 3, **settings)  # type: ignore[arg-type]
    cgc = build_network("cgc", 6, 3, **settings)  # type: ignore[arg-type]
    cgc.load_state_dict(ple.state_dict())
    x = torch.randn(9, 6)
    assert torch.equal(ple(x), cgc(x))


def test_baselines_have_as_many_experts_as_cgc() -> None:
    def experts(kind: NetworkKind) -> int:
        network = build_network(kind, 6, 3, task_experts=2, shared_experts=1, layers=((8, 4), (4,)))
        assert isinstance(network, PLE) and len(network.layers) == 1
        return network.layers[0].experts.weights[0].shape[0]

    assert experts("mmoe") == experts("cgc") == 7


def test_every_expert_starts_as_linear_layers_do() -> None:
    torch.manual_seed(0)
    mlp = BatchedMLP(6, 400, (300, 50))
    for fan_in, weight, bias in zip((400, 300), mlp.weights, mlp.biases, strict=True):
        bound = 1 / math.sqrt(fan_in)
        reference = nn.Linear(fan_in, weight.shape[2])
        for network in range(6):
            assert 0.99 * bound < float(weight[network].detach().abs().max()) <= bound
            torch.testing.assert_close(weight[network].std(), reference.weight.std(), rtol=0.05, atol=0)
            assert float(bias[network].detach().abs().max()) <= bound
    assert not torch.equal(mlp.weights[0][0], mlp.weights[0][1])


def test_dropout_drops_in_training_only_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    mlp = BatchedMLP(2, 5, (1000,), dropout=0.25)
    x = torch.randn(2, 50, 5)
    kept = mlp.eval()(x)
    dropped = mlp.train()(x)
    active = kept > 0
    share = float((dropped[active] == 0).float().mean())
    assert abs(share - 0.25) < 0.01
    survivors = active & (dropped != 0)
    torch.testing.assert_close(dropped[survivors], kept[survivors] / 0.75)


@pytest.mark.parametrize("kind", get_args(NetworkKind))
def test_a_batch_of_no_rows_gives_every_parameter_a_gradient_of_zeros(kind: NetworkKind) -> None:
    network = build_network(kind, 6, 3, task_experts=2, shared_experts=1, layers=((8, 4), (4,)))
    model = nn.Sequential(network, Towers(network.out_features, 3, (5,)))
    out = model(torch.zeros(0, 6))
    assert out.shape == (0, 3)
    out.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("kind", ["ple", "dcn"])
def test_every_parameter_learns(kind: NetworkKind) -> None:
    torch.manual_seed(1)
    network = build_network(kind, 8, 3, task_experts=2, shared_experts=2, layers=((16, 8), (8, 4)))
    model = nn.Sequential(network, Towers(network.out_features, 3, (5,)))
    model(torch.randn(200, 8)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_cross_layers_that_add_nothing_leave_a_shared_bottom() -> None:
    settings = {"task_experts": 2, "shared_experts": 1, "layers": ((8, 4),)}
    dcn = build_network("dcn", 6, 3, dcn_layers=2, **settings)  # type: ignore[arg-type]
    bottom = build_network("shared_bottom", 6, 3, **settings)  # type: ignore[arg-type]
    assert isinstance(dcn, DeepCrossNetwork) and isinstance(bottom, SharedBottom)
    dcn.deep.load_state_dict(bottom.bottom.state_dict())
    x = torch.randn(9, 6)
    assert not torch.allclose(dcn(x), bottom(x))
    with torch.no_grad():
        for weight in dcn.cross_layers.weights:
            weight.zero_()
    torch.testing.assert_close(dcn(x), bottom(x))


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="'moe'"):
        build_network("moe", 6, 3, task_experts=1, shared_experts=1, layers=((4,),))  # type: ignore[arg-type]
