"""Reference of the time-ordered statistics: their definition over all pairs of rows."""

from __future__ import annotations

import numpy as np

from trainer.data.format.schema import DatasetSpec, Rows

ID_COLUMN = {"user": "user_id", "author": "author_id", "item": "item_id"}


def statistics_as_of(spec: DatasetSpec, rows: Rows, as_of_ms: np.ndarray) -> np.ndarray:
    """Return the statistics of each row over the rows with ``emit_ms < as_of_ms[row]``.

    Args:
        spec: description of the dataset, which lists the keys and the behaviours.
        rows: all rows, in any order.
        as_of_ms: ``[n] int64``, any times.

    Returns:
        ``[n, keys * (1 + behaviours)] float32``.
    """
    n = len(as_of_ms)
    side = [feature.name for feature in spec.side]
    known = rows["emit_ms"][None, :] < as_of_ms[:, None]
    outcome = np.concatenate([np.ones((n, 1)), rows["label"] & rows["mask"]], axis=1)
    counts = []
    for key in spec.statistics:
        counted = known.copy()
        for part in key:
            value = rows[ID_COLUMN[part]] if part in ID_COLUMN else rows["side"][:, side.index(part)]
            counted &= value[None, :] == value[:, None]
        counts.append(counted @ outcome)
    return np.concatenate([np.empty((n, 0)), *counts], axis=1).astype(np.float32)
