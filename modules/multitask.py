"""Multi-task networks shared-bottom, DCN, MMoE, CGC and PLE behind one interface, and the towers on top of them.

Every network takes ``[batch, features]`` and returns one representation for each behaviour, ``[batch, behaviours,
width]``, with the width in its attribute ``out_features``. The experts of a layer are one batched matrix product, and
the gates mix them in another.

Sources: shared-bottom, Caruana (1997); DCN V2, Wang et al. (WWW 2021); MMoE, Ma et al. (KDD 2018); CGC and PLE, Tang
et al. (RecSys 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.dcn import CrossLayers
from modules.expert_kernel import CompiledExperts, computes

NetworkKind = Literal["ple", "cgc", "mmoe", "shared_bottom", "dcn"]


class BatchedMLP(nn.Module):
    """MLPs of one shape with separate weights, computed together, with a ReLU after every layer.

    Each has the initial values of ``nn.Linear`` layers: uniform in ``+-1 / sqrt(fan in)``. PyTorch's operations are the
    definition. If ``compiled`` is set, the loops of ``modules/expert_kernel.py`` compute float32 values on a CPU with
    AVX-512 or AVX2, unless values are dropped; they round sums in another order.

    Args:
        networks: number of MLPs, E.
        in_features: width of the input.
        widths: width of each layer; with no layers the input is returned.
        dropout: probability of dropping a value after each layer.
    """

    def __init__(self, networks: int, in_features: int, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        shapes = list(pairwise((in_features, *widths)))
        self.weights = nn.ParameterList(_linear_weight(networks, fan_in, out) for fan_in, out in shapes)
        self.biases = nn.ParameterList(_uniform((networks, 1, out), fan_in) for fan_in, out in shapes)
        self.networks, self.dropout = networks, dropout
        self.out_features = widths[-1] if widths else in_features
        self.compiled = False

    def forward(self, x: Tensor, reads: Tensor | None = None) -> Tensor:
        """Apply each network to its input.

        Args:
            x: inputs ``[inputs, batch, in_features]``.
            reads: input of each network, ``[networks]`` int64. None: the only input, or each network its own.

        Returns:
            ``[networks, batch, out_features]``.
        """
        dropped = self.dropout > 0 and self.training
        if self.compiled and len(self.weights) and not dropped and computes(x):
            places = torch.arange(len(x)).expand(self.networks).contiguous() if reads is None else reads
            return CompiledExperts.apply(x, places, *self.weights, *self.biases)
        # An expanded input instead of one wide product: the activations of each network are contiguous, which the next
        # product needs.
        x = x.expand(self.networks, -1, -1) if reads is None else x.index_select(0, reads)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = functional.dropout(torch.baddbmm(bias, x, weight).relu_(), self.dropout, self.training)
        return x


class GatedExperts(nn.Module):
    """One layer of experts and the gates that mix them: a CGC, or an MMoE if no behaviour has experts of its own.

    The gate of a behaviour is a softmax over its own experts and the shared ones. The shared gate, whose output is the
    input of the next layer's shared experts, is a softmax over all experts. Gates have no bias.

    Args:
        in_features: width of the input.
        behaviours: K, number of behaviours.
        task_experts: experts of each behaviour, 0 or more.
        shared_experts: experts that all behaviours use, 0 or more.
        widths: widths of an expert's layers.
        inputs: 1 if all experts and gates read the same input; K + 1 if each behaviour has its own input, and the
            shared experts and gate have the last one.
        shared_gate: True for a shared gate.
        dropout: dropout in the experts.
    """

    allowed: Tensor
    expert_input: Tensor

    def __init__(
        self,
        in_features: int,
        behaviours: int,
        task_experts: int,
        shared_experts: int,
        widths: Sequence[int],
        *,
        inputs: int = 1,
        shared_gate: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        experts = behaviours * task_experts + shared_experts
        self.behaviours, self.task_experts, self.inputs = behaviours, task_experts, inputs
        self.experts = BatchedMLP(experts, in_features, widths, dropout)
        self.out_features = self.experts.out_features
        self.task_gates = _linear_weight(behaviours, in_features, task_experts + shared_experts)
        self.shared_gate = _linear_weight(1, in_features, experts) if shared_gate else None
        own = torch.eye(behaviours).repeat_interleave(task_experts, dim=1)
        seen = torch.cat([own, torch.ones(behaviours, shared_experts)], dim=1)
        if shared_gate:
            seen = torch.cat([seen, torch.ones(1, experts)])
        # log 0 = -inf: an expert that a gate does not see gets a weight of exactly 0.
        self.register_buffer("allowed", seen.log()[:, None], persistent=False)
        owners = torch.arange(behaviours).repeat_interleave(task_experts)
        expert_input = torch.cat([owners, torch.full((shared_experts,), behaviours)])
        self.register_buffer("expert_input", expert_input, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the experts once for each gate.

        Args:
            x: ``[inputs, batch, in_features]``.

        Returns:
            ``[gates, batch, out_features]``: the behaviours' gates, then the shared one if there is one.
        """
        gates = self._gate_weights()
        gate_input = x.expand(len(gates), -1, -1) if self.inputs == 1 else x[: len(gates)]
        hidden = self.experts(x, None if self.inputs == 1 else self.expert_input)  # [experts, batch, width]
        weights = torch.baddbmm(self.allowed.to(gates.dtype), gate_input, gates).softmax(-1)  # [gates, batch, experts]
        return torch.bmm(weights.transpose(0, 1), hidden.transpose(0, 1)).transpose(0, 1)

    def _gate_weights(self) -> Tensor:
        """Return the gates' weights ``[gates, in_features, experts]``, zero for experts that a gate does not see."""
        own, shared = self.task_gates.split([self.task_experts, self.task_gates.shape[2] - self.task_experts], dim=2)
        diagonal = torch.eye(self.behaviours, dtype=own.dtype, device=own.device)
        placed = (own[:, :, None] * diagonal[:, None, :, None]).flatten(2)
        gates = torch.cat([placed, shared], dim=2)
        return gates if self.shared_gate is None else torch.cat([gates, self.shared_gate])


