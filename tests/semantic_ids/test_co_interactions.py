"""Authors by common users, behaviours and codes: against a plain definition, as of a time, and without popularity."""

from __future__ import annotations

import math
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.semantic_ids.meaning_world import write_world
from trainer.console.errors import UserError
from trainer.data.format.schema import partition_of
from trainer.data.format.text_schema import SEGMENT_MS
from trainer.data.format.visit_events import event_table
from trainer.semantic_ids.co_interactions import SHRINKAGE, AuthorCells, AuthorSimilarity, CodedInteractions
from trainer.semantic_ids.retrieval import AuthorRequest, retrieval_table, retrieve_authors
from trainer.stream.labels.assembled_rows import EXIT, EXPOSURE, FIRST_BEHAVIOUR
from trainer.stream.labels.event_log import EventLog

AUTHORS, CODES, PARTITIONS = 4, 2, 2
STEP = SEGMENT_MS // 2


def draw(seed: int) -> tuple[list[Any], list[Any], int]:
    """Draw segments, visits and a time, dense enough that most authors have something in common.

    A segment is a room, a start, a delay until it is known in steps, and a code. Room r is of author r, room 4 of an
    author who is not compared. A visit is a user, a room, a begin, a time watched, and behaviours with their times.
    """
    rng = np.random.default_rng(seed)

    def below(limit: int) -> int:
        return int(rng.integers(0, limit))

    segments = [(below(AUTHORS + 1), below(9) * STEP, below(3), below(CODES)) for _ in range(10)]
    visits = []
    for _ in range(30):
        begin, play = below(9) * STEP, below(9) * STEP
        events = [(below(2), begin + (play if below(2) else below(9) * STEP)) for _ in range(below(4))]
        visits.append((below(3), below(AUTHORS + 1), begin, play, events))
    return segments, visits, (3 + below(12)) * STEP


def on_air(segments: list[Any], room: int, time: int, as_of: int) -> int | None:
    own = [
        (start, place)
        for place, (item, start, _, _) in enumerate(segments)
        if item == room and start <= time < start + SEGMENT_MS and known(segments[place]) <= as_of
    ]
    return max(own)[1] if own else None


def known(segment: Any) -> int:
    return segment[1] + SEGMENT_MS + segment[2] * STEP


def watched_longest(segments: list[Any], room: int, begin: int, end: int, as_of: int) -> int | None:
    best = None
    for place, segment in enumerate(segments):
        if segment[0] == room and known(segment) <= as_of:
            overlap = min(segment[1] + SEGMENT_MS, end) - max(segment[1], begin)
            if overlap > 0 and (best is None or (-overlap, segment[1], place) < best):
                best = (-overlap, segment[1], place)
    return None if best is None else best[2]


def plain_scores(segments: list[Any], visits: list[Any], asked: int, as_of: int) -> list[float]:
    counts: dict[int, dict[tuple[int, int, int], int]] = defaultdict(lambda: defaultdict(int))
    for user, room, begin, play, events in visits:
        exit_ms = begin + play
        for behaviour, time in events:
            if time > as_of:
                continue
            place = on_air(segments, room, time, as_of)
            if time == exit_ms and play:
                longest = watched_longest(segments, room, begin, exit_ms, as_of)
                place = place if longest is None else longest
            if place is not None and room < AUTHORS:
                counts[room][user, behaviour, segments[place][3]] += 1
    sharing: dict[Any, int] = defaultdict(int)
    for of_author in counts.values():
        for cell in of_author:
            sharing[cell] += 1
    weights = [
        {cell: math.log1p(n) * math.log(AUTHORS / sharing[cell]) for cell, n in counts[author].items()}
        for author in range(AUTHORS)
    ]
    scores = []
    for author in range(AUTHORS):
        common = weights[author].keys() & weights[asked].keys()
        users = {user for user, _, _ in common}
        lengths = [math.sqrt(sum(w * w for w in weights[one].values())) for one in (author, asked)]
        product = sum(weights[author][cell] * weights[asked][cell] for cell in common)
        cosine = product / lengths[0] / lengths[1] if lengths[0] and lengths[1] else 0.0
        scores.append(0.0 if author == asked else cosine * len(users) / (len(users) + SHRINKAGE))
    return scores


