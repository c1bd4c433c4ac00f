"""Both stores of recent codes against a plain definition, by the same tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.console.errors import UserError
from trainer.semantic_ids import redis_store, sqlite_store
from trainer.semantic_ids.code_store import CodeStore, RecentRuns, SegmentCodes, StoreSettings
from trainer.semantic_ids.store_address import open_store

OpenStore = Callable[..., CodeStore]
Segment = tuple[int, int, int, int]
"""Author, segment, code and time."""
Run = tuple[int, int, int, int]
"""Code, length, first and last time."""
GAP = 50


def codes(segments: Iterable[Segment]) -> SegmentCodes:
    columns = list(zip(*segments, strict=True)) or [(), (), (), ()]
    dtypes = (np.int64, np.int64, np.int32, np.int64)
    return SegmentCodes(*(np.array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)))


def by_row(found: RecentRuns) -> list[list[Run]]:
    ends = np.cumsum(found.counts).tolist()
    parts = (found.code, found.length, found.first_ms, found.last_ms)
    runs = list(zip(*(part.tolist() for part in parts), strict=True))
    return [runs[begin:end] for begin, end in pairwise([0, *ends])]


def read(store: CodeStore, rows: Sequence[tuple[int, int]], runs: int) -> list[list[Run]]:
    authors, times = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    return by_row(store.recent(authors, times, runs))


class PlainStore:
    """The definition: all segments in a dictionary, and no bounds."""

    def __init__(self) -> None:
        self.segments: dict[tuple[int, int], tuple[int, int]] = {}

    def append(self, segments: Iterable[Segment]) -> tuple[int, int, int]:
        """Return the numbers of new, repeated and conflicting segments."""
        counts = [0, 0, 0]
        for author, segment, code, known_ms in segments:
            new = (author, segment) not in self.segments
            there = self.segments.setdefault((author, segment), (known_ms, code))
            counts[0 if new else 1 if there == (known_ms, code) else 2] += 1
        stored, repeated, conflicting = counts
        return stored, repeated, conflicting

    def recent(self, author: int, as_of_ms: int, runs: int) -> list[Run]:
        visible = sorted(
            (known_ms, segment, code)
            for (of, segment), (known_ms, code) in self.segments.items()
            if of == author and known_ms <= as_of_ms
        )
        found: list[list[int]] = []
        for known_ms, _, code in visible:
            if found and found[-1][0] == code and known_ms - found[-1][3] <= GAP:
                found[-1][1] += 1
                found[-1][3] = known_ms
            else:
                found.append([code, 1, known_ms, known_ms])
        return [tuple(run) for run in found[-runs:]]  # type: ignore[misc]


SEGMENTS = st.tuples(
    st.sampled_from([0, 7, -(2**63), 2**63 - 1]),
    st.sampled_from([0, 1, 2, 3, 255, 2**32, 2**53 + 1, 2**53 + 2, -1, -(2**63), 2**63 - 1]) | st.integers(0, 40),
    st.sampled_from([0, 1, 2**31 - 1]),
    st.integers(0, 12).map(lambda step: 20 * step) | st.sampled_from([0, 1, 2**52]),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(calls=st.lists(st.lists(SEGMENTS, max_size=12), max_size=6), runs=st.integers(1, 5), data=st.data())
def test_reads_are_those_of_the_definition(
    new_store: OpenStore, calls: list[list[Segment]], runs: int, data: st.DataObject
) -> None:
    store, plain = new_store(gap_ms=GAP), PlainStore()
    for call in calls:
        assert tuple(store.append(codes(call))) == (*plain.append(call), 0)
    rows = data.draw(st.lists(st.tuples(SEGMENTS.map(lambda s: s[0]), SEGMENTS.map(lambda s: s[3])), min_size=1))
    assert read(store, rows, runs) == [plain.recent(author, as_of, runs) for author, as_of in rows]
    # Again, in another order: nothing changes.
    again = [segment for call in calls for segment in call][::-1]
    assert store.append(codes(again)).stored == 0
    assert read(store, rows, runs) == [plain.recent(author, as_of, runs) for author, as_of in rows]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(seed=st.integers(0, 2**32), runs_kept=st.integers(1, 6), segments_kept=st.integers(3, 60))
def test_a_bounded_store_answers_as_the_definition_or_refuses(
    new_store: OpenStore, seed: int, runs_kept: int, segments_kept: int
) -> None:
    random = np.random.default_rng(seed)
    store, plain = new_store(gap_ms=GAP, runs_kept=runs_kept, segments_kept=segments_kept), PlainStore()
    answers = 0
    for number in range(120):
        # Times grow, with some disorder, and some segments are known at one time.
        segment = (1, number, int(random.integers(0, 3)), max(0, 20 * (number // 2) - int(random.integers(0, 40))))
        counts = store.append(codes([segment]))
        assert counts in ((1, 0, 0, 0), (0, 0, 0, 1))
        # A late one is dropped for ever.
        if counts.stored:
            plain.append([segment])
        for as_of in (10 * number + 40, int(random.integers(0, 10 * number + 40))):
            runs = int(random.integers(1, runs_kept + 1))
            try:
                found = read(store, [(1, as_of)], runs)
            except UserError as error:
                assert "no longer kept" in str(error)
                assert len(plain.segments) > min(segments_kept, runs_kept)
            else:
                answers += 1
                assert found == [plain.recent(1, as_of, runs)]
    assert answers > 0


@pytest.mark.parametrize("long_runs", [1, 4])
def test_the_latest_runs_are_kept_and_old_segments_go(new_store: OpenStore, long_runs: int) -> None:
    store, plain = new_store(gap_ms=GAP, runs_kept=10), PlainStore()
    segments = [(5, n, n // long_runs, 20 * n) for n in range(400)]
    for segment in segments:
        store.append(codes([segment]))
    plain.append(segments)
    assert read(store, [(5, 20 * 400)], 10) == [plain.recent(5, 20 * 400, 10)]
    with pytest.raises(UserError, match=r"author 5 as of 2000: the last 10 runs need segments that are no longer kept"):
        read(store, [(5, 2000)], 10)
    assert store.append(codes([(5, 1, 1, 20)])).late == 1
    with pytest.raises(UserError, match="11 runs of an author are asked for; the store keeps 1 to 10"):
        read(store, [(5, 8000)], 11)


def test_one_run_without_end_is_bounded(new_store: OpenStore) -> None:
    store = new_store(gap_ms=GAP, runs_kept=4, segments_kept=20)
    for n in range(0, 200, 5):
        store.append(codes((1, place, 3, 20 * place) for place in range(n, n + 5)))
    with pytest.raises(UserError, match="no longer kept"):
        read(store, [(1, 10_000)], 4)
    store.append(codes([(1, 1000, 4, 20 * 200), (1, 1001, 5, 20 * 201)]))
    assert read(store, [(1, 10_000)], 2) == [[(4, 1, 4000, 4000), (5, 1, 4020, 4020)]]


def test_an_unknown_author_and_a_time_before_the_first_segment_have_no_code(new_store: OpenStore) -> None:
    store = new_store()
    store.append(codes([(1, 1, 4, 1000)]))
    assert read(store, [(2, 5000), (1, 999), (1, 1000)], 3) == [[], [], [(4, 1, 1000, 1000)]]
    none = np.empty(0, np.int64)
    assert by_row(store.recent(none, none, 3)) == []
    assert store.append(codes([])) == (0, 0, 0, 0)


def test_many_authors_are_written_and_read_in_parts(new_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_store, "CHUNK", 3)
    monkeypatch.setattr(sqlite_store, "READ_ROWS", 3)
    random, store, plain = np.random.default_rng(5), new_store(gap_ms=GAP), PlainStore()
    segments = [(n % 11, n, int(random.integers(0, 2)), 10 * n) for n in range(300)]
    assert tuple(store.append(codes(segments))) == (*plain.append(segments), 0)
    rows = [(author, 10 * as_of) for author in range(-1, 12) for as_of in (5, 150, 300)]
    assert read(store, rows, 7) == [plain.recent(author, as_of, 7) for author, as_of in rows]


def test_later_segments_change_nothing_that_was_read(new_store: OpenStore) -> None:
    """A run that goes on is cut to its length as of the time, bit for bit."""
    random = np.random.default_rng(3)
    store = new_store(gap_ms=100)
    times = np.cumsum(random.integers(10, 60, 200)).tolist()
    seen = []
    for segment, known_ms in enumerate(times):
        store.append(codes([(9, segment, int(random.integers(0, 2)), known_ms)]))
        seen.append(read(store, [(9, known_ms + 5)], 20)[0])
    assert read(store, [(9, known_ms + 5) for known_ms in times], 20) == seen


def test_another_version_and_other_settings_are_refused_by_name(new_place: Callable[[], str]) -> None:
    place = new_place()
    open_store(place, StoreSettings("codes-2024-03")).close()
    open_store(place, StoreSettings("codes-2024-03")).close()
    with pytest.raises(UserError, match="has codes of the codebook 'codes-2024-03', not 'codes-2024-04'"):
        open_store(place, StoreSettings("codes-2024-04"))
    with pytest.raises(UserError, match="has runs_kept 300, not 100"):
        open_store(place, StoreSettings("codes-2024-03", runs_kept=100))


def test_wrong_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="same length"):
        SegmentCodes(*(np.zeros(n, np.int64) for n in (1, 1, 1, 2)))
    with pytest.raises(ValueError, match="negative"):
        codes([(1, 1, -1, 5)])


def test_writers_at_once_store_every_segment_once(new_place: Callable[[], str]) -> None:
    place, plain = new_place(), PlainStore()
    store = open_store(place, StoreSettings("v1", gap_ms=GAP))
    segments = [(n % 3, n, n % 5, 7 * n) for n in range(240)]
    plain.append(segments)

    def write(worker: int) -> int:
        # Half of the segments are written by two workers.
        mine = [segment for segment in segments if segment[1] % 4 in (worker, (worker + 1) % 4)]
        own = open_store(place, StoreSettings("v1", gap_ms=GAP))
        stored = sum(own.append(codes(mine[begin : begin + 7])).stored for begin in range(0, len(mine), 7))
        own.close()
        return stored

    with ThreadPoolExecutor(4) as workers:
        assert sum(workers.map(write, range(4))) == len(segments)
    rows = [(author, as_of) for author in range(3) for as_of in (0, 500, 5000)]
    assert read(store, rows, 40) == [plain.recent(author, as_of, 40) for author, as_of in rows]
    store.close()


def test_a_writer_that_is_killed_and_started_again_leaves_nothing_out_or_double(
    new_place: Callable[[], str],
) -> None:
    place, plain = new_place(), PlainStore()
    segments = [(n % 4, n, n % 3, 11 * n) for n in range(2000)]
    plain.append(segments)
    open_store(place, StoreSettings("v1", gap_ms=GAP)).close()
    for calls in (1, 5, 30):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            store = open_store(place, StoreSettings("v1", gap_ms=GAP))
            for begin in range(0, len(segments), 10):
                store.append(codes(segments[begin : begin + 10]))
                os.write(writer, b".")
            os._exit(0)
        os.close(writer)
        # The child goes on while it is killed.
        done = sum(len(os.read(reader, 1)) for _ in range(calls))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        assert done == calls
    store = open_store(place, StoreSettings("v1", gap_ms=GAP))
    assert store.append(codes(segments[:300])).stored == 0, "a call that returned has stored its segments"
    store.append(codes(segments))
    rows = [(author, 11 * 2000) for author in range(4)]
    assert read(store, rows, 300) == [plain.recent(author, as_of, 300) for author, as_of in rows]
    store.close()
