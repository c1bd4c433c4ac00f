"""Tests of messages: valid events survive encoding with either parser, invalid ones are rejected with a reason."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.stream.event_logs import as_tuples, assert_logged, logged_of, random_events
from tests.stream.random_logs import SPEC
from trainer.data.format.schema import EVENT_COLUMNS, partition_of
from trainer.stream.sources import json_events, message_codec
from trainer.stream.sources.logged_features import FEATURES
from trainer.stream.sources.message_codec import DecodedMessages, MessageCodec, select_events

NOW_MS = 1_800_000_000_000
HOUR_MS = 3_600_000
EVENTS = random_events(seed=5, events=300)
GOOD = {
    "user_id": 17,
    "author_id": 3,
    "item_id": 90,
    "domain": "live",
    "visit_id": 5,
    "event": "like",
    "time_ms": 1_700_000_000_000,
    "value": 0.5,
}


OPEN = {**GOOD, "event": "exposure", "side": [49, 7], "dense": [0.5], "stat": [3, 1, 0, 0, 9, 2.0, 0, 1]}
"""Event with features."""


def codec(format: str) -> MessageCodec:
    return MessageCodec(format, SPEC, HOUR_MS)


def line(**changes: object) -> bytes:
    return json.dumps({name: value for name, value in {**GOOD, **changes}.items() if value is not ...}).encode()


def opening(**changes: object) -> bytes:
    return line(**{**OPEN, **changes})


def content(decoded: DecodedMessages) -> tuple:
    return (
        as_tuples(decoded.events),
        decoded.message.tolist(),
        decoded.inside.tolist(),
        [column.tolist() for column in vars(decoded.logged).values()],
        decoded.sizes.tolist(),
        decoded.rejected,
    )


@pytest.mark.parametrize("format", ["json", "arrow"])
@pytest.mark.parametrize("per_message", [1, 7, 300])
def test_events_come_back_as_they_were(format, per_message):
    coded = codec(format)
    parts = [{name: column[k : k + per_message] for name, column in EVENTS.items()} for k in range(0, 300, per_message)]
    if per_message == 1:
        sent = coded.encode(EVENTS, logged_of(EVENTS))
    else:
        sent = [coded.encode_together(part, logged_of(part)) for part in parts]
    decoded = coded.decode(sent, NOW_MS)
    assert_logged(decoded.events, decoded.logged)
    assert 20 < len(decoded.logged) < 60
    assert as_tuples(decoded.events) == as_tuples(EVENTS)
    assert decoded.message.tolist() == [k // per_message for k in range(300)]
    assert decoded.inside.tolist() == [k % per_message for k in range(300)]
    assert decoded.sizes.tolist() == [len(part["value"]) for part in parts]
    assert decoded.rejected == []


BROKEN = [
    (b"", "the message is empty"),
    (None, "the message has no value (null)"),
    (b" \n\t\n", "not JSON: Expecting value"),
    (line()[:-9] + b"\n " + line()[-9:-1], "not JSON: "),
    (b"{}", "event is missing"),
    (b"[1]", "not a JSON object but int"),
    (b" [ ] ", "an empty array has no events"),
    (b"[[" + line() + b"]]", "not a JSON object but list"),
    (b"[" + line() + b",]", "not JSON: "),
    (b"[" + line() + b" " + line() + b"]", "not JSON: "),
    (b"[" + line(), "not JSON: "),
    (b"\xff{", "not UTF-8 text"),
    (line()[:-1], "not JSON: "),
    (line() + b"}", "not JSON: Extra data"),
    (line(user_id=...), "user_id is missing"),
    (line(user_id=None), "user_id is missing"),
    (line(user_id="17"), "user_id is '17', not a 64-bit integer"),
    (line(user_id=17.0), "user_id is 17.0, not a 64-bit integer"),
    (line(user_id=True), "user_id is True, not a 64-bit integer"),
    (line(user_id=1 << 63), "user_id is 9223372036854775808, not a 64-bit integer"),
    (line(user_id=-1), "user_id is negative"),
    (line(visit_id=-1), "visit_id is negative"),
    (line(time_ms=-1), "time_ms is negative"),
    (line(time_ms=0), "time_ms is before the year 2000"),
    (line(time_ms=1_700_000_000), "time_ms is before the year 2000"),
    (line(time_ms=-(1 << 63)), "time_ms is negative"),
    (line(time_ms=(1 << 63) - 1), "time_ms is more than 1 h ahead of the clock"),
    (line(time_ms=NOW_MS + HOUR_MS + 1), "time_ms is more than 1 h ahead of the clock"),
    (line(event="poke"), "event 'poke' is unknown; known are exposure, enter, exit, click, like, gift"),
    (line(event=5), "event is 5, not a string"),
    (line(event="\ud800"), "event is '\\ud800', not a string"),
    (line(domain="tv"), "domain 'tv' is unknown; known are video, live"),
    (line(value="1"), "value is '1', not a number"),
    (line(value=float("nan")), "value is not a finite float32"),
    (line(value=1e39), "value is not a finite float32"),
    (line(value=10**400), "value is not a finite float32"),
    (opening(side=...), "side is missing; a message has all of side, dense and stat or none of them"),
    (opening(dense=None), "dense is missing"),
    (opening(stat=..., dense=...), "stat is missing"),
    (opening(side=[1]), "side has 1 values; it must have 2"),
    (opening(dense=[]), "dense has 0 values; it must have 1"),
    (opening(stat=[0] * 9), "stat has 9 values; it must have 8"),
    (opening(side=[50, 0]), "side has a value outside of its feature's rows"),
    (opening(side=[0, -1]), "side has a value outside of its feature's rows"),
    (opening(side=[0, None]), "side has a value outside of its feature's rows"),
    (opening(side=[0, 1 << 62]), "side has a value outside of its feature's rows"),
    (opening(side=[0, 1.0]), "side is [0, 1.0], not a list of 64-bit integers"),
    (opening(side=7), "side is 7, not a list of 64-bit integers"),
    (opening(dense=[True]), "dense is [True], not a list of numbers"),
    (opening(dense=["1"]), "dense is ['1'], not a list of numbers"),
    (opening(dense=[[1]]), "dense is [[1]], not a list of numbers"),
    (opening(dense=[None]), "dense has a value that is not a finite float32"),
    (opening(dense=[1e39]), "dense has a value that is not a finite float32"),
    (opening(dense=[float("nan")]), "dense has a value that is not a finite float32"),
    (opening(dense=[10**400]), "dense has a value that is not a finite float32"),
    (opening(stat=[-1, 0, 0, 0, 0, 0, 0, 0]), "stat has a value that is not a count"),
    (opening(stat=[None] * 8), "stat has a value that is not a count"),
    (opening(user_id=-1, side=[1]), "user_id is negative"),
]


@pytest.mark.parametrize(("value", "reason"), BROKEN)
def test_an_invalid_event_is_rejected_with_its_reason(value, reason):
    decoded = codec("json").decode([line(), value, line(user_id=18)], NOW_MS)
    assert decoded.events["user_id"].tolist() == [17, 18]
    (bad,) = decoded.rejected
    assert bad.reason.startswith(reason)
    assert (bad.message, bad.inside, select_events("json", value, {0})) == (1, 0, value)


@pytest.mark.parametrize(
    "value",
    [
        line(value=...),
        line(value=None),
        line(value=3),
        line(more={"a": [1, "}"]}),
        line(time_ms=NOW_MS + HOUR_MS),
        b" " + line() + b" ",
        line() + b"\n",
        line(more="ü").replace(b"\\u00fc", "ü".encode()),
        opening(),
        opening(side=None, dense=None, stat=...),
        opening(event="enter"),
        # An event that does not open a visit has no features, so theirs are ignored.
        opening(event="like", side=[1, 2, 3], stat=None),
    ],
)
def test_valid_events(value):
    decoded = codec("json").decode([value], NOW_MS)
    assert decoded.rejected == []
    assert decoded.sizes.tolist() == [1]


def test_features_are_those_of_the_opening_of_a_visit_in_a_candidate_domain():
    events = [("exposure", "live"), ("like", "live"), ("exposure", "video"), ("enter", "live"), ("exit", "live")]
    lines = [opening(event=event, domain=domain, side=[k, 0]) for k, (event, domain) in enumerate(events)]
    decoded = MessageCodec("json", replace(SPEC, candidates=("live",)), HOUR_MS).decode(lines, NOW_MS)
    assert decoded.rejected == []
    assert decoded.logged.at.tolist() == [0, 3]
    assert decoded.logged.side.tolist() == [[0, 0], [3, 0]]
    assert decoded.logged.dense.tolist() == [[0.5]] * 2
    assert decoded.logged.stat.tolist() == [[3, 1, 0, 0, 9, 2, 0, 1]] * 2


def test_a_bad_line_takes_nothing_else_of_its_message():
    value = b"\n".join([line(user_id=1), b"x", line(user_id=2), line(event="poke"), line(user_id=3)])
    decoded = codec("json").decode([line(), value], NOW_MS)
    assert decoded.events["user_id"].tolist() == [17, 1, 2, 3]
    assert decoded.inside.tolist() == [0, 0, 2, 4]
    assert decoded.sizes.tolist() == [1, 5]
    assert [(bad.message, bad.inside) for bad in decoded.rejected] == [(1, 1), (1, 3)]
    assert select_events("json", value, {1, 3}) == b"x\n" + line(event="poke")
    assert select_events("json", value, range(5)) == value


PRETTY = json.dumps(GOOD, indent=2).encode()


@pytest.mark.parametrize(
    ("value", "users"),
    [
        (PRETTY, [17]),
        (PRETTY.replace(b"\n", b"\r\n") + b"\n", [17]),
        (json.dumps(OPEN, indent="\t").encode(), [17]),
        (PRETTY + line(user_id=2) + b"\n\n" + PRETTY, [17, 2, 17]),
        (line(user_id=1) + b"\n\n" + line(user_id=2) + b"\n\n", [1, 2]),
        (json.dumps({"more": [{"a": "}\n{"}, {}], **GOOD}, indent=1, ensure_ascii=False).encode(), [17]),
    ],
)
def test_objects_over_several_lines_are_events(value: bytes, users: list[int]) -> None:
    decoded = codec("json").decode([value, line(user_id=5)], NOW_MS)
    assert decoded.rejected == []
    assert decoded.events["user_id"].tolist() == [*users, 5]
    assert decoded.sizes.tolist() == [len(users), 1]
    assert decoded.events["value"].tolist() == [0.5] * (len(users) + 1)


def array(*values: bytes) -> bytes:
    return b"[" + b", ".join(values) + b"]"


@pytest.mark.parametrize(
    ("value", "users"),
    [
        (array(line(user_id=1), line(user_id=2)), [1, 2]),
        (array(line(user_id=1)) + b"\n" + array(line(user_id=2), line(user_id=3)) + b"\n", [1, 2, 3]),
        (line(user_id=1) + array(line(user_id=2)) + b"\n" + line(user_id=3), [1, 2, 3]),
        (json.dumps([GOOD, {**OPEN, "more": ["],", {"a": [1]}]}], indent=2).encode(), [17, 17]),
        (b"\t[ " + line() + b"\r\n , " + line(user_id=2) + b" ] ", [17, 2]),
    ],
)
def test_the_objects_of_an_array_are_events(value: bytes, users: list[int]) -> None:
    decoded = codec("json").decode([value, line(user_id=5)], NOW_MS)
    assert decoded.rejected == []
    assert decoded.events["user_id"].tolist() == [*users, 5]
    assert decoded.sizes.tolist() == [len(users), 1]


def test_a_bad_element_takes_nothing_else_of_its_array() -> None:
    value = array(line(user_id=1), b"3", line(event="poke"), b"[]", line(user_id=2))
    decoded = codec("json").decode([value], NOW_MS)
    assert decoded.events["user_id"].tolist() == [1, 2] and decoded.sizes.tolist() == [5]
    assert [entry.inside for entry in decoded.rejected] == [1, 2, 3]
    assert select_events("json", value, {1, 2, 3}) == b"\n".join([b"3", line(event="poke"), b"[]"])
    # A line that is not JSON leaves the arrays and the objects beside it as they are.
    decoded = codec("json").decode([b"\n".join([line(), value, b"x"])], NOW_MS)
    assert decoded.events["user_id"].tolist() == [17, 1, 2]
    assert [entry.inside for entry in decoded.rejected] == [2, 3, 4, 6]


def test_a_bad_object_over_several_lines_is_one_rejected_event() -> None:
    bad = json.dumps({**GOOD, "event": "poke"}, indent=2).encode()
    for value, inside in ((bad, [0]), (bad[:-1], [0]), (PRETTY + b"\n" + bad + PRETTY, [1]), (b"[\n" + bad, [0])):
        decoded = codec("json").decode([value], NOW_MS)
        assert [entry.inside for entry in decoded.rejected] == inside
        assert decoded.sizes.tolist() == [len(decoded.events["user_id"]) + 1]


VALUES = st.sampled_from(
    [..., None, 0, -1, 17, 1 << 62, 1 << 63, 1.5, 1e40, True, "", "live", "like", "exit", "5", [], {}, float("nan")]
)
NUMBERS = st.sampled_from([None, 0, 1, 1.5, -3, 1 << 40, 1 << 70, 1e40, float("nan"), True, "1", [2]])
WIDTHS = {name: len(OPEN[name]) for name in FEATURES}
LISTS = st.fixed_dictionaries(
    {},
    optional={
        name: st.one_of(
            st.lists(st.integers(0, 9) if name == "side" else NUMBERS, min_size=width, max_size=width),
            st.lists(NUMBERS, max_size=3),
            VALUES,
        )
        for name, width in WIDTHS.items()
    },
)
LINES = st.one_of(
    st.just(line()),
    st.just(opening()),
    LISTS.map(lambda changes: opening(**changes)),
    st.dictionaries(st.sampled_from([*GOOD, "more"]), VALUES, max_size=3).map(lambda changes: line(**changes)),
    st.sampled_from([value for value, _ in BROKEN]),
    st.tuples(st.just(line()), st.integers(0, 120), st.binary(max_size=2)).map(
        lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + 1 :]
    ),
    st.sampled_from(
        [
            *(line() + line(), line() + b"\n" + line(), b"\n", line() + b"\r", line()[:-1] + b', "user_id": 4}'),
            *(opening()[:-1] + b', "side": [4, 5]}', opening(side=...)[:-1] + b', "\\u0073ide": [4, 5]}'),
        ]
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(LINES, max_size=60))
# As many objects as lines, but not one per line.
@example([line() + line(), b""])
# Rounding directly to 32 bits gives another number than rounding to 64 bits first.
@example([line().replace(b"0.5", b"1.000000059604644775390626")])
def test_both_parsers_give_the_same_result(values):
    fast = content(codec("json").decode(values, NOW_MS))
    with pytest.MonkeyPatch.context() as patch:
        for module in (message_codec, json_events):
            patch.setattr(module, "parse_together", lambda parts, lines: None)
        plain = content(codec("json").decode(values, NOW_MS))
    assert fast == plain


JUNK = st.one_of(
    st.none(),
    st.binary(max_size=40),
    LINES.filter(lambda value: value is not None).map(lambda value: value.replace(b", ", b",\n ")),
    st.lists(LINES.filter(lambda value: value is not None), max_size=4).map(b"\n".join),
    st.lists(LINES.filter(lambda value: value is not None), max_size=4).map(lambda values: array(*values)),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*OPEN, "x"]), inner, max_size=4),
        max_leaves=8,
    ).map(lambda value: json.dumps(value, indent=1).encode()),
)


def check_nothing_vanishes(format: str, values: list[bytes | None]) -> None:
    """Check that each message gives events or rejections, and that its rejected events alone are rejected again."""
    decoded = codec(format).decode(values, NOW_MS)
    assert (decoded.sizes >= 1).all()
    numbered = [*zip(decoded.message.tolist(), decoded.inside.tolist(), strict=True)]
    numbered += [(bad.message, bad.inside) for bad in decoded.rejected]
    places = [(message, k) for message, size in enumerate(decoded.sizes.tolist()) for k in range(size)]
    assert sorted(numbered) == places
    for message, value in enumerate(values):
        bad = [entry for entry in decoded.rejected if entry.message == message]
        if bad:
            alone = codec(format).decode([select_events(format, value, {entry.inside for entry in bad})], NOW_MS)
            again, reasons = ([entry.reason for entry in entries] for entries in (alone.rejected, bad))
            # Lines that do not look like objects are events of their own only beside a line that does.
            assert again == reasons or (format == "json" and len(again) == 1)
            assert not len(alone.message)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(["json", "arrow"]), st.lists(JUNK, max_size=3))
# An element of an array that is an array itself.
@example("json", [b"[" + line() + b", {}, [1], [], [[2]]]"])
def test_every_message_gives_events_or_reasons(format: str, values: list[bytes | None]) -> None:
    check_nothing_vanishes(format, values)


@pytest.mark.slow
@settings(max_examples=100_000, deadline=None)
@given(st.sampled_from(["json", "arrow"]), st.lists(JUNK, max_size=3))
def test_every_one_of_many_messages_gives_events_or_reasons(format: str, values: list[bytes | None]) -> None:
    check_nothing_vanishes(format, values)


def test_users_of_another_partition_are_rejected():
    at = partition_of(EVENTS["user_id"], 4)
    sent = codec("json").encode(EVENTS)
    claimed = at.copy()
    claimed[[3, 8]] = (claimed[[3, 8]] + 1) % 4
    decoded = codec("json").decode(sent, NOW_MS, claimed, 4)
    assert [bad.message for bad in decoded.rejected] == [3, 8]
    assert decoded.rejected[0].reason == f"its user belongs to partition {at[3]}, not to partition {claimed[3]}"
    assert decoded.rejected[0].owner == at[3]


def test_arrow_rejects_single_events_and_whole_messages():
    coded = codec("arrow")
    bad = {name: column[:5].copy() for name, column in EVENTS.items()}
    bad["time_ms"][1], bad["value"][3], bad["user_id"][4] = -1, np.inf, -7
    table = pa.table({"a": [1]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    good = coded.encode_together({name: column[:2] for name, column in EVENTS.items()})
    decoded = coded.decode([good, b"", coded.encode_together(bad), sink.getvalue().to_pybytes(), good], NOW_MS)
    assert decoded.message.tolist() == [0, 0, 2, 2, 4, 4]
    assert decoded.inside.tolist() == [0, 1, 0, 2, 0, 1]
    assert decoded.sizes.tolist() == [2, 1, 5, 1, 2]
    assert [(bad.message, bad.inside, bad.reason[:34]) for bad in decoded.rejected] == [
        (1, 0, "the message is empty"),
        (2, 1, "time_ms is negative"),
        (2, 3, "value is not a finite float32"),
        (2, 4, "user_id is negative"),
        (3, 0, "not an Arrow stream of events: it "),
    ]
    alone = coded.decode([select_events("arrow", coded.encode_together(bad), {1, 4})], NOW_MS).rejected
    assert [entry.reason for entry in alone] == ["time_ms is negative", "user_id is negative"]


def test_arrow_messages_without_events_are_rejected():
    none = codec("arrow").encode_together({name: column[:0] for name, column in EVENTS.items()})
    decoded = codec("arrow").decode([none, b"", None], NOW_MS)
    assert [(bad.message, bad.reason) for bad in decoded.rejected] == [
        (0, "not an Arrow stream of events: it has no events"),
        (1, "the message is empty"),
        (2, "the message has no value (null)"),
    ]
    assert decoded.sizes.tolist() == [1, 1, 1]
    assert [select_events("arrow", value, {0}) for value in (none, b"", None)] == [none, b"", None]


def arrow(*rows: dict[str, object], **types: pa.DataType) -> bytes:
    """Return a message of a producer that builds its tables from Python objects."""
    table = pa.Table.from_pylist(list(rows))
    for name, type in types.items():
        table = table.set_column(table.column_names.index(name), name, table[name].cast(type))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_arrow_features_of_another_producer():
    row = {**OPEN, "domain": 1}
    other = {**row, "side": [0, 1], "stat": [0.0] * 8}
    types = {"side": pa.list_(pa.int8(), 2), "dense": pa.large_list(pa.float64()), "domain": pa.int8()}
    for sent in (arrow(row, other), arrow(row, other, **types)):
        decoded = codec("arrow").decode([sent, arrow({**GOOD, "domain": 1})], NOW_MS)
        assert decoded.rejected == []
        assert decoded.message.tolist() == [0, 0, 1]
        assert decoded.logged.at.tolist() == [0, 1]
        assert decoded.logged.side.tolist() == [[49, 7], [0, 1]]
        assert decoded.logged.stat.tolist() == [[3, 1, 0, 0, 9, 2, 0, 1], [0] * 8]
    sent = arrow({**row, "dense": [float("inf")]}, {**row, "side": [1]}, row)
    decoded = codec("arrow").decode([sent], NOW_MS)
    assert [(bad.inside, bad.reason) for bad in decoded.rejected] == [
        (0, "dense has a value that is not a finite float32"),
        (1, "side has 1 values; it must have 2"),
    ]
    assert decoded.logged.at.tolist() == [0]
    alone = codec("arrow").decode([select_events("arrow", sent, {bad.inside}) for bad in decoded.rejected], NOW_MS)
    assert [bad.reason for bad in alone.rejected] == [bad.reason for bad in decoded.rejected]
    (text,) = codec("arrow").decode([arrow({**row, "side": "none"})], NOW_MS).rejected
    assert text.reason.startswith("not an Arrow stream of events: ")


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "Asia/Shanghai"])
def test_arrow_times_are_converted_by_their_unit(unit, zone):
    per = {"s": 0.001, "ms": 1, "us": 1_000, "ns": 1_000_000}[unit]
    row = {**GOOD, "domain": 1, "time_ms": int(GOOD["time_ms"] * per)}
    decoded = codec("arrow").decode([arrow(row, time_ms=pa.timestamp(unit, zone))], NOW_MS)
    assert (decoded.events["time_ms"].tolist(), decoded.rejected) == ([GOOD["time_ms"]], [])
    wrong = arrow(row, {**row, "time_ms": 0}, time_ms=pa.timestamp(unit, zone))
    (bad,) = codec("arrow").decode([wrong], NOW_MS).rejected
    assert bad.inside == 1 and "before the year 2000" in bad.reason
    far = arrow({**row, "time_ms": 2**62}, time_ms=pa.timestamp(unit, zone))
    assert len(codec("arrow").decode([far], NOW_MS).rejected) == 1


@pytest.mark.parametrize(
    ("kind", "value", "right"),
    [
        (pa.float64(), 2**53 - 1, True),
        (pa.float64(), 2**53, False),
        (pa.float32(), 7, True),
        (pa.float32(), 2**24, False),
    ],
)
def test_arrow_ids_in_floats_are_exact_or_rejected(kind, value, right):
    decoded = codec("arrow").decode([arrow({**GOOD, "domain": 1, "item_id": float(value)}, item_id=kind)], NOW_MS)
    assert decoded.events["item_id"].tolist() == ([value] if right else [])
    assert [bad.reason for bad in decoded.rejected] == (
        [] if right else ["not an Arrow stream of events: float does not hold the id exactly"]
    )


def test_a_message_of_one_event_is_as_large_as_its_own_features():
    one = {name: column[:1] for name, column in EVENTS.items()}
    one["event"][:], one["visit_id"][:] = 0, 1
    many = {name: np.repeat(column, 1000) for name, column in one.items()}
    sent = codec("arrow").encode(many, logged_of(many))
    assert {len(value) for value in sent} == {len(codec("arrow").encode(one, logged_of(one))[0])}


def test_damaged_arrow_messages_raise_no_error():
    coded = codec("arrow")
    nine = {name: column[:9] for name, column in EVENTS.items()}
    whole = coded.encode_together(nine, logged_of(nine))
    rng = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(whole[: rng.integers(0, len(whole) + 1)])
        for at in rng.integers(0, max(len(broken), 1), 3):
            broken[at : at + 1] = bytes([rng.integers(0, 256)])
        decoded = coded.decode([bytes(broken), whole], NOW_MS)
        assert decoded.sizes[1] == 9
        assert (decoded.message == 1).sum() == 9


def test_arrow_events_may_be_plain_text_in_other_columns_order():
    table = pa.table({name: [value] for name, value in {**GOOD, "domain": 1, "more": "x"}.items()})
    assert table.schema != EVENT_COLUMNS
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    decoded = codec("arrow").decode([sink.getvalue().to_pybytes()], NOW_MS)
    assert as_tuples(decoded.events) == as_tuples(codec("json").decode([line()], NOW_MS).events)


def stream_of(columns: list[tuple[str, pa.Array]]) -> bytes:
    """Return an Arrow message with columns of any names and types."""
    table = pa.Table.from_arrays([column for _, column in columns], names=[name for name, _ in columns])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("name", [*EVENT_COLUMNS.names, *FEATURES, "more"])
def test_a_column_that_comes_twice(name):
    row = {**OPEN, "domain": 1, "more": "x"}
    columns = [(key, pa.array([value] * 2)) for key, value in row.items()]
    sent = stream_of([*columns, (name, pa.array([row[name]] * 2))])
    good = stream_of(columns)
    decoded = codec("arrow").decode([good, sent, sent, good], NOW_MS)
    if name == "more":
        assert decoded.rejected == [] and decoded.message.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        return
    reason = f"not an Arrow stream of events: it has the column {name} more than once"
    assert [(bad.message, bad.inside, bad.reason) for bad in decoded.rejected] == [(1, 0, reason), (2, 0, reason)]
    assert select_events("arrow", sent, {0}) == sent
    assert decoded.message.tolist() == [0, 0, 3, 3]


ARROW_TYPES = [
    pa.null(), pa.bool_(), pa.int8(), pa.uint64(), pa.int64(), pa.float16(), pa.float64(), pa.decimal128(38, 2),
    pa.decimal256(76, 10), pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.binary(3), pa.date32(),
    pa.date64(), pa.time64("ns"), pa.timestamp("us"), pa.timestamp("ns", "UTC"), pa.duration("s"),
    pa.month_day_nano_interval(), pa.list_(pa.int64()), pa.list_(pa.float32(), 2), pa.large_list(pa.string()),
    pa.list_view(pa.int64()), pa.struct([("a", pa.int64())]), pa.map_(pa.string(), pa.int64()),
    pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.int64()),
    pa.run_end_encoded(pa.int32(), pa.int64()),
]  # fmt: skip


@st.composite
def arrow_messages(draw: st.DrawFn) -> bytes:
    """Draw a message of events of which columns have other types, are missing or come twice, and bytes are changed."""
    rows = draw(st.integers(0, 3))
    columns = []
    for name, value in {**OPEN, "domain": 1, "more": "x"}.items():
        column = pa.array([value] * rows, type=pa.array([value]).type)
        change = draw(st.sampled_from(["none"] * 12 + ["type", "type", "null", "drop", "twice"]))
        if change == "type":
            type = draw(st.sampled_from(ARROW_TYPES))
            try:
                column = column.cast(type)
            except (pa.ArrowException, NotImplementedError):
                column = pa.nulls(rows, type)
        elif change == "null":
            column = pa.nulls(rows, column.type)
        columns += [] if change == "drop" else [(name, column)] * (2 if change == "twice" else 1)
    message = bytearray(stream_of(draw(st.permutations(columns))))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        message[draw(st.integers(0, len(message) - 1))] = draw(st.integers(0, 255))
    return bytes(message[: draw(st.sampled_from([None, None, None, len(message) // 2]))])


@settings(max_examples=400, deadline=None)
@given(st.lists(arrow_messages(), min_size=1, max_size=4))
def test_any_arrow_message_is_read_or_rejected(values):
    good = codec("arrow").encode_together({name: column[:2] for name, column in EVENTS.items()})
    decoded = codec("arrow").decode([*values, good], NOW_MS)
    assert decoded.sizes[-1] == 2 and (decoded.message == len(values)).sum() == 2
    for place in range(len(values)):
        rejected = [bad for bad in decoded.rejected if bad.message == place]
        assert (decoded.message == place).sum() + len(rejected) == decoded.sizes[place]
    assert all("\n" not in bad.reason for bad in decoded.rejected)
