"""Features of recent codes: replay and live give equal bits, and no later segment changes what was read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.semantic_ids.conftest import OpenStore
from tests.semantic_ids.segment_world import (
    SEGMENT_MS,
    START_MS,
    assigned,
    make_version,
    world_vectors,
    write_vectors,
    write_world,
)
from trainer.data.format.segment_codes import CodeFile
from trainer.semantic_ids.code_features import NO_CODE, RunFeatures, RunReader, run_features
from trainer.semantic_ids.code_files import CodesAsOf, append_codes
from trainer.semantic_ids.code_store import SegmentCodes
from trainer.semantic_ids.sqlite_store import SqliteCodeStore, StoreSettings

RUNS = 5


def features(reader: RunReader, as_of_ms: int) -> RunFeatures:
    authors = np.array([104, 100, 999, 103, 101, 102])
    return run_features(reader, authors, np.full(len(authors), as_of_ms), RUNS)


def assert_equal(one: RunFeatures, other: RunFeatures) -> None:
    for name in ("code", "length", "age_ms"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype and a.tolist() == b.tolist(), name
    assert one.no_code == other.no_code


def test_replay_live_and_files_give_equal_features(tmp_path: Path, new_store: OpenStore) -> None:
    """Replay reads a full store as of t; live reads a store that has only what was known until t."""
    version = make_version(tmp_path / "v", 4, 3)
    world = write_world(tmp_path / "world", segments=24)
    whole = assigned(version, world)
    full, live = new_store(version.name), new_store(version.name)
    assert append_codes(whole, full, version, quiet=True).stored == 240
    seen = 0
    for step in range(0, 25, 3):
        as_of_ms = START_MS + step * SEGMENT_MS
        seen += append_codes(assigned(version, world, as_of_ms + 1), live, version, quiet=True).stored
        assert seen == 10 * step
        replay = features(full, as_of_ms)
        assert_equal(replay, features(live, as_of_ms))
        assert_equal(replay, features(CodesAsOf(whole, version.numbers(whole.codes)), as_of_ms))
        # 999 is an author that nobody knows; before the first segment nobody has a code.
        assert replay.no_code == (1 if step else 6)
    assert (replay.length.sum(1) > 0).tolist() == [True, True, False, True, True, True]
    assert set(replay.code[2]) == {NO_CODE}


@pytest.mark.parametrize("later", ["changed", "removed", "more"])
def test_later_segments_change_nothing_that_is_read(later: str, tmp_path: Path) -> None:
    version = make_version(tmp_path / "v", 4, 3)
    world = write_world(tmp_path / "world", segments=24)
    before = assigned(version, world)
    as_of_ms = START_MS + 12 * SEGMENT_MS
    vectors, known = world_vectors(10, 24), np.tile(np.arange(24), 10) < 12
    if later == "removed":
        write_vectors(world, vectors[known], np.flatnonzero(known))
    elif later == "changed":
        vectors[~known] = world_vectors(10, 24, seed=5)[~known]
        write_vectors(world, vectors)
    else:
        write_world(world, segments=30)
        many = world_vectors(10, 30, seed=7).reshape(10, 30, -1)
        many[:, :12] = vectors.reshape(10, 24, -1)[:, :12]
        write_vectors(world, many.reshape(-1, 8))
    after = assigned(version, world)
    kept = {(item, time): code for item, time, code in zip(*_columns(before), strict=True) if time <= as_of_ms}
    again = {(item, time): code for item, time, code in zip(*_columns(after), strict=True) if time <= as_of_ms}
    assert kept == again and len(kept) == 120
    assert_equal(
        features(CodesAsOf(before, version.numbers(before.codes)), as_of_ms),
        features(CodesAsOf(after, version.numbers(after.codes)), as_of_ms),
    )


def _columns(codes: CodeFile) -> tuple[list[int], list[int], list[tuple[int, ...]]]:
    return codes.item_id.tolist(), codes.known_ms.tolist(), list(map(tuple, codes.codes.tolist()))


SEGMENT = st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(0, 2))


@settings(max_examples=25)
@given(st.lists(SEGMENT, max_size=40), st.lists(st.tuples(st.integers(-1, 4), st.integers(0, 31)), max_size=8))
def test_a_file_answers_as_a_store(
    tmp_path_factory: pytest.TempPathFactory, segments: list[tuple[int, int, int]], reads: list[tuple[int, int]]
) -> None:
    author, time, code = np.array(segments, np.int64).reshape(-1, 3).T
    number, known_ms = np.arange(len(author)), time * 10_000
    place = tmp_path_factory.mktemp("file") / "codes.sqlite"
    store = SqliteCodeStore(str(place), StoreSettings("v", gap_ms=50_000), 1.0)
    store.append(SegmentCodes(author, number, code.astype(np.int32), known_ms))
    file = CodeFile(place, "v", (3,), author, author, number, known_ms, code[:, None].astype(np.int32))
    in_memory = CodesAsOf(file, code.astype(np.int32), 50_000)
    authors, as_of = np.array(reads, np.int64).reshape(-1, 2).T
    for runs in (1, 2, 9):
        expected = store.recent(authors, as_of * 10_000, runs)
        found = in_memory.recent(authors, as_of * 10_000, runs)
        for name in ("counts", "code", "length", "first_ms", "last_ms"):
            assert getattr(found, name).tolist() == getattr(expected, name).tolist(), (name, runs)
        features = run_features(in_memory, authors, as_of * 10_000, runs)
        known = [
            [at for of_author, at, _ in segments if of_author == asked and at <= until]
            for asked, until in zip(authors.tolist(), as_of.tolist(), strict=True)
        ]
        ages = [
            10_000 * (until - max(times)) if times else -1 for times, until in zip(known, as_of.tolist(), strict=True)
        ]
        assert features.age_ms.tolist() == ages and features.no_code == ages.count(-1)
        # Runs are at the end of a line, so the latest ones are in one column.
        count = expected.counts.tolist()
        assert (features.length > 0).tolist() == [[place >= runs - n for place in range(runs)] for n in count]
        assert features.code[features.length > 0].tolist() == expected.code.tolist()
        assert (features.code[features.length == 0] == NO_CODE).all()
    store.close()
