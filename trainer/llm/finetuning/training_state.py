"""How far a fine-tuning is, and what it has seen since the last entry of its trace."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any


class Window:
    """Sums over the steps since the last entry of the trace; the same on all ranks but for the seconds."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._loss = 0.0
        self._answer_tokens = self._tokens = self._places = 0

    def add(self, loss: float, answer_tokens: int, tokens: int, places: int) -> None:
        """Count a step.

        Args:
            loss: sum over its answer tokens.
            answer_tokens: whose loss counts.
            tokens: of all its samples.
            places: tokens and padding.
        """
        self._loss += loss
        self._answer_tokens += answer_tokens
        self._tokens += tokens
        self._places += places

    def entry(self, step: int, learning_rate: float) -> dict[str, Any]:
        """An entry of the trace; the loss is that of a token, tokens are without padding."""
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
        """The sums, and the seconds that they took."""
        sums = (self._loss, self._answer_tokens, self._tokens, self._places)
        return {"sums": list(sums), "elapsed": time.perf_counter() - self._started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._loss, self._answer_tokens, self._tokens, self._places = state["sums"]
        self._started = time.perf_counter() - state["elapsed"]


@dataclass
class TrainingState:
    """How far a fine-tuning is.

    Attributes:
        steps_total: optimizer steps of all epochs.
        sequences_total: in them, of all ranks.
        step: steps done.
        sequences_done: in them.
        trace: entries so far, see :meth:`Window.entry`.
        window: towards the next entry.
        finished: all steps are done and saved.
    """

    steps_total: int
    sequences_total: int
    step: int = 0
    sequences_done: int = 0
    trace: list[dict[str, Any]] = field(default_factory=list)
    window: Window = field(default_factory=Window)
    finished: bool = False
