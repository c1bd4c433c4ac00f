"""Parser of JSON events: a fast path for plain lines of one event each, and a path event by event for the others."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.json as paj

IDS = ("user_id", "author_id", "item_id", "visit_id")
INTEGERS = (*IDS, "time_ms")
# Both parsers read floats in 64 bits and round once, so that they give the same values.
JSON_SCHEMA = pa.schema(
    [(name, pa.int64()) for name in INTEGERS]
    + [("domain", pa.string()), ("event", pa.string()), ("value", pa.float64())]
    + [("side", pa.list_(pa.int64())), ("dense", pa.list_(pa.float64())), ("stat", pa.list_(pa.float64()))]
)
"""Columns of parsed lines; any value may be null."""

_PARSE = paj.ParseOptions(explicit_schema=JSON_SCHEMA, unexpected_field_behavior="ignore")
_FEW_LINES = 32
_JSON_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def parse_lines(lines: list[bytes]) -> tuple[pa.Table, dict[int, str]]:
    """Parse lines into columns of ``JSON_SCHEMA``; return them and the reasons of the rejected lines by number."""
    tables: list[pa.Table] = [JSON_SCHEMA.empty_table()]
    bad: dict[int, str] = {}
    _parse(lines, 0, tables, bad)
    return pa.concat_tables(tables).combine_chunks(), bad


def split_events(value: bytes) -> list[bytes]:
    """Split a message into its events, each without a line break.

    Events are JSON objects, one per line or over several lines, or the elements of JSON arrays. The result is the whole
    message if it is not JSON and none of its lines looks like an object.
    """
    lines = [line for line in value.split(b"\n") if line.strip()]
    like_objects = [line.strip().startswith(b"{") and line.strip().endswith(b"}") for line in lines]
    if lines and all(like_objects):
        return lines
    # Arrays, and objects over several lines, such as those of a pretty printer.
    if pieces := _split_values(value):
        return pieces
    if not any(like_objects):
        return [value.replace(b"\n", b" ")]
    # A line that is not JSON must not take the others with it, and some of those may be arrays.
    return list(chain.from_iterable(_split_values(line) or [line] for line in lines))


def message_of(events: Sequence[bytes]) -> bytes:
    """Return a message that :func:`split_events` splits into ``events``, one a line.

    An element of an array that is an array itself stays inside of one: on a line alone it would be split again.
    """
    return b"\n".join(
        b"[%b]" % event if event[:1] == b"[" and _split_values(event) not in ([], [event]) else event
        for event in events
    )


def _split_values(value: bytes) -> list[bytes]:
    """Split a message into its JSON values and the elements of its arrays; return none if it is not JSON."""
    pieces: list[bytes] = []
    try:
        text = value.decode()
        place = _after_space(text, 0)
        while place < len(text):
            found, end = _values_at(text, place)
            # JSON strings cannot hold a line break, so all of these are white space.
            pieces += [text[first:stop].replace("\n", " ").encode() for first, stop in found]
            place = _after_space(text, end)
    except (ValueError, RecursionError):
        return []
    return pieces


def _values_at(text: str, place: int) -> tuple[list[tuple[int, int]], int]:
    """Return begin and end of each element of the array at ``place``, or of the other value there, and its end.

    Raises:
        ValueError: it is not JSON.
    """
    if not text.startswith("[", place):
        end = _DECODER.raw_decode(text, place)[1]
        return [(place, end)], end
    first = _after_space(text, place + 1)
    if text.startswith("]", first):
        # An empty array is an event of its own, which is rejected, because it would vanish otherwise.
        return [(place, first + 1)], first + 1
    found = []
    while True:
        end = _DECODER.raw_decode(text, first)[1]
        found.append((first, end))
        after = _after_space(text, end)
        if text.startswith("]", after):
            return found, after + 1
        if not text.startswith(",", after):
            raise ValueError("an array has neither a comma nor a bracket after an element")
        first = _after_space(text, after + 1)


def _after_space(text: str, place: int) -> int:
    """Return the position of the first character from ``place`` on that is not white space."""
    space = _JSON_SPACE.match(text, place)
    assert space is not None
    return space.end()


def is_text(value: bytes) -> bool:
    """True if ``value`` is UTF-8."""
    if not value.isascii():
        try:
            value.decode()
        except UnicodeDecodeError:
            return False
    return True


def _parse(lines: list[bytes], first: int, tables: list[pa.Table], bad: dict[int, str]) -> None:
    """Parse lines in order, numbered from ``first``; lines that the fast path refuses are halved and tried again."""
    table = parse_together(lines, len(lines))
    if table is not None:
        tables.append(table)
    elif len(lines) > _FEW_LINES:
        # Halving keeps most good lines on the fast path when a few lines are bad.
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
    """Parse parts with ``lines`` lines in total; return None unless every line is plainly one flat object.

    ``parse_lines`` accepts the same lines with the same values.
    """
    joined = b"\n".join(parts)
    # One opening brace per line, at its start, rules out nested objects and lines that are not objects.
    objects = joined.count(b"{")
    if not objects or objects != lines or not joined.startswith(b"{") or joined.count(b"\n{") != lines - 1:
        return None
    if not is_text(joined):
        return None
    try:
        # One block for all lines, because Arrow refuses a line that is longer than a block.
        read = paj.ReadOptions(use_threads=False, block_size=len(joined) + 1)
        table = paj.read_json(pa.py_buffer(joined), read_options=read, parse_options=_PARSE)
    except pa.ArrowException:
        return None
    return table.select(JSON_SCHEMA.names).combine_chunks() if table.num_rows == lines else None


def _parse_one(line: bytes) -> dict[str, object] | str:
    """Parse a line into a row of ``JSON_SCHEMA``; return the reason as a string if it is rejected."""
    try:
        parsed = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        return f"not JSON: {str(error).splitlines()[0]:.80}"
    if parsed == []:
        return "an empty array has no events"
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
    """Convert an integer as Arrow does: a value beyond the range of float32 becomes infinite."""
    if type(value) is not int:
        return value
    return float(value) if abs(value) <= _LARGEST_FLOAT32 else math.inf


def _is_integer(value: object) -> bool:
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_string(value: object) -> bool:
    # An unpaired UTF-16 surrogate is valid JSON, but not valid text.
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
