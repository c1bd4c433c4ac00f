"""Meaning of codes: their share, examples, the rates of behaviours in their segments, and one room as a timeline.

This looks back on a dataset: it reads all of its events and segments, whenever they became known. The rules of the
attribution are in ``code_interactions.py``, those of the intervals in ``code_rates.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.console.errors import UserError
from trainer.data.format.code_segments import segments_of_codes
from trainer.data.format.segments import UNKNOWN_AUTHOR, DatasetSegments, has_text_ids
from trainer.data.format.text_schema import UNKNOWN_TIME, has_texts, read_texts
from trainer.semantic_ids.air_time import AirTime
from trainer.semantic_ids.code_files import read_codes
from trainer.semantic_ids.code_interactions import (
    HOUR_MS,
    PER_EXPOSURE,
    UNATTRIBUTED,
    SegmentActivity,
    author_sums,
    read_activity,
)
from trainer.semantic_ids.code_rates import FALSE_FINDS, LEAST_CELLS, CodeRates, code_rates
from trainer.semantic_ids.codebook_version import CodebookVersion
from trainer.semantic_ids.segment_labels import label_segments, read_topics
from trainer.semantic_ids.segments import NO_LIMIT_MS, SegmentVectors, range_of_options
from trainer.stream.labels.event_log import EventLog

EXAMPLES = 3
"""Segments, and comments, that stand for a code: those that were watched longest, each of another room."""

NO_CODE = -1

CARRIES = {1: "more", 0: None, -1: "less"}


@dataclass(frozen=True)
class MeaningRequest:
    """Question of a report on the meaning of codes.

    Attributes:
        codebook: directory of the codebook version.
        dataset: path or URL of the dataset with segments and events.
        codes: code file; empty to encode the vectors.
        vectors: table of segment vectors; empty for ``embeddings/segments`` of the dataset.
        time_from, time_until: range of ``known_ms`` of the segments, as ISO times in the dataset's time zone.
        level: number of levels whose codes are looked at: 1 for the first level alone.
        room: room of the timeline; None for the one with most interactions.
    """

    codebook: str
    dataset: str
    codes: str = ""
    vectors: str = ""
    time_from: str | None = None
    time_until: str | None = None
    level: int = 1
    room: int | None = None


@dataclass(frozen=True)
class CodedSegments:
    """All segments of a dataset, with a number for each code that occurs.

    Attributes:
        segments: the dataset's segments.
        embedded: see :meth:`trainer.data.format.segments.DatasetSegments.read`.
        source: path of the code file or of the vectors.
        number: ``[n]`` int64, number of each segment's code, ``NO_CODE`` without one.
        tuples: ``[codes, level]`` int32, code of each number; ascending.
        levels: number of codes of each level.
    """

    segments: DatasetSegments
    embedded: bool
    source: str
    number: np.ndarray
    tuples: np.ndarray
    levels: tuple[int, ...]


def report_meaning(request: MeaningRequest, *, quiet: bool = False) -> dict[str, Any]:
    """Do the work of ``limelight quantize report --interactions``, and return its answer.

    Raises:
        UserError: the files are missing, damaged or do not belong together, no visit was in a segment with a code, or
            the room has no segment with a code.
    """
    version = CodebookVersion.open(request.codebook)
    if request.level > len(version.levels):
        raise UserError(
            f"--level {request.level}: the codebook {request.codebook} has {len(version.levels)}; 1 to "
            f"{len(version.levels)} is accepted"
        )
    log = EventLog(request.dataset)
    coded = _read_coded(version, request, log.spec.timezone)
    codes, segments = len(coded.tuples), coded.segments
    # Before the long work, so that a mistake costs no time.
    _check_room(request.room, coded)
    air = AirTime(segments.item_id, segments.start_ms)
    activity = read_activity(log, air, coded.number, codes, quiet=quiet)
    with_code = coded.number >= 0
    reached = activity.watch_ms[with_code].sum() + activity.exposures[with_code].sum()
    if not reached + activity.events[with_code].sum():
        raise UserError(
            f"{request.dataset}: no interaction with a segment that has a code, in {activity.visits:,} visits to "
            "rooms; give the log of the rooms of these codes, or another range of time"
        )
    # Rooms of unknown authors stand for themselves.
    owner = np.where(segments.author_id == UNKNOWN_AUTHOR, -2 - segments.item_id, segments.author_id)
    authors = author_sums(activity, coded.number, np.unique(owner, return_inverse=True)[1], codes)
    rates = code_rates(authors, activity.users)
    room = _richest(activity, coded) if request.room is None else request.room
    return {
        "version": version.name,
        "dataset": request.dataset,
        "source": coded.source,
        "timezone": log.spec.timezone,
        "level": request.level,
        "levels": list(version.levels),
        "segments": int(with_code.sum()),
        "without_code": int((~with_code).sum()),
        "possible_codes": math.prod(version.levels[: request.level]),
        "used_codes": codes,
        "visits": activity.visits,
        "without_exit": activity.without_exit,
        "watch_hours": float(activity.watch_ms[with_code].sum() / HOUR_MS),
        "attribution": "the segment on air at the time of the event; an event at the end of its visit is spread over "
        "the segments that the visit watched",
        "false_finds": FALSE_FINDS,
        "least_cells": LEAST_CELLS,
        "tested": rates.tested,
        "interval_level": rates.level,
        "behaviours": _behaviours(activity, rates, with_code),
        "codes": _codes(request.dataset, activity, rates, coded, air, authors.effective()),
        "room": _room(request.dataset, room, activity, coded, air),
    }


def _read_coded(version: CodebookVersion, request: MeaningRequest, timezone: str) -> CodedSegments:
    """Return the segments of the dataset with their codes, from the code file or by encoding their vectors."""
    times = range_of_options(request.time_from, request.time_until, timezone)
    if request.codes:
        file = read_codes(Path(request.codes), version)
        segments, embedded = segments_of_codes(request.dataset, file)
        ids, codes, source = file.segment, file.codes, request.codes
    else:
        vectors = SegmentVectors.open(request.dataset, request.vectors)
        version.check_vectors(vectors.table.path, vectors.table.dim, vectors.table.origin)
        embedded = has_text_ids(vectors.table.origin)
        segments = DatasetSegments.read(request.dataset, embedded)
        rows = vectors.rows(times)
        blocks = [version.encode(block)[0] for _, block in vectors.blocks(rows)]
        codes = np.concatenate([np.empty((0, len(version.levels)), np.int32), *blocks])
        ids, source = np.asarray(vectors.table.ids[rows]), str(vectors.table.path)
    row = segments.rows_of(ids)
    known_ms = segments.known_ms[row]
    some = (known_ms >= times.from_ms) & (known_ms < times.until_ms)
    if not some.any():
        raise UserError(f"{source}: no segment with a code became known in the range of time; choose another one")
    tuples, number = np.unique(codes[some, : request.level], axis=0, return_inverse=True)
    numbers = np.full(len(segments), NO_CODE, np.int64)
    numbers[row[some]] = number.reshape(-1)
    return CodedSegments(segments, embedded, source, numbers, tuples, version.levels)


def _behaviours(activity: SegmentActivity, rates: CodeRates, with_code: np.ndarray) -> dict[str, dict[str, Any]]:
    """Return the document of each behaviour over all codes."""
    return {
        name: {
            "events": float(activity.events[with_code, place].sum()),
            "per": "exposure" if name in PER_EXPOSURE else "hour watched",
            "base": float(activity.base(place)[with_code].sum()),
            "rate": _number(rates.overall[place]),
            "spread": int(activity.spread[place]),
            "unattributed": {reason: int(activity.unattributed[code][place]) for code, reason in UNATTRIBUTED.items()},
            "more": int((rates.carries[:, place] > 0).sum()),
            "less": int((rates.carries[:, place] < 0).sum()),
        }
        for place, name in enumerate(activity.behaviours)
    }


def _codes(
    dataset: str,
    activity: SegmentActivity,
    rates: CodeRates,
    coded: CodedSegments,
    air: AirTime,
    effective: np.ndarray,
) -> list[dict[str, Any]]:
    """Return the document of each code, the one with most watch time first."""
    codes = len(coded.tuples)
    some = coded.number >= 0
    number = coded.number[some]
    segments = np.bincount(number, minlength=codes)
    watch_ms = np.bincount(number, activity.watch_ms[some], minlength=codes)
    events = np.stack([np.bincount(number, column, minlength=codes) for column in activity.events[some].T], axis=1)
    topics = _topic_shares(dataset, coded)
    examples = _examples(dataset, activity, coded)
    comments = _comments(dataset, coded, air)
    total_ms = max(1.0, float(watch_ms.sum()))
    return [
        {
            "code": coded.tuples[place].tolist(),
            "segments": int(segments[place]),
            "segment_share": float(segments[place] / segments.sum()),
            "watch_hours": float(watch_ms[place] / HOUR_MS),
            "watch_share": float(watch_ms[place] / total_ms),
            "topics": topics[place] if topics is not None else None,
            "examples": examples[place],
            "comments": comments[place],
            "behaviours": {
                name: {
                    "events": float(events[place, at]),
                    "rate": _number(rates.rate[place, at]),
                    "low": _number(rates.low[place, at]),
                    "high": _number(rates.high[place, at]),
                    "p_value": _number(rates.p_value[place, at]),
                    "authors": float(effective[place, at]),
                    "carries": CARRIES[int(rates.carries[place, at])],
                }
                for at, name in enumerate(activity.behaviours)
            },
        }
        for place in np.lexsort((np.arange(codes), -watch_ms)).tolist()
    ]


def _topic_shares(dataset: str, coded: CodedSegments) -> list[dict[str, float]] | None:
    """Return topic -> share of the segments of each code, the largest first; None if there are no topics."""
    some = np.flatnonzero(coded.number >= 0)
    found = read_topics(dataset, coded.segments.ids[some], coded.embedded)
    if found is None:
        return None
    names, topic = found
    known = topic >= 0
    counts = np.zeros((len(coded.tuples), len(names)))
    np.add.at(counts, (coded.number[some[known]], topic[known]), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return [
        {names[place]: float(row[place]) for place in np.argsort(-row, kind="stable").tolist() if row[place]}
        for row in shares
    ]


def _examples(dataset: str, activity: SegmentActivity, coded: CodedSegments) -> list[list[dict[str, Any]]]:
    """Return the segments that stand for each code: watched longest, each of another room."""
    some = np.flatnonzero(coded.number >= 0)
    some = some[np.lexsort((-activity.watch_ms[some], coded.number[some]))]
    rooms = np.unique(coded.segments.item_id[some], return_inverse=True)[1]
    # The first segment of each room in each code is the one that was watched longest.
    first = np.unique(coded.number[some] * (rooms.max(initial=0) + 1) + rooms, return_index=True)[1]
    chosen = some[np.sort(first)]
    chosen = chosen[_rank_in_run(coded.number[chosen]) < EXAMPLES]
    labels = label_segments(dataset, coded.segments.ids[chosen], coded.embedded, NO_LIMIT_MS)
    examples: list[list[dict[str, Any]]] = [[] for _ in coded.tuples]
    for place, label in zip(chosen.tolist(), labels, strict=True):
        examples[coded.number[place]].append(
            {"segment": int(coded.segments.ids[place]), "item_id": int(coded.segments.item_id[place]), **label}
        )
    return examples


def _comments(dataset: str, coded: CodedSegments, air: AirTime) -> list[list[str]]:
    """Return the first comments that were written in segments of each code."""
    comments: list[list[str]] = [[] for _ in coded.tuples]
    if not has_texts(dataset, "comments"):
        return comments
    table = read_texts(dataset, "comments", ["item_id", "time_ms", "text"])
    item_id, time_ms = (table[name].to_numpy() for name in ("item_id", "time_ms"))
    place = air.at(item_id, time_ms)
    number = np.where((place >= 0) & (time_ms != UNKNOWN_TIME), coded.number[np.maximum(place, 0)], NO_CODE)
    rows = np.flatnonzero(number >= 0)
    rows = rows[np.lexsort((time_ms[rows], number[rows]))]
    rows = rows[_rank_in_run(number[rows]) < EXAMPLES]
    for row, text in zip(rows.tolist(), table["text"].take(rows).to_pylist(), strict=True):
        if text:
            comments[number[row]].append(text)
    return comments


def _rank_in_run(values: np.ndarray) -> np.ndarray:
    """Return the position of each value in its run of equal values, from 0."""
    begins = np.flatnonzero(np.diff(values, prepend=-1))
    return np.arange(len(values)) - np.repeat(begins, np.diff(np.append(begins, len(values))))


def _richest(activity: SegmentActivity, coded: CodedSegments) -> int:
    """Return the room with most interactions; a behaviour weighs the more, the rarer it is."""
    some = coded.number >= 0
    rooms, of = np.unique(coded.segments.item_id[some], return_inverse=True)
    events = activity.events[some]
    weight = (events / np.maximum(events.sum(0), 1)).sum(1)
    # Without any event, watch time decides.
    weight = weight + 1e-9 * activity.watch_ms[some] / max(1.0, activity.watch_ms[some].sum())
    return int(rooms[np.bincount(of, weight).argmax()])


def _check_room(room: int | None, coded: CodedSegments) -> None:
    """Raise a UserError if a room has no segment with a code."""
    own = coded.segments.item_id == room
    if room is None or (own & (coded.number >= 0)).any():
        return
    if own.any():
        raise UserError(f"--room {room}: none of its {own.sum():,} segments has a code of {coded.source} in the range")
    some = np.unique(coded.segments.item_id[coded.number >= 0])
    raise UserError(
        f"--room {room}: {coded.segments.source} has no segment of this room; {len(some):,} rooms have segments with a "
        f"code, such as {', '.join(map(str, some[:3]))}"
    )


def _room(dataset: str, room: int, activity: SegmentActivity, coded: CodedSegments, air: AirTime) -> dict[str, Any]:
    """Return the document of a room: its segments in order of time, with their interactions."""
    segments = coded.segments
    places = air.order[segments.item_id[air.order] == room]
    labels = label_segments(dataset, segments.ids[places], coded.embedded, NO_LIMIT_MS)
    return {
        "item_id": room,
        "author_id": int(segments.author_id[places[0]]),
        "start_ms": int(segments.start_ms[places[0]]),
        "segments": [
            {
                "segment": int(segments.ids[place]),
                "start_ms": int(segments.start_ms[place]),
                "known_ms": int(segments.known_ms[place]),
                "code": coded.tuples[coded.number[place]].tolist() if coded.number[place] >= 0 else None,
                **label,
                "watch_ms": float(activity.watch_ms[place]),
                "exposures": int(activity.exposures[place]),
                "events": dict(zip(activity.behaviours, activity.events[place].tolist(), strict=True)),
            }
            for place, label in zip(places.tolist(), labels, strict=True)
        ],
    }


def _number(value: float) -> float | None:
    """Return a number of a document; what is undefined is None."""
    return float(value) if math.isfinite(value) else None
