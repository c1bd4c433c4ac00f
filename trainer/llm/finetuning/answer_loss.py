"""A causal language model as what training needs of it: the loss of the answers' tokens, and nothing of the others'."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.llm.finetuning.packed_batch import Batch


class AnswerModel(nn.Module):
    """Negative log-likelihood of answers.

    The head, whose output has a number for every entry of the vocabulary, is applied where the loss counts only: for
    Qwen2-7B's 152,064 entries the logits of a whole sequence would be the largest tensor of the step.

    Args:
        model: a causal model of transformers, or peft's wrapper of one.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """``[answer tokens]`` float32 negative log-likelihood of each, row after row."""
        causal = self.causal
        hidden = causal.model(
            input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False
        ).last_hidden_state
        answered = batch.answered
        logits = causal.lm_head(hidden[answered]).float()
        return F.cross_entropy(logits, batch.labels[answered], reduction="none")

    @property
    def causal(self) -> Any:
        """The model of transformers inside peft's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model


def likelihood_of_samples(losses: Tensor, batch: Batch) -> Tensor:
    """``[samples]`` float32 log-likelihood of each sample's answer, from the losses of its tokens."""
    samples = batch.segments[batch.answered]
    return -torch.zeros(len(batch.samples), device=losses.device).index_add(0, samples, losses)
