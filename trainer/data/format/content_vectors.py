"""Tables of content vectors of videos, comments, segments or authors by id: memory-mapped and replaced atomically.

A table is a directory::

    manifest.json           origin and number of the vectors, and the names of the files that hold them
    ids-<hash>.npy          [n] int64, in increasing order
    vectors-<hash>.npy      [n, dim] float16 or float32, in the order of the ids
    texts-<hash>.npy        [n] uint64, a hash of the text from which each vector was made

The files of a new version get new names, then the manifest is replaced in one step. So a reader that opens the table
gets either the old or the new version, and a reader that has it open keeps the version that is mapped. Only one
process may write at a time.

The manifest has a hash of ids and vectors, and the names of the files a hash of all. Opening a table reads it once and
compares both, which takes 1.15 seconds of processor time per GB.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.console.errors import UserError, failure_reason, one_line
from trainer.runtime.files import reserve, sync, write_json
from trainer.runtime.stored_files import file_inside, load_array, read_json_object

VERSION = 1
MANIFEST = "manifest.json"
ITEM_VECTORS, SEGMENT_VECTORS = "embeddings/items", "embeddings/segments"
"""Folders of a dataset: vectors by item id, and by the row number of a segment in ``segments.parquet``."""
DTYPES = ("float16", "float32")

_PARTS = ("ids", "vectors", "texts")
_CHUNK_ROWS = 1 << 16
_CHUNK_BYTES = 16 << 20
_OPEN_TRIES = 10

VectorPart = tuple[np.ndarray, np.ndarray]
"""Ids ``[n] int64`` and their vectors ``[n, dim]``."""


@dataclass(frozen=True)
class Origin:
    """Origin of the vectors of a table.

    Attributes:
        model: name of the model's directory; empty if the vectors were not made by a language model.
        adapter: name of the adapter's directory; empty without an adapter.
        template: name -> text of the templates into which the texts were put.
        pooling: method that reduces the token states of a text to one vector.
        hash: hash of the contents of model, adapter, templates and pooling; vectors with the same hash may be mixed.
        counts: numbers of texts that were empty, truncated or refused.
    """

    model: str = ""
    adapter: str = ""
    template: dict[str, str] = field(default_factory=dict)
    pooling: str = ""
    hash: str = ""
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ContentVectors:
    """An opened table of content vectors.

    Attributes:
        path: directory of the table.
        ids: ``[n] int64``, increasing.
        vectors: ``[n, dim] float16`` or ``float32``, memory-mapped, read-only.
        texts: hashes of the texts, ``[n] uint64``; 0 if the text is not known.
        origin: origin of the vectors.
        hash: hash of ids and vectors.
        segments: hash of the segments from which the vectors were made (``segments.segments_hash``); empty if it is not
            known, or the vectors are of something else.
    """

    path: Path
    ids: np.ndarray
    vectors: np.ndarray
    texts: np.ndarray
    origin: Origin
    hash: str
    segments: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """Number of elements of a vector."""
        return int(self.vectors.shape[1])

    @staticmethod
    def open(path: str | Path) -> ContentVectors:
        """Open the table at ``path``, and read it once to compare its hash.

        Raises:
            UserError: there is no table, it is of another release, or its files are damaged or do not match the
                manifest.
        """
        folder = Path(path)
        for _ in range(_OPEN_TRIES):
            manifest = read_manifest(folder)
            try:
                ids, vectors, texts = (
                    load_array(file_inside(folder, manifest["files"][part]), 2 if part == "vectors" else 1)
                    for part in _PARTS
                )
                shape = (manifest["count"], manifest["dim"])
                origin, digest = Origin(**manifest["origin"]), manifest["hash"]
                names = {part: str(manifest["files"][part]) for part in _PARTS}
                found = _hash_of(folder / names["ids"], folder / names["vectors"])
                version = _version_of(digest, origin, texts)
                break
            except FileNotFoundError:
                # The table was replaced after its manifest was read; the new manifest names files that exist.
                continue
            except (KeyError, TypeError) as error:
                raise UserError(
                    f"{folder / MANIFEST}: damaged ({one_line(error):.120}); make the table again"
                ) from None
        else:
            raise UserError(f"{folder}: files named in {MANIFEST} are missing; make the table again")
        if ids.shape != shape[:1] or texts.shape != shape[:1] or vectors.shape != shape:
            raise UserError(
                f"{folder}: {MANIFEST} lists {shape[0]} vectors with {shape[1]} elements, but the files have ids of "
                f"shape {ids.shape} and vectors of shape {vectors.shape}; make the table again"
            )
        if found != digest:
            raise UserError(
                f"{folder}: {names['ids']} or {names['vectors']} is damaged, its content differs from the hash in "
                f"{MANIFEST}; make the table again"
            )
        if any(names[part] != _file_name(part, version) for part in _PARTS):
            raise UserError(
                f"{folder}: {names['texts']} or {MANIFEST} is damaged, the names of the files do not belong to their "
                "content; make the table again"
            )
        return ContentVectors(folder, ids, vectors, texts, origin, digest, str(manifest.get("segments", "")))

    def lookup(self, ids: np.ndarray) -> np.ndarray:
        """Return the row of each id, or -1 if the table has no vector for it. The result has the shape of ``ids``."""
        if not len(self.ids):
            return np.full(np.shape(ids), -1, np.int64)
        row = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[row] == ids, row, -1)

    def parts(self, rows: np.ndarray) -> Iterator[VectorPart]:
        """Yield ids and vectors of ``rows`` in parts of 65,536 rows."""
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
        """Write a table from arrays: ``ids [n]`` in any order, ``vectors [n, dim]``; see ``write_parts``.

        Raises:
            UserError: the errors of ``write_parts``.
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
    segments: str = "",
) -> ContentVectors:
    """Write a table, or replace an existing one, from parts that arrive one after the other.

    Args:
        path: directory of the table; created if it does not exist.
        ids: ids of all parts, ``[n] int64``, in any order.
        texts: hashes of their texts, ``[n] uint64``.
        parts: ids and vectors; each id occurs in exactly one part.
        dim: number of elements of a vector.
        origin: origin of the vectors.
        dtype: type in which the vectors are stored, ``float16`` or ``float32``.
        segments: hash of the segments of the ids, ascending; empty if it is not known.

    Returns:
        The table, opened.

    Raises:
        UserError: an id comes twice, is negative or has no vector, or a vector has another width or is not finite in
            ``dtype``; the message gives the number of such vectors. An existing table then stays as it was.
    """
    folder = Path(path)
    if dtype not in DTYPES:
        raise UserError(f"{folder}: vectors cannot be stored as {dtype}; accepted types are {', '.join(DTYPES)}")
    order = np.argsort(ids, kind="stable")
    ids, texts = ids[order].astype(np.int64), texts[order].astype(np.uint64)
    _check_ids(folder, ids)
    origin = origin or Origin()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = {part: folder / f"{part}.partial" for part in _PARTS}
        vectors = np.lib.format.open_memmap(partial["vectors"], "w+", np.dtype(dtype), (len(ids), dim))
        with open(partial["vectors"], "r+b") as file:
            reserve(file, vectors.offset + vectors.nbytes)
        _fill(folder, ids, parts, vectors)
        vectors.flush()
        for part, values in (("ids", ids), ("texts", texts)):
            with open(partial[part], "wb") as file:
                np.save(file, values)
        digest = _hash_of(partial["ids"], partial["vectors"])
        # The name of the files follows from their content: the same vectors give the same names.
        version = _version_of(digest, origin, texts)
        files = {part: _file_name(part, version) for part in _PARTS}
        for part in _PARTS:
            sync(partial[part])
            os.replace(partial[part], folder / files[part])
        manifest = {"version": VERSION, "count": len(ids), "dim": dim, "dtype": dtype, "hash": digest}
        if segments:
            manifest["segments"] = segments
        write_json(folder / MANIFEST, {**manifest, "origin": asdict(origin), "files": files})
        sync(folder)
    except OSError as error:
        reason = failure_reason(error)
        raise UserError(f"{folder}: cannot be written ({reason})") from error
    finally:
        for part in _PARTS:
            (folder / f"{part}.partial").unlink(missing_ok=True)
    # Readers that still have the old version open keep their mapping of the deleted files.
    for part in _PARTS:
        for old in folder.glob(f"{part}-*.npy"):
            if old.name != files[part]:
                old.unlink(missing_ok=True)
    return ContentVectors.open(folder)


