"""Data of a Foresight job: the codebook version, the codes, their rows, the two ranges of time, and the truth."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.checkpoint.manifest import DatasetEntry
from trainer.config.foresight import ForesightConfig
from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.segment_codes import CodeFile
from trainer.data.simulator.segment_truth import read_next_topics
from trainer.runtime.host_copy import to_device
from trainer.semantic_ids.code_files import read_codes
from trainer.semantic_ids.codebook_version import CodebookVersion
from trainer.semantic_ids.foresight_rows import ForesightRows, Target
from trainer.semantic_ids.segments import TimeRange, split_time

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CodedRows:
    """Rows of a code file.

    Attributes:
        version: codebook version of the codes.
        rows: rows of all segments.
        entry: path of the codes, and a fingerprint of what is trained on.
    """

    version: CodebookVersion
    rows: ForesightRows
    entry: DatasetEntry

    @property
    def centroids(self) -> Tensor:
        """Centroids of the codes ``[codes, centroid_dim] float32``."""
        return self.version.codebook.levels[0]

    @property
    def codes(self) -> int:
        """Number of codes."""
        return self.version.levels[0]


@dataclass(frozen=True)
class ForesightData(CodedRows):
    """Data of a job that trains on one range of time. The fingerprint is of the rows of training and their contexts.

    Attributes:
        training, held_out: ``[k] int64``, rows of the two ranges, in the order of time.
        held_out_times: range of the evaluation; None if nothing is held out.
        truth: ``[segments, codes] float32``, true distribution of the code after each segment of the code file; None
            if the codes are not the topics of a simulated world.
    """

    training: np.ndarray
    held_out: np.ndarray
    held_out_times: TimeRange | None
    truth: np.ndarray | None

    @property
    def target_counts(self) -> np.ndarray:
        """Targets of training by code ``[codes] int64``."""
        return np.bincount(self.rows.target[self.training], minlength=self.codes)

    @staticmethod
    def open(config: ForesightConfig) -> ForesightData:
        """Open the data of a job.

        Raises:
            UserError: dataset, codes or codebook are missing or damaged, the codes are of another codebook version, the
                codebook has several levels, a range of time is wrong, or no row is in the range of training.
        """
        data = config.data
        keys = {
            f"data.{name}": getattr(data, name) for name in ("train_from", "train_until", "eval_from", "eval_until")
        }
        times, held_out_times = split_time(keys, "training", DatasetSpec.load(data.path).timezone)
        version = open_version(data.codebook)
        codes = read_codes(Path(data.codes), version)
        rows = make_rows(codes, data.target)
        training = rows.training(times)
        if not len(training):
            raise UserError(
                f"{data.codes}: no segment in the range of training has a later one of its room in it; choose a longer "
                "range (data.train_from, data.train_until)"
            )
        held_out = np.empty(0, np.int64) if held_out_times is None else rows.evaluation(held_out_times)
        entry = DatasetEntry(path=data.codes, fingerprint=fingerprint(codes, times))
        truth = _topic_truth(data.path, codes)
        return ForesightData(version, rows, entry, training, held_out, held_out_times, truth)

    def log(self, runs: int) -> None:
        """Log the numbers of rows, and what is special about some of them."""
        rows = self.rows
        logger.info(
            f"{self.entry.path}: {len(rows):,} rows with codes of {self.version.name}; {len(self.training):,} to train "
            f"on, {len(self.held_out):,} held out"
        )
        short = ", ".join(
            f"{self.short_contexts(part, runs):,} {name}"
            for name, part in (("to train on", self.training), ("held out", self.held_out))
        )
        logger.info(f"rows with fewer than {runs} runs: {short}; {rows.without_author:,} segments have no known author")
        if self.held_out_times is not None and not len(self.held_out):
            logger.warning(f"{self.entry.path}: no row is in the held-out range; nothing is evaluated")

    def short_contexts(self, part: np.ndarray, runs: int) -> int:
        """Return how many rows have fewer runs than asked for."""
        return int((self.rows.run_counts(part) < runs).sum())

    def of_unseen_authors(self, part: np.ndarray) -> np.ndarray:
        """Return which rows are of authors without any row of training, ``[k] bool``."""
        return ~np.isin(self.rows.author[part], np.unique(self.rows.author[self.training]))


@dataclass(frozen=True)
class ForesightBatch:
    """Rows as tensors on the device of a rank.

    Attributes:
        code, length: ``[n, runs]`` int32, see ``foresight_rows.Contexts``.
        target: ``[n]`` int64.
    """

    code: Tensor
    length: Tensor
    target: Tensor

    @staticmethod
    def of(
        rows: ForesightRows, part: np.ndarray, runs: int, device: torch.device, hidden: np.ndarray | None = None
    ) -> ForesightBatch:
        """Return some rows.

        Args:
            rows: all rows.
            part: ``[n] int64``, the rows to take.
            runs: runs of a context.
            device: of the tensors.
            hidden: ``[n] bool``, rows whose context is hidden.
        """
        code, length = rows.contexts(part, runs)
        if hidden is not None:
            code[hidden], length[hidden] = -1, 0
        tensors = (to_device(torch.from_numpy(array), device) for array in (code, length, rows.target[part]))
        return ForesightBatch(*tensors)


def open_version(path: str) -> CodebookVersion:
    """Open the codebook version of a job.

    Raises:
        UserError: there is none, it is damaged, or it has several levels.
    """
    version = CodebookVersion.open(path)
    if len(version.levels) > 1:
        raise UserError(
            f"data.codebook = {path!r}: has {len(version.levels)} levels; Foresight takes codes of one level, so fit "
            "one with codebook.levels=[20000] or another size"
        )
    return version


def make_rows(codes: CodeFile, target: Target) -> ForesightRows:
    """Return the rows of a code file of one level."""
    return ForesightRows.make(
        codes.author_id, codes.item_id, codes.segment, codes.known_ms, codes.codes[:, 0], target=target
    )


def fingerprint(codes: CodeFile, times: TimeRange) -> str:
    """Return a hash of all that the rows of a range of training and their contexts depend on."""
    order = np.lexsort((codes.segment, codes.known_ms))
    order = order[codes.known_ms[order] < times.until_ms]
    digest = hashlib.blake2b(f"{codes.version} {times.from_ms}".encode(), digest_size=8)
    for column in (codes.author_id, codes.item_id, codes.segment, codes.known_ms, codes.codes[:, 0]):
        digest.update(np.ascontiguousarray(column[order]).tobytes())
    return digest.hexdigest()


def _topic_truth(dataset: str, codes: CodeFile) -> np.ndarray | None:
    """Return the truth of a simulated world if the code of every segment is its topic; None otherwise."""
    found = read_next_topics(dataset)
    if found is None:
        return None
    topic, p_next = found
    if codes.levels != (p_next.shape[1],) or not len(codes) or codes.segment.max() >= len(topic):
        return None
    return p_next[codes.segment] if np.array_equal(topic[codes.segment], codes.codes[:, 0]) else None
