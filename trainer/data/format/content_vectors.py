"""Vectors of videos, comments, segments or authors by id: one directory, memory-mapped, replaced as a whole.

::

    manifest.json           what made the vectors, how many there are, and the names of the files that hold them
    ids-<hash>.npy          [n] int64, in increasing order
    vectors-<hash>.npy      [n, dim] float16 or float32, in the order of the ids
    texts-<hash>.npy        [n] uint64, a hash of the text that each vector was made from

The manifest is the table. A new version's files get names of their own, then the manifest is replaced in one step:
whoever opens the table gets the old version or the new one, and whoever had it open keeps what is mapped. One process
writes at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.console.errors import UserError

VERSION = 1
MANIFEST = "manifest.json"
DTYPES = ("float16", "float32")

_PARTS = ("ids", "vectors", "texts")
_CHUNK_ROWS = 1 << 16
_CHUNK_BYTES = 16 << 20
_OPEN_TRIES = 10

VectorPart = tuple[np.ndarray, np.ndarray]
"""Ids ``[n] int64`` and their vectors ``[n, dim]``."""


@dataclass(frozen=True)
class Origin:
    """What made the vectors of a table.

    Attributes:
        model: name of the model's directory; empty for vectors of another kind.
        adapter: name of the adapter's directory; empty without one.
        template: name -> text of the templates that the texts were put into.
        pooling: how a text's token states became one vector.
        hash: of model, adapter, templates and pooling with their contents; vectors with the same hash may be mixed.
        counts: what happened on the way: texts empty, truncated, refused.
    """

    model: str = ""
    adapter: str = ""
    template: dict[str, str] = field(default_factory=dict)
    pooling: str = ""
    hash: str = ""
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ContentVectors:
    """An opened table.

    Attributes:
        path: its directory.
        ids: ``[n] int64``, increasing.
        vectors: ``[n, dim] float16`` or ``float32``, memory-mapped, read-only.
        texts: ``[n] uint64``, 0 where the text is not known.
        origin: what made the vectors.
        hash: of ids and vectors.
    """

    path: Path
    ids: np.ndarray
    vectors: np.ndarray
    texts: np.ndarray
    origin: Origin
    hash: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return int(self.vectors.shape[1])

    @staticmethod
    def open(path: str | Path) -> ContentVectors:
        """Open the table at ``path``.

        Raises:
            UserError: none there, of another release, or its files are not what the manifest says.
        """
        folder = Path(path)
        for _ in range(_OPEN_TRIES):
            manifest = _read_manifest(folder)
            try:
                ids, vectors, texts = (
                    np.load(folder / manifest["files"][part], mmap_mode="r", allow_pickle=False) for part in _PARTS
                )
                break
            except FileNotFoundError:
                # Replaced since its manifest was read; the next one names files that are there.
                continue
            except (KeyError, ValueError, EOFError, OSError) as error:
                raise UserError(f"{folder}: not a whole embedding table ({error}); make it again") from None
        else:
            raise UserError(f"{folder}: files that {MANIFEST} names are missing; make the table again")
        shape = (manifest["count"], manifest["dim"])
        if ids.shape != shape[:1] or texts.shape != shape[:1] or vectors.shape != shape:
            raise UserError(f"{folder}: {MANIFEST} tells of {shape[0]} vectors of {shape[1]}, the files hold others")
        return ContentVectors(folder, ids, vectors, texts, Origin(**manifest["origin"]), manifest["hash"])

    def lookup(self, ids: np.ndarray) -> np.ndarray:
        """Rows of the ids, -1 where the table has none. Any shape, int64 -> the same shape, int64."""
        if not len(self.ids):
            return np.full(np.shape(ids), -1, np.int64)
        row = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[row] == ids, row, -1)

    def parts(self, rows: np.ndarray) -> Iterator[VectorPart]:
        """Ids and vectors of ``rows``, some ten thousands at a time."""
        for first in range(0, len(rows), _CHUNK_ROWS):
            chunk = rows[first : first + _CHUNK_ROWS]
            yield self.ids[chunk], self.vectors[chunk]

    @staticmethod
    def write(
        path: str | Path,
        ids: np.ndarray,
        vectors: np.ndarray,
        *,
        texts: np.ndarray | None = None,
        origin: Origin | None = None,
        dtype: str = "float16",
    ) -> ContentVectors:
        """Write a table from arrays; ``ids [n]`` in any order, ``vectors [n, dim]``.

        Raises:
            UserError: as ``write_parts``.
        """
        texts = np.zeros(len(ids), np.uint64) if texts is None else texts
        return write_parts(path, ids, texts, [(ids, vectors)], vectors.shape[1], origin=origin, dtype=dtype)


def write_parts(
    path: str | Path,
    ids: np.ndarray,
    texts: np.ndarray,
    parts: Iterable[VectorPart],
    dim: int,
    *,
    origin: Origin | None = None,
    dtype: str = "float16",
) -> ContentVectors:
    """Write a table, or replace the one that is there, from parts that come one after the other.

    Args:
        path: its directory; made if it is not there.
        ids: ``[n] int64``, those of all parts, in any order.
        texts: ``[n] uint64``, hashes of their texts.
        parts: every id in exactly one of them.
        dim: width of a vector.
        origin: what made the vectors.
        dtype: ``float16`` or ``float32``, in which they are stored.

    Returns:
        The table, opened.

    Raises:
        UserError: an id comes twice, is negative or has no vector; a vector has another width, or is not finite in
            ``dtype``. The number of such vectors is told, and the table that was there stays.
    """
    folder = Path(path)
    if dtype not in DTYPES:
        raise UserError(f"{folder}: vectors cannot be stored as {dtype}; known are {', '.join(DTYPES)}")
    order = np.argsort(ids, kind="stable")
    ids, texts = ids[order].astype(np.int64), texts[order].astype(np.uint64)
    _check_ids(folder, ids)
    origin = origin or Origin()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = {part: folder / f"{part}.partial" for part in _PARTS}
        vectors = np.lib.format.open_memmap(partial["vectors"], "w+", np.dtype(dtype), (len(ids), dim))
        _fill(folder, ids, parts, vectors)
        vectors.flush()
        for part, values in (("ids", ids), ("texts", texts)):
            with open(partial[part], "wb") as file:
                np.save(file, values)
        digest = _hash_of(partial["ids"], partial["vectors"])
        version = hashlib.blake2b((digest + origin.hash).encode() + texts.tobytes(), digest_size=6).hexdigest()
        files = {part: f"{part}-{version}.npy" for part in _PARTS}
        for part in _PARTS:
            _sync(partial[part])
            os.replace(partial[part], folder / files[part])
        manifest = {"version": VERSION, "count": len(ids), "dim": dim, "dtype": dtype, "hash": digest}
        _replace_manifest(folder, {**manifest, "origin": asdict(origin), "files": files})
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise UserError(f"{folder}: cannot be written ({reason})") from error
    finally:
        for part in _PARTS:
            (folder / f"{part}.partial").unlink(missing_ok=True)
    for part in _PARTS:
        for old in folder.glob(f"{part}-*.npy"):
            if old.name != files[part]:
                old.unlink(missing_ok=True)
    return ContentVectors.open(folder)


def finite_rows(vectors: np.ndarray, dtype: str) -> np.ndarray:
    """Which vectors are finite when stored as ``dtype``, ``[n, dim] -> [n] bool``."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.isfinite(vectors.astype(dtype)).all(axis=1)


