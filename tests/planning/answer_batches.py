"""Batches of random tokens for a small language model."""

from __future__ import annotations

import numpy as np
import torch

from trainer.llm.finetuning.packed_batch import TokenBatch
from trainer.llm.finetuning.token_files import TokenCounts, Tokens


def answer_batch(rows: int, length: int, answer: int, vocabulary: int) -> TokenBatch:
    """Return ``rows`` sequences of one sample each; the last ``answer`` tokens of each have a loss."""
    ids = np.random.default_rng(1).integers(1, vocabulary, rows * length, dtype=np.int32)
    starts = np.arange(rows + 1) * length
    tokens = Tokens(ids, starts, np.full(rows, answer, np.int32), TokenCounts(rows, rows * length))
    return TokenBatch.of([np.array([row]) for row in range(rows)], tokens, torch.device("cpu"))
