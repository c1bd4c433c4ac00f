"""Attention masks that are made before the forward pass, where transformers would wait for the device to make them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def ready_mask(config: Any, mask: Tensor | None) -> dict[str, Tensor | None] | None:
    """Return an attention mask in the form that a model takes as it is; None if the model only takes raw ones.

    Without a ready mask transformers looks for padding in the mask, or for packed samples in the positions, and reads
    the result from the device. A Qwen2 model takes a ready mask for each type of its layers. Its eager attention adds
    the mask to the scores and is not causal without one, so it only takes raw masks.

    Args:
        config: the model's configuration of transformers.
        mask: ``[rows, 1, length, length]`` bool; None if being causal is enough.
    """
    qwen2 = config.model_type == "qwen2" and set(config.layer_types) == {"full_attention"}
    ready = qwen2 and config._attn_implementation != "eager"
    return {"full_attention": mask} if ready else None
