"""Encoder of texts into vectors with a causal language model, in batches of texts of about the same length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modules.choices import TextPooling
from modules.text_pooling import pool
from trainer.llm.models.ready_mask import ready_mask
from trainer.llm.models.text_tokens import text_tokens
from trainer.runtime.host_copy import HostCopy, one_behind, to_device


@dataclass
class EncodeCounts:
    """Counts of the encoded texts.

    Attributes:
        texts: number of texts.
        truncated: number of texts that were longer than the maximum length.
        tokens: number of tokens, without padding.
        places: number of positions in the batches, including padding.
    """

    texts: int = 0
    truncated: int = 0
    tokens: int = 0
    places: int = 0


class Encoder:
    """Encoder of texts with a causal language model.

    Texts are truncated at their end, and batches are padded at the end. The states of a causal model do not depend on
    later tokens, so neither the other texts of a batch nor their order change a vector, up to rounding.

    Args:
        model: a causal model of transformers or peft's wrapper of one, in evaluation mode, on ``device``.
        tokenizer: tokenizer of the model.
        device: device to compute on.
        length: maximum tokens of a text.
        tokens: maximum tokens of a batch, including padding; a longer text is a batch of its own.

    Attributes:
        model: the causal model, without peft's wrapper.
        device: device to compute on.
        pooling, query: pooling of token states into one vector, and its query if it has one.
        dim: width of a vector.
        counts: counts of all texts encoded so far.
    """

    def __init__(self, model: Any, tokenizer: Any, device: torch.device, *, length: int, tokens: int) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        # A model of texts and pictures has a model of texts inside.
        self._states = getattr(self.model.model, "language_model", self.model.model)
        self._tokenizer, self.device = tokenizer, device
        self._length, self._tokens = length, tokens
        self.pool_with("last")
        self.dim: int = self.model.config.get_text_config().hidden_size
        self.counts = EncodeCounts()

    def pool_with(self, pooling: TextPooling, query: Tensor | None = None) -> None:
        """Set the pooling of token states into one vector for the following texts; see ``modules/text_pooling.py``."""
        self.pooling, self.query = pooling, None if query is None else query.to(self.device)

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """Encode texts, none of them empty, into vectors ``[n, dim]`` float32 in the same order."""
        ids = self.tokenise(texts)
        lengths = np.array([len(one) for one in ids])
        vectors = np.empty((len(ids), self.dim), np.float32)
        batches = batches_by_length(lengths, self._tokens)
        for batch, (found,) in one_behind((batch, self.pooled([ids[one] for one in batch])) for batch in batches):
            vectors[batch] = found.numpy()
        return vectors

    def pooled(self, ids: Sequence[Sequence[int]], width: int = 0) -> HostCopy:
        """Queue the encoding of one batch of texts into vectors ``[n, dim]`` float32; returns a copy of these.

        Args:
            ids: tokens of each text.
            width: length to which texts are padded; that of the longest if it is 0.
        """
        states, sizes = self.states(ids, width)
        return HostCopy([pool(states, sizes, self.pooling, self.query)])

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the first ``length`` tokens of each text."""
        tokens = text_tokens(self._tokenizer, texts)
        self.counts.texts += len(tokens)
        self.counts.truncated += sum(len(one) > self._length for one in tokens)
        return [one[: self._length] for one in tokens]

    @torch.inference_mode()
    def states(self, ids: Sequence[Sequence[int]], width: int = 0) -> tuple[Tensor, Tensor]:
        """Compute the last layer's states ``[n, width, dim]``; returns them and the text lengths ``[n]`` int64.

        Args:
            ids: tokens of each text.
            width: length to which texts are padded; that of the longest if it is 0.
        """
        sizes = [len(one) for one in ids]
        # Any id may stand for padding: it is masked, and a causal model's earlier states do not depend on it.
        padded = torch.zeros(len(ids), width or max(sizes), dtype=torch.int64)
        for row, one in enumerate(ids):
            padded[row, : len(one)] = torch.tensor(one)
        self.counts.tokens += sum(sizes)
        self.counts.places += padded.numel()
        lengths = to_device(torch.tensor(sizes), self.device)
        mask = self._mask(lengths, padded.shape[1], padding=min(sizes) < padded.shape[1])
        states = self._states(
            input_ids=to_device(padded, self.device), attention_mask=mask, use_cache=False
        ).last_hidden_state
        return states, lengths

    def _mask(self, lengths: Tensor, width: int, *, padding: bool) -> Tensor | dict[str, Tensor | None]:
        """Return the mask of texts of some lengths ``[n]``, in a batch that has ``padding`` or not."""
        places = torch.arange(width, device=self.device)
        tokens = places < lengths[:, None]
        causal = (places[:, None] >= places) & tokens[:, None, None] if padding else None
        ready = ready_mask(self._states.config, causal)
        return tokens.long() if ready is None else ready


def batches_by_length(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Group texts into batches, the longest first, with as many texts as fit if all are padded to the longest.

    Args:
        lengths: ``[n]`` tokens of each text.
        tokens: maximum tokens of a batch, including padding; a longer text is a batch of its own.

    Returns:
        Batches of text positions; every position is in exactly one batch.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, first = [], 0
    while first < len(order):
        rows = max(1, tokens // max(1, int(lengths[order[first]])))
        batches.append(order[first : first + rows])
        first += rows
    return batches
