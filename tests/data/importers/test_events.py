"""Tests of the import of a user's own log: both layouts against a simple reference, and the message of each mistake."""

import json
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.shards import read_rows
from trainer.data.format.times import times_ms
from trainer.data.importers import field_parsers
from trainer.data.importers.events import import_events
from trainer.data.importers.visit_assembly import EventCodes, assemble_visits

T0 = 1_650_000_000_000

EXPOSURES = """
layout = "exposures"
timezone = "Asia/Shanghai"
[columns]
user_id = "uid"
author_id = "anchor"
item_id = "room"
time = "ts"
play_ms = "watched"
[domain]
column = "kind"
video = ["v"]
live = ["l", "party"]
[behaviours]
click = {column = "clk", at = "start"}
like = {column = "liked", delay = "like_ms"}
gift = {column = "price", applies = ["live"]}
[features]
context = {side = ["tab"], dense = ["battery"]}
user = {file = "users.csv", id = "uid", side = ["city"], dense = ["age"]}
"""

EXPOSURE_LINES = """uid,anchor,room,ts,watched,kind,clk,liked,like_ms,price,tab,battery
7,70,700,1650000000000,5000,v,1,true,1200,0,home,0.5
7,71,701,1650000001000,0,l,0,false,,0,,
8,70,702,1650000002000,9000,party,1,false,,2.5,hot,1
"""

USER_LINES = "uid,city,age\n7,Berlin,30\n8,,41.5\n"

EVENTS = """
layout = "events"
[columns]
user_id = "user"
author_id = "author"
item_id = "item"
time = "time"
event = "action"
value = "amount"
[domain]
constant = "live"
[behaviours]
like = {events = ["like", "double_like"]}
gift = {events = ["gift"]}
[events]
exposure = ["show"]
enter = ["enter"]
exit = ["leave"]
ignore = ["heartbeat"]
"""


def write(folder: Path, mapping: str, lines: str, users: str = USER_LINES) -> dict[str, Any]:
    """Write a mapping, a log and a table of users; return the arguments of ``import_events``."""
    (folder / "log").mkdir(parents=True)
    (folder / "map.toml").write_text(mapping)
    (folder / "users.csv").write_text(users)
    (folder / "log" / "a.csv").write_text(lines)
    return {"src": folder / "log", "out": folder / "out", "mapping": folder / "map.toml", "partitions": 2}


def rows_of(out: Path) -> dict[str, np.ndarray]:
    """Return all rows of a dataset in order of visit_id."""
    rows = read_rows(str(out), DatasetSpec.load(out))
    order = np.argsort(rows["visit_id"])
    return {name: column[order] for name, column in rows.items()}


def events_of(out: Path) -> list[tuple[Any, ...]]:
    """Return (visit_id, event, ms since T0, value) of all events."""
    files = sorted((out / "events").glob("*.parquet"))
    table = pa.concat_tables([pq.read_table(file) for file in files])
    return sorted((line["visit_id"], line["event"], line["time_ms"] - T0, line["value"]) for line in table.to_pylist())


