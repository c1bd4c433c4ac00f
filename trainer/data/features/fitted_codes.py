"""Codes that a model was trained with: their identity, their files, and copies of the files beside an export.

Codes are ids of embedding rows, so codes of another codebook version are refused wherever a model is read.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.features import CodesConfig
from trainer.config.paths import absolute
from trainer.console.errors import UserError
from trainer.data.format.code_segments import has_segments, segments_of_codes
from trainer.data.format.segment_codes import CodeFile


@dataclass(frozen=True)
class FittedCodes:
    """Identity of the codes that a model was trained with.

    Attributes:
        version: name of the codebook version.
        levels: number of codes of each level of the file.
        hash: of the file's columns.
        until_ms: largest ``known_ms`` of the file; -1 if it has no segment.
        known: hash of the segments with ``known_ms`` up to this time, whatever their order.
    """

    version: str
    levels: tuple[int, ...]
    hash: str
    until_ms: int
    known: str

    @staticmethod
    def of(codes: CodeFile) -> FittedCodes:
        """Return the identity of a code file."""
        until_ms = int(codes.known_ms.max(initial=-1))
        return FittedCodes(codes.version, codes.levels, codes.hash, until_ms, _hash_known(codes, until_ms))

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> FittedCodes:
        """Return the identity that ``vars`` turned into JSON types.

        Raises:
            KeyError, TypeError, ValueError: an entry is missing or has another type.
        """
        levels = tuple(int(size) for size in document["levels"])
        if not levels or min(levels) < 1:
            raise ValueError(f"codes with the levels {levels}")
        texts = {name: str(document[name]) for name in ("version", "hash", "known")}
        return FittedCodes(levels=levels, until_ms=int(document["until_ms"]), **texts)

    def check_version(self, where: str, path: Path, version: str, levels: Sequence[int]) -> None:
        """Check that a code file is of the model's codebook version.

        Raises:
            UserError: it is of another one.
        """
        if (version, tuple(levels)) != (self.version, self.levels):
            raise UserError(
                f"{where}: {path} is of the codebook version {version!a:.120}, the model was trained with "
                f"{self.version!a:.120}; name a code file of that version"
            )

    def check_unchanged(self, where: str, codes: CodeFile) -> None:
        """Check that a code file has the codes of the training, beside segments that became known later.

        Raises:
            UserError: a segment is missing, is new, or has other codes or times.
        """
        if codes.hash != self.hash and _hash_known(codes, self.until_ms) != self.known:
            raise UserError(
                f"{where}: {codes.path} has other codes than at the start of the run, for segments that were in the "
                "file then (later segments may be added); resume.allow_new_data=true accepts it"
            )


def read_code_files(config: Mapping[str, CodesConfig]) -> dict[str, CodeFile]:
    """Return the content of each code set's file.

    Raises:
        UserError: a file cannot be read.
    """
    return {name: CodeFile.read(Path(own.file)) for name, own in config.items()}


def check_authors(codes: Mapping[str, CodeFile], parts: Iterable[np.ndarray]) -> None:
    """Check that each code file has segments of at least one author of a training range.

    Args:
        codes: code set -> content of its file.
        parts: authors of the rows, ``[n]`` int64 each; read until all files have one of them.

    Raises:
        UserError: a file has none; it is of another dataset, as a rule.
    """
    left = {name: np.unique(file.author_id) for name, file in codes.items()}
    for authors in parts if left else ():
        left = {name: known for name, known in left.items() if not np.isin(authors, known).any()}
        if not left:
            return
    for name in left:
        raise UserError(
            f"features.codes.{name}: {codes[name].path} has segments of no author of the training rows; assign codes "
            "to the dataset of the job"
        )


def check_dataset(config: Mapping[str, CodesConfig], stored: str, path: str) -> None:
    """Check that code files are of another dataset than the model's, where one is read and has segments.

    Args:
        config: sections ``[features.codes.NAME]`` by name.
        stored: path of the dataset that the model stores.
        path: path of the dataset to read.

    Raises:
        UserError: a file has a segment that the dataset does not have.
    """
    if not config or absolute(stored) == absolute(path) or not has_segments(path):
        return
    for name, own in config.items():
        try:
            segments_of_codes(path, CodeFile.read(Path(own.file)))
        except UserError as error:
            raise UserError(f"features.codes.{name}: {error}") from None


def carry_codes(config: Mapping[str, CodesConfig], fitted: Mapping[str, FittedCodes], folder: Path) -> None:
    """Copy the code files of a model into a folder that is made, as ``NAME.parquet``; a model without any needs none.

    Raises:
        UserError: a file is missing, damaged, or of another codebook version.
        OSError: a file cannot be written.
    """
    for name, own in config.items():
        codes = CodeFile.read(Path(own.file))
        identity_of(name, fitted).check_version(f"features.codes.{name}", codes.path, codes.version, codes.levels)
        folder.mkdir(exist_ok=True)
        shutil.copyfile(codes.path, folder / f"{name}.parquet")


def carried_codes(config: Mapping[str, CodesConfig], folder: Path) -> dict[str, CodesConfig]:
    """Return the sections with the code files that :func:`carry_codes` copied to a folder, where there are some."""
    carried = {name: folder / f"{name}.parquet" for name in config}
    return {
        name: own.model_copy(update={"file": str(carried[name])}) if carried[name].exists() else own
        for name, own in config.items()
    }


def identity_of(name: str, fitted: Mapping[str, FittedCodes]) -> FittedCodes:
    """Return the identity of a code set.

    Raises:
        UserError: the model was trained without it.
    """
    if name not in fitted:
        raise UserError(f"features.codes.{name}: the model was trained without these codes; it has {_list(fitted)}")
    return fitted[name]


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _hash_known(codes: CodeFile, until_ms: int) -> str:
    """Return a hash of the segments with ``known_ms`` up to a time, in the order of their ids."""
    rows = np.flatnonzero(codes.known_ms <= until_ms)
    rows = rows[np.lexsort((codes.known_ms[rows], codes.segment[rows]))]
    digest = hashlib.blake2b(digest_size=16)
    for column in (codes.item_id, codes.author_id, codes.segment, codes.known_ms, codes.codes):
        digest.update(np.ascontiguousarray(column[rows]).tobytes())
    return digest.hexdigest()
