"""Check that an id stands for one thing in all lines of a log, across users and files, in bounded memory.

Lines are spilled to disk by id, without those that say again what a recent line said. Each part is then sorted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.data.format.validation import Columns
from trainer.data.writing.duplicates import hash_lines
from trainer.data.writing.partition_spill import Spill

_PARTS = 256
_RECENT = 1 << 16
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Contradiction:
    """Two lines that give an id different values.

    Attributes:
        id: the id.
        row: running number of the later line.
        earlier: running number of an earlier line with the id.
        column: first column in which they differ.
        value: value in the later line.
        other: value in the earlier line.
    """

    id: int
    row: int
    earlier: int
    column: str
    value: int
    other: int


class IdConsistency:
    """Check of the ids of one column.

    Args:
        folder: folder for temporary files; created here.
        name: column of the ids.
        same: columns that must have one value per id.
    """

    def __init__(self, folder: Path, name: str, same: tuple[str, ...]) -> None:
        self._name, self._same = name, same
        # A spill is partitioned by the column `user_id`; here that is the id to check.
        fields = [("user_id", pa.int64()), ("row", pa.int64()), *((f"same_{name}", pa.int64()) for name in same)]
        self._spill = Spill(folder, pa.schema(fields), _PARTS)
        self._recent = np.full((1 + len(same), _RECENT), -1, np.int64)

    def add(self, columns: Columns) -> None:
        """Add lines: the ids, ``row``, and the columns that must be the same."""
        values = np.stack([columns[self._name], *(columns[name] for name in self._same)]).astype(np.int64)
        slot = (values[0].view(np.uint64) * _MIX >> np.uint64(48)).astype(np.int64)
        new = np.flatnonzero((self._recent[:, slot] != values).any(axis=0))
        # One hash is sorted instead of all columns; two of a batch's lines share one with a probability of 1e-9.
        new = new[np.sort(np.unique(hash_lines(values[:, new]), return_index=True)[1])]
        self._recent[:, slot[new]] = values[:, new]
        part = {"user_id": values[0, new], "row": columns["row"][new]}
        self._spill.add(part | {f"same_{name}": values[1 + k, new] for k, name in enumerate(self._same)})

    def find(self) -> Contradiction | None:
        """Return the contradiction that comes first in the log, or None. To be called once."""
        self._spill.flush()
        found = None
        for part in range(_PARTS):
            columns = self._spill.pop(part)
            order = np.lexsort((columns["row"], columns["user_id"]))
            columns = {name: column[order] for name, column in columns.items()}
            again = columns["user_id"][1:] == columns["user_id"][:-1]
            differs = [columns[f"same_{name}"][1:] != columns[f"same_{name}"][:-1] for name in self._same]
            places = np.flatnonzero(again & np.logical_or.reduce(differs))
            if not len(places):
                continue
            place = int(places[np.argmin(columns["row"][1:][places])])
            if found is None or columns["row"][place + 1] < found.row:
                name = next(name for name, differ in zip(self._same, differs, strict=True) if differ[place])
                value, other = (int(columns[f"same_{name}"][at]) for at in (place + 1, place))
                row, earlier = (int(columns["row"][at]) for at in (place + 1, place))
                found = Contradiction(int(columns["user_id"][place]), row, earlier, name, value, other)
        return found


def line_hash(columns: Columns) -> np.ndarray:
    """Return a hash of all columns of each line except ``row``, ``[n] int64``; equal lines have equal hashes."""
    return hash_lines([column for name, column in columns.items() if name != "row"])
