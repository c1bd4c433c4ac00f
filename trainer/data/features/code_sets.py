"""Tables of a code set: one for each level of the codes, and one for each prefix of levels.

A prefix of j levels is the number of its tuple of codes, the last level counting fastest. Row 0 of each table stands
for "no code".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from modules.embeddings import Table
from trainer.config.features import CodesConfig
from trainer.data.features.id_map import hash_rows, hash_salt

NO_CODE = -1

CODE_TABLE = "codes-"
"""Beginning of the names of all tables of codes."""


class SegmentCodeTable(NamedTuple):
    """A table of a code set.

    Attributes:
        name: of the table, and of the candidate's lookup.
        kind: ``level``: the code of the level ``depth``. ``prefix``: the codes of the levels up to ``depth``.
        depth: number of a level, from 1.
        tuples: number of its codes, or of its tuples of codes.
        rows: rows of the table, row 0 included.
    """

    name: str
    kind: Literal["level", "prefix"]
    depth: int
    tuples: int
    rows: int

    @property
    def hashed(self) -> bool:
        """True if the table has fewer rows than there are tuples, so that their numbers are hashed."""
        return self.rows <= self.tuples


class CodeSet:
    """Tables of one code set.

    Args:
        name: of the set.
        config: the section ``[features.codes.NAME]``.
        levels: number of codes of each level of the file.

    Attributes:
        name: as given.
        config: as given.
        levels: number of codes of each level that is used.
        tables: its tables, first those of levels, then those of prefixes.
        in_histories: True if entries of histories have codes.
    """

    def __init__(self, name: str, config: CodesConfig, levels: Sequence[int]) -> None:
        self.name, self.config = name, config
        self.levels = tuple(levels[: config.levels])
        self.in_histories = config.history != "none"
        depths = range(1, len(self.levels) + 1)
        tables = []
        if config.tables != "prefixes":
            tables += [self._table("level", depth, self.levels[depth - 1]) for depth in depths]
        if config.tables != "levels":
            # The prefix of one level is the code of this level, which may have a table already.
            first = 1 if config.tables == "prefixes" else 2
            tables += [self._table("prefix", depth, math.prod(self.levels[:depth])) for depth in depths[first - 1 :]]
        self.tables: tuple[SegmentCodeTable, ...] = tuple(tables)

    def _table(self, kind: Literal["level", "prefix"], depth: int, count: int) -> SegmentCodeTable:
        rows = count + 1 if kind == "level" else min(count + 1, self.config.prefix_rows)
        return SegmentCodeTable(f"{CODE_TABLE}{self.name}-{kind}{depth}", kind, depth, count, rows)

    def declare(self) -> list[Table]:
        """Return the declarations of the tables."""
        own = self.config
        return [Table(table.name, table.rows, own.dim, own.init, own.init_scale, own.sharding) for table in self.tables]

    def rows_of(self, codes: np.ndarray) -> list[np.ndarray]:
        """Return the row of each tuple of codes in each table, ``[n]`` int64.

        Args:
            codes: ``[n, levels]`` int32; ``NO_CODE`` in the first column means that there is no code.
        """
        missing = codes[:, 0] < 0
        found = []
        for table in self.tables:
            if table.kind == "level":
                rows = codes[:, table.depth - 1].astype(np.int64) + 1
            else:
                number = np.zeros(len(codes), np.int64)
                # Products above 2^63 wrap around; such prefixes are hashed in any case.
                for level in range(table.depth):
                    number = number * self.levels[level] + codes[:, level]
                rows = number + 1
                if table.hashed:
                    hash_rows(number, hash_salt(table.name), table.rows, rows)
            rows[missing] = 0
            found.append(rows)
        return found


def code_set_of(table: str) -> str:
    """Return the name of the code set of a table."""
    return table.removeprefix(CODE_TABLE).rpartition("-")[0]
