"""Measure the five searches against the memory's bandwidth, and the recall of faster ones.

    python -m benchmarks.speed.search --out benchmarks/results/search.json

Bandwidth: histories of 10,000 visits, 8,000 of them short videos, vectors of 64 float16; the five searches of a batch
together, each returning 100. Counted are the bytes that they must read: of every visit the item's id and vector once,
of every video the author's id. They are compared with a copy of large arrays (STREAM's first kernel, bytes read and
written) on as many threads. The vectors of a history are spread over those of the catalogue: the size of the catalogue
and the popularity of its items decide how many come from caches.

Vectors are in memory of three kinds. ``own``: of one process, in large pages; threads share it. ``shared``: common to
processes, which has large pages only if the administrator allows it
(``/sys/kernel/mm/transparent_hugepage/shmem_enabled``). ``copies``: in large pages, and each thread has a copy of its
own, as each loader process of a job has where memory allows it.

More figures stand beside each search and say what bounds it, on as many threads and in the same memory. ``read``: both
cache lines of each vector are read, in the search's order and requested as far ahead, and nothing is done with them; no
search in this order can be faster. ``sort`` and ``sorted_read``: the entries of each user are sorted by groups of 512
small pages, and then read in this order. ``loop``: the same searches, with all vectors in the first-level cache, so
that no memory is waited for. Copy, reads and searches alternate, and the fastest round of each counts, since the
machine may do other work.

Recall: short lists (``benchmarks/speed/shortlists.py``) against the exact search, for histories of 1,000, 10,000 and
100,000 visits to items of many topics, of which each user knows some. CPU time per candidate on one thread.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.measure import make_parser, spread_of, write_result
from benchmarks.speed.shortlists import Clusters, HashCodes, Shortlist, top_of_shortlist
from modules.search import search as gsu
from modules.search.cpu_intrinsics import CACHE_LINE, GROUP
from modules.search.cpu_kernels import AHEAD, fetch
from modules.search.search import SearchPart, SearchVectors
from modules.threads import each_part
from trainer.console.text_table import text_table
from trainer.data.features.search_vectors import SearchSpace, SpaceTable

TARGET = 0.5
"""Share of the copy's bandwidth that the five searches aim at."""

VISITS, VIDEOS, LENGTH, DIM = 10_000, 8_000, 100, 64
AUTHORS, LONG_VIEWS = 200, 0.2
COPY_VALUES = 1 << 25
PAGES = 2 << 20
"""Bytes of a group of 512 small pages, whose places are in one page of the page table."""
RESIDENT = 100
"""Vectors that stay in the first-level cache."""
CATALOGUES = (100_000, 1_000_000)
HISTORIES = (1_000, 10_000, 100_000)


class SearchBatch(NamedTuple):
    """Flat histories of some users, of each user the videos and then the rooms, and a candidate for each user."""

    items: np.ndarray
    authors: np.ndarray
    bits: np.ndarray
    ordinal: np.ndarray
    first: np.ndarray
    stop: np.ndarray
    candidate: np.ndarray
    author: np.ndarray
    vectors: SearchVectors


def in_space(values: np.ndarray, forked: bool = False) -> np.ndarray:
    """Return a copy of vectors in memory of the kind that a job uses."""
    tables = {"item": SpaceTable(*values.shape)}
    copy = SearchSpace(tables, tables, values.dtype.name, refresh_steps=0, forked=forked).at(0)["item"]
    copy[:] = values
    return copy


def make_batch(users: int, catalogue: int, even: bool, forked: bool, seed: int) -> SearchBatch:
    """Return histories of items drawn evenly, or by Zipf's law, from a catalogue in random order."""
    rng = np.random.default_rng(seed)
    n = users * VISITS
    values = in_space(rng.standard_normal((catalogue + 1, DIM)).astype(np.float16), forked)
    values[0] = 0
    # By Zipf's law the logarithm of an item's rank is uniform.
    ranks = rng.integers(0, catalogue, n) if even else (catalogue ** rng.random(n)).astype(np.int64)
    items = rng.permutation(catalogue)[ranks % catalogue]
    starts = np.arange(users) * VISITS
    first = np.stack([starts, starts + VIDEOS], axis=1)
    order = np.tile(np.arange(VISITS), (users, 1))
    is_live = rng.permuted(order >= VIDEOS, axis=1)
    ordinal = np.concatenate([order[~is_live].reshape(users, -1), order[is_live].reshape(users, -1)], axis=1)
    return SearchBatch(
        items,
        rng.integers(0, AUTHORS, n),
        (rng.random(n) < LONG_VIEWS).astype(np.int32),
        ordinal.reshape(-1).astype(np.int32),
        first,
        np.stack([first[:, 1], starts + VISITS], axis=1),
        rng.integers(0, catalogue, users),
        rng.integers(0, AUTHORS, users),
        SearchVectors(values, shift=1),
    )


