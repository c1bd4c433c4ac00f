"""Output of the label assemblers: training rows without features, started visits and unused events."""

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
"""Event codes: positions in ``visit_events.event_names``."""

FAST, SLOW, REPORT, EXIT_ROW, FULL = (KINDS.index(name) for name in ("fast", "slow", "report", "exit", "full"))

REASONS: tuple[str, ...] = ("late", "no_open_visit")
"""Reasons why an event changes no row: it came behind the watermark; or its visit had not started, or had ended."""
LATE, NO_OPEN_VISIT = range(len(REASONS))

END_OF_TIME = np.iinfo(np.int64).max

ID_COLUMNS = ("visit_id", "user_id", "author_id", "item_id")

STARTED_COLUMNS = (*ID_COLUMNS, "domain", "request_ms")

ROW_COLUMNS = (*ID_COLUMNS, "domain", "kind", "request_ms", "emit_ms", "label", "mask")

EVENT_TYPES: dict[str, np.dtype] = {
    field.name: np.dtype(np.int8 if field.name == "event" else field.type.to_pandas_dtype()) for field in EVENT_COLUMNS
}
"""Event columns in the form that assemblers take: ``schema.EVENT_COLUMNS`` with ``event`` as an int8 code."""


@dataclass(frozen=True)
class AssembledRows:
    """Rows, started visits and unused events that one call of an assembler gives.

    Attributes:
        rows: ``ROW_COLUMNS``, with the dtypes and shapes of ``schema.row_columns``, in the order that
            ``trainer.stream.labels.policy`` defines.
        started: visits that have started, whether or not they will give rows: ``STARTED_COLUMNS``, dtypes as in
            ``schema.row_columns``, in the order of ``(request_ms, user_id, visit_id)``, which no two visits share.
            Each visit comes once, as soon as the watermark has passed its request.
        unused: events that changed no row: columns of ``EVENT_TYPES`` and ``reason``, a position in ``REASONS``, in
            the order in which the assembler found them.
    """

    rows: Rows
    started: Rows
    unused: Columns


def no_events() -> Columns:
    """Return event columns of length 0."""
    return {name: np.empty(0, dtype) for name, dtype in EVENT_TYPES.items()}


def no_rows(spec: DatasetSpec) -> Rows:
    """Return columns of ``AssembledRows.rows`` of length 0."""
    stored = row_columns(spec)
    return {name: np.empty((0, *stored[name][1]), stored[name][0]) for name in ROW_COLUMNS}


def select_unused(events: Columns, at: np.ndarray, reason: int) -> Columns:
    """Return the events at positions ``at`` with the reason why they change no row."""
    return {
        **{name: events[name][at].astype(dtype, copy=False) for name, dtype in EVENT_TYPES.items()},
        "reason": np.full(len(at), reason, np.int8),
    }


def concatenate(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenate the columns of one or more parts."""
    # Most calls have one part, which need not be copied.
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def row_table(spec: DatasetSpec, rows: Rows) -> pa.Table:
    """Return rows as the table that ``limelight stream assemble`` writes.

    ``visit_id, user_id, author_id, item_id`` int64, ``kind`` by name, ``request_ms, emit_ms`` int64, then for each
    behaviour B ``label_B`` and ``mask_B`` uint8.
    """
    columns = {name: pa.array(rows[name]) for name in ID_COLUMNS}
    columns["kind"] = pa.DictionaryArray.from_arrays(pa.array(rows["kind"].astype(np.int8)), pa.array(KINDS))
    columns |= {name: pa.array(rows[name]) for name in ("request_ms", "emit_ms")}
    for k, behaviour in enumerate(spec.behaviours):
        columns[f"label_{behaviour}"] = pa.array(np.ascontiguousarray(rows["label"][:, k]))
        columns[f"mask_{behaviour}"] = pa.array(np.ascontiguousarray(rows["mask"][:, k]))
    return pa.table(columns)


def unused_event_table(spec: DatasetSpec, unused: Columns) -> pa.Table:
    """Return unused events as a table: ``schema.EVENT_COLUMNS``, and ``reason`` by name."""
    names = {"event": event_names(spec), "reason": REASONS}
    return pa.table(
        {
            name: pa.DictionaryArray.from_arrays(pa.array(column), pa.array(names[name]))
            if name in names
            else pa.array(column)
            for name, column in unused.items()
        }
    )
