"""Reads of the cache: the latest vector and the mean as of a time, against a plain definition, while it is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.semantic_ids.cached_segments import (
    DIM,
    Row,
    append,
    entries_of,
    open_cache,
    vectors_of,
)
from trainer.data.format.content_vectors import ContentVectors
from trainer.semantic_ids.vector_cache_reader import CachedVectors

segments = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 200)), min_size=1, max_size=25)
"""Author and time of each segment, in the order in which they are appended."""


def rows_of(drawn: list[tuple[int, int]]) -> list[Row]:
    return [(author, number, 0, known_ms) for number, (author, known_ms) in enumerate(drawn)]


@given(segments, st.data())
def test_reads_are_those_of_a_plain_definition_and_know_no_future(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[int, int]], data: st.DataObject
) -> None:
    rows, folder = rows_of(drawn), tmp_path_factory.mktemp("reads")
    read_after = data.draw(st.integers(0, len(rows)))
    with open_cache(folder) as cache:
        reader = None
        for number, row in enumerate(rows):
            if number == read_after:
                # Reads between the records must not change the answers of later ones.
                reader = CachedVectors(folder)
                reader.mean(np.arange(4), np.full(4, 300))
            append(cache, [row])
        reader = reader or CachedVectors(folder)
        reader.refresh()
    entries = entries_of(rows)
    vectors = vectors_of(entries)
    as_of = np.array(data.draw(st.lists(st.integers(-1, 210), min_size=4, max_size=4)))
    latest, mean = reader.latest(np.arange(4), as_of), reader.mean(np.arange(4), as_of)
    for author in range(4):
        seen = sorted(
            (at for at, row in enumerate(rows) if row[0] == author and row[3] <= as_of[author]),
            key=lambda at: (rows[at][3], entries["id"][at]),
        )
        assert mean.counts[author] == len(seen)
        if not seen:
            assert (latest.segment[author], latest.known_ms[author]) == (-1, -1) and not latest.vectors[author].any()
            continue
        assert latest.segment[author] == entries["id"][seen[-1]] and latest.known_ms[author] == rows[seen[-1]][3]
        np.testing.assert_array_equal(latest.vectors[author], vectors[seen[-1]])
        expected = np.cumsum(vectors[seen].astype(np.float64), axis=0)[-1] / len(seen)
        np.testing.assert_array_equal(mean.vectors[author], expected.astype(np.float32))
    # Segments that become known later change no bit.
    earlier = folder.parent / f"{folder.name}-earlier"
    with open_cache(earlier) as cache:
        for row in rows:
            if row[3] <= as_of[row[0]]:
                append(cache, [row])
    with CachedVectors(earlier) as alone:
        np.testing.assert_array_equal(alone.latest(np.arange(4), as_of).vectors, latest.vectors)
        np.testing.assert_array_equal(alone.mean(np.arange(4), as_of).vectors, mean.vectors)
    reader.close()


def test_a_reader_sees_new_records_and_parts_and_outlives_removed_ones(tmp_path: Path) -> None:
    with open_cache(tmp_path, keep_ms=24_000) as cache:
        append(cache, [(1, 10, 0, 0)])
        with CachedVectors(tmp_path) as reader:
            for number in range(1, 200):
                append(cache, [(1, 10, number, 1000 * number)])
                if number % 7 == 0:
                    reader.refresh()
                    latest = reader.latest(np.array([1]), np.array([10**9]))
                    assert latest.segment.tolist() == [10 * 65_536 + number]
                    assert reader.mean(np.array([1]), np.array([10**9])).counts.tolist() == [number + 1]
            assert len(reader) < 60


def test_a_cache_becomes_a_table_of_content_vectors(tmp_path: Path) -> None:
    rows = [(author, 10 + author, number, 1000 * number) for number in range(5) for author in (2, 0, 1)]
    with open_cache(tmp_path / "cache") as cache:
        for row in rows:
            append(cache, [row])
    with CachedVectors(tmp_path / "cache") as reader:
        written = reader.write_table(tmp_path / "table")
        assert written.origin == reader.settings.origin
    table = ContentVectors.open(tmp_path / "table")
    entries = entries_of(rows)
    order = np.argsort(entries["id"])
    assert table.ids.tolist() == entries["id"][order].tolist() and set(table.texts.tolist()) == {7}
    np.testing.assert_array_equal(table.vectors, vectors_of(entries)[order])
    assert table.dim == DIM


def test_an_empty_cache_has_no_vectors(tmp_path: Path) -> None:
    open_cache(tmp_path).close()
    with CachedVectors(tmp_path) as reader:
        assert len(reader) == 0 and reader.mean(np.array([3]), np.array([5])).counts.tolist() == [0]
        assert len(reader.write_table(tmp_path / "table")) == 0
