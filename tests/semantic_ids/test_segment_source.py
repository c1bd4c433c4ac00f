"""Messages of segments: any of them is right, or is rejected with a reason."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.semantic_ids.follow_parts import NOW_MS, message
from trainer.data.format.text_schema import segment_ids
from trainer.semantic_ids.segment_source import AHEAD_MS, MAX_ITEM, LiveSegment, RejectedMessage, parse_segment

GOOD = message(17, 3)


def parse(value: Any) -> LiveSegment | RejectedMessage:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parse_segment(content, NOW_MS, "here")


@pytest.mark.parametrize(
    ("changed", "known_ms"),
    [
        ({}, GOOD["known_ms"]),
        ({"end_ms": GOOD["known_ms"] - 5}, GOOD["known_ms"]),
        ({"known_ms": None, "end_ms": 90_000}, 90_000),
        ({"known_ms": None, "start_ms": 90_000}, 120_000),
        ({"known_ms": None, "start_ms": 90_000, "end_ms": 95_000}, 95_000),
        ({"known_ms": NOW_MS + AHEAD_MS}, NOW_MS + AHEAD_MS),
        ({"other": [1, {"x": None}]}, GOOD["known_ms"]),
        ({"item_id": MAX_ITEM - 1, "segment": 65_535}, GOOD["known_ms"]),
    ],
)
def test_a_good_message_is_a_segment(changed: dict[str, Any], known_ms: int) -> None:
    value = {**GOOD, **changed}
    segment = parse(value)
    assert isinstance(segment, LiveSegment), segment
    assert segment.known_ms == known_ms and segment.arrived_ms == min(known_ms, NOW_MS)
    assert (segment.item_id, segment.author_id, segment.segment) == (value["item_id"], 2, value["segment"])
    assert (segment.text, segment.frames, segment.place) == ("17 says 3", (), "here")


def test_a_segment_without_words_may_have_frames() -> None:
    value = {key: value for key, value in GOOD.items() if key != "text"}
    segment = parse({**value, "frames": ["17/3.jpg", "17/4.jpg"]})
    assert isinstance(segment, LiveSegment) and (segment.text, segment.frames) == ("", ("17/3.jpg", "17/4.jpg"))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe{", "not UTF-8 text"),
        ("{}".encode("utf-16"), "not UTF-8 text"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"item_id": ' + b"9" * 5000 + b"}", "not valid JSON"),
        ([GOOD], "a list; a JSON object is expected"),
        (None, "a NoneType"),
        ({**GOOD, "item_id": MAX_ITEM}, "item_id is 140737488355328; a whole number from 0 to 140737488355327"),
        ({**GOOD, "item_id": -1}, "item_id is -1"),
        ({**GOOD, "item_id": True}, "item_id is True"),
        ({**GOOD, "item_id": 3.0}, "item_id is 3.0"),
        ({**GOOD, "author_id": None}, "author_id is missing"),
        ({**GOOD, "author_id": 1 << 63}, "author_id is 9223372036854775808"),
        ({**GOOD, "segment": 65_536}, "segment is 65536"),
        ({**GOOD, "known_ms": None}, "no time; known_ms, end_ms or start_ms is expected"),
        ({**GOOD, "known_ms": "soon"}, "known_ms is 'soon'"),
        ({**GOOD, "known_ms": 5, "end_ms": 6}, r"known_ms is 5, before the end of the segment \(6\)"),
        ({**GOOD, "known_ms": NOW_MS + AHEAD_MS + 1}, "more than an hour after now"),
        ({**GOOD, "text": None}, "text is missing; a text is expected"),
        ({**GOOD, "text": 3}, "text is 3; a text is expected"),
        (b'{"item_id":1,"author_id":1,"segment":1,"known_ms":1,"text":"\\ud800"}', "text has half of a surrogate pair"),
        ({**GOOD, "frames": "17/3.jpg"}, "frames must be a list of at most 64 paths"),
        ({**GOOD, "frames": ["x"] * 65}, "frames must be a list"),
        ({**GOOD, "frames": [3]}, "frames is 3; a text is expected"),
    ],
)
def test_a_bad_message_has_a_reason(value: Any, reason: str) -> None:
    rejected = parse(value)
    assert isinstance(rejected, RejectedMessage)
    assert re.search(reason, rejected.reason), rejected.reason
    assert rejected.place == "here" and isinstance(rejected.content, bytes)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from([*GOOD, "start_ms", "end_ms", "frames"]), values), st.binary(max_size=9))
def test_every_message_is_right_or_rejected(changed: dict[str, Any], noise: bytes) -> None:
    for content in (json.dumps({**GOOD, **changed}).encode(), json.dumps(changed).encode(), noise):
        parsed = parse_segment(content, NOW_MS, "p")
        if isinstance(parsed, RejectedMessage):
            assert parsed.reason and "\n" not in parsed.reason and parsed.content == content
            continue
        assert 0 <= parsed.known_ms <= NOW_MS + AHEAD_MS and 0 <= parsed.author_id < 1 << 63
        parsed.text.encode()
        assert segment_ids(np.array([parsed.item_id]), np.array([parsed.segment])).tolist() == [parsed.id]
