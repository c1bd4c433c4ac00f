"""Tests of the columns of tables: times and ids of other types are converted exactly, or refused."""

from __future__ import annotations

import pyarrow as pa
import pytest

from trainer.console.errors import UserError
from trainer.data.format.validation import columns_of

SCHEMA = pa.schema([("request_ms", pa.int64()), ("user_id", pa.int64())])
TIME_MS = 1_650_000_000_123


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "Asia/Shanghai"])
def test_timestamps_are_converted_by_their_unit(unit: str, zone: str | None) -> None:
    times = pa.array([TIME_MS], pa.timestamp("ms", zone)).cast(pa.timestamp(unit, zone))
    columns = columns_of(pa.table({"request_ms": times, "user_id": [2.0**53 - 1]}), SCHEMA, "t")
    assert (columns["request_ms"].tolist(), columns["user_id"].tolist()) == ([TIME_MS], [2**53 - 1])


@pytest.mark.parametrize(
    ("kind", "value"),
    [(pa.float64(), 2.0**53), (pa.float32(), 2.0**24), (pa.float64(), float("nan")), (pa.float64(), 7.5)],
)
def test_floats_that_hold_no_single_id_are_refused(kind: pa.DataType, value: float) -> None:
    table = pa.table({"request_ms": [TIME_MS], "user_id": pa.array([value], kind)})
    with pytest.raises(UserError, match="t: column 'user_id' is not int64"):
        columns_of(table, SCHEMA, "t")
