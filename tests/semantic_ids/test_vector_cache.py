"""The cache of segment vectors: appends, position, retention, and sums of what was removed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.full_disk import files_of_at_most
from tests.semantic_ids.cached_segments import (
    DIM,
    KEEP_MS,
    SETTINGS,
    append,
    content,
    entries_of,
    open_cache,
    vectors_of,
)
from trainer.console.errors import UserError
from trainer.data.format.content_vectors import Origin
from trainer.semantic_ids import vector_cache
from trainer.semantic_ids.vector_cache import AuthorSums, VectorCache
from trainer.semantic_ids.vector_cache_parts import CachePart, CacheRecord, CacheSettings, part_files
from trainer.semantic_ids.vector_cache_reader import CachedVectors


def test_records_position_and_segments_are_there_after_opening_again(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        assert append(cache, [(1, 10, 0, 1000), (2, 11, 0, 1001)], {"a": [1], "b": [2]}) == 1
        assert append(cache, [(1, 10, 1, 31_000)], {"a": [5], "b": [2]}) == 2
        assert append(cache, [], {"a": [9]}) == 3
        before = content(cache)
    with open_cache(tmp_path) as cache:
        assert (cache.sequence, cache.newest_ms, cache.position) == (3, 31_000, {"a": [9]})
        assert cache.note == {"codebook": "v"}
        assert content(cache) == before and len(before) == 3
        assert [cache.has(room * 65_536 + segment) for room, segment in ((10, 0), (10, 1), (10, 2), (12, 0))] == [
            *(True, True, False, False)
        ]
        assert [record.sequence for record, _ in cache.records(1)] == [2, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (CacheSettings(4, "float32", SETTINGS.origin), "dim = 3, these have 4"),
        (CacheSettings(DIM, "float16", SETTINGS.origin), "dtype = float32, these have float16"),
        (CacheSettings(DIM, "float32", Origin(model="n", hash="other")), "another model"),
    ],
)
def test_other_vectors_are_refused_by_name(tmp_path: Path, settings: CacheSettings, message: str) -> None:
    open_cache(tmp_path).close()
    with pytest.raises(UserError, match=message):
        VectorCache(tmp_path, settings, KEEP_MS)


def test_a_full_disk_leaves_the_cache_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_cache(tmp_path) as cache:
        append(cache, [(1, 10, 0, 1000)])
        before = part_files(tmp_path)[0][1].read_bytes()

        def full(descriptor: int) -> None:
            raise OSError(28, os.strerror(28))

        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", full)
            with pytest.raises(UserError, match="a record cannot be written"):
                append(cache, [(1, 10, 1, 31_000)])
        assert part_files(tmp_path)[0][1].read_bytes() == before and cache.sequence == 1
        append(cache, [(1, 10, 1, 31_000)])
    with open_cache(tmp_path) as cache:
        assert cache.sequence == 2


def test_a_record_for_which_the_disk_has_no_room_is_not_stored(tmp_path: Path) -> None:
    """A write that ends short is no error by itself; the next record would follow a torn one."""
    with open_cache(tmp_path) as cache:
        append(cache, [(1, 10, 0, 1000)], {"a": [1]})
        before = part_files(tmp_path)[0][1].read_bytes()
        with (
            files_of_at_most(len(before) + 100),
            pytest.raises(UserError, match=r"cannot be written \(File too large\)"),
        ):
            append(cache, [(1, 10, 1, 31_000)], {"a": [2]})
        assert part_files(tmp_path)[0][1].read_bytes() == before and cache.sequence == 1
        append(cache, [(1, 10, 1, 31_000)], {"a": [2]})
    with open_cache(tmp_path) as cache:
        assert (cache.sequence, cache.position) == (2, {"a": [2]})


def test_old_parts_go_and_stay_in_the_mean(tmp_path: Path) -> None:
    rows = [(author, 10 + author, number, 1000 * number + author) for number in range(100) for author in range(3)]
    with open_cache(tmp_path, keep_ms=24_000) as cache:
        for first in range(0, len(rows), 3):
            append(cache, rows[first : first + 3], {"place": first})
    kept = [path for _, path in part_files(tmp_path)]
    assert len(kept) <= vector_cache.PARTS_KEPT + 3
    with CachedVectors(tmp_path) as reader:
        assert len(reader) < 90
        mean = reader.mean(np.arange(3), np.full(3, 10**6))
        assert mean.counts.tolist() == [100, 100, 100]
        for author in range(3):
            vectors = vectors_of(entries_of([row for row in rows if row[0] == author]))
            np.testing.assert_allclose(mean.vectors[author], vectors.mean(axis=0), atol=1e-6)
        for read in (reader.mean, reader.latest):
            with pytest.raises(UserError, match="are not kept any more; read a later time"):
                read(np.array([0]), np.array([10_000]))
    with open_cache(tmp_path, keep_ms=24_000) as cache:
        assert (cache.sequence, cache.position) == (100, {"place": 297})


def test_the_sums_of_all_authors_are_copied_once_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy for each record of a part would stop the job for minutes, and then it would drop segments."""
    copies: list[int] = []
    plus = AuthorSums.plus

    def counted(self: AuthorSums, part: CachePart, records: Sequence[CacheRecord]) -> AuthorSums:
        copies.append(len(records))
        return plus(self, part, records)

    monkeypatch.setattr(AuthorSums, "plus", counted)
    # Authors in an order that is not that of their numbers, and with two segments in a record.
    rows = [(number * 7 % 5, number % 5, number, 2 * number) for number in range(1800)]
    with open_cache(tmp_path, keep_ms=2_400) as cache:
        for first in range(0, len(rows), 6):
            append(cache, rows[first : first + 6])
    sums = AuthorSums.read(tmp_path, DIM)
    removed = rows[: 6 * sums.sequence]
    assert len(removed) > 500 and sum(copies) == sums.sequence > 3 * len(copies)
    total = np.zeros((5, DIM))
    for row, vector in zip(removed, vectors_of(entries_of(removed)), strict=True):
        total[row[0]] += vector
    assert sums.author.tolist() == [*range(5)] and sums.sum.tobytes() == total.tobytes()
    assert sums.count.tolist() == [sum(row[0] == author for row in removed) for author in range(5)]
    assert sums.removed_ms.tolist() == [max(row[3] for row in removed if row[0] == author) for author in range(5)]


