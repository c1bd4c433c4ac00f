"""Texts that mean "no value" in the columns of a log.

A missing value (null in Parquet, an empty field in CSV) has no value in every column. Exports write other texts for it,
such as ``\\N``: these are null markers. They count in categories, numbers and outcomes. Ids, names of events and texts
are taken as they are, because a user may be named ``NULL`` and a comment may say ``null``; only ``\\N``, which no
program writes for anything else, is no id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

VALUE_NULLS = (r"\N", "NULL", "null", "NA", "N/A", "n/a", "NaN", "nan", "None", "<NA>", "UNKNOWN")
"""Default markers of categories, numbers and outcomes."""
ID_NULLS = (r"\N",)
"""Default markers of text ids."""


@dataclass(frozen=True)
class NullMarkers:
    """Null markers of the columns of a file.

    Attributes:
        values: markers of categories, numbers and outcomes.
        ids: markers of text ids.
        columns: markers of single columns, by name, instead of the above.
    """

    values: tuple[str, ...] = VALUE_NULLS
    ids: tuple[str, ...] = ID_NULLS
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def of_value(self, column: str) -> tuple[str, ...]:
        """Return the markers of a column of categories, numbers or outcomes."""
        return self.columns.get(column, self.values)

    def of_id(self, column: str) -> tuple[str, ...]:
        """Return the markers of a column of text ids."""
        return self.columns.get(column, self.ids)


DEFAULT_NULLS = NullMarkers()


def without_markers(values: pa.Array, markers: tuple[str, ...]) -> pa.Array:
    """Return text without spaces around it, null where it is empty or a marker; other types are returned unchanged."""
    if not pa.types.is_string(values.type):
        return values
    trimmed = pc.ascii_trim_whitespace(values)
    missing = pc.is_in(trimmed, value_set=pa.array(["", *markers], pa.string()))
    return pc.if_else(missing, pa.scalar(None, pa.string()), trimmed) if pc.any(missing).as_py() else trimmed
