"""Code files: the codes of a dataset's segments by one codebook version, in one Parquet file.

Columns are ``item_id``, ``author_id``, ``segment`` (the id of the segment's vector) and ``known_ms``, all int64, and
``code_1``, ``code_2``, ... int32, one for each level, and ``start_ms`` int64. The metadata of the file has the name of
the version, the sizes of the levels, a hash of all columns but ``start_ms``, and a hash of that one; reading compares
them. Rows are in the order of the table of vectors. Files of earlier versions have no ``start_ms``.

A segment whose author is not known has the author -1. ``trainer/semantic_ids/code_files.py`` writes these files.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from trainer.console.errors import UserError
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import read_table, table_footer

FORMAT = "1"
_KEYS = ("format", "version", "levels", "hash")
_PREFIX = "limelight_codes_"
_HASH_KEY, _STARTS_KEY = f"{_PREFIX}hash", f"{_PREFIX}starts"
_START = "start_ms"
_COLUMNS = ("item_id", "author_id", "segment", "known_ms")


class CodeHeader(NamedTuple):
    """Metadata of a code file.

    Attributes:
        version: name of the codebook version.
        levels: number of codes of each level.
        hash: of all columns but ``start_ms``.
        starts: hash of ``start_ms``; empty if the file does not have this column.
    """

    version: str
    levels: tuple[int, ...]
    hash: str
    starts: str


@dataclass(frozen=True)
class CodeFile:
    """Content of a code file.

    Attributes:
        path: of the file.
        version: name of the codebook version.
        levels: number of codes of each level.
        item_id, author_id, segment, known_ms: ``[n] int64``.
        codes: ``[n, levels] int32``.
        hash: of these columns.
        start_ms: ``[n] int64``, start of each segment; None in a file of an earlier version.
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
    start_ms: np.ndarray | None = None

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
            header = _metadata(files, path)
            code_names, starts = _code_names(len(header.levels)), [_START] if header.starts else []
            table = read_table(files, name, [*_COLUMNS, *code_names, *starts])
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; `limelight quantize assign` makes a code file") from None
        if any(column.null_count or not pa.types.is_integer(column.type) for column in table.columns):
            raise UserError(f"{path}: damaged, a column has empty values or no whole numbers; assign the codes again")
        columns = {name: table[name].to_numpy().astype(np.int64) for name in _COLUMNS}
        codes = np.stack([table[name].to_numpy().astype(np.int32) for name in code_names], axis=1)
        start_ms = table[_START].to_numpy().astype(np.int64) if starts else None
        digests = CodeDigests(len(header.levels))
        digests.add(columns, codes, start_ms)
        if digests.hash != header.hash or (starts and digests.starts != header.starts):
            raise UserError(f"{path}: damaged, its content differs from its hash; assign the codes again")
        if (codes < 0).any() or (codes >= np.array(header.levels)).any():
            raise UserError(f"{path}: damaged, a code is not below the size of its level; assign the codes again")
        return CodeFile(
            path, header.version, header.levels, **columns, codes=codes, hash=header.hash, start_ms=start_ms
        )


class CodeDigests:
    """Hashes of the columns of a code file, one digest a column, so that the blocks do not matter.

    Args:
        levels: number of levels.
    """

    def __init__(self, levels: int) -> None:
        self._digests = [hashlib.blake2b(digest_size=16) for _ in range(len(_COLUMNS) + levels)]
        self._starts = hashlib.blake2b(digest_size=16)

    def add(self, columns: dict[str, np.ndarray], codes: np.ndarray, start_ms: np.ndarray | None = None) -> None:
        """Add rows: the columns without codes, codes ``[n, levels] int32``, and starts."""
        arrays = [*(columns[name] for name in _COLUMNS), *codes.T]
        for digest, array in zip(self._digests, arrays, strict=True):
            digest.update(array.tobytes())
        if start_ms is not None:
            self._starts.update(start_ms.tobytes())

    @property
    def hash(self) -> str:
        """Hash of all columns but ``start_ms``."""
        return hashlib.blake2b(b"".join(digest.digest() for digest in self._digests), digest_size=16).hexdigest()

    @property
    def starts(self) -> str:
        """Hash of ``start_ms``."""
        return self._starts.hexdigest()

    @property
    def metadata(self) -> dict[str, str]:
        """Entries of the file's metadata that are known only after the last row."""
        return {_HASH_KEY: self.hash, _STARTS_KEY: self.starts}


def code_schema(version: str, levels: tuple[int, ...]) -> pa.Schema:
    """Return columns and metadata of a code file, its hashes excepted.

    Args:
        version: name of the codebook version.
        levels: number of codes of each level.
    """
    return pa.schema(
        [
            *((name, pa.int64()) for name in _COLUMNS),
            *((name, pa.int32()) for name in _code_names(len(levels))),
            (_START, pa.int64()),
        ],
        {f"{_PREFIX}format": FORMAT, f"{_PREFIX}version": version, f"{_PREFIX}levels": json.dumps(list(levels))},
    )


def read_code_header(path: Path) -> CodeHeader:
    """Read the metadata of a code file; nothing but its footer is read.

    Raises:
        UserError: there is no such file, it is no code file, or its footer is damaged.
    """
    try:
        return _metadata(DatasetFiles(path.parent), path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `limelight quantize assign` makes a code file") from None


def _metadata(files: DatasetFiles, path: Path) -> CodeHeader:
    """Return the metadata of a file; raises FileNotFoundError if there is no such file."""
    _, metadata = table_footer(files, path.name)
    found = {key: metadata.get(f"{_PREFIX}{key}".encode()) for key in _KEYS}
    if found["format"] is None:
        raise UserError(f"{path}: no code file; `limelight quantize assign` makes one")
    if found["format"] != FORMAT.encode():
        raise UserError(f"{path}: format is {found['format']!r}; this release reads format {FORMAT}")
    levels = _levels(found["levels"])
    if levels is None or found["version"] is None or found["hash"] is None:
        raise UserError(f"{path}: damaged, its metadata is not complete; assign the codes again")
    return CodeHeader(
        found["version"].decode("utf-8", "replace"),
        levels,
        found["hash"].decode("ascii", "replace"),
        metadata.get(_STARTS_KEY.encode(), b"").decode("ascii", "replace"),
    )


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