def test_exposures_become_rows(tmp_path: Path) -> None:
    spec = import_events(**write(tmp_path, EXPOSURES, EXPOSURE_LINES))
    rows = rows_of(tmp_path / "out")
    assert rows["visit_id"].tolist() == [0, 1, 2]
    assert rows["user_id"].tolist() == [7, 7, 8]
    assert rows["author_id"].tolist() == [70, 71, 70]
    assert rows["item_id"].tolist() == [700, 701, 702]
    assert rows["domain"].tolist() == [0, 1, 1]
    assert (rows["request_ms"] - T0).tolist() == [0, 1000, 2000]
    assert (rows["emit_ms"] - T0).tolist() == [5000, 1000, 11000]
    assert spec.behaviours == ("click", "like", "gift")
    assert rows["label"].tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert rows["mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert [side.name for side in spec.side] == ["city", "tab"]
    assert spec.extra["vocabularies"] == {"city": ["Berlin"], "tab": ["home", "hot"]}
    assert rows["side"].tolist() == [[1, 1], [1, 0], [0, 2]]
    assert rows["dense"].tolist() == [[30.0, 0.5], [30.0, 0.0], [41.5, 1.0]]
    assert events_of(tmp_path / "out")[:5] == [
        (0, "click", 0, 0.0),
        (0, "enter", 0, 0.0),
        (0, "exit", 5000, 5000.0),
        (0, "exposure", 0, 0.0),
        (0, "like", 1200, 0.0),
    ]
    assert (2, "gift", 11000, 2.5) in events_of(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["extra"]["log_rows"] == 3


def test_parquet_gzip_and_csv_of_one_log_give_one_dataset(tmp_path: Path) -> None:
    import_events(**write(tmp_path / "csv", EXPOSURES, EXPOSURE_LINES))
    expected = rows_of(tmp_path / "csv" / "out")
    table = pa.csv.read_csv(tmp_path / "csv" / "log" / "a.csv")
    for name, save in (
        ("a.parquet", lambda file: pq.write_table(table, file)),
        ("a.csv.gz", lambda file: pa.csv.write_csv(table, pa.CompressedOutputStream(str(file), "gzip"))),
    ):
        folder = tmp_path / name
        arguments = write(folder, EXPOSURES, "")
        (folder / "log" / "a.csv").unlink()
        save(folder / "log" / name)
        import_events(**arguments)
        for column, values in rows_of(folder / "out").items():
            np.testing.assert_array_equal(values, expected[column], err_msg=f"{name} {column}")


def test_single_events_become_visits(tmp_path: Path) -> None:
    lines = [
        (1, 10, 100, 0, "show", ""),
        (1, 10, 100, 50, "enter", ""),
        (1, 10, 100, 60, "heartbeat", ""),
        (2, 10, 100, 70, "show", ""),
        (1, 10, 100, 80, "like", ""),
        (1, 10, 100, 90, "double_like", ""),
        (1, 11, 110, 95, "show", ""),
        (1, 10, 100, 99, "gift", "3.5"),
        (1, 10, 100, 450, "leave", "400"),
        (1, 10, 100, 500, "show", ""),
        (1, 10, 100, 500, "like", ""),
    ]
    text = "user,author,item,time,action,amount\n"
    text += "".join(f"{u},{a},{i},{T0 + t},{e},{v}\n" for u, a, i, t, e, v in lines)
    spec = import_events(**write(tmp_path, EVENTS, text))
    rows = rows_of(tmp_path / "out")
    assert rows["visit_id"].tolist() == [0, 3, 6, 9], "the line of the exposure"
    assert rows["label"].tolist() == [[1, 1], [0, 0], [0, 0], [1, 0]]
    assert (rows["emit_ms"] - T0).tolist() == [450, 70, 95, 500]
    assert (spec.exposures, spec.events) == (4, 13)
    assert events_of(tmp_path / "out") == [
        (0, "enter", 50, 0.0),
        (0, "exit", 450, 400.0),
        (0, "exposure", 0, 0.0),
        (0, "gift", 99, 3.5),
        (0, "like", 80, 0.0),
        (0, "like", 90, 0.0),
        (3, "exit", 70, 0.0),
        (3, "exposure", 70, 0.0),
        (6, "exit", 95, 0.0),
        (6, "exposure", 95, 0.0),
        (9, "exit", 500, 0.0),
        (9, "exposure", 500, 0.0),
        (9, "like", 500, 0.0),
    ]


def reference_visits(events: list[dict[str, int]], begin: int, by_visit_id: bool) -> tuple[dict, set[int]]:
    """Return start, end and first delays by visit, and the rows of orphans, computed event by event."""
    key = "visit_id" if by_visit_id else "item_id"
    rank = {begin: 0, EventCodes.EXIT: 2}
    visits: dict[int, Any] = {}
    current: dict[tuple[int, int], int] = {}
    orphans = set()
    for event in sorted(events, key=lambda e: (e["time_ms"], rank.get(e["code"], 1), e["row"])):
        group = (event["user_id"], event[key])
        if event["code"] == begin and not (by_visit_id and group in current):
            current[group] = event["row"]
            visits[event["row"]] = {"start": event["time_ms"], "first": {}}
        if group not in current:
            orphans.add(event["row"])
            continue
        visit = visits[current[group]]
        visit["end"] = event["time_ms"]
        visit["first"].setdefault(event["code"], event["time_ms"] - visit["start"])
    return visits, orphans


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 1), st.integers(0, 6), st.integers(0, 4)),
        max_size=30,
    ),
    st.booleans(),
    st.sampled_from([EventCodes.EXPOSURE, EventCodes.ENTER]),
)
def test_assembly_equals_event_by_event(lines: list[tuple[int, ...]], by_visit_id: bool, begin: int) -> None:
    names = ("user_id", "item_id", "visit_id", "time_ms", "code")
    events = [{**dict(zip(names, line, strict=True)), "row": row} for row, line in enumerate(lines)]
    columns = {name: np.array([event[name] for event in events], np.int64) for name in (*names, "row")}
    columns |= {"author_id": columns["item_id"], "domain": columns["item_id"].astype(np.int8)}
    columns |= {"code": columns["code"].astype(np.int8), "value": columns["row"].astype(float)}
    codes = EventCodes(("like", "gift"), begin)
    assembled = assemble_visits(
        {**columns, "tab": columns["row"].astype(np.int32)}, codes, by_visit_id=by_visit_id, has_value=False
    )
    visits, orphans = reference_visits(events, begin, by_visit_id)
    assert set(columns["row"][assembled.orphans].tolist()) == orphans
    got = assembled.visits
    # A visit takes other columns from the line that begins it, here the line's own number.
    assert sorted(got["tab"].tolist()) == sorted(visits)
    for position, row in enumerate(got["tab"].tolist()):
        visit = visits[row]
        assert got["visit_id"][position] == (events[row]["visit_id"] if by_visit_id else row)
        assert (got["request_ms"][position], got["exit_ms"][position]) == (visit["start"], visit["end"])
        assert got["delay_like"][position] == visit["first"].get(3, -1)
        assert got["delay_gift"][position] == visit["first"].get(4, -1)
    kinds = defaultdict(int)
    for code in assembled.events["code"].tolist():
        kinds[code] += 1
    assert kinds[EventCodes.EXPOSURE] >= len(visits) and kinds[EventCodes.EXIT] >= len(visits)


