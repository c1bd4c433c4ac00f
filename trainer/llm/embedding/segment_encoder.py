"""Encoder of segments as they become known: batches of fixed shapes.

Which segments are embedded together depends on when they arrive, so their vectors must not depend on it. Matrix
products of other shapes may round differently. So each batch has a fixed number of rows, and each text is padded to a
length that follows from the text alone. On a CPU in float32 a vector then has the same bits in every batch; a GPU's
kernels do not promise that for different rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from trainer.llm.embedding.text_encoder import Encoder
from trainer.llm.models.prompt_templates import Template
from trainer.runtime.host_copy import HostCopy, one_behind

SHORTEST = 8
"""Smallest length to which texts are padded."""


class TextSegmentEncoder:
    """Encoder of the texts of segments with a language model; frames are left out.

    Args:
        encoder: encoder of texts, with its pooling set.
        template: template with the section ``segments``.
        rows: number of texts of a batch.
        length: maximum tokens of a text.
        tokens: maximum tokens of a batch, including padding.

    Attributes:
        dim: width of a vector.
    """

    def __init__(self, encoder: Encoder, template: Template, *, rows: int, length: int, tokens: int) -> None:
        self._encoder, self._template, self.dim = encoder, template, encoder.dim
        self._rows, self._length, self._tokens = rows, length, tokens

    def encode(self, texts: Sequence[str], frames: Sequence[Sequence[str]]) -> tuple[np.ndarray, list[str]]:
        """Encode segments.

        Args:
            texts: speech of each segment.
            frames: paths of the frames of each segment.

        Returns:
            Vectors ``[n, dim]`` float32, and an empty text for each: every text has a vector.
        """
        ids = self.tokens(texts)
        vectors = np.zeros((len(ids), self._encoder.dim), np.float32)
        for batch, (found,) in one_behind(self._batches(ids)):
            vectors[batch] = found.numpy()[: len(batch)]
        return vectors, [""] * len(ids)

    def _batches(self, ids: Sequence[list[int]]) -> Iterator[tuple[np.ndarray, HostCopy]]:
        """Yield the places of the texts of each batch, with a copy of its vectors."""
        widths = np.array([padded_length(len(one), self._length) for one in ids])
        for width in np.unique(widths).tolist():
            rows = max(1, min(self._rows, self._tokens // width))
            chosen = np.flatnonzero(widths == width)
            for first in range(0, len(chosen), rows):
                batch = chosen[first : first + rows]
                # One token each fills the batch up.
                filled = [ids[one] for one in batch] + [[0]] * (rows - len(batch))
                yield batch, self._encoder.pooled(filled, width)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text in its template, at least one."""
        tokens = self._encoder.tokenise([self._template.fill("segments", text=text) for text in texts])
        # A template without words of its own leaves nothing of an empty text.
        return [one or [0] for one in tokens]


def padded_length(tokens: int, longest: int) -> int:
    """Return the length to which a text is padded: the next power of two, at least 8 and at most ``longest``."""
    return min(max(SHORTEST, 1 << (tokens - 1).bit_length()), max(longest, tokens))
