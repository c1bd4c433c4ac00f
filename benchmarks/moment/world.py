"""A world of live rooms whose click probability jumps at known times, for :mod:`benchmarks.moment`.

Several rooms are open at a time, each shown about once a second. A room is open for most of an hour; then the same
author opens another one. Its click logit is the sum of a level that is constant for 5 to 15 minutes, a value of the
user, and the fit of author and user. Behaviours after the click depend on the level too, and come with a delay:

=========  ===============================  ===============================================
behaviour  given                            after
=========  ===============================  ===============================================
click                                       seconds after the request
long_view  click                            60 s after the click
like       click                            a median of 2 minutes after the click; some again
gift       click                            a median of 3 minutes after the click
=========  ===============================  ===============================================

So about as many of them are seen within 5 minutes as the paper reports of its platform (Moment&Cross, Table 1). The
absence of a behaviour is known when the visit ends: a median of under a minute after the request, with a long tail;
some visits have no exit event.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.data.format.schema import DOMAINS, VISIT_EVENTS, DatasetSpec, SideFeature, visit_schema
from trainer.data.format.shards import read_rows
from trainer.data.format.validation import Columns
from trainer.data.format.visit_events import derive_events, event_table
from trainer.data.simulator.config import START_MS, TIMEZONE
from trainer.data.writing.builder import DatasetBuilder

BEHAVIOURS = ("click", "long_view", "like", "gift")
OFFSETS = np.array([0.0, 0.8, 1.6, 2.4])
"""Levels of a room's click logit above its lowest."""

LONGEST_VISIT_S = 5400.0
NO_EXIT_SHARE = 0.02
TASTES = 4
GROUPS = 8

SPEC = DatasetSpec(
    name="moment",
    source="benchmarks/moment/world.py",
    licence="none",
    partitions=2,
    timezone=TIMEZONE,
    behaviours=BEHAVIOURS,
    applies={name: ("live",) for name in BEHAVIOURS},
    candidates=("live",),
    side=(SideFeature("group", "user", GROUPS + 1),),
    statistics=(("user",), ("author",), ("item",)),
)


@dataclass(frozen=True)
class WorldSize:
    """Size and length of a world.

    Attributes:
        rooms: open at any time.
        users: users who are shown rooms.
        warm_up_s: seconds before the stream begins, for features to be fitted on.
        stream_s: seconds of the stream.
        per_second: exposures of a room.
    """

    rooms: int = 16
    users: int = 2000
    warm_up_s: int = 600
    stream_s: int = 7200
    per_second: float = 1.0


@dataclass(frozen=True)
class Segments:
    """The levels of all rooms, by place and time; every array is ``[segments]``.

    Attributes:
        place: of the room among those open at a time; its author is ``place + 1``.
        item_id: the room.
        start_s: seconds since the stream began, float64; before 0 in the warm-up.
        stop_s: start of the next one.
        offset: of the click logit, one of :data:`OFFSETS`.
        opens: True for the first of a room.
    """

    place: np.ndarray
    item_id: np.ndarray
    start_s: np.ndarray
    stop_s: np.ndarray
    offset: np.ndarray
    opens: np.ndarray


def levels(size: WorldSize, seed: int) -> Segments:
    """Return the levels of all rooms over time."""
    rng = np.random.default_rng([seed, 1])
    rows: list[tuple[int, int, float, float, float, bool]] = []
    item = 0
    for place in range(size.rooms):
        # Rooms are open before the world begins and stay open after its end.
        opens = -float(size.warm_up_s) - rng.uniform(0, 2400)
        while opens < size.stream_s:
            closes = opens + rng.uniform(2400, 4800)
            item += 1
            edges = [opens]
            while edges[-1] < closes:
                edges.append(min(edges[-1] + rng.uniform(300, 900), closes))
            offset = -1
            for number, (start, stop) in enumerate(pairwise(edges)):
                offset = int(rng.choice([other for other in range(len(OFFSETS)) if other != offset]))
                rows.append((place, item, start, stop, float(OFFSETS[offset]), number == 0))
            opens = closes
    place_, item_, start_, stop_, offset_, opens_ = (np.array(column) for column in zip(*rows, strict=True))
    return Segments(place_, item_, start_, stop_, offset_, opens_)


