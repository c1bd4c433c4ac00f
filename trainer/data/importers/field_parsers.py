"""Parsers of parts of columns to canonical values; a parser raises ``pa.ArrowInvalid`` if any value is bad.

``table_files.convert`` turns that error into one that names file, row, column and value.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.format.id_index import IdIndex

EARLIEST_MS, LATEST_MS = 946_684_800_000, 4_102_444_800_000
"""Start of the years 2000 and 2100. A time outside this range was probably read in the wrong unit."""

_PER_MS = {"s": 0.001, "ms": 1, "us": 1_000, "ns": 1_000_000}
_NUMBER = r"^-?[0-9]+(\.[0-9]+)?$"
_OFFSET = r"(Z|[+-][0-9]{2}:?[0-9]{2})$"


def integer_ids(values: pa.Array) -> pa.Array:
    """Parse ids that are whole numbers of 0 or more, as numbers or as text; int64."""
    ids = _cast(_present(values), pa.int64())
    if len(ids) and pc.min(ids).as_py() < 0:
        raise pa.ArrowInvalid("negative id")
    return ids


class IdHash:
    """Ids of texts: 63 bits of a text's BLAKE2b hash, the same on every machine.

    The next 64 bits of the hash detect two texts with the same id: ``collisions``. Among n ids that happens with
    probability n^2 / 2^64. An id takes 32 to 56 bytes of memory.
    """

    def __init__(self) -> None:
        self._collided: set[int] = set()
        self._known = IdIndex()
        self._checks = np.zeros(1024, np.uint64)

    @property
    def collisions(self) -> int:
        """Number of texts whose id already belonged to another text."""
        return len(self._collided)

    def ids(self, values: pa.Array) -> pa.Array:
        """Return the ids of a part of a column; null raises ``pa.ArrowInvalid``."""
        coded = pc.dictionary_encode(_cast(_present(values), pa.string()))
        digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in coded.dictionary.to_pylist()]
        halves = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
        ids = (halves[:, 0] >> np.uint64(1)).astype(np.int64)
        self._compare(ids, halves[:, 1])
        return pa.array(ids[coded.indices.to_numpy()])

    def _compare(self, ids: np.ndarray, checks: np.ndarray) -> None:
        """Record the check bits of new ids, and the texts whose check bits differ from those of their id."""
        before = len(self._known)
        number = self._known.add(ids)
        if len(self._known) > len(self._checks):
            self._checks = np.resize(self._checks, 2 * len(self._known))
        new = np.flatnonzero(number >= before)[::-1]
        # reversed, so that of two new texts with the same id the first one is recorded
        self._checks[number[new]] = checks[new]
        self._collided.update(checks[self._checks[number] != checks].tolist())


def times_ms(values: pa.Array, unit: str, timezone: str) -> pa.Array:
    """Parse numbers in ``unit``, ISO 8601 text, or Arrow times and dates to milliseconds UTC, int64.

    Text and Arrow times without an offset are in ``timezone``. Fractions of a millisecond are cut off.
    """
    values = _plain(_present(values))
    if pa.types.is_string(values.type):
        if pc.all(pc.match_substring_regex(values, _NUMBER)).as_py():
            values = _number(values)
        else:
            offset = pc.any(pc.match_substring_regex(values, _OFFSET)).as_py()
            values = values.cast(pa.timestamp("us", "UTC" if offset else None))
    if pa.types.is_date(values.type):
        values = values.cast(pa.timestamp("ms"))
    if pa.types.is_timestamp(values.type):
        if values.type.tz is None:
            values = pc.assume_timezone(values, timezone, ambiguous="earliest", nonexistent="latest")
        milliseconds = values.cast(pa.timestamp("ms", "UTC"), safe=False).cast(pa.int64())
    elif pa.types.is_integer(values.type):
        whole = values.cast(pa.int64())
        milliseconds = pc.multiply_checked(whole, 1000) if unit == "s" else pc.divide(whole, _PER_MS[unit])
    else:
        # A float of seconds is exact to 0.0003 ms only. Without the margin, .436 s would be cut to 435 ms.
        milliseconds = pc.floor(pc.add(pc.divide(numbers(values), _PER_MS[unit]), 0.001)).cast(pa.int64())
    if len(milliseconds):
        least, most = pc.min_max(milliseconds).as_py().values()
        if least < EARLIEST_MS or most >= LATEST_MS:
            raise pa.ArrowInvalid("time out of range")
    return milliseconds


def numbers(values: pa.Array) -> pa.Array:
    """Parse numbers, text, or true and false to float64; null becomes 0, NaN and infinity raise."""
    values = _plain(values)
    if pa.types.is_string(values.type) and pc.all(pc.is_in(values, value_set=_TRUTH)).as_py():
        values = pc.is_in(values, value_set=_TRUE)
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    floats = pc.fill_null(_cast(values, pa.float64()), 0.0)
    if not pc.all(pc.is_finite(floats)).as_py():
        raise pa.ArrowInvalid("not finite")
    return floats


def codes(values: pa.Array, names: list[str]) -> pa.Array:
    """Return the position of each value, as text, in ``names``; null and other values raise."""
    position = pc.index_in(_cast(_present(values), pa.string()), value_set=pa.array(names, pa.string()))
    if position.null_count:
        raise pa.ArrowInvalid("unknown name")
    return position


_TRUE = pa.array(["true", "True", "TRUE"])
_TRUTH = pa.array(["true", "True", "TRUE", "false", "False", "FALSE", None])


def _present(values: pa.Array) -> pa.Array:
    """Return ``values``; null raises."""
    if values.null_count:
        raise pa.ArrowInvalid("no value")
    return values


def _plain(values: pa.Array) -> pa.Array:
    """Return dictionary-encoded and large text as plain strings; other values as they are."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return values.cast(pa.string()) if pa.types.is_large_string(values.type) else values


def _number(text: pa.Array) -> pa.Array:
    """Parse numeric text to int64 if possible, else to float64."""
    # nanoseconds since 1970 do not fit the 53 bits of a float, so int64 comes first
    try:
        return text.cast(pa.int64())
    except pa.ArrowInvalid:
        return text.cast(pa.float64())


def _cast(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Cast values; a cast that Arrow does not have raises ``pa.ArrowInvalid`` like a bad value."""
    try:
        return _plain(values).cast(kind)
    except pa.ArrowNotImplementedError as error:
        raise pa.ArrowInvalid(str(error)) from None
