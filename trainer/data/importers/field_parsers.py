"""Parts of columns of any log as canonical values; each function takes all values of a part, or raises ArrowInvalid.

``tables.convert`` turns that error into one that names file, row, column and value.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.format.id_index import IdIndex

EARLIEST_MS, LATEST_MS = 946_684_800_000, 4_102_444_800_000
"""2000 and 2100: a time outside was read in the wrong unit."""

_PER_MS = {"s": 0.001, "ms": 1, "us": 1_000, "ns": 1_000_000}
_NUMBER = r"^-?[0-9]+(\.[0-9]+)?$"
_OFFSET = r"(Z|[+-][0-9]{2}:?[0-9]{2})$"


def integer_ids(values: pa.Array) -> pa.Array:
    """Ids that are whole numbers, 0 or more; as numbers or as text."""
    ids = _cast(_present(values), pa.int64())
    if len(ids) and pc.min(ids).as_py() < 0:
        raise pa.ArrowInvalid("negative id")
    return ids


class IdHash:
    """Any text as an id: 63 bits of its BLAKE2b hash, the same on every machine.

    The next 64 bits of the hash tell whether two texts met in one id: ``collisions``. Among n ids that happens with
    probability n^2 / 2^64; 32 to 56 bytes are kept for each.
    """

    def __init__(self) -> None:
        self._met: set[int] = set()
        self._known = IdIndex()
        self._checks = np.zeros(1024, np.uint64)

    @property
    def collisions(self) -> int:
        """Number of texts whose id another text had before."""
        return len(self._met)

    def ids(self, values: pa.Array) -> pa.Array:
        """Ids of a part of a column; null raises."""
        coded = pc.dictionary_encode(_cast(_present(values), pa.string()))
        digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in coded.dictionary.to_pylist()]
        halves = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
        ids = (halves[:, 0] >> np.uint64(1)).astype(np.int64)
        self._compare(ids, halves[:, 1])
        return pa.array(ids[coded.indices.to_numpy()])

    def _compare(self, ids: np.ndarray, checks: np.ndarray) -> None:
        before = len(self._known)
        number = self._known.add(ids)
        if len(self._known) > len(self._checks):
            self._checks = np.resize(self._checks, 2 * len(self._known))
        new = np.flatnonzero(number >= before)[::-1]
        # Backwards, so that of two new texts with one id the first keeps it.
        self._checks[number[new]] = checks[new]
        self._met.update(checks[self._checks[number] != checks].tolist())


def times_ms(values: pa.Array, unit: str, timezone: str) -> pa.Array:
    """Milliseconds UTC of numbers in ``unit``, of ISO 8601 text, or of Arrow times and dates.

    Text and Arrow times without an offset are taken in ``timezone``. Fractions of a millisecond are cut off.
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
        # A float of seconds is exact to 0.0003 ms: without the margin .436 would be cut to 435 ms.
        milliseconds = pc.floor(pc.add(pc.divide(numbers(values), _PER_MS[unit]), 0.001)).cast(pa.int64())
    if len(milliseconds):
        least, most = pc.min_max(milliseconds).as_py().values()
        if least < EARLIEST_MS or most >= LATEST_MS:
            raise pa.ArrowInvalid("time out of range")
    return milliseconds


def numbers(values: pa.Array) -> pa.Array:
    """Float64 of numbers, of text, or of true and false; null is 0. NaN and infinity raise."""
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
    """Position of each value, as text, in ``names``; null and other values raise."""
    place = pc.index_in(_cast(_present(values), pa.string()), value_set=pa.array(names, pa.string()))
    if place.null_count:
        raise pa.ArrowInvalid("unknown name")
    return place


_TRUE = pa.array(["true", "True", "TRUE"])
_TRUTH = pa.array(["true", "True", "TRUE", "false", "False", "FALSE", None])


def _present(values: pa.Array) -> pa.Array:
    if values.null_count:
        raise pa.ArrowInvalid("no value")
    return values


def _plain(values: pa.Array) -> pa.Array:
    """Text in all its encodings as plain strings; other values as they are."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return values.cast(pa.string()) if pa.types.is_large_string(values.type) else values


def _number(text: pa.Array) -> pa.Array:
    # Nanoseconds do not fit the 53 bits of a float.
    try:
        return text.cast(pa.int64())
    except pa.ArrowInvalid:
        return text.cast(pa.float64())


def _cast(values: pa.Array, kind: pa.DataType) -> pa.Array:
    try:
        return _plain(values).cast(kind)
    except pa.ArrowNotImplementedError as error:
        raise pa.ArrowInvalid(str(error)) from None