class SharedBottom(nn.Module):
    """One MLP whose output is the representation of every behaviour."""

    def __init__(self, in_features: int, behaviours: int, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.behaviours = behaviours
        self.bottom = BatchedMLP(1, in_features, widths, dropout)
        self.out_features = self.bottom.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, in_features]`` to ``[batch, behaviours, out_features]``."""
        return self.bottom(x[None]).expand(self.behaviours, -1, -1).transpose(0, 1)


class DeepCrossNetwork(nn.Module):
    """Cross layers with an MLP on top, whose output is the representation of every behaviour: DCN V2, stacked.

    The cross layers are as wide as the input. In the parallel structure each tower would read all inputs again; here
    the MLP reads them once, and a DCN differs from a shared bottom with the same widths in its cross layers only.

    Args:
        in_features: width of the input.
        behaviours: K, number of behaviours.
        widths: widths of the MLP's layers.
        cross_layers: number of cross layers.
        rank: rank of their matrices; 0 for full matrices.
        dropout: dropout in the MLP.
    """

    def __init__(
        self,
        in_features: int,
        behaviours: int,
        widths: Sequence[int],
        cross_layers: int,
        rank: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.behaviours = behaviours
        self.cross_layers = CrossLayers(in_features, cross_layers, rank)
        self.deep = BatchedMLP(1, in_features, widths, dropout)
        self.out_features = self.deep.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, in_features]`` to ``[batch, behaviours, out_features]``."""
        return self.deep(self.cross_layers(x)[None]).expand(self.behaviours, -1, -1).transpose(0, 1)