def finite_rows(vectors: np.ndarray, dtype: str) -> np.ndarray:
    """Return a mask of the vectors that are finite when stored as ``dtype``, ``[n, dim] -> [n] bool``."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.isfinite(vectors.astype(dtype)).all(axis=1)


def _check_ids(folder: Path, ids: np.ndarray) -> None:
    """Check that sorted ids are not negative and distinct."""
    if len(ids) and ids[0] < 0:
        raise UserError(f"{folder}: id {ids[0]} is negative; ids must be 0 or more")
    twice = np.flatnonzero(ids[1:] == ids[:-1])
    if len(twice):
        raise UserError(f"{folder}: id {ids[twice[0]]} comes twice; each id must have one vector")


def _fill(folder: Path, ids: np.ndarray, parts: Iterable[VectorPart], vectors: np.ndarray) -> None:
    """Write the vectors of all parts into their rows, and check that each id gets a finite vector."""
    written = np.zeros(len(ids), bool)
    refused, first_refused = 0, None
    for part_ids, part in parts:
        if part.ndim != 2 or part.shape[1] != vectors.shape[1] or len(part) != len(part_ids):
            raise UserError(
                f"{folder}: a part has vectors of shape {part.shape}; for its {len(part_ids)} ids it must be "
                f"{(len(part_ids), vectors.shape[1])}"
            )
        rows = np.minimum(np.searchsorted(ids, part_ids), max(len(ids) - 1, 0))
        if len(part_ids) and not (len(ids) and np.array_equal(ids[rows], part_ids)):
            raise UserError(f"{folder}: a part has an id that is not in the list of ids of the table")
        good = finite_rows(part, vectors.dtype.name)
        if not good.all():
            first_refused = int(part_ids[np.argmin(good)]) if first_refused is None else first_refused
            refused += int((~good).sum())
        # Overflow was checked above; numpy's warning would only repeat it.
        with np.errstate(over="ignore", invalid="ignore"):
            vectors[rows] = part
        written[rows] = True
    if refused:
        raise UserError(
            f"{folder}: {refused} of {len(ids)} vectors are not finite in {vectors.dtype.name}, the first is that of "
            f"id {first_refused}; all vectors must be finite"
        )
    if not written.all():
        raise UserError(f"{folder}: id {ids[np.argmin(written)]} has no vector; each id must have one")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a table, and check its version.

    Raises:
        UserError: there is no table, its manifest is damaged, or it is of another release.
    """
    file = folder / MANIFEST
    try:
        manifest = read_json_object(file)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder}: no embedding table here ({MANIFEST} is missing); `limelight embed` creates one"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)})") from None
    if manifest.get("version") != VERSION:
        raise UserError(f"{file}: version is {manifest.get('version')}; this release reads version {VERSION}")
    return manifest


def _version_of(digest: str, origin: Origin, texts: np.ndarray) -> str:
    """Return a hash of all that a table holds, which is in the names of its files."""
    return hashlib.blake2b((digest + origin.hash).encode() + texts.tobytes(), digest_size=6).hexdigest()


def _file_name(part: str, version: str) -> str:
    return f"{part}-{version}.npy"


def _hash_of(*files: Path) -> str:
    """Return a hash of the contents of files, one after the other."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with open(file, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
