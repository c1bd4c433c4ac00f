"""Segments of a code file against those of a dataset."""

from __future__ import annotations

import numpy as np

from trainer.console.errors import UserError
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import table_footer
from trainer.data.format.segment_codes import CodeFile
from trainer.data.format.segments import SEGMENTS, TEXT_SEGMENTS, DatasetSegments


def has_segments(dataset: str) -> bool:
    """True if a dataset has a table of segments."""
    for name in (SEGMENTS, TEXT_SEGMENTS):
        try:
            table_footer(DatasetFiles(dataset), name)
        except FileNotFoundError:
            continue
        return True
    return False


def segments_of_codes(dataset: str, codes: CodeFile) -> tuple[DatasetSegments, bool]:
    """Return the segments of the dataset to which the ids of a code file belong, and whether they have texts' ids.

    Raises:
        UserError: the dataset has no segments, or not those of the file.
    """
    unreadable, others = [], []
    for embedded in (False, True):
        try:
            segments = DatasetSegments.read(dataset, embedded)
        except UserError as error:
            unreadable.append(error)
            continue
        try:
            check_segments(codes, segments)
        except UserError as error:
            others.append(error)
        else:
            return segments, embedded
    raise [*others, *unreadable][0]


def check_segments(codes: CodeFile, segments: DatasetSegments) -> None:
    """Check that the segments of a code file are those of a dataset, with the same rooms, authors and times.

    Raises:
        UserError: the dataset does not have one of them.
    """
    row = segments.rows_of(codes.segment)
    there = row >= 0
    for name in ("item_id", "author_id", "known_ms"):
        there[there] = getattr(segments, name)[row[there]] == getattr(codes, name)[there]
    if not there.all():
        first = int(np.argmin(there))
        raise UserError(
            f"{codes.path}: has segment {codes.segment[first]} of room {codes.item_id[first]}, which {segments.source} "
            "does not have; give a code file of this dataset"
        )
