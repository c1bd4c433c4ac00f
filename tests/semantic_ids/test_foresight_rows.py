"""Rows of Foresight beside a plain definition and a store's features; no context has what is known later."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.semantic_ids.code_features import run_features
from trainer.semantic_ids.code_files import CodeFile, CodesAsOf
from trainer.semantic_ids.foresight_rows import ForesightRows, Target
from trainer.semantic_ids.segments import TimeRange

GAP_MS = 5
RUNS = 4


@dataclass(frozen=True)
class Log:
    """Segments in any order."""

    author: np.ndarray
    item: np.ndarray
    segment: np.ndarray
    known_ms: np.ndarray
    code: np.ndarray

    def rows(self, target: Target = "next") -> ForesightRows:
        return ForesightRows.make(
            self.author, self.item, self.segment, self.known_ms, self.code, target=target, gap_ms=GAP_MS
        )

    def reader(self) -> CodesAsOf:
        codes = CodeFile(
            Path("codes"), "v", (9,), self.item, self.author, self.segment, self.known_ms, self.code[:, None]
        )
        return CodesAsOf(codes, self.code, GAP_MS)

    def where(self, keep: np.ndarray) -> Log:
        return Log(*(column[keep] for column in vars(self).values()))


@st.composite
def logs(draw: st.DrawFn) -> Log:
    """Draw segments of rooms 0 to 5; rooms 0 and 1 are of author 0, and so on; room 5 is of an unknown author."""
    segments = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 25), st.integers(0, 3)), max_size=40))
    room, known_ms, code = (np.array([entry[part] for entry in segments], np.int64) for part in range(3))
    author = np.where(room == 5, -1, room // 2)
    ids = draw(st.permutations(range(len(segments))))
    return Log(author, room, np.array(ids, np.int64), known_ms, code.astype(np.int32))


def plain_rows(log: Log, target: Target) -> list[tuple[int, int, int, int, int]]:
    """Return author, time, code, target and time of the target of each row, by their definition."""
    found = []
    for room in range(5):
        own = sorted((log.known_ms[at], log.segment[at], at) for at in np.flatnonzero(log.item == room))
        for place, (as_of, segment, at) in enumerate(own):
            if any(time == as_of for time, *_ in own[place + 1 :]):
                continue
            before = as_of
            for time, _, later in own[place + 1 :]:
                if time - before > GAP_MS:
                    break
                before = time
                if target == "next" or log.code[later] != log.code[at]:
                    found.append(((as_of, segment), (room // 2, as_of, log.code[at], log.code[later], time)))
                    break
    return [tuple(int(value) for value in row) for _, row in sorted(found)]  # type: ignore[misc]


@given(log=logs(), target=st.sampled_from(["next", "change"]))
def test_rows_are_those_of_the_definition(log: Log, target: Target) -> None:
    rows = log.rows(target)
    found = zip(rows.author, rows.as_of_ms, rows.code, rows.target, rows.target_ms, strict=True)
    assert [tuple(map(int, row)) for row in found] == plain_rows(log, target)
    assert (log.code[rows.segment] == rows.code).all() and (log.known_ms[rows.segment] == rows.as_of_ms).all()
    assert rows.without_author == (log.author == -1).sum()


@given(log=logs(), target=st.sampled_from(["next", "change"]), runs=st.integers(1, 6))
def test_contexts_are_the_features_of_a_store_bit_for_bit(log: Log, target: Target, runs: int) -> None:
    rows = log.rows(target)
    every = np.arange(len(rows))
    found, expected = rows.contexts(every, runs), run_features(log.reader(), rows.author, rows.as_of_ms, runs)
    for one, other in ((found.code, expected.code), (found.length, expected.length)):
        assert one.dtype == other.dtype and np.array_equal(one, other)
    assert (rows.run_counts(every) >= (found.code >= 0).sum(1)).all()
    some = every[::-2]
    assert np.array_equal(rows.contexts(some, runs).length, found.length[some])


@given(log=logs(), time=st.integers(0, 26), moved=st.data())
def test_segments_that_are_known_later_change_no_context(log: Log, time: int, moved: st.DataObject) -> None:
    """They are removed, or have other codes, authors, rooms and later times."""
    late = log.known_ms > time
    size = int(late.sum())

    def drawn(low: int, high: int) -> np.ndarray:
        return np.array(moved.draw(st.lists(st.integers(low, high), min_size=size, max_size=size)), np.int64)

    changed = Log(*(column.copy() for column in vars(log).values()))
    changed.code[late], changed.known_ms[late], changed.author[late] = drawn(0, 8), drawn(time + 1, 40), drawn(0, 3)
    changed.item[late] = drawn(0, 9)
    expected = contexts_by_segment(log, time)
    for other in (changed, log.where(~late)):
        found = contexts_by_segment(other, time)
        # A row whose target came late, or does not come, is missing; a room may get a later segment, and a new row.
        for segment in expected.keys() & found.keys():
            assert found[segment] == expected[segment]
    # The rows that are complete by then are there in any case.
    complete = log.rows()
    segments = {int(log.segment[at]) for at in complete.segment[complete.target_ms <= time]}
    assert segments <= expected.keys() & contexts_by_segment(changed, time).keys()


def contexts_by_segment(log: Log, time: int) -> dict[int, tuple[bytes, bytes]]:
    """Return the contexts of the rows up to a time, by the id of their segment."""
    rows = log.rows()
    early = np.flatnonzero(rows.as_of_ms <= time)
    found = rows.contexts(early, RUNS)
    ids = log.segment[rows.segment[early]]
    return {int(at): (found.code[place].tobytes(), found.length[place].tobytes()) for place, at in enumerate(ids)}


@given(log=logs(), border=st.integers(1, 26), until=st.integers(1, 30))
def test_the_split_keeps_targets_of_training_before_all_of_the_evaluation(log: Log, border: int, until: int) -> None:
    rows = log.rows()
    training, held_out = rows.training(TimeRange(2, border)), rows.evaluation(TimeRange(border, max(until, border)))
    assert not set(training) & set(held_out)
    assert (rows.target_ms[training] < border).all() and (rows.as_of_ms[training] >= 2).all()
    assert (rows.as_of_ms[held_out] >= border).all() and (rows.as_of_ms[held_out] < until).all()
    assert (np.diff(training) > 0).all() and (np.diff(rows.as_of_ms) >= 0).all()


def test_a_run_of_two_rooms_and_a_target_that_is_known_at_the_same_time() -> None:
    log = Log(
        author=np.array([7, 7, 7, 7, 7]),
        item=np.array([1, 1, 1, 2, 1]),
        segment=np.array([0, 1, 2, 3, 4]),
        known_ms=np.array([1, 3, 3, 3, 4]),
        code=np.array([5, 5, 6, 6, 2], np.int32),
    )
    rows = log.rows()
    # The segment 1 has no row: that of its next segment is known at the same time.
    assert log.segment[rows.segment].tolist() == [0, 2] and rows.target.tolist() == [5, 2]
    contexts = rows.contexts(np.arange(2), 3)
    assert contexts.code.tolist() == [[-1, -1, 5], [-1, 5, 6]] and contexts.length.tolist() == [[0, 0, 1], [0, 2, 2]]


@pytest.mark.parametrize("target", ["next", "change"])
def test_without_segments_there_are_no_rows(target: Target) -> None:
    empty = np.empty(0, np.int64)
    rows = Log(empty, empty, empty, empty, empty.astype(np.int32)).rows(target)
    assert len(rows) == 0 and rows.contexts(empty, 3).code.shape == (0, 3)
