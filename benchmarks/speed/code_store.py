"""Measure the store of recent codes: appends and reads a second, and bytes, of SQLite and of Redis.

    python -m benchmarks.speed.code_store --out benchmarks/results/code_store.json
    python -m benchmarks.speed.code_store --redis redis://127.0.0.1:6379/9

Segments of many authors arrive as they become known, one of each author in a call; a twelfth of them has the code of
the segment before. Then the last 100 runs of authors are read, as of the end and as of earlier times. Redis is measured
when ``--redis`` names a server that may be written; its database must be empty. The stores are measured by turns,
``--repeats`` times around; the median counts, and the least and the largest show the spread. Seconds are elapsed time:
the server is another process. Processor seconds of this process stand beside them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import make_parser, median_and_range, median_of, write_result
from trainer.console.text_table import text_table
from trainer.semantic_ids.code_store import SegmentCodes, StoreSettings
from trainer.semantic_ids.store_address import open_store

SHORT = ("--scale", "10", "--repeats", "1")

AUTHORS, SEGMENTS, READS, RUNS, CODES = 2000, 150, 10_000, 100, 20_000
AUTHORS_OF_A_READ = 256
SAME_CODE = 1 / 12
"""Share of neighbouring segments with one code, as Foresight's table 3 has it for 20,000 codes."""
SEGMENT_MS = 30_000
TARGETS = {"sqlite": (50_000, 5_000), "redis": (30_000, 30_000)}
"""Appends and reads a second."""


def make_calls(authors: int, segments: int) -> list[SegmentCodes]:
    """Return one call for each 30 seconds, with a segment of each author."""
    random = np.random.default_rng(1)
    author = random.permutation(authors).astype(np.int64)
    code = random.integers(0, CODES, authors, np.int32)
    calls = []
    for number in range(segments):
        code = np.where(random.random(authors) < SAME_CODE, code, random.integers(0, CODES, authors, np.int32))
        known_ms = np.full(authors, (number + 1) * SEGMENT_MS) + random.integers(0, 5000, authors)
        calls.append(SegmentCodes(author, author * 1000 + number, code.astype(np.int32), known_ms))
    return calls


def clocked(work: Callable[[], object], number: int) -> dict[str, float]:
    """Run some work and return how many of a number it does a second."""
    begin, cpu = time.perf_counter(), time.process_time()
    work()
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
    return {"a_second": number / seconds, "a_processor_second": number / cpu_seconds}


def measure(place: str, scale: int) -> dict[str, Any]:
    """Fill a store and read it."""
    store = open_store(place, StoreSettings("benchmark"))
    authors, segments, reads = max(2, AUTHORS // scale), SEGMENTS, READS // scale
    calls = make_calls(authors, segments)
    result: dict[str, Any] = {"append": clocked(lambda: [store.append(call) for call in calls], authors * segments)}
    random = np.random.default_rng(2)
    end = int(calls[-1].known_ms.max())
    for name, earliest in (("read the latest", end), ("read earlier times", end * 9 // 10)):

        def read(earliest: int = earliest) -> None:
            for begin in range(0, reads, AUTHORS_OF_A_READ):
                n = min(AUTHORS_OF_A_READ, reads - begin)
                found = store.recent(random.integers(0, authors, n), random.integers(earliest, end + 1, n), RUNS)
                assert (found.counts == RUNS).all()

        result[name] = clocked(read, reads)
    store.close()
    return {"authors": authors, "segments": authors * segments, **result}


def measure_sqlite(scale: int) -> dict[str, Any]:
    """Fill a new file and read it."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "codes.sqlite"
        result = measure(str(file), scale)
        return {**result, "bytes_a_segment": file.stat().st_size / result["segments"]}


def measure_redis(url: str, scale: int) -> dict[str, Any]:
    """Fill an empty database of a server, read it, and empty it."""
    import redis

    client = redis.Redis.from_url(url)
    if client.dbsize():
        raise SystemExit(f"{url}: the database is not empty; name another number")
    empty = int(client.info("memory")["used_memory"])
    result = measure(url, scale)
    used = int(client.info("memory")["used_memory"]) - empty
    client.flushdb()
    return {**result, "bytes_a_segment": used / result["segments"]}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("speed.code_store", __doc__)
    parser.add_argument("--redis", metavar="URL", help="empty database of a Redis server")
    parser.add_argument("--scale", type=int, default=1, help="divide authors and reads by this (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved runs of each (default: %(default)s)")
    options = parser.parse_args(argv)
    ways: dict[str, Callable[[], dict[str, Any]]] = {"sqlite": lambda: measure_sqlite(options.scale)}
    if options.redis:
        ways["redis"] = lambda: measure_redis(options.redis, options.scale)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, measure_one in ways.items():
            runs[name].append(measure_one())
    stores = {name: median_of(of_store) for name, of_store in runs.items()}
    lines = []
    for name, store in stores.items():
        appends, reads = TARGETS[name]
        targets = {"append": appends, "read the latest": reads, "read earlier times": reads}
        cells = []
        for what, target in targets.items():
            rate = median_and_range([run[what]["a_second"] for run in store["runs"]])
            spread = f"{rate['least']:,.0f} to {rate['most']:,.0f}"
            cells.append(f"{rate['median']:,.0f} ({rate['median'] / target:.1f}; {spread})")
        lines.append([name, *cells, f"{store['bytes_a_segment']:.0f}"])
    header = ["store", "appends/s (of target; spread)", "latest reads/s", "earlier reads/s", "bytes a segment"]
    print(text_table(header, lines))
    write_result(options.out, {"runs": RUNS, "targets": TARGETS, "repeats": options.repeats, "stores": stores})


if __name__ == "__main__":
    main()