def interactions(segments: list[Any], visits: list[Any]) -> CodedInteractions:
    rows = []
    for number, (user, room, begin, play, events) in enumerate(visits):
        rows.append((user, room, number, EXPOSURE, begin, 0))
        rows += [(user, room, number, FIRST_BEHAVIOUR + behaviour, time, 0) for behaviour, time in events]
        rows.append((user, room, number, EXIT, begin + play, play))
    names = ("user_id", "item_id", "visit_id", "event", "time_ms", "value")
    columns = {name: np.array([row[place] for row in rows], np.int64) for place, name in enumerate(names)}
    columns["domain"] = np.ones(len(rows), np.int64)
    partition = partition_of(columns["user_id"], PARTITIONS)
    log: Any = SimpleNamespace(
        spec=SimpleNamespace(partitions=PARTITIONS, behaviours=("like", "gift")),
        read=lambda number: {name: column[partition == number] for name, column in columns.items()},
    )
    item, start = (np.array([segment[place] for segment in segments], np.int64) for place in range(2))
    known_ms = np.array([known(segment) for segment in segments], np.int64)
    code = np.array([segment[3] for segment in segments], np.int64)
    return CodedInteractions(log, item, start, known_ms, np.where(item < AUTHORS, item, -1), code, AUTHORS)


def test_scores_are_those_of_the_definition() -> None:
    some = 0
    for seed in range(200):
        segments, visits, as_of = draw(seed)
        asked = seed % AUTHORS
        similarity = AuthorSimilarity(asked, AUTHORS)
        for cells in interactions(segments, visits).cells(as_of):
            similarity.add(cells)
        expected = plain_scores(segments, visits, asked, as_of)
        assert similarity.scores().tolist() == pytest.approx(expected)
        some += sum(0 < score < 0.99 for score in expected) > 1
    assert some > 20, "too few of these worlds have something to compare"