@pytest.mark.parametrize(
    ("mapping", "lines", "message"),
    [
        (EXPOSURES.replace('"clk"', '"clicked"'), EXPOSURE_LINES, r"a\.csv: column 'clicked' is missing"),
        (EXPOSURES, EXPOSURE_LINES.replace("1650000001000", "yesterday"), r"a\.csv: row 2: column 'ts' is 'yesterday'"),
        (
            EXPOSURES,
            EXPOSURE_LINES.replace("1650000001000", "1650000001"),
            r"row 2: column 'ts' is '1650000001'.*time_unit",
        ),
        (EXPOSURES, EXPOSURE_LINES.replace("1650000002000", "1649999999999"), r"row 3: column 'ts'.*out_of_order"),
        (EXPOSURES, EXPOSURE_LINES.replace("8,70", "-8,70"), r"row 3: column 'uid' is '-8'.*0 or more"),
        (
            EXPOSURES,
            EXPOSURE_LINES.replace("8,70", "eve,70"),
            r"row 3: column 'uid' is 'eve'.*hash_ids = \[\"user_id\"\]",
        ),
        (EXPOSURES, EXPOSURE_LINES.replace("8,70", ",70"), r"row 3: column 'uid' is empty"),
        (EXPOSURES, EXPOSURE_LINES.replace("party", "audio"), r"row 3: column 'kind' is 'audio'.*one of v, l, party"),
        (EXPOSURES, EXPOSURE_LINES.replace("true,1200", "true,-3"), r"row 1: column 'like_ms' is '-3'"),
        (EXPOSURES, EXPOSURE_LINES.replace("2.5", "inf"), r"row 3: column 'price' is 'inf'.*finite"),
        (EXPOSURES, EXPOSURE_LINES.replace(",hot,1", ""), r"a\.csv: line 4: "),
        (EXPOSURES, "", r"a\.csv: is empty"),
        (EXPOSURES, EXPOSURE_LINES.splitlines()[0] + "\n", "no visits"),
        (
            EXPOSURES.replace("play_ms", "play"),
            EXPOSURE_LINES,
            r"map\.toml: unknown key columns\.play; .* columns\.play_ms",
        ),
        (EXPOSURES.replace("clk", 'clk", when = "start'), EXPOSURE_LINES, r"unknown key behaviours\.click\.when"),
        (EXPOSURES.replace("Asia/Shanghai", "Mars"), EXPOSURE_LINES, r"map\.toml: timezone = 'Mars'"),
        (EXPOSURES + "[x", EXPOSURE_LINES, r"map\.toml: not valid TOML"),
        (EXPOSURES.replace('column = "kind"', ""), EXPOSURE_LINES, r"domain.*either `constant` or `column`"),
        (EVENTS.replace('event = "action"', ""), "", r"needs columns\.event"),
        (EVENTS.replace('["leave"]', '["leave", "gift"]'), "", r"map\.toml: .*the event 'gift' is mapped twice"),
        (EXPOSURES.replace('["v"]', '["1", "1.0"]'), "", r"map\.toml: .*the value '1' is mapped twice"),
        (EXPOSURES.replace('["v"]', '["l"]'), "", r"map\.toml: .*the value 'l' is mapped twice"),
    ],
)
def test_mistakes_give_a_one_line_message_and_leave_no_files(
    tmp_path: Path, mapping: str, lines: str, message: str
) -> None:
    arguments = write(tmp_path, mapping, lines)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        import_events(**arguments)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("show", "shown", r"row 1: column 'action' is 'shown'; it must be one of show, enter, leave, like"),
        (
            "1,1,1,1650000000000",
            "1,1,2,1650000000000",
            r"row 2: column 'action' is 'like'.*exposure.*orphans = \"drop\"",
        ),
    ],
)
def test_mistakes_in_single_events(tmp_path: Path, old: str, new: str, message: str) -> None:
    lines = f"user,author,item,time,action,amount\n1,1,1,{T0},show,\n1,1,1,{T0 + 5},like,\n"
    arguments = write(tmp_path, EVENTS, lines.replace(old, new))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        import_events(**arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_orphans_can_be_dropped_and_lines_sorted(tmp_path: Path) -> None:
    lines = f"user,author,item,time,action,amount\n1,1,1,{T0 + 5},like,\n1,1,1,{T0},show,\n1,1,2,{T0},like,\n"
    spec = import_events(**write(tmp_path, 'out_of_order = "sort"\norphans = "drop"\n' + EVENTS, lines))
    assert spec.extra["orphans_dropped"] == 1
    assert rows_of(tmp_path / "out")["label"].tolist() == [[1, 0]]


def test_text_ids_are_hashed_when_asked(tmp_path: Path) -> None:
    mapping = EXPOSURES.replace("[columns]", 'hash_ids = ["user_id", "item_id"]\n[columns]', 1)
    lines = EXPOSURE_LINES.replace("\n7,", "\nanna,").replace("\n8,", "\nbert,")
    spec = import_events(**write(tmp_path, mapping, lines, "uid,city,age\nanna,Berlin,30\nbert,Rome,2\n"))
    rows = rows_of(tmp_path / "out")
    assert spec.extra["hash_collisions"] == {"user_id": 0, "item_id": 0}
    assert rows["user_id"][0] == rows["user_id"][1] != rows["user_id"][2]
    assert (rows["user_id"] >= 0).all() and (rows["user_id"] > 1 << 40).all()
    assert rows["side"][:, 0].tolist() == [1, 1, 2], "the table of users is joined by the same hash"
    # Pinned: ids must be the same on every machine and in every release.
    assert field_parsers.IdHash().ids(pa.array(["anna"])).to_pylist() == [rows["user_id"][0]] == [4416767800488558539]


def test_hash_collisions_are_counted_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"user{number}" for number in range(20)]
    hashing = field_parsers.IdHash()
    assert len(set(hashing.ids(pa.array(texts)).to_pylist())) == 20 and hashing.collisions == 0

    class ShortHash:
        """Hash with only three values in its first half, which is the id."""

        def __init__(self, text: bytes, digest_size: int) -> None:
            self.halves = (zlib.crc32(text) % 3 * 2).to_bytes(8, "little") + text.rjust(8)

        def digest(self) -> bytes:
            return self.halves

    monkeypatch.setattr(field_parsers.hashlib, "blake2b", ShortHash)
    short = field_parsers.IdHash()
    for first in (0, 5, 10, 15, 0, 10):
        short.ids(pa.array(texts[first : first + 5]))
    assert short.collisions == 20 - 3


