"""Recall of authors on air, against a plain count of the authors with larger scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.console.errors import UserError
from trainer.semantic_ids.align_evaluation import (
    OUTCOME,
    HeldOut,
    Rooms,
    _candidates,
    _ranks,
    _report,
    retrieval_table,
)
from trainer.semantic_ids.align_popularity import BUCKETS, AuthorPopularity

MINUTE = 60_000


def make_rooms(seed: int) -> Rooms:
    random = np.random.default_rng(seed)
    start = np.sort(random.integers(0, 60 * MINUTE, 40))
    return Rooms(random.integers(0, 15, 40), start, start + random.integers(1, 30 * MINUTE, 40))


@pytest.mark.parametrize("seed", range(3))
def test_an_author_is_ranked_among_those_on_air_at_the_request(seed: int) -> None:
    rooms, random = make_rooms(seed), np.random.default_rng(seed + 9)
    slot = 20 * MINUTE
    request = np.sort(random.integers(slot, slot + MINUTE, 12))
    # Author 99 has no room: it counts as on air, since the user was shown one.
    author = np.where(random.random(12) < 0.2, 99, random.integers(0, 15, 12))
    visit, user_id = 100 + np.arange(12), random.integers(0, 5, 12)
    held_out = HeldOut(visit, user_id, author, request, random.integers(-2, 3, (12, 3)).astype(np.float32))
    candidates = _candidates(rooms, held_out, slot, MINUTE, slice(0, 12))
    vectors = random.integers(-1, 2, (len(candidates), 3)).astype(np.float32)
    score_of = dict(zip(candidates.tolist(), vectors, strict=True))
    found = _ranks(rooms, held_out, slice(0, 12), candidates, vectors)
    for row, moment in enumerate(request.tolist()):
        here = (rooms.start_ms <= moment) & (rooms.end_ms > moment)
        on_air = {*rooms.author_id[here].tolist(), int(author[row])}
        scores = {each: float(held_out.user[row] @ score_of[each]) for each in on_air}
        own = scores[int(author[row])]
        larger, equal = (sum(compare) for compare in zip(*((s > own, s == own) for s in scores.values()), strict=True))
        key = [visit[row], user_id[row], author[row], moment]
        assert found[row].tolist() == [*key, larger, equal, len(on_air)]


def test_equal_scores_count_as_if_drawn_and_buckets_are_apart() -> None:
    popularity = AuthorPopularity(np.array([1, 2]), np.array([0, 0, 2]), np.array([5, 6]))
    # One of ten equal scores; the best; the sixth; an unseen author.
    reported = {"author_id": [1, 2, 2, 3], "larger": [0, 0, 5, 0], "equal": [10, 1, 1, 1], "on_air": [10, 10, 10, 4]}
    outcomes = np.array([reported.get(name, [-7] * 4) for name in OUTCOME]).T
    gates = np.array([[2.0, 0, 0, 0.5, 0], [2, 0, 0, 1, 0]])
    report = _report(outcomes, gates, popularity, (1, 5))
    assert report["all"]["pairs"] == 4 and report["all"]["recall@1"] == pytest.approx((0.1 + 1 + 0 + 1) / 4)
    assert report["all"]["recall@5"] == pytest.approx((0.5 + 1 + 0 + 1) / 4)
    assert report["unseen"] == {
        **{"pairs": 1, "authors": 1, "recall@1": 1.0, "recall@5": 1.0, "mrr": 1.0, "on_air": 4.0, "gate": 1.0}
    }
    assert report[BUCKETS[1]]["recall@5"] == 0.5 and report[BUCKETS[1]]["gate"] is None
    assert report[BUCKETS[3]]["authors"] == 1 and report[BUCKETS[3]]["mrr"] == pytest.approx((1 + 1 / 6) / 2)
    assert report[BUCKETS[2]]["recall@1"] is None and report[BUCKETS[2]]["pairs"] == 0
    assert retrieval_table(report).splitlines()[0].split()[:4] == ["author", "pairs", "authors", "recall@1"]


def test_rooms_without_times_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"items\.parquet: no such file"):
        Rooms.read(str(tmp_path))
    pq.write_table(pa.table({"item_id": [1], "author_id": [2], "start_ms": [3]}), tmp_path / "items.parquet")
    with pytest.raises(UserError, match=r"has no column 'end_ms', so the authors on air at a request are not known"):
        Rooms.read(str(tmp_path))


def test_rooms_on_air_in_an_interval() -> None:
    rooms = make_rooms(1)
    for start in range(0, 60 * MINUTE, 7 * MINUTE):
        stop = start + MINUTE
        expected = np.flatnonzero((rooms.start_ms < stop) & (rooms.end_ms > start))
        assert rooms.between(start, stop).tolist() == expected.tolist()