def _check_ids(folder: Path, ids: np.ndarray) -> None:
    if len(ids) and ids[0] < 0:
        raise UserError(f"{folder}: id {ids[0]} is negative; ids are 0 or more")
    twice = np.flatnonzero(ids[1:] == ids[:-1])
    if len(twice):
        raise UserError(f"{folder}: id {ids[twice[0]]} comes twice; every id has one vector")


def _fill(folder: Path, ids: np.ndarray, parts: Iterable[VectorPart], vectors: np.ndarray) -> None:
    written = np.zeros(len(ids), bool)
    refused, first_refused = 0, -1
    for part_ids, part in parts:
        if part.ndim != 2 or part.shape[1] != vectors.shape[1] or len(part) != len(part_ids):
            raise UserError(f"{folder}: vectors of shape {part.shape} for {len(part_ids)} ids of {vectors.shape[1]}")
        rows = np.minimum(np.searchsorted(ids, part_ids), max(len(ids) - 1, 0))
        if len(part_ids) and not (len(ids) and np.array_equal(ids[rows], part_ids)):
            raise UserError(f"{folder}: a part has an id that is not among the table's")
        good = finite_rows(part, vectors.dtype.name)
        if not good.all():
            first_refused = first_refused if refused else int(part_ids[np.argmin(good)])
            refused += int((~good).sum())
        with np.errstate(over="ignore", invalid="ignore"):
            vectors[rows] = part
        written[rows] = True
    if refused:
        raise UserError(
            f"{folder}: {refused} of {len(ids)} vectors are not finite in {vectors.dtype.name}, the first that of id "
            f"{first_refused}; a table holds finite vectors only"
        )
    if not written.all():
        raise UserError(f"{folder}: id {ids[np.argmin(written)]} has no vector; leave it out or give it one")


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder}: no embedding table here ({MANIFEST} is missing); `limelight embed` makes one"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if manifest.get("version") != VERSION:
        raise UserError(f"{file}: version {manifest.get('version')}, this release reads version {VERSION}")
    return manifest


def _replace_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    aside = folder / f"{MANIFEST}.partial"
    aside.write_text(json.dumps(manifest, indent=1))
    _sync(aside)
    os.replace(aside, folder / MANIFEST)
    _sync(folder)


def _hash_of(*files: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with open(file, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
