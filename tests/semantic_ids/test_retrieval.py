"""Retrieval of authors against plain definitions, and without a look into the future."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.semantic_ids.segment_world import (
    DIM,
    SEGMENT_MS,
    START_MS,
    assigned,
    make_version,
    write_vectors,
    write_world,
)
from trainer.console.errors import UserError
from trainer.data.format.content_vectors import ContentVectors, Origin, write_parts
from trainer.data.format.segments import DatasetSegments
from trainer.data.format.text_schema import segment_ids
from trainer.semantic_ids import retrieval
from trainer.semantic_ids.code_files import assign_codes
from trainer.semantic_ids.retrieval import (
    ON_AIR_MS,
    AuthorRequest,
    rank_by_codes,
    rank_by_cosine,
    retrieval_table,
    retrieve_authors,
    rooms_on_air,
)
from trainer.semantic_ids.segments import SegmentVectors, TimeRange

WORLD_ROOMS, WORLD_SEGMENTS = 10, 12
AS_OF = "2024-03-04T00:04:10"
"""Segments 0 to 7 of each room of the world are known."""


def plain_cosine(first: Sequence[float], second: Sequence[float]) -> float | None:
    def product(left: Sequence[float], right: Sequence[float]) -> float:
        total = 0.0
        for a, b in zip(left, right, strict=True):
            total += a * b
        return total

    lengths = math.sqrt(product(first, first)) * math.sqrt(product(second, second))
    return max(-1.0, min(1.0, product(first, second) / lengths)) if lengths else None


@given(st.data())
def test_ranks_by_cosine_are_those_of_the_definition_in_blocks_of_any_size(data: st.DataObject) -> None:
    dim = data.draw(st.integers(1, 6))
    vector = st.lists(st.integers(-3, 3).map(float), min_size=dim, max_size=dim)
    asked = data.draw(vector.filter(any))
    vectors = data.draw(st.lists(vector, min_size=1, max_size=12))
    rows = data.draw(st.lists(st.integers(0, len(vectors) - 1), max_size=12))
    authors = data.draw(st.lists(st.integers(0, 99), min_size=len(rows), max_size=len(rows), unique=True))
    count = data.draw(st.integers(1, 14))
    defined = [
        (plain_cosine(vectors[row], asked), author, place)
        for place, (row, author) in enumerate(zip(rows, authors, strict=True))
    ]
    ranked = sorted((-cosine, author, place) for cosine, author, place in defined if cosine is not None)[:count]
    with patch.object(retrieval, "BLOCK_VALUES", data.draw(st.integers(1, 40))):
        found = rank_by_cosine(
            np.array(asked), np.array(vectors, np.float32), np.array(rows, np.int64), np.array(authors, np.int64), count
        )
    assert found.places.tolist() == [place for *_, place in ranked]
    assert found.cosines.tolist() == [-negative for negative, *_ in ranked]
    assert found.without_direction == sum(cosine is None for cosine, *_ in defined)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_blocks_of_any_size_give_the_same_bits(dtype: type) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((60, 333)).astype(dtype)
    vectors[40:] = vectors[:20]
    rows, authors = rng.permutation(60), rng.permutation(60)
    results = []
    for values in (1, 1000, 7 * 333, 1 << 22):
        with patch.object(retrieval, "BLOCK_VALUES", values):
            results.append(rank_by_cosine(vectors[3], vectors, rows, authors, 25))
    for found in results[1:]:
        assert found.places.tolist() == results[0].places.tolist()
        assert found.cosines.tobytes() == results[0].cosines.tobytes()
    # Equal vectors have equal cosines, and are in the order of their authors.
    cosines, ranked = results[0].cosines, authors[results[0].places]
    assert (cosines[1:] == cosines[:-1]).any()
    assert all(ranked[at] < ranked[at + 1] for at in np.flatnonzero(cosines[1:] == cosines[:-1]))


def test_vectors_that_are_not_finite_are_left_out_and_counted() -> None:
    vectors = np.array([[1, 0], [np.nan, 1], [np.inf, 1], [0, 0], [3e38, 3e38]], np.float32)
    found = rank_by_cosine(np.array([1.0, 1.0]), vectors, np.arange(5), np.arange(5), 9)
    assert (found.places.tolist(), found.without_direction) == ([4, 0], 3)


def plain_levels(first: Sequence[int], second: Sequence[int]) -> int:
    level = 0
    while level < len(first) and first[level] == second[level]:
        level += 1
    return level


@given(st.data())
def test_ranks_by_codes_are_those_of_the_definition(data: st.DataObject) -> None:
    levels = data.draw(st.integers(1, 3))
    runs = st.lists(st.tuples(*[st.integers(0, 2)] * levels), min_size=1, max_size=4)
    asked = data.draw(runs)
    others = data.draw(st.lists(runs, max_size=8))
    authors = data.draw(st.lists(st.integers(0, 99), min_size=len(others), max_size=len(others), unique=True))
    count = data.draw(st.integers(1, 9))
    defined = [
        (
            -plain_levels(asked[-1], other[-1]),
            -sum(max(plain_levels(run, run_of_other) for run_of_other in other) for run in asked),
            author,
            place,
        )
        for place, (other, author) in enumerate(zip(others, authors, strict=True))
    ]
    expected = sorted(line for line in defined if line[0] or line[1])[:count]
    found = rank_by_codes(
        np.array(asked[-1]),
        np.array(asked),
        np.array([other[-1] for other in others]).reshape(-1, levels),
        np.array([run for other in others for run in other]).reshape(-1, levels),
        np.array([len(other) for other in others], np.int64),
        np.array(authors, np.int64),
        count,
    )
    assert found.places.tolist() == [place for *_, place in expected]
    assert found.levels.tolist() == [-line[0] for line in expected]
    assert found.recent.tolist() == [-line[1] for line in expected]


@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 5), st.integers(0, 8)), max_size=15), st.integers(0, 9))
def test_a_room_is_on_air_for_a_minute_after_a_segment_of_it_became_known(
    drawn: list[tuple[int, int, int]], now: int
) -> None:
    author, room, known = (np.array([row[column] for row in drawn], np.int64) for column in range(3))
    known_ms, as_of_ms = known * SEGMENT_MS, now * SEGMENT_MS
    segments = DatasetSegments("", np.arange(len(drawn)), room, author, known_ms - SEGMENT_MS, known_ms)
    expected: dict[int, int] = {}
    for who in range(4):
        seen = [(ms, place) for place, ms in enumerate(known_ms) if author[place] == who and ms <= as_of_ms]
        if seen and as_of_ms - max(seen)[0] <= ON_AIR_MS:
            expected[who] = int(room[max(seen)[1]])
    assert rooms_on_air(segments, as_of_ms) == expected


def write_topics(path: Path, known_ms: np.ndarray | None = None) -> None:
    """Give the segments of a world numbers and topics, and perhaps other times."""
    table = pq.read_table(path / "segments.parquet")
    number = np.tile(np.arange(WORLD_SEGMENTS), len(table) // WORLD_SEGMENTS)
    columns = {name: table[name].to_numpy() for name in ("item_id", "known_ms")}
    columns |= {"segment": number, "topic": (number % 2).astype(np.int8)}
    if known_ms is not None:
        columns["known_ms"] = known_ms
    pq.write_table(pa.table(columns), path / "segments.parquet")
    spec = json.loads((path / "dataset.json").read_text())
    (path / "dataset.json").write_text(json.dumps({**spec, "extra": {"topics": ["song", "chat"]}}))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    path = write_world(tmp_path / "world", WORLD_ROOMS, WORLD_SEGMENTS)
    write_topics(path)
    assigned(make_version(tmp_path / "book", 3, 4), path)
    return path


def ask(world: Path, author: int = 102, **options: Any) -> dict[str, Any]:
    if options.get("by") == "codes":
        options = {"codes": str(world / "codes.parquet"), **options}
    return retrieve_authors(str(world), AuthorRequest(author, **{"as_of": AS_OF, **options}))


def test_authors_are_compared_by_their_latest_known_vectors(world: Path) -> None:
    document = ask(world)
    vectors = np.asarray(ContentVectors.open(world / "embeddings/segments").vectors, np.float64)
    # Author 100 + a has rooms 2 a and 2 a + 1. Of two segments that are known at once, the latest has the larger id.
    latest = {100 + a: (2 * a + 1) * WORLD_SEGMENTS + 7 for a in range(WORLD_ROOMS // 2)}
    asked = vectors[latest[102]]
    cosines = {
        author: float(vectors[row] @ asked / np.linalg.norm(vectors[row]) / np.linalg.norm(asked))
        for author, row in latest.items()
        if author != 102
    }
    assert [entry["author"] for entry in document["authors"]] == sorted(cosines, key=cosines.__getitem__, reverse=True)
    for entry in (document["asked"], *document["authors"]):
        assert entry["segment"] == latest[entry["author"]]
        assert entry["room_on_air"] == 2 * (entry["author"] - 100) + 1
        assert (entry["topic"], entry["text"], entry["codes"]) == ("chat", None, None)
        assert entry["age_ms"] == 10_000
        if entry is not document["asked"]:
            assert entry["cosine"] == pytest.approx(cosines[entry["author"]])
    assert document["compared"] == 4 and "cosine" not in document["asked"]
    assert [entry["author"] for entry in ask(world, count=2)["authors"]] == [
        entry["author"] for entry in document["authors"][:2]
    ]


def test_authors_are_compared_by_their_latest_known_codes(world: Path, tmp_path: Path) -> None:
    document = ask(world, by="codes", codebook=str(tmp_path / "book"))
    table = pq.read_table(world / "codes.parquet").to_pydict()
    codes = list(zip(table["code_1"], table["code_2"], strict=True))
    asked = codes[document["asked"]["segment"]]
    assert tuple(document["asked"]["codes"]) == asked
    levels = [entry["levels"] for entry in document["authors"]]
    assert levels == sorted(levels, reverse=True)
    for entry in document["authors"]:
        assert tuple(entry["codes"]) == codes[entry["segment"]]
        assert entry["levels"] == plain_levels(asked, entry["codes"])
    # The codes beside the vectors are the same.
    beside = ask(world, codes=str(world / "codes.parquet"))
    assert beside["codebook_version"] == document["codebook_version"]
    assert {entry["author"]: entry["codes"] for entry in beside["authors"]}.items() >= {
        entry["author"]: entry["codes"] for entry in document["authors"]
    }.items()


def test_only_authors_with_a_room_on_air_are_compared_if_that_is_asked(world: Path) -> None:
    known_ms = pq.read_table(world / "segments.parquet")["known_ms"].to_numpy().copy()
    # Both rooms of author 101 ended after their third segment, and the second room of author 103 after its sixth.
    for room, segments in ((2, 3), (3, 3), (7, 6)):
        known_ms[room * WORLD_SEGMENTS + segments : (room + 1) * WORLD_SEGMENTS] += 10**9
    write_topics(world, known_ms)
    everyone, live = ask(world), ask(world, on_air=True)
    assert {entry["author"]: entry["room_on_air"] for entry in everyone["authors"]} == {
        100: 1,
        101: None,
        103: 6,
        104: 9,
    }
    assert live["authors"] == [entry for entry in everyone["authors"] if entry["author"] != 101]
    # The asked author needs no room on air.
    assert [entry["author"] for entry in ask(world, 101, on_air=True)["authors"]] != []
    assert "102" in retrieval_table(ask(world, 101, on_air=True))


@pytest.mark.parametrize("seed", range(3))
def test_later_segments_change_nothing(world: Path, tmp_path: Path, seed: int) -> None:
    options: list[dict[str, Any]] = [{}, {"on_air": True}, {"by": "codes"}, {"by": "codes", "on_air": True}]
    options.append({"codes": str(world / "codes.parquet")})
    before = [ask(world, **option) for option in options]
    rng = np.random.default_rng(seed)
    table = pq.read_table(world / "segments.parquet")
    segments = {name: table[name].to_numpy().copy() for name in table.column_names}
    as_of_ms = START_MS + 250_000
    later = segments["known_ms"] > as_of_ms
    assert 0 < later.sum() < len(later)
    vectors = np.asarray(ContentVectors.open(world / "embeddings/segments").vectors).copy()
    vectors[later] = rng.standard_normal((later.sum(), DIM))
    segments["known_ms"][later] = as_of_ms + rng.integers(1, 10**6, later.sum())
    segments["item_id"][later] = rng.integers(0, WORLD_ROOMS, later.sum())
    segments["topic"][later] = 1 - segments["topic"][later]
    # The last two segments are removed, and others are added.
    kept, added = len(later) - 2, rng.choice(np.flatnonzero(later), 5)
    rows = {name: np.append(values[:kept], values[added]) for name, values in segments.items()}
    pq.write_table(pa.table(rows), world / "segments.parquet")
    write_vectors(world, np.concatenate([vectors[:kept], rng.standard_normal((5, DIM)).astype(np.float32)]))
    assigned(make_version(tmp_path / "same", 3, 4), world)
    assert [ask(world, **option) for option in options] == before


def test_segments_with_texts_are_named_by_them(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world", 6, 4)
    room, number = np.repeat(np.arange(6), 4), np.tile(np.arange(4), 6)
    vectors = np.asarray(ContentVectors.open(world / "embeddings/segments").vectors)
    start_ms = START_MS + number * SEGMENT_MS
    table = {
        "item_id": room,
        "segment": number.astype(np.int32),
        "start_ms": start_ms,
        "known_ms": start_ms + SEGMENT_MS,
    }
    text = [f"room {r}\nsays {n} " + ("again " * 20 if r == 5 else "") for r, n in zip(room, number, strict=True)]
    (world / "texts").mkdir()
    pq.write_table(pa.table({**table, "text": text}), world / "texts/segments.parquet")
    (world / "segments.parquet").unlink()
    origin = Origin(model="small", hash="abc", template={"segments": "{text}"})
    ContentVectors.write(tmp_path / "fused", segment_ids(room, number), vectors, origin=origin, dtype="float32")
    document = ask(world, 100, vectors=str(tmp_path / "fused"), as_of="2024-03-04T00:01:35")
    assert [document["asked"]["text"], document["asked"]["topic"]] == ["room 1\nsays 2 ", None]
    assert {entry["author"]: entry["text"][:13] for entry in document["authors"]} == {
        101: "room 3\nsays 2",
        102: "room 5\nsays 2",
    }
    # A code file of these ids finds the same segments, without the table of vectors.
    version = make_version(tmp_path / "book", 1)
    opened = SegmentVectors.open(str(world), str(tmp_path / "fused"))
    assign_codes(version, opened, TimeRange(), world / "codes.parquet", quiet=True)
    by_codes = ask(world, 100, by="codes", as_of="2024-03-04T00:01:35")
    assert [entry["text"] for entry in by_codes["authors"]] == [
        f"room {r}\nsays 2 " + "again " * (20 * (r == 5)) for r in (3, 5)
    ]
    assert [entry["levels"] for entry in by_codes["authors"]] == [1, 1]
    table_text = retrieval_table(document)
    assert "room 1 says 2" in table_text and "..." in table_text
    assert max(map(len, table_text.splitlines())) < 120


def test_a_text_that_is_known_later_than_its_segment_is_not_shown(world: Path) -> None:
    room, number = np.repeat(np.arange(WORLD_ROOMS), WORLD_SEGMENTS), np.tile(np.arange(WORLD_SEGMENTS), WORLD_ROOMS)
    start_ms = START_MS + number * SEGMENT_MS
    columns = {"item_id": room, "segment": number.astype(np.int32), "start_ms": start_ms}
    text = [f"room {r} says {n}" for r, n in zip(room, number, strict=True)]
    (world / "texts").mkdir()
    for late_ms, shown in ((20_000, None), (10_000, "room 5 says 7")):
        table = {**columns, "known_ms": start_ms + SEGMENT_MS + late_ms, "text": text}
        pq.write_table(pa.table(table), world / "texts/segments.parquet")
        asked = ask(world)["asked"]
        assert (asked["segment"], asked["topic"], asked["text"]) == (5 * WORLD_SEGMENTS + 7, "chat", shown)


@pytest.mark.parametrize(
    ("known", "author", "segments", "message"),
    [
        ([7, 9], 8, [7, 9, 8, 8], "--author 8: no segment of this author is known at --as-of T; the first is"),
        ([], 8, [7, 9, 8, 8], "--as-of T: no segment of t is known then; the first is known from 1970-01-01T00:00:10"),
        ([7, 9], 5, [7, 9, 8, -1], "--author 5: t has no segment of this author; 2 authors are known at --as-of"),
        ([7, 9], -1, [7, 9, 8, -1], "--author -1: t has no segment of this author; 2 authors are known at --as-o"),
        ([], 8, [-1, -1, -1, -1], "t: has no segment of a known author"),
        ([], 8, [], "t: has no segment of a known author"),
    ],
)
def test_an_author_that_is_not_there_is_told_from_one_that_is_known_later(
    known: list[int], author: int, segments: list[int], message: str
) -> None:
    request = AuthorRequest(author, as_of="T")
    times = np.arange(10_000, 50_000, 10_000)[: len(segments)]
    arrays = (np.array(known, np.int64), np.array(segments, np.int64), times)
    with pytest.raises(UserError) as refused:
        retrieval._find_author(request, *arrays, "t", "UTC")
    assert str(refused.value).startswith(message)
    if "the first is" in message and known:
        assert "known from 1970-01-01T00:00:30" in str(refused.value)
    if known:
        assert retrieval._find_author(AuthorRequest(9, as_of="T"), *arrays, "t", "UTC") == 1


def test_a_zero_vector_of_the_asked_author_is_refused(world: Path) -> None:
    vectors = np.asarray(ContentVectors.open(world / "embeddings/segments").vectors).copy()
    vectors[5 * WORLD_SEGMENTS + 7] = 0
    write_vectors(world, vectors)
    with pytest.raises(UserError, match=r"--author 102: the vector of segment 67 in .* is zero or not finite"):
        ask(world)
    document = ask(world, 100)
    assert (document["compared"], document["without_direction"]) == (3, 1)
    assert "left out, as their vector is zero or not finite: 1" in retrieval_table(document)


def test_codes_of_other_segments_are_refused(world: Path, tmp_path: Path) -> None:
    other = write_world(tmp_path / "other", WORLD_ROOMS, WORLD_SEGMENTS + 1)
    codes = assigned(make_version(tmp_path / "book2", 3), other)
    for options in ({"by": "codes"}, {}):
        with pytest.raises(UserError, match=r"has segment 12 of room 0, which .*segments\.parquet does not have"):
            ask(world, codes=str(codes.path), **options)
    with pytest.raises(UserError, match="is of the codebook version"):
        ask(world, codes=str(codes.path), codebook=str(tmp_path / "book"))


def test_a_table_of_another_model_than_the_codebook_is_refused(world: Path, tmp_path: Path) -> None:
    vectors = np.asarray(ContentVectors.open(world / "embeddings/segments").vectors)
    write_vectors(world, vectors, model="other")
    with pytest.raises(UserError, match="vectors are from another model"):
        ask(world, codes=str(world / "codes.parquet"), codebook=str(tmp_path / "book"))


def test_vectors_of_another_dataset_with_the_same_ids_are_refused(world: Path, tmp_path: Path) -> None:
    """The table of an alignment has a hash of its segments; one without a hash is taken as it is."""
    other = write_world(tmp_path / "other", WORLD_ROOMS, WORLD_SEGMENTS)
    table = pq.read_table(other / "segments.parquet")
    later = table.set_column(1, "known_ms", pa.array(table["known_ms"].to_numpy() + 1000))
    pq.write_table(later, other / "segments.parquet")
    vectors = np.asarray(ContentVectors.open(world / "embeddings/segments").vectors)
    for place, accepted in ((world, True), (other, False)):
        segments = SegmentVectors.open(str(place))
        digest, ids = segments.hash(np.arange(len(segments))), segments.table.ids
        fused, no_texts = tmp_path / "fused", np.zeros(len(ids), np.uint64)
        write_parts(fused, ids, no_texts, [(ids, vectors)], DIM, dtype="float32", segments=digest)
        if accepted:
            assert ask(world, vectors=str(fused))["compared"] == 4
        else:
            with pytest.raises(UserError, match=r"fused: its vectors were made from other segments than .*world"):
                ask(world, vectors=str(fused))
