"""The meaning of codes on a simulated world: a planted effect of topics on gifts is found, and no other."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.code_files import write_codes
from tests.semantic_ids.meaning_world import CARRYING, draw_gifts, plant_gifts, topics_of, write_world
from tests.semantic_ids.segment_world import assigned, make_version
from tests.semantic_ids.segment_world import write_world as write_rooms
from tests.semantic_ids.test_code_interactions import empty_activity
from trainer.console.errors import UserError
from trainer.data.format.segment_codes import CodeFile
from trainer.data.format.visit_events import event_table
from trainer.data.simulator.population import TOPICS
from trainer.semantic_ids.code_interactions import SegmentActivity, add_visits, author_sums, visits_of
from trainer.semantic_ids.code_meaning import MeaningRequest, report_meaning
from trainer.semantic_ids.code_meaning_text import meaning_text, room_runs
from trainer.semantic_ids.code_rates import CellSums, code_rates
from trainer.stream.labels.event_log import EventLog

GIFT = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("meaning")
    write_world(directory)
    plant_gifts(directory / "world", effect=6.0, seed=1)
    return directory


def request(folder: Path, **options: Any) -> MeaningRequest:
    return MeaningRequest(str(folder / "book"), str(folder / "world"), str(folder / "codes.parquet"), **options)


@pytest.fixture(scope="module")
def document(folder: Path) -> dict[str, Any]:
    return report_meaning(request(folder), quiet=True)


def topic_of(code: dict[str, Any]) -> str:
    (name,) = code["topics"]
    return name


def test_the_topics_with_the_planted_effect_are_named(document: dict[str, Any]) -> None:
    more = {topic_of(code) for code in document["codes"] if code["behaviours"]["gift"]["carries"] == "more"}
    assert more == set(CARRYING)
    for code in document["codes"]:
        gift = code["behaviours"]["gift"]
        assert TOPICS[code["code"][0]] == topic_of(code) and code["topics"] == {topic_of(code): 1.0}
        if gift["carries"] == "more":
            assert gift["low"] > document["behaviours"]["gift"]["rate"]


def test_without_an_effect_the_share_of_false_finds_is_the_stated_one(folder: Path) -> None:
    world = folder / "world"
    log = EventLog(world)
    air, topic, segments = topics_of(world)
    parts = [visits_of(log.read(partition))[0] for partition in range(log.spec.partitions)]
    worlds, false, found = 60, 0, 0
    for seed in range(worlds):
        for effect in (1.0, 6.0) if seed < 3 else (1.0,):
            rng = np.random.default_rng(seed)
            activity = empty_activity(len(topic))
            activity = SegmentActivity(
                **{**vars(activity), "behaviours": log.spec.behaviours, "events": np.zeros((len(topic), 7))}
                | {"spread": np.zeros(7, np.int64), "users": CellSums.zeros(len(TOPICS), 7)}
                | {"unattributed": {reason: np.zeros(7, np.int64) for reason in activity.unattributed}}
            )
            for visits in parts:
                add_visits(activity, visits, draw_gifts(visits, air, topic, effect, rng), air, topic)
            assert all(not counts.any() for counts in activity.unattributed.values())
            rates = code_rates(author_sums(activity, topic, segments.author_id, len(TOPICS)), activity.users)
            assert rates.tested >= 3
            if effect == 1:
                false += bool((rates.carries != 0).any())
            else:
                found += {TOPICS[place] for place in np.flatnonzero(rates.carries[:, GIFT] > 0)} == set(CARRYING)
    assert false <= 0.05 * worlds and found == 3


def test_shares_and_counts_are_those_of_the_log(folder: Path, document: dict[str, Any]) -> None:
    segments = pq.read_table(folder / "world/segments.parquet")
    counts = np.bincount(segments["topic"].to_numpy(), minlength=len(TOPICS))
    assert {code["code"][0]: code["segments"] for code in document["codes"]} == {
        place: count for place, count in enumerate(counts.tolist()) if count
    }
    for share in ("segment_share", "watch_share"):
        assert sum(code[share] for code in document["codes"]) == pytest.approx(1)
    hours = [code["watch_hours"] for code in document["codes"]]
    assert hours == sorted(hours, reverse=True) and sum(hours) == pytest.approx(document["watch_hours"])
    log, totals = EventLog(folder / "world"), np.zeros(7)
    for partition in range(log.spec.partitions):
        events = log.read(partition)
        live = events["domain"] == 1
        totals += [(events["event"][live] == 3 + place).sum() for place in range(7)]
    for place, (name, behaviour) in enumerate(document["behaviours"].items()):
        assert sum(code["behaviours"][name]["events"] for code in document["codes"]) == pytest.approx(
            behaviour["events"]
        )
        assert behaviour["events"] + sum(behaviour["unattributed"].values()) == pytest.approx(totals[place])
        assert behaviour["per"] == ("exposure" if name == "click" else "hour watched")
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_examples_are_watched_segments_of_different_rooms_with_their_texts(document: dict[str, Any]) -> None:
    for code in document["codes"]:
        assert len({example["item_id"] for example in code["examples"]}) == len(code["examples"]) <= 3
        for example in code["examples"]:
            assert example["topic"] == topic_of(code) and example["text"]
        assert code["comments"] == []


def test_comments_written_in_a_room_are_examples_of_its_codes(folder: Path, tmp_path: Path) -> None:
    _, topic, segments = topics_of(folder / "world")
    place = int(np.flatnonzero(topic == TOPICS.index("dance"))[0])
    table = pq.read_table(folder / "world/texts/comments.parquet").slice(0, 3).to_pydict()
    start = int(segments.start_ms[place])
    table |= {"item_id": [int(segments.item_id[place])] * 3, "time_ms": [start + 29_999, start, -1]}
    table["text"] = ["late", "early", "without a time"]
    original = pq.read_table(folder / "world/texts/comments.parquet")
    schema = original.schema
    try:
        pq.write_table(pa.table(table, schema=schema), folder / "world/texts/comments.parquet")
        found = {topic_of(code): code["comments"] for code in report_meaning(request(folder), quiet=True)["codes"]}
    finally:
        pq.write_table(original, folder / "world/texts/comments.parquet")
    assert found.pop("dance") == ["early", "late"] and not any(found.values())


def test_the_room_is_a_timeline_of_all_its_segments(folder: Path, document: dict[str, Any]) -> None:
    room = document["room"]
    starts = [segment["start_ms"] for segment in room["segments"]]
    assert starts == sorted(starts)
    runs = room_runs(room)
    assert sum(run.end_ms - run.begin_ms for run in runs) == 30_000 * len(starts)
    assert all(one.code != two.code for one, two in pairwise(runs))
    for name in document["behaviours"]:
        assert sum(run.events[name] for run in runs) == pytest.approx(sum(s["events"][name] for s in room["segments"]))
    # No room has more of the rarer behaviours.
    other = next(
        example["item_id"]
        for code in document["codes"]
        for example in code["examples"]
        if example["item_id"] != room["item_id"]
    )
    another = report_meaning(request(folder, room=other), quiet=True)
    assert another["room"]["item_id"] == other
    assert {**another, "room": None} == {**document, "room": None}

    def weight(found: dict[str, Any]) -> float:
        return sum(
            segment["events"][name] / max(1, behaviour["events"])
            for segment in found["segments"]
            for name, behaviour in document["behaviours"].items()
        )

    assert weight(room) > weight(another["room"])


def test_the_text_names_what_was_found(document: dict[str, Any]) -> None:
    text = meaning_text(document, 12)
    for topic in CARRYING:
        line = next(line for line in text.splitlines() if line.startswith("gift") and line.endswith(f"{topic} 100%"))
        assert " to " in line
    assert f"room {document['room']['item_id']} of author" in text
    assert max(map(len, text.splitlines())) < 250


def test_a_range_of_time_and_levels(folder: Path) -> None:
    until = report_meaning(request(folder, time_until="2024-03-05"), quiet=True)
    whole = report_meaning(request(folder), quiet=True)
    assert 0 < until["segments"] < whole["segments"] == until["segments"] + until["without_code"]
    missing = sum(found["unattributed"]["in a segment without a code"] for found in until["behaviours"].values())
    assert missing > 0
    with pytest.raises(UserError, match=r"--level 2: the codebook .*book has 1; 1 to 1 is accepted"):
        report_meaning(request(folder, level=2))
    with pytest.raises(UserError, match="no segment with a code became known in the range"):
        report_meaning(request(folder, time_from="2034-03-05"))


def test_vectors_give_the_codes_of_the_code_file(tmp_path: Path) -> None:
    """Without events, both ways read the codes and then say that nothing happened."""
    world = write_rooms(tmp_path / "world", rooms=4, segments=6)
    book = make_version(tmp_path / "book", 3, 4)
    assigned(book, world)
    (world / "events").mkdir()
    spec = EventLog(world).spec
    nothing = {name: np.empty(0, np.int64) for name in ("user_id", "author_id", "item_id", "visit_id", "time_ms")}
    columns = {**nothing, "domain": np.empty(0, np.int8), "event": np.empty(0, np.int8), "value": np.empty(0, "f4")}
    pq.write_table(event_table(spec, columns), world / "events/part-00000.parquet")
    for codes in ("", str(world / "codes.parquet")):
        with pytest.raises(UserError, match="no interaction with a segment that has a code, in 0 visits to rooms"):
            report_meaning(MeaningRequest(str(book.path), str(world), codes, level=2), quiet=True)
    with pytest.raises(UserError, match=r"--room 9: .*segments\.parquet has no segment of this room; 4 rooms have"):
        report_meaning(MeaningRequest(str(book.path), str(world), room=9), quiet=True)
    with pytest.raises(UserError, match="--room 9: "):
        report_meaning(MeaningRequest(str(book.path), str(world), room=9), quiet=True)


def test_codes_of_another_dataset_or_version_are_refused(folder: Path, tmp_path: Path) -> None:
    codes = CodeFile.read(folder / "codes.parquet")
    moved = CodeFile(**{**vars(codes), "item_id": codes.item_id + 1})
    write_codes(tmp_path / "moved.parquet", moved)
    version, world = str(folder / "book"), str(folder / "world")
    with pytest.raises(UserError, match=r"has segment 0 of room .* does not have; give a code file of this dataset"):
        report_meaning(MeaningRequest(version, world, str(tmp_path / "moved.parquet")), quiet=True)
    other = make_version(tmp_path / "other", 7)
    with pytest.raises(UserError, match="is of the codebook version"):
        report_meaning(MeaningRequest(str(other.path), world, str(folder / "codes.parquet")), quiet=True)