def write_world(out: Path, size: WorldSize, seed: int) -> None:
    """Simulate a world and write it as a dataset with its true probabilities; ``visit_id`` counts exposures in time."""
    rng = np.random.default_rng([seed, 2])
    segments = levels(size, seed)
    users, authors = np.arange(1, size.users + 1), np.arange(1, size.rooms + 1)
    taste = rng.normal(0, 1, (size.users + 1, TASTES))
    group = 1 + (taste[:, :3] > 0) @ np.array([1, 2, 4])
    kind = rng.normal(0, 1, (size.rooms + 1, TASTES)) * (0.7 / np.sqrt(TASTES))
    eager, dullest = rng.normal(0, 0.4, size.users + 1), rng.normal(-2.0, 0.3, size.rooms + 1)

    n = rng.poisson(size.rooms * size.per_second * (size.warm_up_s + size.stream_s))
    at_s = np.sort(rng.uniform(-size.warm_up_s, size.stream_s, n))
    place = rng.integers(0, size.rooms, n)
    activity = rng.gamma(2.0, size=size.users)
    user = users[rng.choice(size.users, n, p=activity / activity.sum())]
    segment = segment_of(segments, place, at_s)
    author, level = place + 1, segments.offset[segment]

    fit = (taste[user] * kind[author]).sum(axis=1)
    click = _sigmoid(dullest[author] + level + eager[user] + fit)
    given_click = {
        "long_view": _sigmoid(-0.8 + 0.5 * level + 0.8 * fit),
        "like": _sigmoid(-2.2 + 0.6 * level + 0.8 * eager[user]),
        "gift": _sigmoid(-3.6 + 0.6 * level + fit),
    }
    probability = {"click": click} | {name: click * given for name, given in given_click.items()}
    clicked = rng.random(n) < click
    click_s = rng.lognormal(np.log(3), 0.7, n)
    after_click_s = {
        "long_view": np.full(n, 60.0),
        "like": rng.lognormal(np.log(120), 1.1, n),
        "gift": rng.lognormal(np.log(180), 1.0, n),
    }
    happened_s = {"click": np.where(clicked, click_s, -1.0)}
    for name, given in given_click.items():
        happens = clicked & (rng.random(n) < given)
        happened_s[name] = np.where(happens, np.minimum(click_s + after_click_s[name], LONGEST_VISIT_S), -1.0)
    stay_s = np.where(clicked, rng.lognormal(np.log(150), 1.2, n), rng.lognormal(np.log(25), 1.2, n))
    last_s = np.max(list(happened_s.values()), axis=0)
    stay_s = np.maximum(np.minimum(stay_s, LONGEST_VISIT_S), last_s + 1)

    request_ms = START_MS + np.round((at_s + size.warm_up_s) * 1000).astype(np.int64)
    visits: Columns = {
        "visit_id": np.arange(n),
        "user_id": user,
        "author_id": author,
        "item_id": segments.item_id[segment],
        "domain": np.full(n, DOMAINS.index("live"), np.int8),
        "request_ms": request_ms,
        "exit_ms": request_ms + np.round(stay_s * 1000).astype(np.int64),
        "play_ms": np.where(clicked, np.round((stay_s - click_s) * 1000), 0).astype(np.int64),
        **{
            f"delay_{name}": np.where(seconds < 0, -1, np.round(seconds * 1000)).astype(np.int32)
            for name, seconds in happened_s.items()
        },
        "value_gift": np.where(happened_s["gift"] < 0, 0, 10).astype(np.float32),
    }
    without_exit = rng.random(n) < NO_EXIT_SHARE
    repeats = _more_likes(visits, rng)
    with DatasetBuilder(out, SPEC) as builder:
        builder.table("users", pa.table({"user_id": users, "group": group[users].astype(np.int32)}))
        builder.table("authors", pa.table({"author_id": authors}))
        builder.table("items", pa.table({"item_id": np.unique(segments.item_id)}))
        builder.visits(pa.table(visits, schema=visit_schema(SPEC)))
        for events in derive_events(SPEC, visits, repeats):
            kept = (events["event"] != VISIT_EVENTS.index("exit")) | ~without_exit[events["visit_id"]]
            builder.events(event_table(SPEC, {name: column[kept] for name, column in events.items()}))
        ids = {name: visits[name] for name in ("visit_id", "user_id", "request_ms")}
        truth = {f"p_{name}": values.astype(np.float32) for name, values in probability.items()}
        builder.truth(pa.table({**ids, **truth}))
        builder.finish()