@pytest.mark.parametrize(
    ("values", "unit", "zone", "expected"),
    [
        (["2022-05-04T00:00:00.25+08:00", "2022-05-03T16:00:00Z"], "ms", "UTC", [1651593600250, 1651593600000]),
        (["2022-05-04", "2022-05-04 01:00"], "ms", "Asia/Shanghai", [1651593600000, 1651597200000]),
        (["1651593600000"], "ms", "UTC", [1651593600000]),
        (["1651593600.2569"], "s", "UTC", [1651593600256]),
        (["1650812741.436", "1650812741.001"], "s", "UTC", [1650812741436, 1650812741001]),
        ([1651593600], "s", "UTC", [1651593600000]),
        ([1651593600000999], "us", "UTC", [1651593600000]),
        (["1651593600000999999"], "ns", "UTC", [1651593600000]),
    ],
)
def test_times(values: list, unit: str, zone: str, expected: list[int]) -> None:
    assert times_ms(pa.array(values), unit, zone).to_pylist() == expected


def test_arrow_times() -> None:
    naive = pa.array([1651593600000000], pa.timestamp("us"))
    assert times_ms(naive, "s", "Asia/Shanghai").to_pylist() == [1651593600000 - 8 * 3_600_000]
    assert times_ms(naive.cast(pa.timestamp("us", "UTC")), "s", "Asia/Shanghai").to_pylist() == [1651593600000]
    assert times_ms(pa.array([19116], pa.date32()), "s", "UTC").to_pylist() == [1651622400000]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("uid", pa.array([2.0**53 + 2, 7, 7]), r"row 1: column 'uid' is 9007199254740994.0; .*2\^53.*int64 or as text"),
        ("uid", pa.array([7, None, 7], pa.float64()), r"row 2: column 'uid' is empty"),
        ("ts", pa.array(np.array([1650000000 + i for i in range(3)], np.float32)), r"row 1: column 'ts'.*float32"),
        (
            "ts",
            pa.array([1650000000000, 1650000001, 1650000002000]),
            r"row 2: column .ts. is 1650000001; .*2000",
        ),
    ],
)
def test_columns_that_lost_digits_are_refused(tmp_path: Path, column: str, values: pa.Array, message: str) -> None:
    arguments = write(tmp_path, EXPOSURES, EXPOSURE_LINES)
    table = pa.csv.read_csv(tmp_path / "log" / "a.csv")
    (tmp_path / "log" / "a.csv").unlink()
    table = table.set_column(table.column_names.index(column), column, values)
    pq.write_table(table, tmp_path / "log" / "a.parquet")
    with pytest.raises(UserError, match=message) as error:
        import_events(**arguments)
    assert "\n" not in str(error.value)


def test_seven_point_zero_is_seven(tmp_path: Path) -> None:
    lines = EXPOSURE_LINES.replace("\n7,71", "\n7.0,71")
    import_events(**write(tmp_path / "whole", EXPOSURES, lines))
    assert rows_of(tmp_path / "whole" / "out")["user_id"].tolist() == [7, 7, 8]
    mapping = EXPOSURES.replace("[columns]", 'hash_ids = ["user_id"]\n[columns]', 1)
    import_events(**write(tmp_path / "hashed", mapping, lines))
    users = rows_of(tmp_path / "hashed" / "out")["user_id"]
    assert users[0] == users[1] != users[2]
