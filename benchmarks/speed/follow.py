"""Measure how many rooms ``limelight embed --follow`` keeps up with, and the lag of their segments.

    python -m benchmarks.speed.follow --out benchmarks/results/follow.json

Rooms are on air for some minutes, each with a segment every 30 seconds, evenly spread. The loop is the real one, with a
small random model, a codebook, the cache and an SQLite store on disk. Its clock leaves out the waiting: it goes on by
the time of the work, and jumps over every pause. So an hour of few rooms takes as long as its work. One thread. All
numbers of rooms run one after another, ``--repeats`` times around; the median counts, and the least and the largest
show the spread.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import make_parser, median_and_range, median_of, write_result
from modules.codebook import Codebook
from trainer.config.finetune import SmallConfig
from trainer.console.text_table import text_table
from trainer.data.format.content_vectors import Origin
from trainer.llm.embedding.segment_encoder import TextSegmentEncoder
from trainer.llm.embedding.text_encoder import Encoder
from trainer.llm.models.base_model import BaseModelFiles
from trainer.llm.models.prompt_templates import Template
from trainer.llm.models.small_model import write_small_model
from trainer.semantic_ids.code_store import StoreSettings
from trainer.semantic_ids.codebook_version import FittedVectors, write_version
from trainer.semantic_ids.follow import CodeTarget, Follower, FollowSettings, StopRequest
from trainer.semantic_ids.segment_source import SEGMENT_MS, Clock, LiveSegment, SourceBatch
from trainer.semantic_ids.store_address import open_store
from trainer.semantic_ids.vector_cache import VectorCache
from trainer.semantic_ids.vector_cache_parts import CacheSettings

LENGTH, TOKENS, BATCH = 128, 16_384, 16
WORDS = 400
CODES = 4096


class BusyClock(Clock):
    """Clock that goes on by the time of work, and jumps over pauses."""

    def __init__(self) -> None:
        self._skipped = 0.0

    def time(self) -> float:
        """Return the seconds since 1970, with the pauses that were left out."""
        return time.time() + self._skipped

    def monotonic(self) -> float:
        """Return the seconds of a clock that is never set, with the pauses that were left out."""
        return time.monotonic() + self._skipped

    def sleep(self, seconds: float) -> None:
        """Leave out a pause."""
        self._skipped += seconds


class RoomsOnAir:
    """Source of the segments of rooms on air.

    Args:
        rooms: number of rooms.
        minutes: time for which they are on air.
        clock: clock.
    """

    def __init__(self, rooms: int, minutes: float, clock: Clock) -> None:
        self._clock, self._rooms = clock, rooms
        self._began_ms = clock.time() * 1000
        self._total, self._taken = round(rooms * minutes * 60_000 / SEGMENT_MS), 0
        random = np.random.default_rng(1)
        self._texts = [" ".join(f"word{one}" for one in random.integers(0, WORDS, 25)) for _ in range(1000)]

    @property
    def finished(self) -> bool:
        """True after the last segment."""
        return self._taken == self._total

    def take(self, limit: int, timeout: float) -> SourceBatch:
        """Return the segments that have become known."""
        until = self._clock.monotonic() + timeout
        while not self.finished and (left := until - self._clock.monotonic()) > 0:
            wait = (self._known_ms(self._taken) / 1000) - self._clock.time()
            if wait <= 0:
                break
            self._clock.sleep(min(wait, left))
        batch, now_ms = SourceBatch({}), self._clock.time() * 1000
        while not self.finished and len(batch.segments) < limit and self._known_ms(self._taken) <= now_ms:
            number, room = divmod(self._taken, self._rooms)
            known_ms = self._known_ms(self._taken)
            text = self._texts[self._taken % len(self._texts)]
            batch.segments.append(LiveSegment(room, room, number, int(known_ms), text, arrived_ms=round(known_ms)))
            self._taken += 1
        batch.position = {"taken": self._taken}
        return batch

    def close(self) -> None:
        """Nothing to release."""

    def _known_ms(self, number: int) -> float:
        return self._began_ms + number * SEGMENT_MS / self._rooms


def measure(folder: Path, rooms: int, minutes: float, encoder: TextSegmentEncoder) -> dict[str, Any]:
    """Follow some rooms, and return rates, lag and the share of dropped segments."""
    clock, origin = BusyClock(), Origin(hash="benchmark")
    generator = torch.Generator().manual_seed(1)
    fitted = FittedVectors(dataset="", table="", count=1, hash="", from_ms=0, until_ms=1)
    centroids = torch.randn(CODES, encoder.dim, generator=generator)
    version = write_version(folder / "version", Codebook((centroids,)), origin=origin, vectors=fitted, settings={})
    settings = FollowSettings(
        batch=BATCH,
        wait_seconds=0.5,
        behind_seconds=30.0,
        report_seconds=1e9,
        keep_ms=SEGMENT_MS * 1000,
        dtype="float16",
    )
    place, source = str(folder / "codes.sqlite"), RoomsOnAir(rooms, minutes, clock)
    with (
        VectorCache(folder / "cache", CacheSettings(encoder.dim, "float16", origin), settings.keep_ms) as cache,
        closing(open_store(place, StoreSettings(version.name))) as store,
    ):
        target = CodeTarget(version, store, place)
        Follower(folder, source, encoder, cache, target, settings, clock, StopRequest()).run()
    (entry,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    total = entry["embedded"] + entry["dropped"]
    return {
        "rooms": rooms,
        "segments": total,
        "needed_per_second": rooms * 1000 / SEGMENT_MS,
        "reached_per_second": entry["reached_per_second"],
        "dropped_share": entry["dropped"] / total,
        "lag_seconds": entry["lag_seconds"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("speed.follow", __doc__)
    parser.add_argument("--rooms", type=int, nargs="+", default=[100, 1000, 3000], help="numbers of rooms on air")
    parser.add_argument("--minutes", type=float, default=5.0, help="time on air (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved runs of each (default: %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    runs: dict[int, list[dict[str, Any]]] = {rooms: [] for rooms in options.rooms}
    with tempfile.TemporaryDirectory() as scratch:
        path, device = Path(scratch) / "model", torch.device("cpu")
        words = [f"word{number}" for number in range(WORDS)]
        write_small_model(path, (" ".join(words) for _ in range(20)), SmallConfig(), seed=1, length=2 * LENGTH)
        base = BaseModelFiles.open(str(path))
        plain = Encoder(base.load(bf16=False), base.tokenizer, device, length=LENGTH, tokens=TOKENS)
        kinds = ("items", "comments", "segments", "authors")
        template = Template.read("configs/templates/embed.txt", dict.fromkeys(kinds, frozenset({"text"})))
        encoder = TextSegmentEncoder(plain, template, rows=BATCH, length=LENGTH, tokens=TOKENS)
        for turn in range(options.repeats):
            for rooms in options.rooms:
                folder = Path(scratch) / f"{turn}-{rooms}"
                folder.mkdir()
                runs[rooms].append(measure(folder, rooms, options.minutes, encoder))
    results = [median_of(of_rooms) for of_rooms in runs.values()]
    lines = []
    for one in results:
        reached = median_and_range([run["reached_per_second"] for run in one["runs"]])
        spread = f"{reached['least']:,.1f} to {reached['most']:,.1f}"
        rates = [f"{one['needed_per_second']:,.1f}", f"{reached['median']:,.1f}", spread]
        lags = [f"{one['lag_seconds'][name]:.2f} s" for name in ("p50", "p99", "max")]
        lines.append([f"{one['rooms']:,}", *rates, f"{one['dropped_share']:.0%}", *lags])
    print(text_table(["rooms", "needed/s", "reached/s", "spread", "dropped", "lag p50", "p99", "max"], lines))
    settings = {"batch": BATCH, "minutes": options.minutes, "codes": CODES, "repeats": options.repeats}
    write_result(options.out, {**settings, "results": results})


if __name__ == "__main__":
    main()