def test_popularity_does_not_win() -> None:
    """The author with all users is not nearer than the one with the same few users."""
    rng, users = np.random.default_rng(0), 300
    # Author 0 and 1 share 6 users; author 2 has every user, and those of author 0 many times; the others have some.
    cells = [(user, author, 1.0) for user in range(6) for author in (0, 1)]
    cells += [(user, 2, 50.0 if user < 6 else 5.0) for user in range(users)]
    cells += [(user, author, 1.0) for author in range(3, 10) for user in rng.choice(users, 20, replace=False)]
    user, author, count = (np.array(column) for column in zip(*cells, strict=True))
    sharing = np.bincount(user, minlength=users)[user]
    weight = np.log1p(count) * np.log(10 / sharing)
    similarity = AuthorSimilarity(0, 10)
    similarity.add(AuthorCells(user, user, author, weight))
    ranking = similarity.rank(np.arange(10) + 100, np.ones(10, bool), 3)
    assert ranking.places[0] == 1 and ranking.users[0] == 6 and ranking.cells[0] == 6
    assert ranking.scores[0] > 5 * ranking.scores[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("co")
    write_world(directory)
    return directory


def ask(folder: Path, **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"as_of": "2024-03-06T12:00", "by": "interactions", "count": 5}
    settings |= {"codes": str(folder / "codes.parquet"), **options}
    author = settings.pop("author", None)
    if author is None:
        segments = pq.read_table(folder / "codes.parquet", columns=["author_id"])["author_id"].to_numpy()
        author = int(np.bincount(segments).argmax())
    return retrieve_authors(str(folder / "world"), AuthorRequest(author, **settings))


def test_the_answer_has_the_ranks_by_codes_and_by_vectors(folder: Path) -> None:
    vectors = str(folder / "world/embeddings/segments")
    document = ask(folder, vectors=vectors)
    assert document["beside"] == ["codes", "vectors"] and document["authors"]
    scores = [entry["score"] for entry in document["authors"]]
    assert scores == sorted(scores, reverse=True) and scores[-1] > 0 and scores[0] < 1
    author = document["asked"]["author"]
    nearest = ask(folder, author=author, by="vectors", vectors=vectors, codes="", count=1000)["authors"]
    by_codes = ask(folder, author=author, by="codes", count=1000)["authors"]
    for name, others in (("vectors", nearest), ("codes", by_codes)):
        ranks = {entry["author"]: rank for rank, entry in enumerate(others, 1)}
        assert [entry["ranks"][name] for entry in document["authors"]] == [
            ranks.get(entry["author"]) for entry in document["authors"]
        ]
    text = retrieval_table(document).splitlines()
    assert text[1].split()[:7] == ["author", "score", "users", "by", "codes", "by", "vectors"]
    assert text[0].startswith(f"authors like {author} by common users, behaviours and codes, as of ")
    alone = ask(folder, author=author)
    assert alone["beside"] == ["codes"] and [e["author"] for e in alone["authors"]] == [
        e["author"] for e in document["authors"]
    ]
    live = ask(folder, author=author, on_air=True)
    assert all(entry["room_on_air"] is not None for entry in live["authors"])


def test_later_events_change_nothing(folder: Path, tmp_path: Path) -> None:
    before = ask(folder)
    log = EventLog(folder / "world")
    as_of_ms, rng = before["as_of_ms"], np.random.default_rng(0)
    for partition in range(log.spec.partitions):
        events = log.read(partition)
        later = np.flatnonzero(events["time_ms"] > as_of_ms)
        assert 0 < len(later) < len(events["time_ms"])
        # Other rooms, other behaviours, and half of the events are gone.
        changed = {name: column.copy() for name, column in events.items()}
        behaviour = later[events["event"][later] >= FIRST_BEHAVIOUR]
        changed["event"][behaviour] = rng.permutation(changed["event"][behaviour])
        changed["item_id"][behaviour] = rng.permutation(changed["item_id"][behaviour])
        kept = np.ones(len(events["time_ms"]), bool)
        kept[behaviour[::2]] = False
        table = event_table(log.spec, {name: column[kept] for name, column in changed.items()})
        pq.write_table(table, folder / f"world/events/part-{partition:05d}.parquet")
    assert ask(folder) == before
    # An earlier time is another answer.
    assert ask(folder, as_of="2024-03-05T12:00")["authors"] != before["authors"]


def test_options_that_do_not_fit_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="--by interactions needs --codes FILE, a code file"):
        ask(folder, codes="")
    with pytest.raises(UserError, match="--level needs --by interactions"):
        ask(folder, by="codes", level=1)
    with pytest.raises(UserError, match=r"--level 2: the codes of .*codes\.parquet have 1; 1 to 1 is accepted"):
        ask(folder, level=2)
    with pytest.raises(UserError, match="has no segment of this author"):
        ask(folder, author=10**9)
    # When the first segment of the second author has just become known, nothing is shared.
    columns = pq.read_table(folder / "codes.parquet", columns=["author_id", "known_ms"])
    authors, known_ms = (columns[name].to_numpy() for name in ("author_id", "known_ms"))
    second = np.sort([known_ms[authors == author].min() for author in np.unique(authors)])[1]
    as_of = datetime.fromtimestamp(second / 1000, UTC).isoformat()
    early = ask(folder, as_of=as_of, author=int(authors[np.flatnonzero(known_ms == second)[0]]))
    assert early["compared"] == 1 and early["authors"] == []
    assert "none of them shares a user, behaviour and code" in retrieval_table(early)