class PLE(nn.Module):
    """Progressive layered extraction: layers of gated experts, where the gates' outputs are the next layer's inputs.

    All layers but the last have a shared gate over all experts. A single layer is a CGC, and a single layer without
    experts of the behaviours is an MMoE.

    Args:
        in_features: width of the input.
        behaviours: K, number of behaviours.
        task_experts: experts of each behaviour in a layer.
        shared_experts: shared experts in a layer.
        layers: widths of the experts of each layer.
        dropout: dropout in the experts.
    """

    def __init__(
        self,
        in_features: int,
        behaviours: int,
        task_experts: int,
        shared_experts: int,
        layers: Sequence[Sequence[int]],
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.out_features = in_features
        for depth, widths in enumerate(layers):
            layer = GatedExperts(
                self.out_features,
                behaviours,
                task_experts,
                shared_experts,
                widths,
                inputs=behaviours + 1 if depth else 1,
                shared_gate=depth + 1 < len(layers),
                dropout=dropout,
            )
            self.layers.append(layer)
            self.out_features = layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, in_features]`` to ``[batch, behaviours, out_features]``."""
        x = x[None]
        for layer in self.layers:
            x = layer(x)
        return x.transpose(0, 1)


def build_network(
    kind: NetworkKind,
    in_features: int,
    behaviours: int,
    *,
    task_experts: int,
    shared_experts: int,
    layers: Sequence[Sequence[int]],
    dcn_layers: int = 3,
    dcn_rank: int = 0,
    dropout: float = 0.0,
) -> SharedBottom | DeepCrossNetwork | PLE:
    """Build a multi-task network by its name.

    Args:
        kind: PLE has all ``layers``, the others only the first; MMoE has as many experts as a CGC of these settings.
        in_features: width of the input.
        behaviours: K, number of behaviours.
        task_experts: experts of each behaviour in a layer.
        shared_experts: shared experts in a layer.
        layers: widths of the experts of each layer.
        dcn_layers: number of DCN's cross layers.
        dcn_rank: rank of DCN's matrices; 0 for full matrices.
        dropout: dropout in the experts.

    Raises:
        ValueError: the kind is unknown.
    """
    match kind:
        case "ple":
            return PLE(in_features, behaviours, task_experts, shared_experts, layers, dropout)
        case "cgc":
            return PLE(in_features, behaviours, task_experts, shared_experts, layers[:1], dropout)
        case "mmoe":
            return PLE(in_features, behaviours, 0, behaviours * task_experts + shared_experts, layers[:1], dropout)
        case "shared_bottom":
            return SharedBottom(in_features, behaviours, layers[0], dropout)
        case "dcn":
            return DeepCrossNetwork(in_features, behaviours, layers[0], dcn_layers, dcn_rank, dropout)
    raise ValueError(f"no multi-task network is called {kind!r}")


class Towers(nn.Module):
    """Towers of a multi-task network: an MLP and a logit for each behaviour.

    Args:
        in_features: width of a representation.
        behaviours: K, number of behaviours.
        widths: widths of the hidden layers, none or more.
        dropout: dropout in the hidden layers.
    """

    def __init__(self, in_features: int, behaviours: int, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden = BatchedMLP(behaviours, in_features, widths, dropout)
        self.weight = _linear_weight(behaviours, self.hidden.out_features, 1)
        self.bias = nn.Parameter(torch.zeros(behaviours, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, behaviours, in_features]`` to logits ``[batch, behaviours]``."""
        return torch.baddbmm(self.bias, self.hidden(x.transpose(0, 1)), self.weight)[..., 0].t()


def _uniform(shape: tuple[int, ...], fan_in: int) -> nn.Parameter:
    """Return a parameter with the uniform initial values of ``nn.Linear``."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def _linear_weight(networks: int, in_features: int, out_features: int) -> nn.Parameter:
    """Return the weights of one linear layer of each network, ``[networks, in_features, out_features]``."""
    return _uniform((networks, in_features, out_features), in_features)
