"""Messages: what is an event comes back as it was, whichever parser reads it; what is none is told with its reason."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.stream.event_logs import as_tuples, random_events
from tests.stream.random_logs import BEHAVIOURS
from trainer.data.schema import EVENT_COLUMNS, partition_of
from trainer.stream import messages
from trainer.stream.messages import Codec, Decoded

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


def codec(format: str) -> Codec:
    return Codec(format, BEHAVIOURS, HOUR_MS)


def line(**changes: object) -> bytes:
    return json.dumps({name: value for name, value in {**GOOD, **changes}.items() if value is not ...}).encode()


def content(decoded: Decoded) -> tuple:
    return (
        as_tuples(decoded.events),
        decoded.message.tolist(),
        decoded.inside.tolist(),
        decoded.sizes.tolist(),
        decoded.rejected,
    )


@pytest.mark.parametrize("format", ["json", "arrow"])
@pytest.mark.parametrize("per_message", [1, 7, 300])
def test_events_come_back_as_they_were(format, per_message):
    coded = codec(format)
    parts = [{name: column[k : k + per_message] for name, column in EVENTS.items()} for k in range(0, 300, per_message)]
    sent = coded.encode(EVENTS) if per_message == 1 else [coded.encode_together(part) for part in parts]
    decoded = coded.decode(sent, NOW_MS)
    assert as_tuples(decoded.events) == as_tuples(EVENTS)
    assert decoded.message.tolist() == [k // per_message for k in range(300)]
    assert decoded.inside.tolist() == [k % per_message for k in range(300)]
    assert decoded.sizes.tolist() == [len(part["value"]) for part in parts]
    assert decoded.rejected == []


BROKEN = [
    (b"", "not JSON: Expecting value"),
    (b"{}", "event is missing"),
    (b"[1]", "not a JSON object but list"),
    (b"\xff{", "not text in UTF-8"),
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
    (line(time_ms=NOW_MS + HOUR_MS + 1), "time_ms is more than 1 h ahead of the clock"),
    (line(event="poke"), "event 'poke' is unknown; known are exposure, enter, exit, click, like, gift"),
    (line(event=5), "event is 5, not a string"),
    (line(event="\ud800"), "event is '\\ud800', not a string"),
    (line(domain="tv"), "domain 'tv' is unknown; known are video, live"),
    (line(value="1"), "value is '1', not a number"),
    (line(value=float("nan")), "value is not a finite float32"),
    (line(value=1e39), "value is not a finite float32"),
    (line(value=10**400), "value is not a finite float32"),
]


@pytest.mark.parametrize(("value", "reason"), BROKEN)
def test_what_is_no_event_is_told_with_its_reason(value, reason):
    decoded = codec("json").decode([line(), value, line(user_id=18)], NOW_MS)
    assert decoded.events["user_id"].tolist() == [17, 18]
    (bad,) = decoded.rejected
    assert bad.reason.startswith(reason)
    assert (bad.message, bad.inside, bad.content) == (1, 0, value)


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
    ],
)
def test_what_is_an_event(value):
    decoded = codec("json").decode([value], NOW_MS)
    assert decoded.rejected == []
    assert decoded.sizes.tolist() == [1]


def test_a_bad_line_takes_nothing_else_of_its_message():
    value = b"\n".join([line(user_id=1), b"x", line(user_id=2), line(event="poke"), line(user_id=3)])
    decoded = codec("json").decode([line(), value], NOW_MS)
    assert decoded.events["user_id"].tolist() == [17, 1, 2, 3]
    assert decoded.inside.tolist() == [0, 0, 2, 4]
    assert decoded.sizes.tolist() == [1, 5]
    assert [(bad.message, bad.inside, bad.content) for bad in decoded.rejected] == [
        (1, 1, b"x"),
        (1, 3, line(event="poke")),
    ]


VALUES = st.sampled_from(
    [..., None, 0, -1, 17, 1 << 62, 1 << 63, 1.5, 1e40, True, "", "live", "like", "exit", "5", [], {}, float("nan")]
)
LINES = st.one_of(
    st.just(line()),
    st.dictionaries(st.sampled_from([*GOOD, "more"]), VALUES, max_size=3).map(lambda changes: line(**changes)),
    st.sampled_from([value for value, _ in BROKEN]),
    st.tuples(st.just(line()), st.integers(0, 120), st.binary(max_size=2)).map(
        lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + 1 :]
    ),
    st.sampled_from(
        [line() + line(), line() + b"\n" + line(), b"\n", line() + b"\r", line()[:-1] + b', "user_id": 4}']
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(LINES, max_size=60))
# As many objects as lines, but not one a line.
@example([line() + line(), b""])
# Rounded to 32 bits at once it is another number than by way of 64.
@example([line().replace(b"0.5", b"1.000000059604644775390626")])
def test_the_fast_parser_takes_what_the_plain_one_takes(values):
    fast = content(codec("json").decode(values, NOW_MS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "_parse_together", lambda parts, lines: None)
        plain = content(codec("json").decode(values, NOW_MS))
    assert fast == plain


def test_users_of_another_partition_are_rejected():
    at = partition_of(EVENTS["user_id"], 4)
    sent = codec("json").encode(EVENTS)
    claimed = at.copy()
    claimed[[3, 8]] = (claimed[[3, 8]] + 1) % 4
    decoded = codec("json").decode(sent, NOW_MS, claimed, 4)
    assert [bad.message for bad in decoded.rejected] == [3, 8]
    assert decoded.rejected[0].reason == f"a user of partition {at[3]} in partition {claimed[3]}"
    assert decoded.rejected[0].content == sent[3]


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
        (1, 0, "not an Arrow stream of events: Tri"),
        (2, 1, "time_ms is negative"),
        (2, 3, "value is not a finite float32"),
        (2, 4, "user_id is negative"),
        (3, 0, "not an Arrow stream of events: it "),
    ]
    alone = coded.decode([decoded.rejected[1].content], NOW_MS).rejected
    assert [entry.reason for entry in alone] == ["time_ms is negative"]


def test_arrow_that_is_cut_or_scribbled_on_is_no_error():
    coded = codec("arrow")
    whole = coded.encode_together({name: column[:9] for name, column in EVENTS.items()})
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
