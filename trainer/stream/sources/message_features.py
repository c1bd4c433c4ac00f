"""Logged features in messages: three lists of numbers beside the fields of an event, all of them or none."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.format.schema import DatasetSpec, row_columns
from trainer.stream.sources.logged_features import FEATURES, RequestFeatures, empty_features


class FeatureListCodec:
    """Reads and writes the features of a dataset's description.

    Args:
        spec: names the features.
    """

    def __init__(self, spec: DatasetSpec) -> None:
        self._none = empty_features(spec)
        layout = row_columns(spec)
        self._width = {name: layout[name][1][0] for name in FEATURES}
        self._side_rows = np.array([side.rows for side in spec.side], np.int64)

    def read(self, table: pa.Table, asked: np.ndarray) -> tuple[RequestFeatures, dict[int, str]]:
        """Features of rows of a table, and why those of others are none.

        Args:
            table: with the columns ``FEATURES``, lists of numbers.
            asked: ``[n] bool``, the rows whose features are wanted; those of others are not looked at.
        """
        lists = {name: table[name].combine_chunks() for name in FEATURES}
        if all(column.null_count == len(column) for column in lists.values()):
            return self._none, {}
        given = {name: column.is_valid().to_numpy(zero_copy_only=False) & asked for name, column in lists.items()}
        some, each = np.any(list(given.values()), axis=0), np.all(list(given.values()), axis=0)
        reasons: dict[int, str] = {}
        for name in FEATURES:
            partly = np.flatnonzero(some & ~given[name])
            reasons |= dict.fromkeys(partly.tolist(), f"{name} is missing: side, dense and stat come all or not at all")
            lengths = pc.list_value_length(lists[name]).fill_null(0).to_numpy()
            wrong = np.flatnonzero(each & (lengths != self._width[name]))
            for row in wrong.tolist():
                reasons[row] = f"{name} has {lengths[row]} values; it must have {self._width[name]}"
            each[wrong] = False
        rows = np.flatnonzero(each)
        good = np.ones(len(rows), bool)
        read = {}
        for name in FEATURES:
            # Flattening leaves out what is null, so mostly nothing has to be taken.
            wanted = lists[name] if len(lists[name]) - lists[name].null_count == len(rows) else lists[name].take(rows)
            read[name], bad, reason = self._checked(name, wanted.flatten(), len(rows))
            reasons |= dict.fromkeys(rows[bad].tolist(), reason)
            good &= ~bad
        kept = np.flatnonzero(good)
        return RequestFeatures(rows, **read).rows(kept, rows[kept]), reasons

    def _checked(self, name: str, values: pa.Array, rows: int) -> tuple[np.ndarray, np.ndarray, str]:
        """A column of features ``[rows, width]``, in which of them a value cannot be, and why."""
        shape = rows, self._width[name]
        null = values.is_null().to_numpy(zero_copy_only=False).reshape(shape) if values.null_count else False
        found = values.fill_null(0).to_numpy().reshape(shape)
        if name == "side":
            wrong, reason = (found < 0) | (found >= self._side_rows), "side has a value that is none of its feature's"
        else:
            with np.errstate(over="ignore"):
                found = found.astype(np.float32)
            wrong, reason = ~np.isfinite(found), f"{name} has a value that is not a finite float32"
            if name == "stat":
                wrong, reason = wrong | (found < 0), "stat has a value that is no count"
        return found.astype(getattr(self._none, name).dtype, copy=False), np.any(wrong | null, axis=1), reason

    def lines(self, logged: RequestFeatures) -> list[str]:
        """Of each event that carries features the fields of its JSON object."""
        columns = (getattr(logged, name).tolist() for name in FEATURES)
        return [
            ", ".join(f'"{name}": {json.dumps(values)}' for name, values in zip(FEATURES, row, strict=True))
            for row in zip(*columns, strict=True)
        ]

    def arrays(self, logged: RequestFeatures, events: int) -> dict[str, pa.Array]:
        """Arrow columns of a batch of so many events, null where one carries no features."""
        carries = np.zeros(events, bool)
        carries[logged.at] = True
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(carries)])
        columns = {}
        for name in FEATURES:
            values = getattr(logged, name)
            offsets = pa.array((starts * values.shape[1]).astype(np.int32))
            columns[name] = pa.ListArray.from_arrays(
                offsets, pa.array(values.reshape(-1)), mask=pa.array(~carries) if events else None
            )
        return columns
