"""Loss of a causal language model on the tokens of the answers only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.llm.finetuning.packed_attention import attention_inputs
from trainer.llm.finetuning.packed_batch import TokenBatch


class AnswerModel(nn.Module):
    """Module that returns the negative log-likelihood of answer tokens.

    The output head is applied to answer positions only. Its output has one number per vocabulary entry: with the
    152,064 entries of Qwen2-7B, logits of all positions would be the largest tensor of a step.

    Args:
        model: a causal model of transformers, or peft's wrapper of one.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch) -> Tensor:
        """Compute the float32 negative log-likelihoods ``[answer tokens]``, row after row."""
        causal = self.causal
        separate = attention_inputs(batch, causal.config)
        hidden = causal.model(
            input_ids=batch.ids, position_ids=batch.positions, use_cache=False, **separate
        ).last_hidden_state
        logits = causal.lm_head(batch.of_answers(hidden)).float()
        return F.cross_entropy(logits, batch.of_answers(batch.labels), reduction="none")

    @property
    def causal(self) -> Any:
        """The transformers model inside peft's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model


def likelihood_of_samples(losses: Tensor, batch: TokenBatch) -> Tensor:
    """Sum token losses into the float32 log-likelihood of each sample's answer, ``[samples]``."""
    samples = batch.of_answers(batch.segments)
    return -torch.zeros(len(batch.samples), device=losses.device).index_add(0, samples, losses)