def five_searches(batch: SearchBatch) -> int:
    """Run all five searches for every user; return the number of entries that they found."""
    videos, rooms = ((batch.first[:, d].copy(), batch.stop[:, d].copy()) for d in range(2))
    part = SearchPart(batch.items, batch.candidate, batch.vectors)
    found = (
        gsu.latest(*videos, LENGTH),
        gsu.top(*videos, LENGTH, part),
        gsu.same_author(*videos, LENGTH, batch.authors, batch.author),
        gsu.top(*rooms, LENGTH, part),
        gsu.latest_of_all(batch.first, batch.stop, LENGTH, batch.ordinal, batch.bits, 1),
    )
    return sum(len(each.at) for each in found)


def bytes_of(batch: SearchBatch) -> int:
    """Return the bytes that the five searches must read."""
    users = len(batch.candidate)
    return users * (VISITS * (batch.items.itemsize + DIM * 2) + VIDEOS * batch.authors.itemsize)


@numba.njit(nogil=True)
def _read_vectors(begin: int, end: int, items: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    """Read a word of each cache line of entries' vectors; ``values`` are rows of uint64."""
    base, row_bytes = values.ctypes.data, values.shape[1] * values.itemsize
    total = np.uint64(0)
    for at in range(begin, end):
        fetch(base, (items[min(at + AHEAD * GROUP, end - 1)] + 1) * row_bytes, row_bytes)
        for word in range(0, values.shape[1], CACHE_LINE // 8):
            total ^= values[items[at] + 1, word]
    out[begin] = total


def read_vectors(batch: SearchBatch) -> None:
    """Read every vector that the searches need, and do nothing with it."""
    values, out = batch.vectors.values.view(np.uint64), np.empty(len(batch.items), np.uint64)
    each_part(lambda begin, end: _read_vectors(begin, end, batch.items, values, out), len(batch.items))


@numba.njit(nogil=True)
def _sort_by_pages(
    begin: int, end: int, visits: int, items: np.ndarray, row_bytes: int, groups: int, out: np.ndarray
) -> None:
    """Write the items of the users from ``begin`` to ``end``, those of each user in the order of :data:`PAGES`."""
    for user in range(begin, end):
        low, high = user * visits, (user + 1) * visits
        place = np.zeros(groups + 1, np.int64)
        for at in range(low, high):
            place[(items[at] + 1) * row_bytes // PAGES + 1] += 1
        for group in range(groups):
            place[group + 1] += place[group]
        for at in range(low, high):
            group = (items[at] + 1) * row_bytes // PAGES
            out[low + place[group]] = items[at]
            place[group] += 1


def sort_by_pages(batch: SearchBatch, out: np.ndarray) -> None:
    """Write the items in an order in which a user's vectors of one group of pages are read one after another."""
    users, values = len(batch.candidate), batch.vectors.values
    groups, row_bytes = values.nbytes // PAGES + 1, values.shape[1] * values.itemsize
    visits = len(batch.items) // users
    each_part(lambda begin, end: _sort_by_pages(begin, end, visits, batch.items, row_bytes, groups, out), users)


def part_of(batch: SearchBatch, begin: int, end: int) -> SearchBatch:
    """Return the batch of the users from ``begin`` to ``end``."""
    runs = {name: getattr(batch, name)[begin:end] for name in ("first", "stop")}
    moved = {name: rows - begin * VISITS for name, rows in runs.items()}
    entries = {
        name: getattr(batch, name)[begin * VISITS : end * VISITS] for name in ("items", "authors", "bits", "ordinal")
    }
    return batch._replace(**moved, **entries, candidate=batch.candidate[begin:end], author=batch.author[begin:end])


def with_copies(batch: SearchBatch, threads: int) -> list[SearchBatch]:
    """Return equal parts of a batch, each with a copy of the vectors."""
    edges = np.linspace(0, len(batch.candidate), threads + 1).astype(int).tolist()
    values, shift = batch.vectors
    return [
        part_of(batch, begin, end)._replace(vectors=SearchVectors(in_space(values), shift))
        for begin, end in itertools.pairwise(edges)
    ]


def on_copies(executor: Executor, job: Callable[[SearchBatch], Any], parts: Sequence[SearchBatch]) -> None:
    """Do a job on each part of a batch, in a thread for each, as loader processes do."""
    for _ in executor.map(job, parts):
        pass


def seconds_of(work: Callable[[], Any], threads: int) -> float:
    """Return CPU time on one thread, which other work on the machine hardly lengthens; otherwise elapsed time."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    begin = clock()
    work()
    return clock() - begin


def bandwidth(users: int, rounds: int, catalogues: Sequence[int]) -> list[dict[str, Any]]:
    """Return the rates for each size of the catalogue, popularity, kind of memory and number of threads."""
    source = torch.ones(COPY_VALUES)
    target = torch.empty_like(source)
    results = []
    # A loader process has one thread.
    executor = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))
    for catalogue, even, memory in itertools.product(catalogues, (False, True), ("own", "copies", "shared")):
        batch = make_batch(users, catalogue, even, memory == "shared", seed=1)
        by_page = batch._replace(items=np.empty_like(batch.items))
        sort_by_pages(batch, by_page.items)
        resident = batch._replace(items=batch.items % RESIDENT, candidate=batch.candidate % RESIDENT)
        for threads in (1, 2):
            if memory == "copies" and threads == 1:
                continue  # The copy of one process is its own memory.
            torch.set_num_threads(threads)
            work: dict[str, Callable[[], Any]] = {
                "copy": partial(target.copy_, source),
                "sort": partial(sort_by_pages, batch, np.empty_like(batch.items)),
            }
            jobs = {
                "read": (read_vectors, batch),
                "sorted_read": (read_vectors, by_page),
                "search": (five_searches, batch),
                "loop": (five_searches, resident),
            }
            for name, (job, of) in jobs.items():
                if memory == "copies":
                    work[name] = partial(on_copies, executor, job, with_copies(of, threads))
                else:
                    work[name] = partial(job, of)
            for each in work.values():
                each()
            runs = [{name: seconds_of(each, threads) for name, each in work.items()} for _ in range(rounds)]
            seconds = {name: min(run[name] for run in runs) for name in work}
            rates = {"copy": 2 * source.nbytes, "read": users * VISITS * DIM * 2, "search": bytes_of(batch)}
            rates |= {"sorted_read": rates["read"], "loop": rates["search"]}
            gb_s = {f"{name}_gb_s": size / seconds[name] / 1e9 for name, size in rates.items()}
            results.append(
                {
                    "catalogue": catalogue,
                    "popularity": "even" if even else "zipf",
                    "memory": memory,
                    "threads": threads,
                    **gb_s,
                    "share_of_copy": gb_s["search_gb_s"] / gb_s["copy_gb_s"],
                    "microseconds_per_user": seconds["search"] / users * 1e6,
                    "sort_microseconds_per_user": seconds["sort"] / users * 1e6,
                    "seconds": spread_of(runs),
                }
            )
    return results


def topical(users: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray, SearchPart]:
    """Return histories of items from 30 of 1,000 topics each, and candidates of a topic that their user knows."""
    rng = np.random.default_rng(seed)
    topics, catalogue = 1000, 200_000
    topic = rng.integers(0, topics, catalogue)
    centre = rng.standard_normal((topics, DIM))
    values = (centre[topic] + 0.8 * rng.standard_normal((catalogue, DIM))).astype(np.float16)
    values[0] = 0
    by_topic = np.argsort(topic, kind="stable")
    begins = np.searchsorted(topic[by_topic], np.arange(topics))
    sizes = np.bincount(topic, minlength=topics)
    known = rng.integers(0, topics, (users, 30))

    def items_of(chosen: np.ndarray) -> np.ndarray:
        return by_topic[begins[chosen] + (rng.random(chosen.shape) * sizes[chosen]).astype(np.int64)]

    items = items_of(np.take_along_axis(known, rng.integers(0, 30, (users, length)), axis=1)).reshape(-1)
    first = np.arange(users) * length
    return first, first + length, SearchPart(items, items_of(known[:, 0]), SearchVectors(in_space(values)))


def recall(users: int, repeats: int, histories: Sequence[int]) -> list[dict[str, Any]]:
    """Return the share of the exact 100 that each search finds, and its time."""
    torch.set_num_threads(1)
    results = []
    for length in histories:
        some = max(users * 1_000 // length, 8)
        first, stop, part = topical(some, length, seed=length)
        exact = gsu.top(first, stop, LENGTH, part)
        begin = time.process_time()
        clusters = Clusters.of(first, stop, part.column, part.vectors, size=20)
        clustering = (time.process_time() - begin) / some
        scaled = part.vectors.values * (127 / np.abs(part.vectors.values).max().astype(np.float32))
        int8 = part._replace(vectors=SearchVectors(in_space(np.rint(scaled).astype(np.int8))))
        codes = {bits: HashCodes.of(part.vectors, bits, seed=0) for bits in (64, 128, 256)}
        exactly = partial(gsu.top, first, stop, LENGTH)
        searches: dict[str, Callable[[], gsu.SearchResult]] = {
            "exact, float16": partial(exactly, part),
            "exact, int8": partial(exactly, int8),
        }
        for bits, own in codes.items():
            for oversample in (1, 4, 16):
                shortlist: Shortlist = own._replace(oversample=oversample)
                listed = partial(top_of_shortlist, first, stop, LENGTH, part, shortlist)
                searches[f"codes of {bits} bits, x{oversample}"] = listed
        for oversample in (1, 2, 4):
            shortlist = clusters._replace(oversample=oversample)
            listed = partial(top_of_shortlist, first, stop, LENGTH, part, shortlist)
            searches[f"clusters of 20, x{oversample}"] = listed
        found_by = {name: search() for name, search in searches.items()}
        runs = [{name: seconds_of(search, 1) for name, search in searches.items()} for _ in range(repeats)]
        spread = spread_of(runs)
        for name, found in found_by.items():
            results.append(
                {
                    "history": length,
                    "search": name,
                    "recall": len(np.intersect1d(found.at, exact.at)) / len(exact.at),
                    "microseconds": spread[name]["least"] / some * 1e6,
                    "seconds": spread[name],
                    "clustering_seconds_per_user": clustering if name.startswith("clusters") else None,
                }
            )
    return results


def report(document: dict[str, Any]) -> str:
    """Both tables."""
    rates = [
        [
            f"{row['catalogue']:,}",
            row["popularity"],
            row["memory"],
            str(row["threads"]),
            *(f"{row[name]:.2f}" for name in ("copy_gb_s", "read_gb_s", "search_gb_s")),
            f"{row['share_of_copy']:.2f}",
            f"{row['microseconds_per_user']:.0f}",
        ]
        for row in document["bandwidth"]
    ]
    found = [
        [f"{row['history']:,}", row["search"], f"{row['recall']:.3f}", f"{row['microseconds']:.0f}"]
        for row in document["recall"]
    ]
    names = ["items", "popularity", "memory", "threads", "copy GB/s", "bare GB/s", "five GB/s", "of copy", "µs a user"]
    return "\n\n".join([text_table(names, rates), text_table(["history", "search", "recall of 100", "µs"], found)])


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw recall over time, a panel for each length of the histories."""
    lengths = list(dict.fromkeys(row["history"] for row in rows))
    figure = Figure(figsize=(4 * len(lengths), 3.8), layout="constrained")
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)
    kinds = {"exact": "o", "codes": "s", "clusters": "^"}
    for panel, length in zip(panels[0], lengths, strict=True):
        for kind, marker in kinds.items():
            shown = [row for row in rows if row["history"] == length and row["search"].startswith(kind)]
            panel.scatter(
                [row["microseconds"] for row in shown], [row["recall"] for row in shown], marker=marker, label=kind
            )
        panel.set(xscale="log", title=f"{length:,} visits", xlabel="µs a candidate, one thread")
    panels[0, 0].set_ylabel(f"recall of the exact {LENGTH}")
    panels[0, 0].legend()
    figure.savefig(file, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("speed.search", __doc__)
    parser.add_argument("--users", type=int, default=64, help="users of a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="runs; the fastest counts (default: %(default)s)")
    parser.add_argument(
        "--catalogues", type=int, nargs="+", default=CATALOGUES, metavar="N", help="items (default: %(default)s)"
    )
    parser.add_argument(
        "--histories", type=int, nargs="+", default=HISTORIES, metavar="N", help="visits (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    document: dict[str, Any] = {
        "bandwidth": bandwidth(options.users, options.rounds, options.catalogues),
        "recall": recall(options.users, max(options.rounds // 4, 1), options.histories),
        "target_share_of_copy": TARGET,
        "settings": {"users": options.users, "visits": VISITS, "videos": VIDEOS, "length": LENGTH, "dim": DIM},
        "load_average": os.getloadavg()[0],
    }
    print(report(document))
    write_result(options.out, document)
    if options.out:
        draw(document["recall"], options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
