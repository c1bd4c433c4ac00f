"""Tests of the reader of times: every type, unit and form of text, right or refused, and each value by itself."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.iso_time import ISO_FORMS, read_iso
from trainer.data.format.times import EARLIEST_MS, LATEST_MS, accepted_times, times_ms

PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
DAY = 1_651_622_400_000  # 2022-05-04 in UTC


def read(values: pa.Array, unit: str = "ms", zone: str = "UTC") -> list[int] | None:
    """Return the times, or None if they are refused."""
    try:
        return times_ms(values, unit, zone).to_pylist()
    except pa.ArrowInvalid:
        return None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2022-05-04", DAY),
        ("2022-05-04 00:00:00+00", DAY),  # Postgres
        ("2022-05-04 00:00:00.5+08", DAY + 500 - 8 * 3_600_000),
        ("2022-05-04 00:00:00-03:30", DAY + 12_600_000),
        ("2022-05-04 00:00:00 UTC", DAY),  # BigQuery
        ("2022-05-04 00:00:00.123456 UTC", DAY + 123),
        ("2022-05-04t00:00:00z", DAY),
        ("2022-05-04T00:00:00.999999999Z", DAY + 999),
        ("2022-05-04T00:00:00.123456789", DAY + 123),
        ("2022-05-04T01", DAY + 3_600_000),
        ("2022-05-04T0130+0000", DAY + 5_400_000),
        ("2022-05-04 00:00:00 +0800", DAY - 8 * 3_600_000),
        ("2022-02-30", None),
        ("2022-05-04T24:00", None),
        ("2022-05-04T00:60", None),
        ("2022-05-04T00:00:60", None),
        ("2022-05-04T00:00:00.1234567890", None),
        ("2022-05-04T00:00+24", None),
        ("2022-05-04Z", None),
        ("2022-05-04 ", None),
        ("2022-05-04\n", None),
        ("1999-12-31T23:59:59.999Z", None),
        ("2100-01-01T00:00Z", None),
        ("04.05.2022", None),
        ("", None),
    ],
)
def test_forms_of_text(text: str, expected: int | None) -> None:
    assert read(pa.array([text])) == (None if expected is None else [expected])
    scalar = read_iso(text, "UTC")
    assert scalar == expected or (expected is None and not EARLIEST_MS <= (scalar or LATEST_MS) < LATEST_MS)


def test_values_with_and_without_an_offset_are_read_by_themselves() -> None:
    texts = ["2022-05-04", "2022-05-04T00:00Z", f"{DAY}", f"{DAY}.75"]
    assert read(pa.array(texts), zone="Asia/Shanghai") == [DAY - 8 * 3_600_000, DAY, DAY, DAY]


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32()])
def test_short_floats_are_refused_with_what_to_write(kind: pa.DataType) -> None:
    assert read(pa.array(np.array([1, 2], kind.to_pandas_dtype())), "s") is None
    assert "write" not in accepted_times(kind, "s", "UTC") and "int64, float64" in accepted_times(kind, "s", "UTC")
    assert ISO_FORMS in accepted_times(pa.string(), "s", "UTC")


@pytest.mark.parametrize(
    "values",
    [
        pa.array([2**62], pa.timestamp("s")),
        pa.array([-(2**62)], pa.timestamp("ms", "UTC")),
        pa.array([2**31 - 1], pa.date32()),
        pa.array([2**63], pa.uint64()),
        pa.array([None], pa.int64()),
        pa.array([float("nan")]),
        pa.array([float("inf")]),
        pa.array([True]),
        pa.array([[DAY]]),
        pa.array([{"a": DAY}]),
        pa.array([5], pa.time64("us")),
        pa.array([DAY], pa.duration("ms")),
        pa.array([b"2022"]),
        pa.nulls(1),
    ],
    ids=lambda values: str(values.type),
)
@pytest.mark.parametrize("unit", PER_SECOND)
def test_what_is_no_time_is_refused(values: pa.Array, unit: str) -> None:
    assert read(values, unit) is None
    assert accepted_times(values.type, unit, "UTC")


@st.composite
def columns(draw: st.DrawFn) -> tuple[pa.Array, str, str, list[int | None]]:
    """Draw a column of any form with its unit, its zone, and the right time of each value; None if it is refused."""
    unit, zone = draw(st.sampled_from(list(PER_SECOND))), draw(st.sampled_from(["UTC", "Asia/Shanghai"]))
    near = st.integers(EARLIEST_MS * 1_000_000 - 10**15, EARLIEST_MS * 1_000_000 + 10**15)
    instant = st.one_of(st.integers(EARLIEST_MS * 10**6, LATEST_MS * 10**6 - 1), near)
    moments = draw(st.lists(instant, min_size=1, max_size=4))
    form = draw(
        st.sampled_from(["integer", "integer text", "float", "decimal text", "timestamp", "naive", "iso", "any"])
    )
    if form == "any":
        whole = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4))
        return pa.array(whole, pa.int64()), unit, zone, [right(Fraction(each, PER_SECOND[unit])) for each in whole]
    whole = [moment * PER_SECOND[unit] // 10**9 for moment in moments]
    if form in ("integer", "integer text"):
        texts = pa.array([str(each) for each in whole]) if form == "integer text" else pa.array(whole, pa.int64())
        return texts, unit, zone, [right(Fraction(each, PER_SECOND[unit])) for each in whole]
    if form == "float":
        # A float in the file is what a writer made of whole milliseconds.
        ms = [moment // 10**6 for moment in moments]
        floats = pa.array([each * PER_SECOND[unit] / 1000 for each in ms], pa.float64())
        return floats, unit, zone, [right(Fraction(each, 1000)) for each in ms]
    if form == "decimal text":
        exact = [Fraction(moment // 10**6, 1000) for moment in moments]
        texts = [
            f"{int(each * PER_SECOND[unit])}.{int(each * 1000) % 1000 if unit == 's' else 0:03d}" for each in exact
        ]
        return pa.array(texts), unit, zone, [right(each) for each in exact]
    if form in ("timestamp", "naive"):
        aware = form == "timestamp"
        kind = pa.timestamp(unit, "America/New_York" if aware else None)
        early = timedelta() if aware or zone == "UTC" else timedelta(hours=8)
        seconds = [Fraction(each, PER_SECOND[unit]) - int(early.total_seconds()) for each in whole]
        return pa.array(whole, kind), unit, zone, [right(each) for each in seconds]
    texts, expected = [], []
    for moment in moments:
        local = EPOCH + timedelta(seconds=moment // 10**9)
        decimals = draw(st.integers(0, 9))
        fraction = f"{moment % 10**9:09d}"[:decimals]
        name, east = draw(st.sampled_from([("", None), ("Z", 0), ("z", 0), (" UTC", 0), ("+08", 8), ("-0300", -3)]))
        clock = draw(st.sampled_from(["T", "t", " "])) + local.strftime("%H:%M:%S")
        texts.append(local.strftime("%Y-%m-%d") + clock + (f".{fraction}" if fraction else "") + name)
        hours = (8 if zone != "UTC" else 0) if east is None else east
        seconds = moment // 10**9 - 3600 * hours + Fraction(int(fraction or "0"), 10**decimals)
        expected.append(right(seconds))
    return pa.array(texts, draw(st.sampled_from([pa.string(), pa.large_string()]))), unit, zone, expected


def right(seconds: Fraction) -> int | None:
    """Return the milliseconds of seconds since 1970, None outside 2000 to 2100."""
    milliseconds = seconds * 1000 // 1
    return milliseconds if EARLIEST_MS <= milliseconds < LATEST_MS else None


def check_right_or_refused(drawn: tuple[pa.Array, str, str, list[int | None]]) -> None:
    values, unit, zone, expected = drawn
    assert read(values, unit, zone) == (None if None in expected else expected)
    for place, each in enumerate(expected):
        assert read(values.slice(place, 1), unit, zone) == (None if each is None else [each])


@given(columns())
@settings(max_examples=500, deadline=None)
def test_every_column_is_right_or_refused(drawn: Any) -> None:
    check_right_or_refused(drawn)


@pytest.mark.slow
@given(columns())
@settings(max_examples=100_000, deadline=None)
def test_every_column_is_right_or_refused_at_length(drawn: Any) -> None:
    check_right_or_refused(drawn)


@given(
    st.text(max_size=30)
    | st.from_regex(r"[0-9T:+. ZUC-]{0,30}", fullmatch=True)
    | st.from_regex(
        r"20[0-9]{2}-[01][0-9]-[0-3][0-9][Tt ][0-9:]{0,9}[.,]?[0-9]{0,10} ?[-+ZzUTC0-9:]{0,6}", fullmatch=True
    )
)
@settings(max_examples=1_000, deadline=None)
def test_any_text_is_read_like_a_single_time_or_refused(text: str) -> None:
    found, scalar = read(pa.array([text])), read_iso(text, "UTC")
    if scalar is not None and EARLIEST_MS <= scalar < LATEST_MS:
        assert found == [scalar]
    elif found is not None:
        assert abs(found[0] - float(text)) <= 1, "only a number of milliseconds is read in another way"


def test_both_readers_agree_on_summer_time() -> None:
    zone = "Europe/Berlin"
    for text in ("2022-03-27T01:59", "2022-03-27T03:00", "2022-10-30T02:30", "2022-10-30T03:00"):
        expected = int((datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)) - EPOCH).total_seconds() * 1000)
        assert read(pa.array([text]), zone=zone) == [read_iso(text, zone)] == [expected]
