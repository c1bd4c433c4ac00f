"""Packed sequences as tensors, with segment ids and masks that separate the samples in a sequence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.config.finetune import AnswerWeight
from trainer.llm.finetuning.packing import Packs
from trainer.llm.finetuning.token_files import Tokens
from trainer.runtime.host_copy import to_device

IGNORED = -100
"""Label of a position that has no loss."""

PADDING = -1
"""Segment id of padding."""


def answer_weights(tokens: np.ndarray, weight: AnswerWeight) -> np.ndarray:
    """Return the weight of each answer in the loss, ``[samples]`` float64, from its number of tokens."""
    return np.power(tokens.astype(np.float64), {"tokens": 1.0, "root": 0.5, "one": 0.0}[weight])


@dataclass(frozen=True)
class TokenBatch:
    """Sequences of one forward pass.

    Attributes:
        ids: ``[rows, length]`` int64, token ids.
        positions: ``[rows, length]`` int64, position ids that start at 0 in every sample; padding continues those of
            the last sample.
        segments: ``[rows, length]`` int64, index into ``samples`` of the sample of each token, or ``PADDING``.
        labels: ``[rows, length]`` int64, the next token if it is part of the same sample's answer, else ``IGNORED``.
        answered: ``[answer tokens]`` int64, positions that have a loss, as places in the batch row after row.
        samples: index of each sample in the :class:`Tokens`, row after row.
        weights: ``[samples]`` float32, loss weight of one answer token of the sample.
        tokens: number of tokens without padding.
        packed: True if a row has more than one sample.
        run_starts: ``[runs + 1]`` int32, place of the first token of each run in the batch row after row, and the end.
            A run is a sample, or the padding of a row.
        longest_run: tokens of the longest run.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    labels: Tensor
    answered: Tensor
    samples: np.ndarray
    weights: Tensor
    tokens: int
    packed: bool
    run_starts: Tensor
    longest_run: int

    @staticmethod
    def of(
        packs: Packs, tokens: Tokens, device: torch.device, *, multiple: int = 8, weight: AnswerWeight = "tokens"
    ) -> TokenBatch:
        """Build a batch from sequences, padded at the end; without any sequence, the batch is one row of padding.

        Args:
            packs: samples of each row.
            tokens: tokens of all samples.
            device: device of the tensors.
            multiple: the row length is rounded up to a multiple of this.
            weight: weight of an answer as a whole; its tokens share it equally.
        """
        lengths = tokens.lengths
        used = [int(lengths[samples].sum()) for samples in packs]
        width = -(-max([1, *used]) // multiple) * multiple
        shape = (max(1, len(packs)), width)
        ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
        positions = np.broadcast_to(np.arange(width), shape).copy()
        segments = np.full(shape, PADDING, np.int64)
        number, runs = 0, set(range(0, shape[0] * width + 1, width))
        for row, samples in enumerate(packs):
            at = 0
            for sample in samples.tolist():
                start, stop = tokens.starts[sample], tokens.starts[sample + 1]
                end, answer = at + int(stop - start), int(tokens.answers[sample])
                ids[row, at:end] = tokens.ids[start:stop]
                # The label of a position is the next token, hence one place to the left of the answer.
                labels[row, end - answer - 1 : end - 1] = tokens.ids[stop - answer : stop]
                # Restart at 0 for this sample and all that follows in the row.
                positions[row, at:] -= positions[row, at]
                segments[row, at:end] = number
                at, number = end, number + 1
                runs.add(row * width + end)
        starts = np.array(sorted(runs), np.int32)
        drawn = np.concatenate([*packs, np.empty(0, np.int64)])
        shares = answer_weights(tokens.answers[drawn], weight) / tokens.answers[drawn]
        on_device = {
            "ids": ids,
            "positions": positions,
            "segments": segments,
            "labels": labels,
            # Found here: on a GPU, the host would wait for the number of places.
            "answered": np.flatnonzero(labels != IGNORED),
            "weights": shares.astype(np.float32),
            "run_starts": starts,
        }
        return TokenBatch(
            samples=drawn,
            tokens=sum(used),
            packed=any(len(samples) > 1 for samples in packs),
            longest_run=int(np.diff(starts).max()),
            **{name: to_device(torch.from_numpy(values), device) for name, values in on_device.items()},
        )

    @property
    def padding(self) -> int:
        """Number of positions without a token."""
        return self.ids.numel() - self.tokens

    def of_answers(self, values: Tensor) -> Tensor:
        """Return the values ``[answer tokens, ...]`` at the positions that have a loss, of ``[rows, length, ...]``."""
        return values.flatten(0, 1).index_select(0, self.answered)

    @property
    def mask(self) -> Tensor | None:
        """Attention mask ``[rows, 1, length, length]`` bool; None if no row is packed and a causal mask is enough."""
        if not self.packed:
            return None
        length = self.ids.shape[1]
        same = self.segments[:, :, None] == self.segments[:, None, :]
        return (same & torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril())[:, None]