def test_a_kill_between_the_sums_and_the_removal_counts_no_segment_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".bin":
            raise Killed
        os.unlink(self)

    rows = [(1, 10, number, 1000 * number) for number in range(100)]
    done = 0
    for _ in range(50):
        with open_cache(tmp_path, keep_ms=24_000) as cache, monkeypatch.context() as patched:
            assert cache.sequence == done
            patched.setattr(Path, "unlink", killed)
            try:
                for row in rows[done:]:
                    append(cache, [row])
                    done += 1
            except Killed:
                pass
    with open_cache(tmp_path, keep_ms=24_000) as cache:
        for row in rows[done:]:
            append(cache, [row])
    with CachedVectors(tmp_path) as reader:
        mean = reader.mean(np.array([1]), np.array([10**6]))
    assert mean.counts.tolist() == [100]
    np.testing.assert_allclose(mean.vectors[0], vectors_of(entries_of(rows)).mean(axis=0), atol=1e-6)


def test_the_latest_segments_begin_after_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_cache, "LATEST_SEGMENTS", 5)
    with open_cache(tmp_path) as cache:
        for number, expected in enumerate((0, 0, 0, 1, 2), 1):
            append(cache, [(author, author, number, 1000 * number) for author in range(2)])
            append(cache, [])
            assert cache.sequence_before_latest == (2 * expected if expected else 0)
            latest = sum(len(record.entries) for record, _ in cache.records(cache.sequence_before_latest))
            assert latest == min(6, 2 * number)
    with open_cache(tmp_path) as cache:
        assert cache.sequence_before_latest == 4


def test_only_changes_of_the_position_are_written(tmp_path: Path) -> None:
    files = {f"room-{number}.jsonl": [number, 1] for number in range(1000)}
    with open_cache(tmp_path) as cache:
        append(cache, [(1, 1, 0, 0)], files)
        size = part_files(tmp_path)[0][1].stat().st_size
        changed = {**files, "room-7.jsonl": [99, 1]}
        del changed["room-8.jsonl"]
        append(cache, [(1, 1, 1, 0)], changed)
        assert part_files(tmp_path)[0][1].stat().st_size < size + 400
    with open_cache(tmp_path) as cache:
        assert cache.position == changed