@dataclass(frozen=True)
class WorldExposures:
    """The n exposures of a world, by ``visit_id``.

    Attributes:
        user_id: ``[n]`` int64.
        place: ``[n]`` int64, of the room.
        at_s: ``[n]`` float64, seconds since the stream began, ascending.
        truth: ``[n, behaviours]`` float64, true probabilities.
        label: ``[n, behaviours]`` uint8, complete labels, however late.
        segment: ``[n]`` int64, of :func:`levels`.
    """

    user_id: np.ndarray
    place: np.ndarray
    at_s: np.ndarray
    truth: np.ndarray
    label: np.ndarray
    segment: np.ndarray


def read_exposures(dataset: Path, size: WorldSize, seed: int) -> WorldExposures:
    """Return the exposures of a world that was written, with their true probabilities."""
    files = sorted((dataset / "truth").glob("part-*.parquet"))
    truth = pa.concat_tables([pq.read_table(file) for file in files]).sort_by("visit_id")
    events = pa.concat_tables([pq.read_table(file) for file in sorted((dataset / "events").glob("part-*.parquet"))])
    exposures = events.filter(pc.equal(events["event"].cast(pa.string()), "exposure")).sort_by("visit_id")
    place = exposures["author_id"].to_numpy() - 1
    at_s = (truth["request_ms"].to_numpy() - START_MS) / 1000 - size.warm_up_s
    probability = np.stack([truth[f"p_{name}"].to_numpy() for name in BEHAVIOURS], axis=1).astype(np.float64)
    rows = read_rows(dataset, SPEC, columns=["visit_id", "label"])
    label = np.zeros(probability.shape, np.uint8)
    label[rows["visit_id"]] = rows["label"]
    segment = segment_of(levels(size, seed), place, at_s)
    return WorldExposures(truth["user_id"].to_numpy(), place, at_s, probability, label, segment)


def segment_of(segments: Segments, place: np.ndarray, at_s: np.ndarray) -> np.ndarray:
    """Return the segment of each exposure ``[n]``, from the place of its room and its time."""
    span = float(segments.stop_s.max() - segments.start_s.min()) + 1
    return np.searchsorted(segments.start_s + span * segments.place, at_s + span * place, "right") - 1


def _more_likes(visits: Columns, rng: np.random.Generator) -> Columns:
    """Return likes after the first of a visit, half as many as first ones, before the visit ends."""
    liked = np.flatnonzero(visits["delay_like"] >= 0)
    line = np.repeat(liked, rng.poisson(0.5, len(liked)))
    first_ms = visits["request_ms"][line] + visits["delay_like"][line]
    time_ms = first_ms + (rng.random(len(line)) * (visits["exit_ms"][line] - first_ms)).astype(np.int64)
    return {
        **{name: visits[name][line] for name in ("user_id", "author_id", "item_id", "domain", "visit_id")},
        "event": np.full(len(line), len(VISIT_EVENTS) + BEHAVIOURS.index("like"), np.int8),
        "time_ms": time_ms,
        "value": np.zeros(len(line), np.float32),
    }


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))
