"""Reader of columns of times: one for the logs of importers, candidates, and messages of a stream.

A column holds numbers of a unit since 1970, ISO 8601 text, or Arrow dates and timestamps. Each value is read by itself,
so one value never changes how another one is read.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.config.iso_time import ISO_FORMS, ISO_TIME
from trainer.data.format.column_types import check_type

EARLIEST_MS, LATEST_MS = 946_684_800_000, 4_102_444_800_000
"""Start of the years 2000 and 2100. A time outside this range was probably read in the wrong unit."""

_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_DAY_MS = 86_400_000
_INTEGER = r"^-?[0-9]+$"
_DECIMAL = r"^(?P<whole>[0-9]{1,19})\.(?P<fraction>[0-9]+)$"


def accepted_times(kind: pa.DataType, unit: str, timezone: str) -> str:
    """Return a description of the times that ``times_ms`` reads, for the message about a value of type ``kind``."""
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):
        size = "float16" if pa.types.is_float16(kind) else "float32"
        return f"int64, float64, a timestamp or ISO 8601 text, because {size} does not have the digits of a time"
    return (
        f"a time from 2000 to 2100: {unit} since 1970, a timestamp, or text such as {ISO_FORMS}; without an offset in "
        f"{timezone}"
    )


def times_ms(values: pa.Array, unit: str, timezone: str) -> pa.Array:
    """Read times to milliseconds UTC, int64. Fractions of a millisecond are cut off.

    Args:
        values: part of a column, without nulls: whole numbers, float64, decimals or their text in ``unit``; ISO 8601
            text; dates and timestamps.
        unit: ``s``, ``ms``, ``us`` or ``ns``, of numbers.
        timezone: IANA time zone of text, dates and timestamps without an offset.

    Raises:
        pa.ArrowInvalid: a value is null, not a time, outside 2000 to 2100, or of a type that cannot hold a time.
    """
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if values.null_count:
        raise pa.ArrowInvalid("no value")
    kind = values.type
    if pa.types.is_decimal(kind):
        # Decimals of any size are exact as text.
        values = values.cast(pa.string())
    elif pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        values = values.cast(pa.string())
    if pa.types.is_string(values.type):
        return pa.array(_from_text(values, unit, timezone))
    if pa.types.is_date(kind):
        days_ms = values.cast(pa.timestamp("s")).cast(pa.int64()).to_numpy(zero_copy_only=False)
        return pa.array(_local(days_ms, "s", timezone))
    if pa.types.is_timestamp(kind):
        raw = values.cast(pa.int64()).to_numpy(zero_copy_only=False)
        return pa.array(_from_integers(raw, kind.unit) if kind.tz is not None else _local(raw, kind.unit, timezone))
    if pa.types.is_integer(kind):
        return pa.array(_from_integers(values.cast(pa.int64()).to_numpy(zero_copy_only=False), unit))
    if pa.types.is_float64(kind):
        per_ms = _PER_SECOND[unit] / 1000
        # A float of seconds is exact to 0.0003 ms only. Without the margin, .436 s would be cut to 435 ms.
        milliseconds = np.floor(values.to_numpy(zero_copy_only=False) / per_ms + 0.001)
        return pa.array(_in_range(milliseconds, EARLIEST_MS, LATEST_MS).astype(np.int64))
    check_type(values, "time")
    raise pa.ArrowInvalid(f"{kind} does not hold times")


def milliseconds_of(timestamps: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return timestamps as milliseconds UTC, int64, whatever their unit and time; null stays null.

    Timestamps without a zone are UTC.

    Raises:
        pa.ArrowInvalid: a time does not fit 64 bits.
    """
    raw, unit = timestamps.cast(pa.int64()), timestamps.type.unit
    return pc.multiply_checked(raw, 1000) if unit == "s" else pc.divide(raw, _PER_SECOND[unit] // 1000)


def _in_range(values: np.ndarray, earliest: int, latest: int) -> np.ndarray:
    """Return the values; one outside ``[earliest, latest)``, or NaN, raises ``pa.ArrowInvalid``."""
    if not ((values >= earliest) & (values < latest)).all():
        raise pa.ArrowInvalid("time out of range")
    return values


def _from_integers(values: np.ndarray, unit: str) -> np.ndarray:
    """Return whole numbers of a unit since 1970 as milliseconds."""
    # The range is checked before the conversion, which could overflow.
    per = _PER_SECOND[unit]
    _in_range(values, EARLIEST_MS // 1000 * per, LATEST_MS // 1000 * per)
    return values * 1000 if unit == "s" else values // (per // 1000)


def _local(values: np.ndarray, unit: str, timezone: str) -> np.ndarray:
    """Return local times, as whole numbers of a unit since 1970 by the clock of a time zone, as milliseconds UTC."""
    # A day more on both sides: no time zone is further from UTC.
    day, per = _DAY_MS // 1000, _PER_SECOND[unit]
    _in_range(values, (EARLIEST_MS // 1000 - day) * per, (LATEST_MS // 1000 + day) * per)
    local = pa.array(values).cast(pa.timestamp(unit))
    aware = pc.assume_timezone(local, timezone, ambiguous="earliest", nonexistent="latest")
    return _from_integers(aware.cast(pa.int64()).to_numpy(zero_copy_only=False), unit)


def _from_text(values: pa.Array, unit: str, timezone: str) -> np.ndarray:
    """Return times as text, each a number or ISO 8601, as milliseconds."""
    whole = pc.match_substring_regex(values, _INTEGER)
    if pc.all(whole).as_py():
        return _from_integers(values.cast(pa.int64()).to_numpy(zero_copy_only=False), unit)
    times = np.empty(len(values), np.int64)
    decimal = pc.match_substring_regex(values, _DECIMAL)
    readers = (
        (whole, lambda part: _from_integers(part.cast(pa.int64()).to_numpy(zero_copy_only=False), unit)),
        (decimal, lambda part: _from_decimals(part, unit)),
        (pc.invert(pc.or_(whole, decimal)), lambda part: _from_iso(part, timezone)),
    )
    for mask, read in readers:
        if pc.any(mask).as_py():
            times[mask.to_numpy(zero_copy_only=False)] = read(values.filter(mask))
    return times


def _from_decimals(values: pa.Array, unit: str) -> np.ndarray:
    """Return text of numbers with decimals as milliseconds."""
    parts = pc.extract_regex(values, _DECIMAL)
    whole = pc.struct_field(parts, "whole").cast(pa.int64()).to_numpy(zero_copy_only=False)
    if unit in ("us", "ns"):
        return _from_integers(whole, unit)
    _from_integers(whole, unit)
    places = 6 if unit == "s" else 3
    digits = pc.utf8_slice_codeunits(pc.utf8_rpad(pc.struct_field(parts, "fraction"), places, "0"), 0, places)
    microseconds = whole * 10**places + digits.cast(pa.int64()).to_numpy(zero_copy_only=False)
    # The margin of a microsecond is that of floats in `times_ms`: such text is often a float's.
    return _in_range((microseconds + 1) // 1000, EARLIEST_MS, LATEST_MS)


def _from_iso(values: pa.Array, timezone: str) -> np.ndarray:
    """Return ISO 8601 text as milliseconds."""
    # Arrow's parser is much faster, and reads the usual forms if all values have an offset or none has.
    for zone in (None, "UTC"):
        try:
            nanoseconds = values.cast(pa.timestamp("ns", zone)).cast(pa.int64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:
            continue
        return _local(nanoseconds, "ns", timezone) if zone is None else _from_integers(nanoseconds, "ns")
    parts = pc.extract_regex(values, ISO_TIME)
    if parts.null_count:
        raise pa.ArrowInvalid("not ISO 8601")

    def number(name: str, limit: int, digits: int = 2) -> np.ndarray:
        text = pc.utf8_slice_codeunits(pc.utf8_rpad(pc.struct_field(parts, name), digits, "0"), 0, digits)
        return _in_range(text.cast(pa.int64()).to_numpy(zero_copy_only=False), 0, limit)

    day = pc.struct_field(parts, "date").cast(pa.date32()).cast(pa.int32()).to_numpy(zero_copy_only=False)
    minutes = (day.astype(np.int64) * 24 + number("hour", 24)) * 60 + number("minute", 60)
    times = (minutes * 60 + number("second", 60)) * 1000 + number("fraction", 1000, 3)
    east = number("offset_hour", 24) * 60 + number("offset_minute", 60)
    west = pc.equal(pc.struct_field(parts, "sign"), "-").to_numpy(zero_copy_only=False)
    local = pc.equal(pc.struct_field(parts, "offset"), "").to_numpy(zero_copy_only=False)
    times -= np.where(west, -east, east) * 60_000
    if local.any():
        times[local] = _local(times[local], "ms", timezone)
    return _in_range(times, EARLIEST_MS, LATEST_MS)
