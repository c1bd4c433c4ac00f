"""Lines of JSON, an event each, as columns: fast where all of them are plain, and line by line where not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.json as paj

IDS = ("user_id", "author_id", "item_id", "visit_id")
INTEGERS = (*IDS, "time_ms")
# Floats are read in 64 bits and rounded once, whichever parser reads them.
JSON_SCHEMA = pa.schema(
    [(name, pa.int64()) for name in INTEGERS]
    + [("domain", pa.string()), ("event", pa.string()), ("value", pa.float64())]
    + [("side", pa.list_(pa.int64())), ("dense", pa.list_(pa.float64())), ("stat", pa.list_(pa.float64()))]
)
"""Columns of the lines; any value may be null."""

_PARSE = paj.ParseOptions(explicit_schema=JSON_SCHEMA, unexpected_field_behavior="ignore")
_FEW = 32
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def parse_lines(lines: list[bytes]) -> tuple[pa.Table, dict[int, str]]:
    """Lines as columns of ``JSON_SCHEMA``, and why lines are none: those are left out of the table."""
    tables: list[pa.Table] = [JSON_SCHEMA.empty_table()]
    bad: dict[int, str] = {}
    _parse(lines, 0, tables, bad)
    return pa.concat_tables(tables).combine_chunks(), bad


def is_text(value: bytes) -> bool:
    """Whether it is UTF-8."""
    if not value.isascii():
        try:
            value.decode()
        except UnicodeDecodeError:
            return False
    return True


def _parse(lines: list[bytes], first: int, tables: list[pa.Table], bad: dict[int, str]) -> None:
    """Parse lines, whose first one has the number ``first``, in order; halves of what Arrow does not take."""
    table = parse_together(lines, len(lines))
    if table is not None:
        tables.append(table)
    elif len(lines) > _FEW:
        half = len(lines) // 2
        _parse(lines[:half], first, tables, bad)
        _parse(lines[half:], first + half, tables, bad)
    else:
        rows = []
        for number, line in enumerate(lines, first):
            row = _parse_one(line)
            if isinstance(row, str):
                bad[number] = row
            else:
                rows.append(row)
        tables.append(pa.Table.from_pylist(rows, schema=JSON_SCHEMA))


def parse_together(parts: list[bytes], lines: int) -> pa.Table | None:
    """Parts of so many lines, as columns of ``JSON_SCHEMA``; None if any line is not plainly one flat object.

    What it takes, ``parse_lines`` takes with the same values.
    """
    joined = b"\n".join(parts)
    objects = joined.count(b"{")
    if not objects or objects != lines or not joined.startswith(b"{") or joined.count(b"\n{") != lines - 1:
        return None
    if not is_text(joined):
        return None
    try:
        # One block, since a line may not be longer than one.
        read = paj.ReadOptions(use_threads=False, block_size=len(joined) + 1)
        table = paj.read_json(pa.py_buffer(joined), read_options=read, parse_options=_PARSE)
    except pa.ArrowException:
        return None
    return table.select(JSON_SCHEMA.names).combine_chunks() if table.num_rows == lines else None


def _parse_one(line: bytes) -> dict[str, object] | str:
    """A line as a row of ``JSON_SCHEMA``, or why it is none."""
    try:
        parsed = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        return f"not JSON: {str(error).splitlines()[0]:.80}"
    if not isinstance(parsed, dict):
        return f"not a JSON object but {type(parsed).__name__}"
    row: dict[str, object] = {}
    for name in JSON_SCHEMA.names:
        value = parsed.get(name)
        fits, kind = _KINDS[name]
        if value is not None and not fits(value):
            return f"{name} is {value!a:.80}, not {kind}"
        if name in _FLOAT_LISTS and value is not None:
            value = [_as_float(each) for each in value]
        row[name] = _as_float(value) if name == "value" else value
    return row


def _as_float(value: object) -> object:
    """A number as Arrow reads it: what no float can hold is infinite."""
    if type(value) is not int:
        return value
    return float(value) if abs(value) <= _LARGEST_FLOAT32 else math.inf


def _is_integer(value: object) -> bool:
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_string(value: object) -> bool:
    # Half of a pair of UTF-16 is JSON, and no text.
    return type(value) is str and not any("\ud800" <= character <= "\udfff" for character in value)


def _list_of(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: type(value) is list and all(each is None or fits(each) for each in value)


_FLOAT_LISTS = ("dense", "stat")
_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(INTEGERS, (_is_integer, "a 64-bit integer")),
    **dict.fromkeys(("domain", "event"), (_is_string, "a string")),
    "value": (_is_number, "a number"),
    "side": (_list_of(_is_integer), "a list of 64-bit integers"),
    **dict.fromkeys(_FLOAT_LISTS, (_list_of(_is_number), "a list of numbers")),
}
