"""Versions of a codebook: directories that never change, named by their content.

A version is a directory::

    codebook.json       format, name, sizes, origin of the vectors, range of time, settings of the fit
    centroids-1.npy     [N, dim] float32, centroids of the first level; one file for each level
    report.json         quality on held-out segments, see codebook_report.py; missing if nothing was held out
    checksums.json      size and CRC-32 of the other files

It is built under another name, synced and renamed, so it is whole or not there. Its name, such as
``256x256x256-1f3a9c2d``, has the sizes of the levels and a hash of everything that a code depends on: centroids,
normalisation, and the model that makes the vectors. Codes, stores and models keep the name of their version, and refuse
another one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modules.codebook import Codebook
from trainer.config.quantize import MAX_CODES, MAX_LEVELS
from trainer.console.errors import UserError, one_line
from trainer.data.format.content_vectors import Origin
from trainer.runtime.checksums import CHECKSUMS, verify_checksums, write_checksums
from trainer.runtime.files import sync, write_json, write_whole
from trainer.runtime.stored_files import file_inside, load_array, read_json_object
from trainer.semantic_ids.vector_source import LARGEST_MAGNITUDE, find_finite

FORMAT = 1
MANIFEST = "codebook.json"
REPORT = "report.json"
REPAIR = "restore it, or fit the codebook again"

MAX_NUMBER = (1 << 31) - 1
"""Largest number that stands for a tuple of codes in the store of recent codes."""

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Size = Annotated[int, Field(ge=1, le=MAX_CODES)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OriginEntry(_Entry):
    """Origin of the vectors; see :class:`trainer.data.format.content_vectors.Origin`."""

    model: str = ""
    adapter: str = ""
    template: dict[str, str] = {}
    pooling: str = ""
    hash: str = ""

    @staticmethod
    def of(origin: Origin) -> OriginEntry:
        """Return the entry of a table's origin; its counts are of the table, not of the model."""
        fields = {name: value for name, value in asdict(origin).items() if name != "counts"}
        return OriginEntry(**fields)

    @property
    def identity(self) -> str:
        """Text that two origins share if their vectors may be mixed."""
        return self.hash or self.pooling

    def __str__(self) -> str:
        parts = [self.model, self.adapter, self.pooling, f"hash {self.hash}" if self.hash else ""]
        return ", ".join(filter(None, parts)) or "unknown"


class FittedVectors(_Entry):
    """Vectors on which a version was fitted.

    Attributes:
        dataset: path of the dataset.
        table: path of the table.
        count: number of vectors.
        hash: hash of their ids and values.
        from_ms, until_ms: range of ``known_ms``.
    """

    dataset: str
    table: str
    count: Count
    hash: str
    from_ms: Count
    until_ms: Count


class CodebookManifest(_Entry):
    """Content of ``codebook.json``.

    Attributes:
        format: of the directory.
        name: of the version.
        dim: number of elements of a vector.
        levels: number of codes of each level.
        normalize: residuals are scaled to length 1 before each level but the first.
        scales: mean length of the residual before each level; empty without ``normalize``.
        origin: model that makes the vectors.
        vectors: vectors of the fit.
        settings: section ``[codebook]`` of the job.
        matched_from: name of the version from which the fit started, and whose codes were matched; empty for none.
    """

    format: int
    name: str
    dim: Annotated[int, Field(ge=1, le=1 << 20)]
    levels: Annotated[tuple[Size, ...], Field(min_length=1, max_length=MAX_LEVELS)]
    normalize: bool
    scales: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = ()
    origin: OriginEntry
    vectors: FittedVectors
    settings: dict[str, Any]
    matched_from: str = ""


