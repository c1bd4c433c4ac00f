"""Encoding of logged features in messages: three lists of numbers beside the fields of an event, or none of them."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.format.schema import DatasetSpec, row_columns
from trainer.stream.sources.logged_features import FEATURES, RequestFeatures, empty_features


class FeatureListCodec:
    """Reads and writes the feature lists of messages.

    Args:
        spec: description of the dataset, which names the features.
    """

    def __init__(self, spec: DatasetSpec) -> None:
        self._none = empty_features(spec)
        layout = row_columns(spec)
        self._width = {name: layout[name][1][0] for name in FEATURES}
        self._side_rows = np.array([side.rows for side in spec.side], np.int64)

    def read(self, table: pa.Table, wanted: np.ndarray) -> tuple[RequestFeatures, dict[int, str]]:
        """Return the features of rows of a table, and the reasons of rows with invalid features by row.

        Args:
            table: table with the columns ``FEATURES``, lists of numbers.
            wanted: ``[n] bool``, the rows to read; the features of other rows are ignored.
        """
        lists = {name: table[name].combine_chunks() for name in FEATURES}
        # Without any features there is nothing to check.
        if all(column.null_count == len(column) for column in lists.values()):
            return self._none, {}
        present = {name: column.is_valid().to_numpy(zero_copy_only=False) & wanted for name, column in lists.items()}
        some, each = np.any(list(present.values()), axis=0), np.all(list(present.values()), axis=0)
        reasons: dict[int, str] = {}
        for name in FEATURES:
            partly = np.flatnonzero(some & ~present[name])
            reasons |= dict.fromkeys(
                partly.tolist(), f"{name} is missing; a message has all of side, dense and stat or none of them"
            )
            lengths = pc.list_value_length(lists[name]).fill_null(0).to_numpy()
            wrong = np.flatnonzero(each & (lengths != self._width[name]))
            for row in wrong.tolist():
                reasons[row] = f"{name} has {lengths[row]} values; it must have {self._width[name]}"
            each[wrong] = False
        rows = np.flatnonzero(each)
        good = np.ones(len(rows), bool)
        read = {}
        for name in FEATURES:
            # Flattening skips nulls, so rows need to be selected only if some valid rows are unwanted or rejected.
            valid = lists[name] if len(lists[name]) - lists[name].null_count == len(rows) else lists[name].take(rows)
            read[name], bad, reason = self._checked(name, valid.flatten(), len(rows))
            reasons |= dict.fromkeys(rows[bad].tolist(), reason)
            good &= ~bad
        kept = np.flatnonzero(good)
        return RequestFeatures(rows, **read).rows(kept, rows[kept]), reasons

    def _checked(self, name: str, values: pa.Array, rows: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Return a column ``[rows, width]``, a mask of the rows with an invalid value, and the reason."""
        shape = rows, self._width[name]
        null = values.is_null().to_numpy(zero_copy_only=False).reshape(shape) if values.null_count else False
        column = values.fill_null(0).to_numpy().reshape(shape)
        if name == "side":
            wrong, reason = (column < 0) | (column >= self._side_rows), "side has a value outside of its feature's rows"
        else:
            # An overflow gives infinity, which is rejected below.
            with np.errstate(over="ignore"):
                column = column.astype(np.float32)
            wrong, reason = ~np.isfinite(column), f"{name} has a value that is not a finite float32"
            if name == "stat":
                wrong, reason = wrong | (column < 0), "stat has a value that is not a count"
        return column.astype(getattr(self._none, name).dtype, copy=False), np.any(wrong | null, axis=1), reason

    def lines(self, logged: RequestFeatures) -> list[str]:
        """Return the JSON fields of each event that has features."""
        columns = (getattr(logged, name).tolist() for name in FEATURES)
        return [
            ", ".join(f'"{name}": {json.dumps(values)}' for name, values in zip(FEATURES, row, strict=True))
            for row in zip(*columns, strict=True)
        ]

    def arrays(self, logged: RequestFeatures, events: int) -> dict[str, pa.Array]:
        """Return Arrow columns for a batch of ``events`` events, null where an event has no features."""
        has_features = np.zeros(events, bool)
        has_features[logged.at] = True
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(has_features)])
        columns = {}
        for name in FEATURES:
            values = getattr(logged, name)
            offsets = pa.array((starts * values.shape[1]).astype(np.int32))
            columns[name] = pa.ListArray.from_arrays(
                offsets, pa.array(values.reshape(-1)), mask=pa.array(~has_features) if events else None
            )
        return columns
