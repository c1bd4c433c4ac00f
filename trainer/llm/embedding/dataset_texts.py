"""Texts of a dataset that become vectors: ids, texts, and hashes that detect a changed text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.format.segments import DatasetSegments, UnknownRooms
from trainer.data.format.text_schema import read_texts, segment_ids

_KEYS = {"items": "item_id", "comments": "comment_id", "authors": "author_id"}


@dataclass(frozen=True)
class KindTexts:
    """Texts of one kind, the longest first, so that neighbours have about the same length.

    Attributes:
        ids: ``[n] int64``.
        hashes: ``[n] uint64``, hashes of the texts.
        texts: ``[n]`` strings, none of them blank.
        empty: number of ids with a blank text, which get no vector.
    """

    ids: np.ndarray
    hashes: np.ndarray
    texts: pa.Array
    empty: int

    @staticmethod
    def read(path: str | Path, kind: str) -> KindTexts:
        """Read the texts of the dataset at ``path``.

        Raises:
            UserError: the dataset has no texts of this kind.
        """
        keys = ["item_id", "segment"] if kind == "segments" else [_KEYS[kind]]
        table = read_texts(path, kind, [*keys, "text"])
        columns = [table.column(key).to_numpy() for key in keys]
        ids = segment_ids(columns[0], columns[1]) if kind == "segments" else columns[0]
        # string has 32-bit offsets, which overflow at 2 GB of text; large_string has 64-bit offsets.
        texts = table.column("text").cast(pa.large_string()).combine_chunks()
        filled = pc.utf8_length(pc.utf8_trim_whitespace(texts)).to_numpy(zero_copy_only=False) > 0
        ids, texts = ids[filled], texts.filter(pa.array(filled))
        sizes = pc.binary_length(texts).to_numpy(zero_copy_only=False)
        order = np.lexsort((ids, -sizes))
        ids, texts = ids[order], texts.take(pa.array(order))
        return KindTexts(ids, _hashes(texts), texts, int((~filled).sum()))

    def texts_at(self, rows: np.ndarray) -> list[str]:
        """Return the texts at positions ``rows``."""
        texts: list[str] = self.texts.take(pa.array(rows)).to_pylist()
        return texts


def read_segments(path: str | Path, kind: str) -> DatasetSegments | None:
    """Return the segments that texts of a kind belong to; None for other kinds, and if their rooms are not known.

    Raises:
        UserError: a table of the dataset is damaged, or has a segment twice.
    """
    if kind != "segments":
        return None
    try:
        return DatasetSegments.read(str(path), embedded=True)
    except UnknownRooms:
        return None


def _hashes(texts: pa.Array) -> np.ndarray:
    digests = bytearray()
    for text in texts:
        digests += hashlib.blake2b(text.as_buffer(), digest_size=8).digest()
    return np.frombuffer(bytes(digests), "<u8").astype(np.uint64)
