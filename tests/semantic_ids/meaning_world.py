"""A simulated world whose gifts depend on the topic on air, with codes that are the topics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.code_files import write_codes
from tests.semantic_ids.segment_world import make_version
from trainer.data.format.segment_codes import CodeFile
from trainer.data.format.segments import DatasetSegments
from trainer.data.format.visit_events import event_names, event_table
from trainer.data.simulator.population import TOPICS
from trainer.data.simulator.segment_vectors import DIM
from trainer.data.simulator.write_dataset import simulate
from trainer.runtime.checksums import CHECKSUMS
from trainer.semantic_ids.air_time import AirTime
from trainer.semantic_ids.code_interactions import HOUR_MS, VisitEvents, Visits, visits_of
from trainer.stream.labels.event_log import EventLog

CARRYING = ("dance", "match")
"""Topics with more gifts than others."""


def write_world(folder: Path) -> Path:
    """Simulate ``folder/world`` with texts, and write ``folder/book`` and ``folder/codes.parquet``: topics as codes."""
    world = folder / "world"
    simulate(world, users=120, days=3, partitions=2, seed=5, texts=True, segment_noise=0.0)
    version = make_version(folder / "book", len(TOPICS), dim=DIM)
    segments = DatasetSegments.read(str(world), False)
    topic = pq.read_table(world / "segments.parquet")["topic"].to_numpy().astype(np.int32)
    columns: dict[str, Any] = {name: getattr(segments, name) for name in ("item_id", "author_id", "known_ms")}
    codes = CodeFile(
        Path(), version.name, version.levels, **columns, segment=segments.ids, codes=topic[:, None],
        start_ms=segments.start_ms,
    )  # fmt: skip
    write_codes(folder / "codes.parquet", codes)
    # The tests change the events.
    (world / CHECKSUMS).unlink()
    return world


def topics_of(world: Path) -> tuple[AirTime, np.ndarray, DatasetSegments]:
    """Return the times of the segments, and their topics."""
    segments = DatasetSegments.read(str(world), False)
    topic = pq.read_table(world / "segments.parquet")["topic"].to_numpy().astype(np.int64)
    return AirTime(segments.item_id, segments.start_ms), topic, segments


def draw_gifts(
    visits: Visits, air: AirTime, topic: np.ndarray, effect: float, rng: np.random.Generator, rate: float = 60.0
) -> VisitEvents:
    """Draw gifts of visits: ``rate`` an hour watched, ``effect`` times as many in the topics ``CARRYING``.

    Users and rooms have rates of their own, and gifts come in bunches.
    """
    watched = air.overlaps(visits.item_id, visits.begin_ms, visits.end_ms)
    users, rooms = (np.unique(column, return_inverse=True)[1] for column in (visits.user_id, visits.item_id))
    level = np.exp(0.4 * rng.standard_normal(len(users))[users] + 0.4 * rng.standard_normal(len(users))[rooms])
    more = np.isin(topic[watched.place], [TOPICS.index(name) for name in CARRYING])
    mean = rate * watched.ms / HOUR_MS * level[watched.visit] * np.where(more, effect, 1.0)
    first = rng.poisson(mean)
    overlap = np.repeat(np.arange(len(mean)), first + rng.poisson(0.3 * first))
    visit = watched.visit[overlap]
    # The overlaps of a visit follow each other in time without a gap.
    before = np.cumsum(watched.ms) - watched.ms
    first_of = np.searchsorted(watched.visit, np.arange(len(users)))
    offset = before - before[np.minimum(first_of, len(before) - 1)][watched.visit]
    within = (rng.random(len(overlap)) * watched.ms[overlap]).astype(np.int64)
    time_ms = visits.begin_ms[visit] + offset[overlap] + within
    return VisitEvents(visit, np.full(len(visit), 5), time_ms, np.zeros(len(visit), bool))


def plant_gifts(world: Path, effect: float, seed: int) -> int:
    """Replace the gifts in the event log of a world, and return their number."""
    log, rng, count = EventLog(world), np.random.default_rng(seed), 0
    air, topic, _ = topics_of(world)
    code = event_names(log.spec).index("gift")
    for partition in range(log.spec.partitions):
        events = log.read(partition)
        visits, _ = visits_of(events)
        gifts = draw_gifts(visits, air, topic, effect, rng)
        kept = np.flatnonzero(events["event"] != code)
        live = np.flatnonzero(events["domain"] == 1)
        order = live[np.lexsort((events["visit_id"][live], events["user_id"][live]))]
        begins = np.diff(events["visit_id"][order], prepend=-1) != 0
        source = order[begins][gifts.visit]
        rows = np.concatenate([kept, source])
        columns = {name: column[rows] for name, column in events.items()}
        columns["event"][len(kept) :], columns["time_ms"][len(kept) :] = code, gifts.time_ms
        columns["value"][len(kept) :] = 1.0
        ordered = np.argsort(columns["time_ms"], kind="stable")
        table: pa.Table = event_table(log.spec, {name: column[ordered] for name, column in columns.items()})
        pq.write_table(table, world / f"events/part-{partition:05d}.parquet")
        count += len(gifts.visit)
    return count
