"""Import of published vectors as content vectors of a dataset (``trainer/data/format/content_vectors.py``)."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.console.errors import UserError
from trainer.data.format.content_vectors import Origin, VectorPart, write_parts
from trainer.data.importers.columns import ColumnBatch

DTYPE = "float16"
_LARGEST = np.finfo(DTYPE).max
_BLOCK = 1 << 16
VECTORS = pa.list_(pa.float64())
"""Type of a column of vectors, for ``table_files.read_batches``."""


def read_vectors(batch: ColumnBatch, name: str, width: int) -> np.ndarray:
    """Return a column of lists of numbers as ``[rows, width] float32``.

    Raises:
        UserError: a list has another length, or a number is missing, not finite or too large for float16.
    """
    column = batch.column(name)
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        batch.raise_bad_value(name, 0, f"a list of {width} numbers")
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    if (lengths != width).any():
        row = int(np.argmax(lengths != width))
        raise UserError(
            f"{batch.file}: row {batch.first_row + row}: column {name!r} has {lengths[row]} numbers; "
            f"there must be {width}"
        )
    flat = column.flatten().cast(pa.float32()).to_numpy(zero_copy_only=False).reshape(-1, width)
    bad = ~(np.abs(flat) <= _LARGEST).all(axis=1)
    if bad.any():
        row = int(np.argmax(bad))
        raise UserError(
            f"{batch.file}: row {batch.first_row + row}: column {name!r} has a number that is missing, not finite or "
            f"beyond {_LARGEST:.0f}, in a vector that is stored as {DTYPE}"
        )
    return flat


def write_vectors(
    folder: Path,
    ids: np.ndarray,
    parts: Iterator[tuple[np.ndarray, np.ndarray]],
    width: int,
    source: str,
    segments: str = "",
) -> None:
    """Write vectors to ``folder``; see ``content_vectors.write_parts``. ``source`` names the file of the vectors."""
    origin = Origin(pooling=f"as published in {source}")
    no_texts = np.zeros(len(ids), np.uint64)
    write_parts(folder, ids, no_texts, parts, width, origin=origin, dtype=DTYPE, segments=segments)


def find_title_file(folder: Path) -> Path:
    """Return the file of KuaiLive's title vectors: ``.npy`` or ``.npz``, because its description uses both names.

    Raises:
        UserError: neither file exists.
    """
    for name in ("title_embeddings.npy", "title_embeddings.npz"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}/title_embeddings.npy: is missing; it is one of the files of KuaiLive")


def write_title_vectors(folder: Path, file: Path, item_id: np.ndarray, title: np.ndarray) -> int:
    """Write the vector of each item's title; return the number of items without a vector.

    Args:
        folder: folder of the content vectors.
        file: file of the title vectors, see ``find_title_file``; row t is the vector of title t.
        item_id: ``[n] int64``, each once.
        title: ``[n] int64``, number of the item's title; items with a number outside the file get no vector.

    Raises:
        UserError: the file is not an array ``[titles, width]`` of floats, or a vector is not finite.
    """
    titles = _load_titles(file)
    known = np.flatnonzero((title >= 0) & (title < len(titles)))

    def parts() -> Iterator[VectorPart]:
        for first in range(0, len(known), _BLOCK):
            rows = known[first : first + _BLOCK]
            vectors = titles[title[rows]].astype(np.float32)
            bad = ~(np.abs(vectors) <= _LARGEST).all(axis=1)
            if bad.any():
                raise UserError(f"{file}: row {title[rows][np.argmax(bad)]} (from 0) has a number that is not finite")
            yield item_id[rows], vectors

    write_vectors(folder, item_id[known], parts(), titles.shape[1], file.name)
    return len(item_id) - len(known)


def _load_titles(file: Path) -> np.ndarray:
    """Return the title vectors ``[titles, width]``, memory-mapped if the file allows it.

    Raises:
        UserError: the file cannot be read, or it is not one array of that shape.
    """
    try:
        loaded = np.load(file, mmap_mode="r", allow_pickle=False)
        titles = loaded if isinstance(loaded, np.ndarray) else loaded[_only(file, loaded.files)]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: cannot be read as an array ({error})") from None
    if titles.ndim != 2 or titles.dtype.kind != "f":
        raise UserError(f"{file}: is an array {titles.shape} of {titles.dtype}; it must be [titles, width] of floats")
    return titles


def _only(file: Path, names: list[str]) -> str:
    """Return the name of the only array of an ``.npz`` file.

    Raises:
        UserError: the file has no array or several.
    """
    if len(names) != 1:
        raise UserError(f"{file}: has the arrays {', '.join(names) or 'none'}; it must have exactly one")
    return names[0]
