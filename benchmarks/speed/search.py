"""Measure the five searches against the memory's bandwidth, and the recall of faster ones.

    python -m benchmarks.speed.search --out benchmarks/results/search.json

Bandwidth: histories of 10,000 visits, 8,000 of them short videos, vectors of 64 float16; the five searches of a batch
together, each returning 100. Counted are the bytes that they must read: of every visit the item's id and vector once,
of every video the author's id. They are compared with a copy of large arrays (STREAM's first kernel, bytes read and
written) on as many threads, and with reading the same vectors without any work on them, which no search can beat. The
vectors of a history are spread over those of the catalogue: the size of the catalogue and the popularity of its items
decide how many come from caches. Vectors are in memory as in a job: its own, or, where other processes load the data,
memory shared with them, which has large pages only if the administrator allows it
(``/sys/kernel/mm/transparent_hugepage/shmem_enabled``). Copy, bare reading and search alternate, and the fastest round
of each counts, since the machine may do other work.

Recall: short lists (``benchmarks/speed/shortlists.py``) against the exact search, for histories of 1,000, 10,000 and
100,000 visits to items of many topics, of which each user knows some. CPU time per candidate on one thread.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.measure import make_parser, write_result
from benchmarks.speed.shortlists import Clusters, HashCodes, Shortlist, top_of_shortlist
from modules.search import search as gsu
from modules.search.cpu_kernels import fetch
from modules.search.search import SearchPart, SearchVectors
from modules.threads import each_part
from trainer.console.text_table import text_table
from trainer.data.features.search_vectors import SearchSpace, SpaceTable

TARGET = 0.5
"""Share of the copy's bandwidth that the five searches aim at."""

VISITS, VIDEOS, LENGTH, DIM = 10_000, 8_000, 100, 64
AUTHORS, LONG_VIEWS = 200, 0.2
COPY_VALUES = 1 << 25
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
def _read_vectors(begin: int, end: int, items: np.ndarray, values: np.ndarray) -> None:
    base, row_bytes = values.ctypes.data, values.shape[1] * values.itemsize
    for at in range(begin, end):
        fetch(base, (items[at] + 1) * row_bytes, row_bytes)


def read_vectors(batch: SearchBatch) -> None:
    """Fetch every vector that the searches need, and do nothing with it."""
    values = batch.vectors.values.view(np.uint16)
    each_part(lambda begin, end: _read_vectors(begin, end, batch.items, values), len(batch.items))


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
    for catalogue, even, forked in itertools.product(catalogues, (False, True), (False, True)):
        batch = make_batch(users, catalogue, even, forked, seed=1)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            work: dict[str, Callable[[], Any]] = {
                "copy": partial(target.copy_, source),
                "read": partial(read_vectors, batch),
                "search": partial(five_searches, batch),
            }
            for each in work.values():
                each()
            seconds = dict.fromkeys(work, float("inf"))
            for _ in range(rounds):
                seconds = {name: min(seconds[name], seconds_of(each, threads)) for name, each in work.items()}
            copied = 2 * source.nbytes / seconds["copy"]
            searched = bytes_of(batch) / seconds["search"]
            results.append(
                {
                    "catalogue": catalogue,
                    "popularity": "even" if even else "zipf",
                    "memory": "shared" if forked else "own",
                    "threads": threads,
                    "copy_gb_s": copied / 1e9,
                    "read_gb_s": users * VISITS * DIM * 2 / seconds["read"] / 1e9,
                    "search_gb_s": searched / 1e9,
                    "share_of_copy": searched / copied,
                    "microseconds_per_user": seconds["search"] / users * 1e6,
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
        for name, search in searches.items():
            found = search()
            seconds = min(seconds_of(search, 1) for _ in range(repeats))
            results.append(
                {
                    "history": length,
                    "search": name,
                    "recall": len(np.intersect1d(found.at, exact.at)) / len(exact.at),
                    "microseconds": seconds / some * 1e6,
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
