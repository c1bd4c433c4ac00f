"""What an assembler gives: training rows without features, and the events that became no part of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from trainer.data.format.schema import EVENT_COLUMNS, KINDS, VISIT_EVENTS, DatasetSpec, Rows, row_columns
from trainer.data.format.validation import Columns
from trainer.data.format.visit_events import event_names

EXPOSURE, ENTER, EXIT = (VISIT_EVENTS.index(name) for name in ("exposure", "enter", "exit"))
FIRST_BEHAVIOUR = len(VISIT_EVENTS)
"""Event codes: positions in ``visits.event_names``."""

FAST, SLOW, REPORT, EXIT_ROW, FULL = (KINDS.index(name) for name in ("fast", "slow", "report", "exit", "full"))

REASONS: tuple[str, ...] = ("late", "no_open_visit")
"""Why an event was set aside: it came behind the watermark; or its visit had not begun, or had ended."""
LATE, NO_OPEN_VISIT = range(len(REASONS))

END_OF_TIME = np.iinfo(np.int64).max

ID_COLUMNS = ("visit_id", "user_id", "author_id", "item_id")

BEGUN_COLUMNS = (*ID_COLUMNS, "domain", "request_ms")

ROW_COLUMNS = (*ID_COLUMNS, "domain", "kind", "request_ms", "emit_ms", "label", "mask")

EVENT_TYPES: dict[str, np.dtype] = {
    field.name: np.dtype(np.int8 if field.name == "event" else field.type.to_pandas_dtype()) for field in EVENT_COLUMNS
}
"""Columns of events as assemblers take them: ``schema.EVENT_COLUMNS`` with ``event`` as an int8 code."""


@dataclass(frozen=True)
class Assembled:
    """What came of some events.

    Attributes:
        rows: ``ROW_COLUMNS``, with the dtypes and shapes of ``schema.row_columns``, in the order that
            ``trainer.stream.labels.policy`` defines.
        begun: visits that began, whatever rows they will give: ``BEGUN_COLUMNS``, dtypes as in ``schema.row_columns``,
            in the order of ``(request_ms, user_id, visit_id)``, which no two visits share. Each comes once, and as soon
            as the watermark has passed its request.
        aside: events that changed no row: columns of ``EVENT_TYPES`` and ``reason``, a position in ``REASONS``, in the
            order in which that was found.
    """

    rows: Rows
    begun: Rows
    aside: Columns


def no_events() -> Columns:
    """Event columns of length 0."""
    return {name: np.empty(0, dtype) for name, dtype in EVENT_TYPES.items()}


def no_rows(spec: DatasetSpec) -> Rows:
    """Columns of ``Assembled.rows`` of length 0."""
    stored = row_columns(spec)
    return {name: np.empty((0, *stored[name][1]), stored[name][0]) for name in ROW_COLUMNS}


def take_aside(events: Columns, at: np.ndarray, reason: int) -> Columns:
    """Events at positions ``at``, with the reason why they are set aside."""
    return {
        **{name: events[name][at].astype(dtype, copy=False) for name, dtype in EVENT_TYPES.items()},
        "reason": np.full(len(at), reason, np.int8),
    }


def concatenate(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Columns of all parts, of which there is at least one, behind one another."""
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def row_table(spec: DatasetSpec, rows: Rows) -> pa.Table:
    """Rows in the columns that ``limelight stream assemble`` writes.

    ``visit_id, user_id, author_id, item_id`` int64, ``kind`` its name, ``request_ms, emit_ms`` int64, then for each
    behaviour B ``label_B`` and ``mask_B`` uint8.
    """
    columns = {name: pa.array(rows[name]) for name in ID_COLUMNS}
    columns["kind"] = pa.DictionaryArray.from_arrays(pa.array(rows["kind"].astype(np.int8)), pa.array(KINDS))
    columns |= {name: pa.array(rows[name]) for name in ("request_ms", "emit_ms")}
    for k, behaviour in enumerate(spec.behaviours):
        columns[f"label_{behaviour}"] = pa.array(np.ascontiguousarray(rows["label"][:, k]))
        columns[f"mask_{behaviour}"] = pa.array(np.ascontiguousarray(rows["mask"][:, k]))
    return pa.table(columns)


def aside_table(spec: DatasetSpec, aside: Columns) -> pa.Table:
    """Events that were set aside: ``schema.EVENT_COLUMNS`` and ``reason`` by its name."""
    names = {"event": event_names(spec), "reason": REASONS}
    return pa.table(
        {
            name: pa.DictionaryArray.from_arrays(pa.array(column), pa.array(names[name]))
            if name in names
            else pa.array(column)
            for name, column in aside.items()
        }
    )
