"""Reports of several codebook versions: those that the job stored, or measured on other segments."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.console.errors import UserError
from trainer.semantic_ids.codebook_report import Report, encode_segments, measure, range_document
from trainer.semantic_ids.codebook_version import CodebookVersion
from trainer.semantic_ids.segments import SegmentVectors, hash_vectors


def read_reports(
    paths: Sequence[str], dataset: str | None, vectors: str, time_from: str | None, time_until: str | None
) -> dict[str, Report]:
    """Return reports by the names of versions.

    Args:
        paths: directories of versions.
        dataset: dataset to measure on; None takes the reports that the job stored.
        vectors: table of its segment vectors; empty for the dataset's own.
        time_from, time_until: range of ``known_ms``, as ISO times in the dataset's time zone.

    Raises:
        UserError: a version is missing, damaged, or has no stored report, or the segments are not its own kind.
    """
    versions = [CodebookVersion.open(path) for path in paths]
    if dataset is None:
        return {version.name: _stored(version) for version in versions}
    segments = SegmentVectors.open(dataset, vectors)
    times = segments.time_range(time_from, time_until)
    rows = segments.rows(times)
    for version in versions:
        version.check_vectors(segments.table.path, segments.table.dim, segments.table.origin)
    hash_vectors(segments, rows)
    return {
        version.name: {
            "dataset": dataset,
            **range_document(times),
            **measure(encode_segments(version.codebook, segments, rows), segments, rows, version.levels),
        }
        for version in versions
    }


def _stored(version: CodebookVersion) -> Report:
    report = version.report()
    if report is None or "levels" not in report:
        raise UserError(
            f"{version.path}: has no report, since no segment was held out; --data DATASET measures it on a dataset"
        )
    return report
