"""Rooms of ``benchmarks/quality/highlights.py``: their segments in order, scores, parts by time, and simple rules.

Position t of a room stands for its segment t, of which the content is known, and for the score of segment t + 1, which
is to be predicted. Segments are in the order in which they became known, as in the store of recent codes. A room of
fewer than five segments is left out, as KuaiLive-M3's benchmark does.

Scores from outside are a plain Parquet file with the columns

* ``room``: whole number, ``item_id`` of the dataset;
* ``segment``: whole number, place of the segment in its room in the order of ``known_ms``, from 0 on;
* ``score``: finite number.

A room of which the file does not have exactly the segments that the dataset has is left out, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.quality.highlight_metrics import find_highlights
from trainer.console.errors import UserError
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import read_table
from trainer.data.format.segment_codes import CodeFile
from trainer.data.format.segments import UNKNOWN_AUTHOR
from trainer.data.simulator.segment_truth import read_next_topics

LEAST_SEGMENTS = 5
TRAIN, VALIDATE, TEST = PARTS = ("train", "validate", "test")
COLUMNS = ("room", "segment", "score")

SMOOTHED = 5
"""Positions since the start over which the rule by position averages."""


@dataclass(frozen=True)
class HighlightRoom:
    """A room.

    Attributes:
        author: of the room.
        segments: ``[K] int64``, places of its segments in the code file, in order.
        history: ``[H] int64``, places of the author's latest segments of earlier rooms that were known before the
            room's first one was, in order.
        score: ``[K - 1] float32``, of the segments from the second on, in the units of the training rooms' range.
        highlight: ``[K - 1] bool``, of the same segments.
    """

    author: int
    segments: np.ndarray
    history: np.ndarray
    score: np.ndarray
    highlight: np.ndarray

    @property
    def positions(self) -> np.ndarray:
        """Places ``[K - 1] int64`` of the segments after which a score is predicted."""
        return self.segments[:-1]

    def __len__(self) -> int:
        return len(self.score)


@dataclass(frozen=True)
class HighlightRooms:
    """All rooms by part.

    Attributes:
        parts: part -> rooms.
        score: ``[segments of the code file] float32``, in the units of the training rooms' range; nan if unknown.
        without_scores: rooms that were left out since scores are missing.
    """

    parts: dict[str, list[HighlightRoom]]
    score: np.ndarray
    without_scores: int

    @staticmethod
    def make(
        codes: CodeFile, score: np.ndarray, borders: Sequence[int], history: int, limits: Sequence[int], seed: int = 1
    ) -> HighlightRooms:
        """Sort the rooms of a code file into parts.

        Args:
            codes: the code file.
            score: ``[n]``, of its segments; nan if unknown.
            borders: times: rooms that end before the first are trained on, those between the first two chosen by, and
                those that begin from the third on tested. So no room is in two parts, and no two parts overlap in time.
            history: most segments of earlier rooms.
            limits: most rooms of each part; of more, so many are drawn.
            seed: of the draw.

        Raises:
            UserError: a part has no room.
        """
        start_ms = codes.known_ms if codes.start_ms is None else codes.start_ms
        order = np.lexsort((codes.segment, codes.known_ms, codes.item_id))
        order = order[codes.author_id[order] != UNKNOWN_AUTHOR]
        rooms = np.split(order, np.flatnonzero(np.diff(codes.item_id[order])) + 1)
        by_author = np.lexsort((codes.segment, codes.known_ms, codes.author_id))
        authors = codes.author_id[by_author]
        first, second, third = borders
        chosen: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
        without = 0
        for room in rooms:
            if len(room) < LEAST_SEGMENTS:
                continue
            begin, end = start_ms[room].min(), codes.known_ms[room[-1]]
            part = TRAIN if end < first else VALIDATE if begin >= first and end < second else TEST
            if part == TEST and begin < third:
                continue
            if np.isnan(score[room]).any():
                without += 1
                continue
            chosen[part].append(room)
        for limit, (part, members) in zip(limits, chosen.items(), strict=True):
            if not members:
                raise UserError(f"{codes.path}: no room with scores is in the part {part!r}; choose other --borders")
            drawn = np.random.default_rng(seed).permutation(len(members))[:limit]
            chosen[part] = [members[one] for one in np.sort(drawn)]
        trained = score[np.concatenate(chosen[TRAIN])]
        low, high = trained.min(), trained.max()
        scaled = ((score - low) / max(high - low, 1e-12)).astype(np.float32)

        def make(room: np.ndarray) -> HighlightRoom:
            author = codes.author_id[room[0]]
            own = by_author[np.searchsorted(authors, author) : np.searchsorted(authors, author, side="right")]
            earlier = own[codes.known_ms[own] < codes.known_ms[room[0]]]
            earlier = earlier[max(0, len(earlier) - history) :]
            return HighlightRoom(int(author), room, earlier, scaled[room[1:]], find_highlights(score[room])[1:])

        return HighlightRooms({part: [make(room) for room in found] for part, found in chosen.items()}, scaled, without)

    def positions(self, part: str) -> np.ndarray:
        """Return the places of the segments after which a score is predicted, of all rooms of a part."""
        return np.concatenate([room.positions for room in self.parts[part]])


def read_scores(file: Path, codes: CodeFile) -> np.ndarray:
    """Return the scores of the segments of a code file ``[n] float64`` from a Parquet file; nan if unknown.

    Raises:
        UserError: there is no such file, or it is damaged, of other columns, or has a segment twice.
    """
    expected = f"a Parquet file with the columns {', '.join(COLUMNS)} (room and segment whole, segment from 0 on)"
    try:
        table = read_table(DatasetFiles(file.parent), file.name, COLUMNS)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; --scores takes {expected}") from None
    room, segment, score = (table[name].to_numpy() for name in COLUMNS)
    if room.dtype.kind not in "iu" or segment.dtype.kind not in "iu" or score.dtype.kind not in "fiu":
        raise UserError(f"{file}: columns of other types or with empty values; --scores takes {expected}")
    if not np.isfinite(score.astype(np.float64)).all():
        raise UserError(f"{file}: has a score that is no finite number; --scores takes {expected}")
    order = np.lexsort((segment, room))
    room, segment, score = room[order], segment[order], score[order]
    if len(room) and ((np.diff(room) == 0) & (np.diff(segment) == 0)).any():
        raise UserError(f"{file}: has a segment twice; --scores takes each once")
    found = np.full(len(codes), np.nan)
    own = np.lexsort((codes.segment, codes.known_ms, codes.item_id))
    for places in np.split(own, np.flatnonzero(np.diff(codes.item_id[own])) + 1):
        item = codes.item_id[places[0]] if len(places) else -1
        first, last = np.searchsorted(room, item), np.searchsorted(room, item, side="right")
        if last - first == len(places) and np.array_equal(segment[first:last], np.arange(len(places))):
            found[places] = score[first:last]
    return found


def read_intensity(world: Path, codes: CodeFile) -> np.ndarray:
    """Return the true intensity of the segments of a code file of a simulated world, ``[n] float64``."""
    intensity: np.ndarray = read_table(DatasetFiles(world), "segments.parquet", ["intensity"])["intensity"].to_numpy()
    return intensity[codes.segment].astype(np.float64)


Predictions = list[np.ndarray]
"""Predictions ``[K - 1]`` of each test room."""


def rule_predictions(rooms: HighlightRooms) -> dict[str, Predictions]:
    """Return the predictions of the rules by name.

    ``mean`` predicts the same everywhere; ``position`` the mean of the training rooms at the position since the start
    of the room, averaged over neighbouring ones; ``last score`` the score of the segment before.
    """
    trained = rooms.parts[TRAIN]
    longest = max(len(room) for part in rooms.parts.values() for room in part)
    sums, counts = np.zeros(longest), np.zeros(longest)
    for room in trained:
        sums[: len(room)] += room.score
        counts[: len(room)] += 1
    window = np.ones(2 * SMOOTHED + 1)
    sums, counts = (np.convolve(values, window, mode="same") for values in (sums, counts))
    mean = float(np.concatenate([room.score for room in trained]).mean())
    # Positions that few training rooms reach are drawn to the mean.
    position = (sums + 10 * mean) / (counts + 10)
    tests = rooms.parts[TEST]
    return {
        "mean": [np.full(len(room), mean) for room in tests],
        "position": [position[: len(room)] for room in tests],
        "last score": [rooms.score[room.positions] for room in tests],
    }


def truth_predictions(world: Path, codes: CodeFile, rooms: HighlightRooms) -> dict[str, Predictions]:
    """Return the expectations of the next score of who knows the world's topics, without and with the past scores.

    The first one knows the true distribution of the next topic, and the mean score of each topic. The second one also
    knows that a phase keeps its level: if the topic stays, it expects the mean score of the phase so far.
    """
    truth = read_next_topics(world)
    assert truth is not None
    topic, p_next = (values[codes.segment] for values in truth)
    trained = np.concatenate([room.segments for room in rooms.parts[TRAIN]])
    counts = np.bincount(topic[trained], minlength=p_next.shape[1])
    level = np.bincount(topic[trained], rooms.score[trained], p_next.shape[1]) / np.maximum(counts, 1)
    content, both = [], []
    for room in rooms.parts[TEST]:
        here, p = topic[room.positions], p_next[room.positions]
        score = rooms.score[room.positions].astype(np.float64)
        begins = np.append(True, here[1:] != here[:-1])
        phase = np.cumsum(begins) - 1
        first = np.flatnonzero(begins)
        total = np.cumsum(score)
        of_phase = total - np.append(0.0, total)[first][phase]
        so_far = of_phase / (np.arange(len(here)) - first[phase] + 1)
        expected = p @ level
        content.append(expected)
        both.append(expected + p[np.arange(len(here)), here] * (so_far - level[here]))
    return {"truth": content, "truth, past scores": both}