@dataclass(frozen=True)
class CodebookVersion:
    """An opened version.

    Attributes:
        path: directory.
        manifest: content of ``codebook.json``.
        codebook: its levels, on the CPU.
    """

    path: Path
    manifest: CodebookManifest
    codebook: Codebook

    @property
    def name(self) -> str:
        """Name of the version."""
        return self.manifest.name

    @property
    def dim(self) -> int:
        """Number of elements of a vector."""
        return self.manifest.dim

    @property
    def levels(self) -> tuple[int, ...]:
        """Number of codes of each level."""
        return self.manifest.levels

    @staticmethod
    def open(path: str | Path) -> CodebookVersion:
        """Open a version, and compare every file with its checksum.

        Raises:
            UserError: there is no version, it is of another release, or a file is missing or damaged.
        """
        directory = Path(path)
        manifest = _read_manifest(directory)
        names = [_file_name(level) for level in range(len(manifest.levels))]
        if not (directory / CHECKSUMS).exists():
            raise UserError(f"{directory / CHECKSUMS}: is missing; {REPAIR}")
        verify_checksums(directory, [MANIFEST, *names], repair=REPAIR)
        try:
            centroids = tuple(load_array(file_inside(directory, name), 2, np.dtype(np.float32)) for name in names)
        except FileNotFoundError as error:
            raise UserError(f"{error.filename}: is missing; {REPAIR}") from None
        for name, array, size in zip(names, centroids, manifest.levels, strict=True):
            if array.shape != (size, manifest.dim):
                raise UserError(
                    f"{directory / name}: has the shape {array.shape}, {MANIFEST} says {(size, manifest.dim)}; {REPAIR}"
                )
            if not np.isfinite(array).all():
                raise UserError(f"{directory / name}: damaged, a number is not finite; {REPAIR}")
        if len(manifest.scales) != (len(names) if manifest.normalize else 0):
            raise UserError(f"{directory / MANIFEST}: damaged, it has {len(manifest.scales)} scales; {REPAIR}")
        codebook = _codebook(centroids, manifest.normalize, manifest.scales)
        expected = version_name(codebook, manifest.origin)
        if manifest.name != expected:
            raise UserError(
                f"{directory}: damaged, the name in {MANIFEST} is {manifest.name!a:.80}, and its content has the name "
                f"{expected}; {REPAIR}"
            )
        return CodebookVersion(directory, manifest, codebook)

    def encode(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return codes ``[n, levels] int32`` and squared errors ``[n] float32`` of vectors ``[n, dim]``.

        Raises:
            UserError: the vectors have another dimension, or one is not finite, too large, or zero.
        """
        vectors = np.asarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise UserError(f"{self.path}: takes vectors of shape (n, {self.dim}), these have {vectors.shape}")
        bad = int((~find_finite(vectors) | ~vectors.any(axis=1)).sum())
        if bad:
            raise UserError(
                f"{self.path}: {bad:,} of {len(vectors):,} vectors are not finite, above {LARGEST_MAGNITUDE:g}, or "
                "zero; such a vector has no code"
            )
        codes, error = self.codebook.encode(torch.from_numpy(np.ascontiguousarray(vectors)))
        return codes.numpy(), error.numpy()

    def numbers(self, codes: np.ndarray) -> np.ndarray:
        """Return one number ``[n] int32`` for each tuple of codes ``[n, levels]``, as the store of recent codes has it.

        The last level counts fastest: of the levels (256, 256), the codes (1, 2) are the number 258.

        Raises:
            UserError: there are more tuples than numbers.
        """
        self.check_numbers()
        number = np.zeros(len(codes), np.int64)
        for level, size in enumerate(self.levels):
            number = number * size + codes[:, level]
        return number.astype(np.int32)

    def check_numbers(self) -> None:
        """Check that the tuples of codes have numbers.

        Raises:
            UserError: there are more tuples than numbers.
        """
        if (count := self.tuples) > MAX_NUMBER + 1:
            raise UserError(
                f"{self.path}: has {count:,} tuples of codes, and the store of recent codes numbers at most "
                f"{MAX_NUMBER + 1:,}; fit one with smaller or fewer levels"
            )

    @property
    def tuples(self) -> int:
        """Number of different tuples of codes that are possible."""
        count = 1
        for size in self.levels:
            count *= size
        return count

    def check_vectors(self, place: object, dim: int, origin: Origin) -> None:
        """Check that vectors are of the kind on which the version was fitted.

        Args:
            place: of the vectors, for the message.
            dim: number of elements of a vector.
            origin: of the vectors.

        Raises:
            UserError: the vectors have another dimension, or another model makes them.
        """
        if dim != self.dim:
            raise UserError(f"{place}: vectors have {dim} elements, the codebook {self.path} takes {self.dim}")
        found = OriginEntry.of(origin)
        if found.identity != self.manifest.origin.identity:
            raise UserError(
                f"{place}: vectors are from another model ({found}) than those of the codebook {self.path} "
                f"({self.manifest.origin}); embed with that model, or fit a new codebook"
            )

    def check_name(self, place: object, name: str) -> None:
        """Check that codes or a model belong to this version.

        Raises:
            UserError: they are of another version.
        """
        if name != self.name:
            raise UserError(
                f"{place}: is of the codebook version {name!a:.120}, {self.path} is {self.name}; use the other version"
            )

    def report(self) -> dict[str, Any] | None:
        """Return the quality on held-out segments that was measured after the fit; None if nothing was held out."""
        try:
            return read_json_object(self.path / REPORT)
        except FileNotFoundError:
            return None


def version_name(codebook: Codebook, origin: OriginEntry) -> str:
    """Return the name of a version by its content."""
    digest = hashlib.blake2b(digest_size=4)
    settings = [FORMAT, codebook.sizes, codebook.dim, codebook.normalize, codebook.scales, origin.identity]
    digest.update(json.dumps(settings).encode())
    for level in codebook.levels:
        digest.update(np.ascontiguousarray(level.numpy(), "<f4").tobytes())
    return f"{'x'.join(map(str, codebook.sizes))}-{digest.hexdigest()}"


def write_version(
    directory: Path,
    codebook: Codebook,
    *,
    origin: Origin,
    vectors: FittedVectors,
    settings: dict[str, Any],
    matched_from: str = "",
    report: dict[str, Any] | None = None,
) -> CodebookVersion:
    """Write a version to a directory that does not exist, and open it; the parameters are those of the manifest.

    Raises:
        UserError: the directory exists or cannot be written, or a centroid is not finite.
    """
    check_new(directory)
    codebook = codebook.to("cpu")
    for number, level in enumerate(codebook.levels, 1):
        if not level.isfinite().all():
            raise UserError(f"{directory}: a centroid of level {number} is not finite; fit on vectors that are smaller")
    entry = OriginEntry.of(origin)
    manifest = CodebookManifest(
        format=FORMAT,
        name=version_name(codebook, entry),
        dim=codebook.dim,
        levels=codebook.sizes,
        normalize=codebook.normalize,
        scales=codebook.scales,
        origin=entry,
        vectors=vectors,
        settings=settings,
        matched_from=matched_from,
    )
    write_whole(directory, partial(_write_files, codebook=codebook, manifest=manifest, report=report))
    sync(directory.parent)
    return CodebookVersion.open(directory)


def check_new(directory: Path) -> None:
    """Check that nothing is at the place of a new version.

    Raises:
        UserError: something is there.
    """
    if directory.exists() or directory.is_symlink():
        raise UserError(
            f"{directory}: exists already; a version never changes, so name another place (codebook.directory)"
        )


def _write_files(
    directory: Path, codebook: Codebook, manifest: CodebookManifest, report: dict[str, Any] | None
) -> None:
    directory.mkdir()
    for number, level in enumerate(codebook.levels):
        file = directory / _file_name(number)
        with file.open("wb") as stream:
            np.save(stream, level.numpy().astype(np.float32))
        sync(file)
    if report is not None:
        write_json(directory / REPORT, report)
    write_json(directory / MANIFEST, manifest.model_dump(mode="json"))
    write_checksums(directory)
    sync(directory)


def _read_manifest(directory: Path) -> CodebookManifest:
    file = directory / MANIFEST
    try:
        document = read_json_object(file)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{directory}: no codebook version here ({MANIFEST} is missing); `limelight quantize` makes one"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)})") from None
    if document.get("format") != FORMAT:
        raise UserError(f"{file}: format is {document.get('format')!a:.40}; this release reads format {FORMAT}")
    try:
        return CodebookManifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: damaged, {key}: {one_line(ValueError(first['msg'])):.120}; {REPAIR}") from None


def _codebook(centroids: Sequence[np.ndarray], normalize: bool, scales: tuple[float, ...]) -> Codebook:
    # A copy: a tensor over a read-only memory map would warn, and a truncated file would end the process later.
    return Codebook(tuple(torch.from_numpy(np.array(array)) for array in centroids), normalize, scales)


def _file_name(level: int) -> str:
    return f"centroids-{level + 1}.npy"
