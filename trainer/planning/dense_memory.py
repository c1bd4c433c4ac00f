"""Memory of a network under DeepSpeed's ZeRO: weights, gradients and AdamW on one rank."""

from __future__ import annotations

from dataclasses import dataclass

MASTER, MOMENTS = 4, 8
"""Bytes of a trained parameter's float32 copy, and of AdamW's two moments."""


@dataclass(frozen=True)
class ZeroSettings:
    """Settings that decide what a rank holds.

    Attributes:
        stage: 0 partitions nothing, 1 the optimizer's state, 2 also gradients, 3 also weights.
        bf16: weights and gradients are bfloat16, beside a float32 copy.
        offload_optimizer: the optimizer's state and the float32 copy lie in host memory.
        offload_parameters: the partition of the weights lies in host memory (stage 3).
    """

    stage: int
    bf16: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False


@dataclass(frozen=True)
class DenseMemory:
    """Bytes of one rank.

    Attributes:
        weights: weights in the type that the network computes with.
        gathered: whole weights of the layers in use, which stage 3 collects from all ranks.
        gradients: gradients of trained weights, and DeepSpeed's bucket in which they are reduced.
        optimizer: float32 copies and AdamW's moments on the device.
        host: what is offloaded.
    """

    weights: int
    gathered: int
    gradients: int
    optimizer: int
    host: int

    @property
    def device(self) -> int:
        """All bytes on the device."""
        return self.weights + self.gathered + self.gradients + self.optimizer


def dense_memory(parameters: int, trained: int, world: int, zero: ZeroSettings, largest_layer: int = 0) -> DenseMemory:
    """Return the memory of a network of ``parameters`` weights, of which ``trained`` are trained.

    With ``e`` bytes an element (2 in bfloat16, else 4) and ``W`` ranks: weights ``e p``; gradients ``e t``; float32
    copies ``4 t`` (none in float32 at stage 0); moments ``8 t``. Stage 1 divides copies and moments by ``W``, stage 2
    also the gradients, stage 3 also the weights, of which it collects two layers at a time. From stage 1 on, the bucket
    takes ``e t`` more.

    Args:
        parameters: number of all weights, p.
        trained: number of trained weights, t.
        world: number of ranks, W.
        zero: settings.
        largest_layer: number of weights of the largest layer, for stage 3.
    """
    element = 2 if zero.bf16 else 4

    def part(elements: int, from_stage: int) -> int:
        return -(-elements // world) if zero.stage >= from_stage else elements

    weights = element * part(parameters, 3)
    gradients = element * (part(trained, 2) + (trained if zero.stage >= 1 else 0))
    copies = MASTER * part(trained, 1) if zero.bf16 or zero.stage >= 1 else 0
    optimizer = copies + MOMENTS * part(trained, 1)
    host = 0
    if zero.offload_optimizer:
        host, optimizer = host + optimizer, 0
    if zero.offload_parameters and zero.stage == 3:
        host, weights = host + weights, 0
    gathered = 2 * element * largest_layer if zero.stage == 3 else 0
    return DenseMemory(weights, gathered, gradients, optimizer, host)
