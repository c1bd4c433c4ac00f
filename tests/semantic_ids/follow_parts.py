"""Clock, encoder, codebook and messages of the tests that follow live rooms."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.data.format.content_vectors import Origin
from trainer.semantic_ids.segment_source import Clock

DIM = 4
NOW_MS = 1_700_000_000_000


class ManualClock(Clock):
    """Clock that only moves when somebody sleeps or the test moves it."""

    def __init__(self, time_ms: int = NOW_MS) -> None:
        self.now = time_ms / 1000

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class HashEncoder:
    """Encoder whose vectors follow from the text; a segment takes ``seconds`` of the clock."""

    dim = DIM

    def __init__(self, clock: ManualClock | None = None, seconds: float = 0.0) -> None:
        self.clock, self.seconds = clock, seconds
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str], frames: Sequence[Sequence[str]]) -> tuple[np.ndarray, list[str]]:
        self.texts += texts
        if self.clock is not None:
            self.clock.now += self.seconds * len(texts)
        vectors = np.stack([self.vector(text) for text in texts])
        return vectors, ["cannot be seen" if text == "unseen" else "" for text in texts]

    def vector(self, text: str) -> np.ndarray:
        if text in ("nan", "zero"):
            return np.full(DIM, float("nan") if text == "nan" else 0.0, np.float32)
        digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
        return np.random.default_rng(int.from_bytes(digest, "little")).standard_normal(DIM).astype(np.float32)


class SignCodebook:
    """Codebook whose code is the sign of each element."""

    def __init__(self, name: str = "signs") -> None:
        self.name = name

    def encode(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (vectors > 0).astype(np.int32), np.zeros(len(vectors), np.float32)

    def numbers(self, codes: np.ndarray) -> np.ndarray:
        return (codes @ (1 << np.arange(codes.shape[1]))).astype(np.int32)

    def check_vectors(self, place: object, dim: int, origin: Origin) -> None:
        """Accept any vectors."""


def message(room: int, segment: int, **changed: Any) -> dict[str, Any]:
    """Return a message of a room whose segments become known every 30 seconds."""
    known_ms = NOW_MS - 3_600_000 + 30_000 * segment + room
    values = {
        "item_id": room,
        "author_id": room % 3,
        "segment": segment,
        "known_ms": known_ms,
        "text": f"{room} says {segment}",
    }
    return {**values, **changed}


def lines_of(messages: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in messages)
