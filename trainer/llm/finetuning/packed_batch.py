"""Sequences of packed samples as tensors that keep the samples apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.config.finetune import AnswerWeight
from trainer.llm.finetuning.packing import Packs
from trainer.llm.finetuning.token_files import Tokens

IGNORED = -100
"""Label of a token whose successor is not learnt."""

PADDING = -1
"""Segment of what is no token."""


def answer_weights(tokens: np.ndarray, weight: AnswerWeight) -> np.ndarray:
    """``[samples]`` float64, what answers of so many tokens count for as a whole."""
    return np.power(tokens.astype(np.float64), {"tokens": 1.0, "root": 0.5, "one": 0.0}[weight])


@dataclass(frozen=True)
class TokenBatch:
    """Sequences of one forward pass.

    Attributes:
        ids: ``[rows, length]`` int64.
        positions: ``[rows, length]`` int64, from 0 in every sample; padding goes on behind the last one.
        segments: ``[rows, length]`` int64, which of ``samples`` a token is of, or ``PADDING``.
        labels: ``[rows, length]`` int64, the next token where it is part of the same sample's answer, else ``IGNORED``.
        samples: position of each sample in the tokens, row after row.
        weights: ``[samples]`` float32, what the loss of a token of a sample's answer counts for.
        tokens: of the samples, without padding.
        packed: some row has several samples.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    labels: Tensor
    samples: np.ndarray
    weights: Tensor
    tokens: int
    packed: bool

    @staticmethod
    def of(
        packs: Packs, tokens: Tokens, device: torch.device, *, multiple: int = 8, weight: AnswerWeight = "tokens"
    ) -> TokenBatch:
        """Put sequences side by side, padded at their end; no sequences at all are one of padding.

        Args:
            packs: which samples each row has.
            tokens: of all samples.
            device: to put the tensors on.
            multiple: rows are padded to a multiple of so many tokens.
            weight: of an answer as a whole, which its tokens share.
        """
        lengths = tokens.lengths
        used = [int(lengths[samples].sum()) for samples in packs]
        width = -(-max([1, *used]) // multiple) * multiple
        shape = (max(1, len(packs)), width)
        ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
        positions = np.broadcast_to(np.arange(width), shape).copy()
        segments = np.full(shape, PADDING, np.int64)
        number = 0
        for row, samples in enumerate(packs):
            at = 0
            for sample in samples.tolist():
                start, stop = tokens.starts[sample], tokens.starts[sample + 1]
                end, answer = at + int(stop - start), int(tokens.answers[sample])
                ids[row, at:end] = tokens.ids[start:stop]
                labels[row, end - answer - 1 : end - 1] = tokens.ids[stop - answer : stop]
                positions[row, at:] -= positions[row, at]
                segments[row, at:end] = number
                at, number = end, number + 1
        drawn = np.concatenate([*packs, np.empty(0, np.int64)])
        shares = answer_weights(tokens.answers[drawn], weight) / tokens.answers[drawn]
        return TokenBatch(
            ids=torch.from_numpy(ids).to(device),
            positions=torch.from_numpy(positions).to(device),
            segments=torch.from_numpy(segments).to(device),
            labels=torch.from_numpy(labels).to(device),
            samples=drawn,
            weights=torch.from_numpy(shares.astype(np.float32)).to(device),
            tokens=sum(used),
            packed=any(len(samples) > 1 for samples in packs),
        )

    @property
    def padding(self) -> int:
        """Places without a token."""
        return self.ids.numel() - self.tokens

    @property
    def answered(self) -> Tensor:
        """``[rows, length]`` bool: where the loss counts."""
        return self.labels != IGNORED

    @property
    def mask(self) -> Tensor | None:
        """``[rows, 1, length, length]`` bool: which token may look at which; None where being causal is enough."""
        if not self.packed:
            return None
        length = self.ids.shape[1]
        same = self.segments[:, :, None] == self.segments[:, None, :]
        return (same & torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril())[:, None]
