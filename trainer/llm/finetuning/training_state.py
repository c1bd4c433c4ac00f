"""Sums of a fine-tuning run since the last record of its metric history."""

from __future__ import annotations

import time
from typing import Any


class LossWindow:
    """Sums over the steps since the last record of the metric history; the same on all ranks except for the seconds."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._loss = 0.0
        self._answer_tokens = self._tokens = self._places = 0

    def add(self, loss: float, answer_tokens: int, tokens: int, places: int) -> None:
        """Add a step to the sums.

        Args:
            loss: sum of the losses of its answer tokens.
            answer_tokens: number of tokens that the loss is computed on.
            tokens: number of tokens of all its samples.
            places: number of positions in its batches: tokens and padding.
        """
        self._loss += loss
        self._answer_tokens += answer_tokens
        self._tokens += tokens
        self._places += places

    def entry(self, step: int, learning_rate: float) -> dict[str, Any]:
        """Return a record of the metric history: mean loss of an answer token, token counts without padding, rates."""
        seconds = time.perf_counter() - self._started
        return {
            "step": step,
            "loss": self._loss / max(self._answer_tokens, 1),
            "learning_rate": learning_rate,
            "tokens": self._tokens,
            "answer_tokens": self._answer_tokens,
            "padding_share": 1 - self._tokens / max(self._places, 1),
            "seconds": seconds,
            "tokens_per_second": self._tokens / seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and the elapsed seconds."""
        sums = (self._loss, self._answer_tokens, self._tokens, self._places)
        return {"sums": list(sums), "elapsed": time.perf_counter() - self._started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the sums and the elapsed seconds from :meth:`state_dict`."""
        self._loss, self._answer_tokens, self._tokens, self._places = state["sums"]
        self._started = time.perf_counter() - state["elapsed"]
