"""Code files: the codes of a dataset's segments by one codebook version, in one Parquet file.

Columns are ``item_id``, ``author_id``, ``segment`` (the id of the segment's vector) and ``known_ms``, all int64, and
``code_1``, ``code_2``, ... int32, one for each level. The metadata of the file has the name of the version, the sizes
of the levels, and a hash of all columns, which reading compares. Rows are in the order of the table of vectors.

A segment whose author is not known has the author -1. ``trainer/semantic_ids/code_files.py`` writes these files.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.console.errors import UserError
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import read_table, table_footer

FORMAT = "1"
_KEYS = ("format", "version", "levels", "hash")
_PREFIX = "limelight_codes_"
HASH_KEY = f"{_PREFIX}hash"
"""Key of the metadata with the hash of all columns, which is known only after the last row."""
_COLUMNS = ("item_id", "author_id", "segment", "known_ms")


@dataclass(frozen=True)
class CodeFile:
    """Content of a code file.

    Attributes:
        path: of the file.
        version: name of the codebook version.
        levels: number of codes of each level.
        item_id, author_id, segment, known_ms: ``[n] int64``.
        codes: ``[n, levels] int32``.
        hash: of all columns.
    """

    path: Path
    version: str
    levels: tuple[int, ...]
    item_id: np.ndarray
    author_id: np.ndarray
    segment: np.ndarray
    known_ms: np.ndarray
    codes: np.ndarray
    hash: str = ""

    def __len__(self) -> int:
        return len(self.segment)

    @staticmethod
    def read(path: Path) -> CodeFile:
        """Read a code file of any codebook version.

        Raises:
            UserError: there is no such file, it is no code file, or it is damaged.
        """
        files, name = DatasetFiles(path.parent), path.name
        try:
            levels, version, expected = _metadata(files, path)
            code_names = _code_names(len(levels))
            table = read_table(files, name, [*_COLUMNS, *code_names])
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; `limelight quantize assign` makes a code file") from None
        if any(column.null_count or not pa.types.is_integer(column.type) for column in table.columns):
            raise UserError(f"{path}: damaged, a column has empty values or no whole numbers; assign the codes again")
        columns = {name: table[name].to_numpy().astype(np.int64) for name in _COLUMNS}
        codes = np.stack([table[name].to_numpy().astype(np.int32) for name in code_names], axis=1)
        digests = CodeDigests(len(levels))
        digests.add(columns, codes)
        if digests.hash != expected:
            raise UserError(f"{path}: damaged, its content differs from its hash; assign the codes again")
        if (codes < 0).any() or (codes >= np.array(levels)).any():
            raise UserError(f"{path}: damaged, a code is not below the size of its level; assign the codes again")
        return CodeFile(path, version, levels, **columns, codes=codes, hash=expected)


class CodeDigests:
    """Hash of the columns of a code file, one digest a column, so that the blocks do not matter.

    Args:
        levels: number of levels.
    """

    def __init__(self, levels: int) -> None:
        self._digests = [hashlib.blake2b(digest_size=16) for _ in range(len(_COLUMNS) + levels)]

    def add(self, columns: dict[str, np.ndarray], codes: np.ndarray) -> None:
        """Add rows: the columns without codes, and codes ``[n, levels] int32``."""
        arrays = [*(columns[name] for name in _COLUMNS), *codes.T]
        for digest, array in zip(self._digests, arrays, strict=True):
            digest.update(array.tobytes())

    @property
    def hash(self) -> str:
        """Hash of all columns."""
        return hashlib.blake2b(b"".join(digest.digest() for digest in self._digests), digest_size=16).hexdigest()


def code_schema(version: str, levels: tuple[int, ...]) -> pa.Schema:
    """Return columns and metadata of a code file, the hash excepted.

    Args:
        version: name of the codebook version.
        levels: number of codes of each level.
    """
    return pa.schema(
        [(name, pa.int64()) for name in _COLUMNS] + [(name, pa.int32()) for name in _code_names(len(levels))],
        {f"{_PREFIX}format": FORMAT, f"{_PREFIX}version": version, f"{_PREFIX}levels": json.dumps(list(levels))},
    )


def read_code_header(path: Path) -> tuple[tuple[int, ...], str, str]:
    """Return the sizes of the levels, the name of the codebook version and the hash of a code file, of its footer only.

    Raises:
        UserError: there is no such file, it is no code file, or its footer is damaged.
    """
    try:
        return _metadata(DatasetFiles(path.parent), path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `limelight quantize assign` makes a code file") from None


def _metadata(files: DatasetFiles, path: Path) -> tuple[tuple[int, ...], str, str]:
    """Return levels, version and hash; raises FileNotFoundError if there is no such file."""
    schema, footer = table_footer(files, path.name)
    metadata = footer | (schema.metadata or {})
    found = {key: metadata.get(f"{_PREFIX}{key}".encode()) for key in _KEYS}
    if found["format"] is None:
        raise UserError(f"{path}: no code file; `limelight quantize assign` makes one")
    if found["format"] != FORMAT.encode():
        raise UserError(f"{path}: format is {found['format']!r}; this release reads format {FORMAT}")
    levels = _levels(found["levels"])
    if levels is None or found["version"] is None or found["hash"] is None:
        raise UserError(f"{path}: damaged, its metadata is not complete; assign the codes again")
    return levels, found["version"].decode("utf-8", "replace"), found["hash"].decode("ascii", "replace")


def _code_names(levels: int) -> list[str]:
    return [f"code_{level + 1}" for level in range(levels)]


def _levels(text: bytes | None) -> tuple[int, ...] | None:
    """Return the sizes of levels from the metadata; None if it is damaged."""
    try:
        levels = json.loads(text or b"null")
    except ValueError:
        return None
    if not isinstance(levels, list) or not levels or any(type(size) is not int or size < 1 for size in levels):
        return None
    return tuple(levels)
