"""Memory and work of fine-tuning a Qwen2-family model with LoRA, by its shape."""

from __future__ import annotations

from typing import NamedTuple

LOSS_BYTES = 12
"""Bytes of the loss for each answer token and entry of the vocabulary: log-probabilities and two gradients, float32."""


class ModelShape(NamedTuple):
    """Sizes of a model.

    Attributes:
        hidden: width of the residual stream, h.
        intermediate: width of the feed-forward layer, i.
        layers: number of layers, L.
        kv_width: width of all keys, k.
        vocabulary: entries of the vocabulary, V.
        linear: weights of all linear layers but the output head.
        head: weights of the output head.
        parameters: all weights, those of the adapter included.
        trained: weights that are trained.
        adapter_width: sum over the adapters of one layer of their ranks.
        dropped: sum over the adapters of one layer of the widths of their inputs; 0 without dropout.
        mask_bytes: bytes of an entry of a dropout mask: 1 on a GPU; on a CPU those of an activation.
    """

    hidden: int
    intermediate: int
    layers: int
    kv_width: int
    vocabulary: int
    linear: int
    head: int
    parameters: int
    trained: int
    adapter_width: int
    dropped: int = 0
    mask_bytes: int = 1


def layer_bytes(shape: ModelShape, tokens: float, element: int) -> float:
    """Return the activations that one layer keeps for its backward pass.

    Each token keeps in the layer's type: the two normed inputs (2 h), queries, output of the attention twice (3 h),
    keys and values repeated for all heads (2 h), and of the feed-forward layer its gate, the gate's activation, the
    other branch and their product (4 i); the adapters' inner vectors; and the residual stream that each of the two
    norms reads (2 h), as a float32 copy if the type is another one. With dropout on the adapters' inputs each adapter
    keeps a mask and an input of its own, in place of the inputs that adapters share without it (3 h + i).

    Args:
        shape: the model.
        tokens: tokens of a micro-batch.
        element: bytes of an activation: 2 in bfloat16, 4 in float32.
    """
    shared = 0 if shape.dropped else 3 * shape.hidden + shape.intermediate
    kept = 4 * shape.hidden + 3 * shape.intermediate + shape.adapter_width + shared
    return tokens * (element * kept + 4 * 2 * shape.hidden + (element + shape.mask_bytes) * shape.dropped)


def kept_bytes(shape: ModelShape, tokens: float, element: int, *, checkpointing: bool) -> float:
    """Return the activations of a micro-batch that wait for the backward pass.

    With gradient checkpointing a layer keeps its input alone.

    Args:
        shape: the model.
        tokens: tokens of a micro-batch.
        element: see :func:`layer_bytes`.
        checkpointing: activations are computed again in the backward pass.
    """
    of_layer = element * tokens * shape.hidden if checkpointing else layer_bytes(shape, tokens, element)
    return shape.layers * of_layer


def loss_bytes(shape: ModelShape, answers: float) -> float:
    """Return the memory of the loss over ``answers`` answer tokens: ``12 V`` bytes each."""
    return LOSS_BYTES * shape.vocabulary * answers


def working_bytes(shape: ModelShape, tokens: float, answers: float, element: int, *, checkpointing: bool) -> float:
    """Return the memory that the backward pass needs beside :func:`kept_bytes` at its peak.

    This is the larger of the loss, with which it begins, and of the backward pass of one layer: gradients of the
    residual stream and of the feed-forward layer (h + i), and with gradient checkpointing the layer's activations.
    """
    of_layer = element * tokens * (shape.hidden + shape.intermediate)
    if checkpointing:
        of_layer += layer_bytes(shape, tokens, element)
    return max(of_layer, loss_bytes(shape, answers))


def step_flops(shape: ModelShape, tokens: float, length: float, answers: float, *, checkpointing: bool) -> float:
    """Return the FLOPs of one pass over a micro-batch: the formula of benchmarks/speed/finetune.py.

    A frozen weight costs 2 FLOPs a token forward and 2 backward, a trained one 6; attention costs ``2 L h`` for each
    pair of tokens forward and twice that backward, of which causality needs half. Gradient checkpointing adds the
    forward pass of the layers once more.

    Args:
        shape: the model.
        tokens: tokens of a micro-batch.
        length: tokens of a sequence, all of one sample.
        answers: answer tokens.
        checkpointing: see :func:`kept_bytes`.
    """
    attention = 2 * shape.layers * shape.hidden * length * tokens
    flops = (4 * shape.linear + 6 * shape.trained) * tokens + 3 * attention + 4 * shape.head * answers
    if checkpointing:
        flops += (2 * shape.linear + 2 * shape.trained) * tokens + attention
    return flops
