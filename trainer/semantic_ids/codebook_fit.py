"""Steps of a fit of a codebook version: the data, the fit, the refresh of an old version, the report."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modules.codebook import Codebook
from trainer.config.quantize import CodebookConfig, QuantizeJob
from trainer.data.format import storage
from trainer.data.format.content_vectors import SEGMENT_VECTORS
from trainer.runtime.distributed import World
from trainer.semantic_ids.code_matching import KeptShares, kept_shares, match_levels, renumber, reorder
from trainer.semantic_ids.codebook_report import (
    EncodedSegments,
    Report,
    encode_segments,
    measure,
    range_document,
    refresh_text,
    report_table,
)
from trainer.semantic_ids.codebook_version import CodebookVersion, FittedVectors, check_new
from trainer.semantic_ids.kmeans import KMeansSettings, fit
from trainer.semantic_ids.segments import SegmentVectors, TimeRange, hash_vectors, require_segments
from trainer.semantic_ids.vector_source import StoredVectors, merge_equal

logger = logging.getLogger(__name__)


NO_FIT = ("directory", "device")
"""Keys of ``[codebook]`` that change no bit of a version."""


@dataclass(frozen=True)
class FitData:
    """Segments of a job.

    Attributes:
        segments: all segments of the dataset.
        rows: ``[n] int64``, rows of the range of the fit.
        source: their vectors, equal ones merged.
        fitted: description of them for the manifest.
        held_out: ``[m] int64``, rows of the held-out range; empty if nothing is held out.
        held_out_times: the held-out range.
    """

    segments: SegmentVectors
    rows: np.ndarray
    source: StoredVectors
    fitted: FittedVectors
    held_out: np.ndarray
    held_out_times: TimeRange | None

    @staticmethod
    def open(config: QuantizeJob, world: World) -> FitData:
        """Open the segments of a job. Collective.

        Raises:
            UserError: dataset or vectors are missing, damaged or do not fit each other, a range of time is wrong or has
                too few segments, or vectors are not finite or zero.
        """
        segments = SegmentVectors.open(config.data.path, config.data.vectors)
        times, held_out_times = segments.ranges(config.data)
        require_segments(segments, times, config.codebook.levels)
        rows = segments.rows(times)
        digest = world.on_first_rank(lambda: hash_vectors(segments, rows))
        held_out = np.empty(0, np.int64) if held_out_times is None else segments.rows(held_out_times)
        if len(held_out):
            world.on_first_rank(lambda: hash_vectors(segments, held_out))
        elif held_out_times is not None and world.rank == 0:
            logger.warning(f"{segments.table.path}: no segment became known in the held-out range; there is no report")
        fitted = FittedVectors(
            dataset=config.data.path,
            table=config.data.vectors or storage.join(config.data.path, SEGMENT_VECTORS),
            count=len(rows),
            hash=digest,
            **range_document(times),
        )
        return FitData(segments, rows, merge_equal(segments.source(rows, digest)), fitted, held_out, held_out_times)


def fit_settings(config: CodebookConfig) -> dict[str, Any]:
    """Return the settings of a fit as the manifest stores them."""
    return config.model_dump(mode="json", exclude=set(NO_FIT))


def finished_version(
    directory: Path, config: QuantizeJob, data: FitData, old: CodebookVersion | None
) -> CodebookVersion | None:
    """Return the version that this job has written before; None if there is none.

    Raises:
        UserError: something else is at its place.
    """
    if not directory.exists():
        check_new(directory)
        return None
    version = CodebookVersion.open(directory)
    stored = version.manifest
    if (stored.settings, stored.vectors.hash, stored.matched_from) != (
        fit_settings(config.codebook),
        data.fitted.hash,
        old.name if old else "",
    ):
        check_new(directory)
    report, times = version.report() or {}, data.held_out_times
    if times is not None and "levels" in report and report != {**report, **range_document(times)}:
        logger.warning(
            f"{directory}: its report is not about the held-out range of this job; `limelight quantize report "
            f"{directory} --data {config.data.path}` measures any range"
        )
    return version


def fit_codebook(config: QuantizeJob, data: FitData, world: World, state: Path, warm: Codebook | None) -> Codebook:
    """Fit a codebook from its own start, or from another codebook. Collective.

    Args:
        config: the job.
        data: its segments.
        world: ranks of the job.
        state: file of the state after each pass.
        warm: codebook to start from.

    Raises:
        UserError: as :func:`trainer.semantic_ids.kmeans.fit`.
    """
    codebook = config.codebook
    settings = KMeansSettings(
        codebook.levels,
        iterations=codebook.iterations,
        tolerance=codebook.tolerance,
        start=codebook.start if warm is None else "warm",
        batch=codebook.mini_batch,
        normalize=codebook.normalize,
        seed=codebook.seed,
    )
    return fit(data.source, settings, world, warm=warm, state=state).codebook


def match_with_old(
    codebook: Codebook, old: CodebookVersion, data: FitData, world: World
) -> tuple[Codebook, dict[str, KeptShares]]:
    """Give the codes of a new codebook the numbers of the old codes with which they share most segments. Collective.

    The segments of the fit decide. The shares of segments that keep their code are those of the held-out range, or of
    the fit if nothing is held out.

    Returns:
        The codebook with its codes in the new order, and the shares before and after matching.
    """
    sizes = codebook.sizes
    pairs = [_codes(book, data, data.rows, world) for book in (old.codebook, codebook)]
    numbers = world.on_first_rank(lambda: match_levels(*_both(pairs), sizes))
    if len(data.held_out):
        pairs = [_codes(book, data, data.held_out, world) for book in (old.codebook, codebook)]

    def shares() -> dict[str, KeptShares]:
        before, after = _both(pairs)
        return {
            "before matching": kept_shares(before, after),
            "after matching": kept_shares(before, renumber(after, numbers)),
        }

    levels = tuple(
        torch.from_numpy(reorder(level.cpu().numpy(), number))
        for level, number in zip(codebook.levels, numbers, strict=True)
    )
    return Codebook(levels, codebook.normalize, codebook.scales), world.on_first_rank(shares)


def refresh_document(old: CodebookVersion, data: FitData, kept: dict[str, KeptShares]) -> dict[str, Any]:
    """Return the part of a report about a refresh; ``kept`` is by start, such as ``warm, after matching``."""
    return {
        "from": old.name,
        "segments": len(data.held_out) or len(data.rows),
        "kept": {name: shares.document() for name, shares in kept.items()},
    }


def held_out_report(codebook: Codebook, data: FitData, world: World) -> Report | None:
    """Return the report on the held-out segments, on the first rank; None if there are none. Collective."""
    if data.held_out_times is None or not len(data.held_out):
        return None
    encoded = _encode(codebook, data, data.held_out, world)
    if encoded is None:
        return None
    report = measure(encoded, data.segments, data.held_out, codebook.sizes)
    return {"dataset": data.fitted.dataset, **range_document(data.held_out_times), **report}


def log_version(version: CodebookVersion, done: bool) -> None:
    """Log what a version is, its report and its refresh; ``done`` if an earlier job wrote it."""
    fitted, report = version.manifest.vectors, version.report() or {}
    was = "was there already" if done else "is written"
    logger.info(f"{version.path}: codebook version {version.name} {was}, fitted on {fitted.count:,} segments")
    if "levels" in report:
        logger.info(f"held out: {report['segments']:,} segments\n{report_table({version.name: report})}")
    if "refresh" in report:
        logger.info(refresh_text(report["refresh"]))


def _encode(codebook: Codebook, data: FitData, rows: np.ndarray, world: World) -> EncodedSegments | None:
    """Encode rows, each rank its share; the first rank has the result."""
    share = rows[len(rows) * world.rank // world.size : len(rows) * (world.rank + 1) // world.size]
    parts = world.gather(encode_segments(codebook, data.segments, share, world.device))
    return None if parts is None else EncodedSegments.join(parts)


def _codes(codebook: Codebook, data: FitData, rows: np.ndarray, world: World) -> np.ndarray | None:
    encoded = _encode(codebook, data, rows, world)
    return None if encoded is None else encoded.codes


def _both(codes: list[np.ndarray | None]) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes of an old and a new codebook, which the first rank has."""
    old, new = codes
    assert old is not None and new is not None
    return old, new
