"""Declarations of embedding tables and of the lookups that read them.

A :class:`Table` has rows; a :class:`Lookup` names ids that read one table. So pooled features and sequences can share
one table. :func:`initial_rows` gives each shard of a table the values that it would have in the whole table.
``modules/table_set.py`` turns both into TorchRec modules.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modules.choices import Dynamic

Init = Literal["uniform", "normal", "zeros"]
Sharding = Literal["auto", "table_wise", "row_wise", "column_wise", "data_parallel"]
Pooling = Literal["none", "sum", "mean"]

# The values of a chunk and its scratch memory fit into a core's cache: four times faster than a whole table at once.
_CHUNK = 1 << 15
# Odd constants of splitmix64 (Steele, Lea and Flood, 2014) as signed 64-bit integers.
_GOLDEN, _MIX_1, _MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


@dataclass(frozen=True)
class Table:
    """An embedding table ``[rows, dim]``, float32.

    Attributes:
        name: unique among the tables; it also seeds the table's initial values.
        rows: number of rows; by convention, row 0 is the row of unknown ids.
        dim: width of a row.
        init: ``uniform`` on ``[-init_scale, init_scale)``, ``normal`` with that standard deviation, or ``zeros``.
        init_scale: ``None`` means ``0.1 / sqrt(dim)``. This is small compared with the first steps of an Adagrad
            optimizer, so rows that were seen once or never add little noise.
        sharding: sharding that the planner must use for the table; ``auto`` leaves the choice to it.
        dynamic: set if lookups have ids of any value that get rows during training; ``None`` if ids are row numbers.
    """

    name: str
    rows: int
    dim: int
    init: Init = "uniform"
    init_scale: float | None = None
    sharding: Sharding = "auto"
    dynamic: Dynamic | None = None


@dataclass(frozen=True)
class Lookup:
    """Ids of a batch that read one table.

    Attributes:
        name: unique among the lookups; the key of a ``KeyedJaggedTensor``.
        table: name of the table.
        length: number of ids of each row of the batch, or ``None`` if it varies (a sequence).
        pooling: way in which the dense part joins the embeddings of a row: ``sum``, ``mean``, or ``none``, which
            concatenates them if the length is fixed and reads them as a sequence if it varies.
        ids_per_entry: number of ids that together describe one entry of a sequence.
        max_length: largest number of ids of one row of a sequence, for the planner's estimate; None if it is unknown.
    """

    name: str
    table: str
    length: int | None
    pooling: Pooling = "none"
    ids_per_entry: int = 1
    max_length: int | None = None

    @property
    def most_ids(self) -> int:
        """Return the largest number of ids of one row; 1 if it is unknown."""
        return self.length or self.max_length or 1


def group_lookups(tables: Sequence[Table], lookups: Sequence[Lookup]) -> tuple[tuple[int, tuple[Lookup, ...]], ...]:
    """Group lookups by the dimension of their tables: ``((dim, lookups), ...)``, in order of first appearance.

    A group becomes one collection and one ``KeyedJaggedTensor``, whose keys are the group's lookups in this order.

    Raises:
        ValueError: a name is used twice, a lookup has no table, a table has no lookup, or a size is below 1.
    """
    for kind, names in (("table", [t.name for t in tables]), ("lookup", [lookup.name for lookup in lookups])):
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{kind} {name!r} is declared more than once")
    by_name = {table.name: table for table in tables}
    for table in tables:
        if table.rows < 1 or table.dim < 1:
            raise ValueError(f"table {table.name!r} is [{table.rows}, {table.dim}]: both must be 1 or more")
        if not any(lookup.table == table.name for lookup in lookups):
            raise ValueError(f"table {table.name!r} is read by no lookup")
    groups: dict[int, list[Lookup]] = {}
    for lookup in lookups:
        if lookup.table not in by_name:
            raise ValueError(f"lookup {lookup.name!r} reads table {lookup.table!r}; there are {sorted(by_name)}")
        if lookup.length is not None and lookup.length < 1:
            raise ValueError(f"lookup {lookup.name!r} has length {lookup.length}: it must be 1 or more, or None")
        groups.setdefault(by_name[lookup.table].dim, []).append(lookup)
    return tuple((dim, tuple(members)) for dim, members in groups.items())


def initial_rows(
    table: Table, seed: int, row_offset: int, rows: int, column_offset: int = 0, columns: int | None = None
) -> Tensor:
    """Return the initial values of rows ``[row_offset, row_offset + rows)`` of a table, or of some of their columns.

    A value depends only on the seed, the table's name, its row and its column, so any sharding gives the same table.
    For ``init = normal`` this holds up to the float32 rounding of values that differ by one unit in the last place of
    float64.

    Args:
        table: declaration of the table.
        seed: seed of the run.
        row_offset: first row.
        rows: number of rows, 0 or more.
        column_offset: first column.
        columns: number of columns; ``None`` means all from ``column_offset`` on.

    Returns:
        ``[rows, columns]`` float32 on the CPU.

    Raises:
        ValueError: rows or columns are outside the table.
    """
    columns = table.dim - column_offset if columns is None else columns
    if min(row_offset, rows, column_offset, columns) < 0:
        raise ValueError(f"table {table.name!r}: offsets and sizes must be 0 or more")
    if row_offset + rows > table.rows or column_offset + columns > table.dim:
        raise ValueError(
            f"table {table.name!r} is [{table.rows}, {table.dim}]; asked for rows up to {row_offset + rows} "
            f"and columns up to {column_offset + columns}"
        )
    return initial_values(table, seed, torch.arange(row_offset, row_offset + rows), column_offset, columns)


def initial_values(table: Table, seed: int, rows: Tensor, column_offset: int, columns: int) -> Tensor:
    """Return initial values as :func:`initial_rows` does, for any rows ``[n]`` int64: ``[n, columns]`` float32.

    They are on the device of ``rows``.
    """
    out = torch.zeros(len(rows), columns, dtype=torch.float32, device=rows.device)
    if table.init == "zeros" or columns == 0:
        return out
    scale = 0.1 / math.sqrt(table.dim) if table.init_scale is None else table.init_scale
    for start, bits in _random_bits(table.name, seed, rows, column_offset, columns):
        part = out[start : start + len(bits)]
        if table.init == "uniform":
            # 24 random bits are exact in float32, and a single multiplication rounds the same way in any shard.
            part.copy_(bits >> 40).mul_(scale / (1 << 23))
        else:
            part.copy_(_normal(bits).mul_(scale))
    return out


def _random_bits(name: str, seed: int, rows: Tensor, column_offset: int, columns: int) -> Iterator[tuple[int, Tensor]]:
    """Yield ``(start, bits)`` for chunks of rows; bits are ``[chunk, columns]`` int64, a hash of row and column."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little", signed=True)
    column_keys = torch.arange(column_offset, column_offset + columns, device=rows.device) * _MIX_1
    # A GPU has no core's cache, and each chunk would start kernels of its own.
    step = max(1, _CHUNK // columns if rows.device.type == "cpu" else len(rows))
    for start in range(0, len(rows), step):
        row_keys = rows[start : start + step] * _GOLDEN
        row_keys = _mix(row_keys.add_(key))
        yield start, _mix(row_keys[:, None] + column_keys)


def _mix(x: Tensor) -> Tensor:
    """Apply splitmix64's finaliser in place; int64 products wrap around, and masks make the shifts logical."""
    x ^= (x >> 30) & ((1 << 34) - 1)
    x *= _MIX_1
    x ^= (x >> 27) & ((1 << 37) - 1)
    x *= _MIX_2
    x ^= (x >> 31) & ((1 << 33) - 1)
    return x


def _normal(bits: Tensor) -> Tensor:
    """Apply Box and Muller's transform to the two halves of each hash, in float64; |x| <= sqrt(64 ln 2) = 6.7."""
    low, high = bits & 0xFFFFFFFF, (bits >> 32) & 0xFFFFFFFF
    radius = ((low + 1).double() / (1 << 32)).log_().mul_(-2).sqrt_()
    return radius.mul_((high.double() * (2 * math.pi / (1 << 32))).cos_())
