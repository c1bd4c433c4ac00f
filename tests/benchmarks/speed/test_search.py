"""The benchmark of the searches runs, and its short lists agree with plain NumPy.

Both are tested here, since both compile the same kernels, which takes most of the time.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.speed import search as benchmark
from benchmarks.speed.shortlists import Clusters, HashCodes, top_of_shortlist
from modules.search import search
from modules.search.search import SearchPart, SearchResult, SearchVectors

N, RUNS = 3000, 4


def make(seed: int, groups: int = 12) -> tuple[np.ndarray, np.ndarray, SearchPart]:
    """Histories of items in groups that are alike, and a candidate of each."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((groups, 32))
    values = (centres[rng.integers(0, groups, 800)] + 0.4 * rng.standard_normal((800, 32))).astype(np.float16)
    values[0] = 0
    vectors = SearchVectors(values, shift=1)
    first = np.arange(RUNS) * (N // RUNS)
    part = SearchPart(rng.integers(-1, 799, N), rng.integers(0, 799, RUNS), vectors)
    return first, first + N // RUNS, part


def rows(found: SearchResult) -> list[list[int]]:
    return [each.tolist() for each in np.split(found.at, np.cumsum(found.lengths)[:-1])]


@pytest.mark.parametrize(("bits", "oversample"), [(64, 1), (192, 3)])
def test_codes_are_the_sides_of_planes_and_the_nearest_win(bits, oversample):
    first, stop, part = make(0)
    codes = HashCodes.of(part.vectors, bits, seed=3, oversample=oversample)
    assert codes.codes.shape == (800, bits // 64)
    planes = np.unpackbits(codes.codes.view(np.uint8), axis=1)
    expected = []
    for row in range(RUNS):
        items = part.vectors.rows(part.column[first[row] : stop[row]])
        apart = (planes[items] != planes[part.vectors.rows(part.candidate)[row]]).sum(axis=1)
        nearest = np.lexsort((-np.arange(len(items)), apart))[: 20 * oversample]
        expected.append(sorted((first[row] + nearest).tolist()))
    assert rows(codes.shortlist(first, stop, 20, part)) == expected
    found = top_of_shortlist(first, stop, 20, part, codes)
    exact = search.top(first, stop, 20, part)
    assert all(set(mine) <= set(listed) for mine, listed in zip(rows(found), expected, strict=True))
    recall = len(np.intersect1d(found.at, exact.at)) / len(exact.at)
    assert recall > 0.2


@pytest.mark.parametrize("length", [1, 2, 5])
def test_codes_of_runs_of_every_small_size(length):
    """Runs of 0 to 150 entries: shorter than the list, as long, one longer, and beyond the buffer of best entries."""
    rng = np.random.default_rng(length)
    sizes = np.array([*range(30), *range(60, 151)])
    stop = np.cumsum(sizes)
    first = stop - sizes
    values = np.concatenate([np.zeros((1, 16)), rng.standard_normal((40, 16))]).astype(np.float16)
    part = SearchPart(rng.integers(0, 40, stop[-1]), rng.integers(0, 40, len(sizes)), SearchVectors(values, shift=1))
    codes = HashCodes.of(part.vectors, 64, seed=1, oversample=1)
    bits = np.unpackbits(codes.codes.view(np.uint8), axis=1)
    wanted = bits[part.vectors.rows(part.candidate)]
    listed = rows(codes.shortlist(first, stop, length, part))
    for run, (low, high) in enumerate(zip(first.tolist(), stop.tolist(), strict=True)):
        apart = (bits[part.vectors.rows(part.column[low:high])] != wanted[run]).sum(axis=1)
        nearest = np.lexsort((-np.arange(high - low), apart))[:length]
        assert listed[run] == sorted((low + nearest).tolist()), f"a run of {high - low}"


@pytest.mark.parametrize("size", [1, 20, 10_000])
def test_every_entry_is_in_one_cluster_with_its_mean(size):
    first, stop, part = make(1)
    clusters = Clusters.of(first, stop, part.column, part.vectors, size)
    np.testing.assert_array_equal(np.sort(clusters.members), np.arange(N))
    lengths = np.diff(clusters.member)
    assert lengths.min() > 0 and lengths.max() <= size
    values = part.vectors.values[part.vectors.rows(part.column)].astype(np.float32)
    for run in range(RUNS):
        for each in range(clusters.cluster[run], clusters.cluster[run + 1]):
            mine = clusters.members[clusters.member[each] : clusters.member[each + 1]]
            assert (np.diff(mine) > 0).all() and first[run] <= mine[0] and mine[-1] < stop[run]
            np.testing.assert_allclose(clusters.means[each], values[mine].mean(axis=0), atol=2e-3)


def test_clusters_do_not_depend_on_the_scale_of_the_vectors():
    first, stop, part = make(9)
    whole = Clusters.of(first, stop, part.column, part.vectors, 15)
    # A power of two is exact.
    small = SearchVectors(part.vectors.values / np.float16(64), part.vectors.shift)
    found = Clusters.of(first, stop, part.column, small, 15)
    for name in ("cluster", "member", "members"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))


def test_the_best_clusters_are_listed_with_what_came_since():
    first, stop, part = make(2)
    until = stop - 100
    clusters = Clusters.of(first, until, part.column, part.vectors, 15, oversample=2)
    listed = rows(clusters.shortlist(first, stop, 30, part))
    query = part.vectors.values[part.vectors.rows(part.candidate)].astype(np.float32)
    for run in range(RUNS):
        mine = range(clusters.cluster[run], clusters.cluster[run + 1])
        order = np.argsort(-(clusters.means[mine.start : mine.stop].astype(np.float32) @ query[run]))
        expected: list[int] = []
        for each in mine.start + order:
            if len(expected) >= 60:
                break
            expected += clusters.members[clusters.member[each] : clusters.member[each + 1]].tolist()
        assert listed[run] == [*sorted(expected), *range(until[run], stop[run])]
    exact, found = search.top(first, stop, 30, part), top_of_shortlist(first, stop, 30, part, clusters)
    assert len(np.intersect1d(found.at, exact.at)) / len(exact.at) > 0.6


def test_long_enough_lists_are_exact():
    first, stop, part = make(3)
    exact = search.top(first, stop, 25, part)
    for shortlist in (
        HashCodes.of(part.vectors, 64, seed=0, oversample=N),
        Clusters.of(first, stop, part.column, part.vectors, 20, oversample=N),
    ):
        found = top_of_shortlist(first, stop, 25, part, shortlist)
        assert (found.at.tolist(), found.lengths.tolist()) == (exact.at.tolist(), exact.lengths.tolist())


def test_clusters_made_of_the_future_are_not_used():
    """A run that is read as of a time before it was clustered is searched exactly, whatever its clusters hold."""
    first, stop, part = make(4)
    clusters = Clusters.of(first, stop, part.column, part.vectors, 20, oversample=1)
    before = stop - np.array([1, 50, 400, 0])
    found, exact = top_of_shortlist(first, before, 25, part, clusters), search.top(first, before, 25, part)
    assert rows(found)[:3] == rows(exact)[:3]
    # The limit on a history's length has moved on: what lies before is not listed.
    later = first + 300
    listed = rows(clusters.shortlist(later, stop, 25, part))
    assert all(min(mine) >= low for mine, low in zip(listed, later.tolist(), strict=True))


def test_runs_of_others_have_no_clusters():
    first, stop, part = make(5)
    clusters = Clusters.of(first[1:2], stop[1:2], part.column, part.vectors, 20, oversample=1)
    found, exact = top_of_shortlist(first, stop, 25, part, clusters), search.top(first, stop, 25, part)
    assert [rows(found)[run] == rows(exact)[run] for run in (0, 2, 3)] == [True] * 3
    empty = np.zeros(0, np.int64)
    none = Clusters.of(empty, empty, part.column, part.vectors, 20)
    assert rows(top_of_shortlist(first, stop, 25, part, none)) == rows(exact)


def test_a_run_of_as_many_entries_as_a_cluster_holds_is_one_cluster():
    first, stop, part = make(6)
    clusters = Clusters.of(first, stop, part.column, part.vectors, N // RUNS)
    assert clusters.cluster.tolist() == list(range(RUNS + 1))
    smaller = Clusters.of(first, stop, part.column, part.vectors, N // RUNS - 1)
    assert (np.diff(smaller.cluster) == 2).all()


def test_clusters_of_one_entry_list_as_many_as_are_wanted():
    """A run that is clustered up to its end uses its clusters, and no cluster follows when enough are listed."""
    first, stop, part = make(7)
    clusters = Clusters.of(first, stop, part.column, part.vectors, 1, oversample=2)
    listed = clusters.shortlist(first, stop, 30, part)
    assert listed.lengths.tolist() == [60] * RUNS
    later = clusters.shortlist(first, stop + np.array([0, 0, 0, -1]), 30, part)
    assert later.lengths.tolist() == [60, 60, 60, N // RUNS - 1], "one that ends before its clusters is listed whole"


def test_a_list_begins_with_the_first_entry_of_a_run_that_moved_on():
    first, stop, part = make(8)
    clusters = Clusters.of(first, stop, part.column, part.vectors, 20, oversample=N)
    moved = first + 7
    assert rows(clusters.shortlist(moved, stop, 25, part)) == [
        list(range(low, high)) for low, high in zip(moved.tolist(), stop.tolist(), strict=True)
    ]


def test_the_oldest_and_the_newest_entry_can_be_the_nearest():
    vectors = SearchVectors(np.concatenate([np.zeros((1, 16)), np.ones((1, 16)), -np.ones((1, 16))]).astype(np.float16))
    codes = HashCodes.of(vectors, 64, seed=0, oversample=1)
    first, stop = np.array([0, 40]), np.array([40, 60])
    column = np.full(60, 2)
    column[[0, 39, 40, 59]] = 1
    part = SearchPart(column, np.array([1, 1]), vectors)
    assert rows(codes.shortlist(first, stop, 2, part)) == [[0, 39], [40, 59]]
    # Of equal codes the later ones; a run that is not longer than the list is listed whole.
    assert rows(codes.shortlist(first, stop, 3, part)) == [[0, 38, 39], [40, 58, 59]]
    assert rows(codes.shortlist(first, stop, 20, part))[1] == list(range(40, 60))


@pytest.mark.parametrize("bits", [0, 100])
def test_codes_of_other_lengths_are_refused(bits):
    with pytest.raises(ValueError, match="multiple of 64"):
        HashCodes.of(make(0)[2].vectors, bits, seed=0)


@pytest.mark.parametrize("threads", [1, 2])
def test_entries_are_sorted_by_pages_for_each_user(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "VISITS", 500)
    monkeypatch.setattr(benchmark, "VIDEOS", 400)
    batch = benchmark.make_batch(3, 70_000, even=True, forked=False, seed=1)
    found = np.empty_like(batch.items)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    benchmark.sort_by_pages(batch, found)
    torch.set_num_threads(before)
    groups = (batch.items + 1) * 128 // benchmark.PAGES
    assert len(set(groups.tolist())) == 5
    for user in range(3):
        own = slice(user * 500, (user + 1) * 500)
        order = np.argsort(groups[own], kind="stable")
        np.testing.assert_array_equal(found[own], batch.items[own][order])


def test_parts_of_a_batch_with_copies_find_the_same_entries() -> None:
    batch = benchmark.make_batch(5, 3000, even=False, forked=False, seed=2)
    parts = benchmark.with_copies(batch, 2)
    assert [len(part.candidate) for part in parts] == [2, 3]
    whole = search.top(
        batch.first[:, 0].copy(), batch.stop[:, 0].copy(), 7, SearchPart(batch.items, batch.candidate, batch.vectors)
    )
    joined = []
    for part, user in zip(parts, (0, 2), strict=True):
        runs = (part.first[:, 0].copy(), part.stop[:, 0].copy())
        found = search.top(*runs, 7, SearchPart(part.items, part.candidate, part.vectors))
        joined += (found.at + user * benchmark.VISITS).tolist()
        assert not np.shares_memory(part.vectors.values, batch.vectors.values)
    assert joined == whole.at.tolist()


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "search.json"
    benchmark.main(["--users=2", "--rounds=1", "--catalogues", "2000", "--histories", "300", "500", f"--out={out}"])
    written = json.loads(out.read_text())
    # One catalogue by two popularities: two kinds of memory by two numbers of threads, and copies of two processes.
    assert len(written["bandwidth"]) == 10
    for row in written["bandwidth"]:
        assert row["share_of_copy"] == pytest.approx(row["search_gb_s"] / row["copy_gb_s"])
        names = ("read_gb_s", "sorted_read_gb_s", "loop_gb_s", "microseconds_per_user", "sort_microseconds_per_user")
        assert all(row[name] > 0 for name in names)
    recall = {(row["history"], row["search"]): row["recall"] for row in written["recall"]}
    assert {history for history, _ in recall} == {300, 500}
    for history in (300, 500):
        assert recall[history, "exact, float16"] == 1
        assert recall[history, "codes of 256 bits, x16"] == 1, "a list of the whole history is exact"
        assert 0.1 < recall[history, "codes of 64 bits, x1"] <= recall[history, "codes of 64 bits, x4"] <= 1
    assert out.with_suffix(".png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "recall of 100" in printed and "2,000" in printed
