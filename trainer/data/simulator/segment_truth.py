"""Truth of a world's segments: the distribution of the next topic, and the best possible accuracy for a codebook.

The topics of a room follow a cycle of phases, and the length of a phase is uniform between two numbers of segments
(``content.PHASES``). So the probability that a phase ends now depends only on how long it has lasted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.console.errors import UserError
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import read_table
from trainer.data.simulator.content import PHASES, Items, Phase
from trainer.data.simulator.population import TOPICS

LONGEST_PHASE = max(longest for phases in PHASES for _, _, longest, _, _ in phases)

Quantizer = Callable[[np.ndarray], np.ndarray]
"""Function from vectors ``[n, dim] float32`` to their codes ``[n]``, whole numbers from 0 on."""


@dataclass(frozen=True)
class PhaseRules:
    """Phases of the rooms by topic, ``[topics]`` each; 0 for the topic of videos.

    Attributes:
        shortest, longest: fewest and most segments.
        after: topic of the phase that follows.
        low, high: lowest and highest level of the intensity.
    """

    shortest: np.ndarray
    longest: np.ndarray
    after: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @staticmethod
    def of(cycles: Sequence[Sequence[Phase]]) -> PhaseRules:
        """Return the rules of the phases of all categories."""
        shortest, longest, after = (np.zeros(len(TOPICS), np.int64) for _ in range(3))
        low, high = np.zeros(len(TOPICS)), np.zeros(len(TOPICS))
        for phases in cycles:
            codes = [TOPICS.index(name) for name, *_ in phases]
            for place, (code, (_, *sizes)) in enumerate(zip(codes, phases, strict=True)):
                shortest[code], longest[code], low[code], high[code] = sizes
                after[code] = codes[(place + 1) % len(codes)]
        return PhaseRules(shortest, longest, after, low, high)


PHASE_RULES = PhaseRules.of(PHASES)


def phase_begins(items: Items, first: int, last: int) -> np.ndarray:
    """Return the position at which the phase of each segment begins, not before ``first``, ``[last - first] int64``.

    Args:
        items: the rooms of a world.
        first: position of the first segment.
        last: position after the last segment.
    """
    position = np.arange(first, last)
    begins = (np.diff(items.topic[first:last], prepend=-1) != 0) | (items.segment_times(first, last)["segment"] == 0)
    return np.maximum.accumulate(np.where(begins, position, first))


def next_topics(items: Items, first: int, last: int) -> pa.Table:
    """Return the true distribution of the topic that follows each segment, as ``text_schema.SEGMENT_TRUTH``.

    Args:
        items: the rooms of a world.
        first: position of the first segment.
        last: position after the last segment.
    """
    shortest, longest, after = PHASE_RULES.shortest, PHASE_RULES.longest, PHASE_RULES.after
    # no phase is longer, so the phases of all segments asked for begin in this window
    start = max(first - LONGEST_PHASE, 0)
    position = np.arange(start, last)
    times = items.segment_times(start, last)
    lasted = 1 + position - phase_begins(items, start, last)
    topic = items.topic[start:last].astype(np.int64)
    stay = np.where(lasted < shortest[topic], 1.0, 1 - 1 / np.maximum(longest[topic] + 1 - lasted, 1))
    p_next = np.zeros((len(position), len(TOPICS)), np.float32)
    p_next[np.arange(len(position)), topic] = stay
    p_next[np.arange(len(position)), after[topic]] = 1 - stay
    lists = pa.FixedSizeListArray.from_arrays(p_next[first - start :].ravel(), len(TOPICS))
    return pa.table(
        {
            "item_id": times["item_id"][first - start :],
            "segment": times["segment"][first - start :],
            "p_next": lists.cast(pa.list_(pa.float32())),
        }
    )


@dataclass(frozen=True)
class ReferenceAccuracy:
    """Accuracy of the best predictions of the code of the next segment, with its standard errors.

    Attributes:
        accuracy: of a predictor that knows author, style, drift, noise and the distribution of the next topic. No
            predictor that reads the past only can be better, except by chance.
        standard_error: of ``accuracy``, over the segments and the draws.
        with_next_topic: accuracy of a predictor that knows the topic of the next segment as well.
        with_next_topic_error: its standard error.
        targets: number of segments from which both were computed.
        draws: number of vectors drawn for each segment.
    """

    accuracy: float
    standard_error: float
    with_next_topic: float
    with_next_topic_error: float
    targets: int
    draws: int


def nearest_centroid(centroids: np.ndarray) -> Quantizer:
    """Return the function that maps vectors to the nearest of ``centroids [codes, dim]``."""
    half = (centroids.astype(np.float32) ** 2).sum(axis=1) / 2
    return lambda vectors: (vectors @ centroids.astype(np.float32).T - half).argmax(axis=1)


def reference_accuracy(
    path: str | Path,
    quantizer: Quantizer,
    *,
    from_ms: int = 0,
    until_ms: int = 1 << 62,
    targets: int | None = 2_000,
    draws: int = 512,
    seed: int = 0,
) -> ReferenceAccuracy:
    """Return the best possible accuracy of a prediction of the next segment's code, for any codebook.

    A target is a segment that has one before it in its room. For each target, vectors are drawn from their true
    distribution. The best prediction is the most frequent code of one half of the draws, and it is evaluated on the
    other half, and the other way round. So the result is not too high, and with few draws a little too low.

    Args:
        path: dataset of a simulated world with segment vectors.
        quantizer: codes of vectors; see ``nearest_centroid``.
        from_ms: start of the first target at the earliest.
        until_ms: time before which targets start.
        targets: number of targets, drawn at random; None takes all.
        draws: vectors to draw for each target and each topic that it can have, an even number from 2 on.
        seed: of the draws.

    Raises:
        UserError: the dataset has no truth of segment vectors, or no target in the range of time.
    """
    if draws < 2 or draws % 2:
        raise UserError(f"reference_accuracy: draws is {draws}; it must be an even number, 2 or more")
    truth = _Truth.read(path)
    rng = np.random.default_rng(seed)
    start_ms = truth.start_ms
    follows = np.append(False, truth.item_id[1:] == truth.item_id[:-1])
    rows = np.flatnonzero(follows & (start_ms >= from_ms) & (start_ms < until_ms))
    if not len(rows):
        raise UserError(f"{path}: no segment starts from {from_ms} to {until_ms} with one before it in its room")
    if targets is not None and targets < len(rows):
        rows = rng.choice(rows, targets, replace=False)
    scores = np.array([_best_accuracies(truth, row, quantizer, draws, rng) for row in rows.tolist()])
    error = scores.std(axis=0, ddof=1) / np.sqrt(len(rows)) if len(rows) > 1 else np.full(2, np.nan)
    (accuracy, with_topic), (standard_error, topic_error) = scores.mean(axis=0).tolist(), error.tolist()
    return ReferenceAccuracy(accuracy, standard_error, with_topic, topic_error, len(rows), draws)


def read_next_topics(path: str | Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the topics of a world's segments, and the true distribution of the topic that follows each.

    Returns:
        ``[n] int64`` and ``[n, topics] float32``, in the order of ``segments.parquet``; None without a truth.
    """
    files = DatasetFiles(path)
    try:
        truth = read_table(files, "truth/segments.parquet", ["p_next"])
    except FileNotFoundError:
        return None
    topic = read_table(files, "segments.parquet", ["topic"]).column("topic").to_numpy().astype(np.int64)
    return topic, _rows(truth.column("p_next"))


@dataclass(frozen=True)
class _Truth:
    """Truth of the segments of a dataset, in the order of ``segments.parquet``.

    Attributes:
        item_id, start_ms, author: ``[n] int64``.
        p_next: ``[n, topics] float32``.
        topics: ``[topics, dim] float32``.
        noise: ``[dim] float32``.
        author_vectors: author -> times ``[k] int64`` and vectors ``[k, dim] float32``.
    """

    item_id: np.ndarray
    start_ms: np.ndarray
    author: np.ndarray
    p_next: np.ndarray
    topics: np.ndarray
    noise: np.ndarray
    author_vectors: dict[int, tuple[np.ndarray, np.ndarray]]

    @staticmethod
    def read(path: str | Path) -> _Truth:
        """Read the truth of the dataset at ``path``.

        Raises:
            UserError: the dataset has none.
        """
        files = DatasetFiles(path)
        try:
            truth = read_table(files, "truth/segments.parquet", ["item_id", "p_next"])
            parameters = read_table(files, "truth/segment_vectors.parquet")
        except FileNotFoundError:
            raise UserError(
                f"{path}: has no truth of segment vectors; `limelight data simulate --segment-vectors` writes it"
            ) from None
        segments = read_table(files, "segments.parquet", ["item_id", "start_ms"])
        items = read_table(files, "items.parquet", ["item_id", "author_id"])
        item_id, author_id = (items.column(name).to_numpy() for name in ("item_id", "author_id"))
        order = np.argsort(item_id)
        room = segments.column("item_id").to_numpy()
        vectors = _rows(parameters.column("vector"))
        part = np.array(parameters.column("part").to_pylist())
        ids, time_ms = (parameters.column(name).to_numpy() for name in ("id", "time_ms"))
        p_next = _rows(truth.column("p_next"))
        topics = np.zeros((p_next.shape[1], vectors.shape[1]), np.float32)
        topics[ids[part == "topic"]] = vectors[part == "topic"]
        lines = np.flatnonzero(part == "author")
        lines = lines[np.lexsort((time_ms[lines], ids[lines]))]
        authors, begin = np.unique(ids[lines], return_index=True)
        pieces = np.split(lines, begin[1:])
        return _Truth(
            item_id=room,
            start_ms=segments.column("start_ms").to_numpy(),
            author=author_id[order][np.searchsorted(item_id[order], room)],
            p_next=p_next,
            topics=topics,
            noise=vectors[part == "noise"][0],
            author_vectors={
                author: (time_ms[piece], vectors[piece]) for author, piece in zip(authors.tolist(), pieces, strict=True)
            },
        )

    def style(self, row: int) -> np.ndarray:
        """Return style plus drift of the author of segment ``row`` at its start, ``[dim] float32``."""
        times, vectors = self.author_vectors[int(self.author[row])]
        after = int(np.searchsorted(times, self.start_ms[row], side="right"))
        share = (self.start_ms[row] - times[after - 1]) / (times[after] - times[after - 1])
        return vectors[after - 1] + np.float32(share) * (vectors[after] - vectors[after - 1])


def _rows(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of lists of one length as ``[n, length] float32``."""
    return pc.list_flatten(column).to_numpy().reshape(len(column), -1)


def _best_accuracies(
    truth: _Truth, row: int, quantizer: Quantizer, draws: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Return the accuracies of the best predictions for a target, without and with its true topic.

    The draws are split in halves. The prediction comes from one half and is evaluated on the other.
    """
    p_topic = truth.p_next[row - 1].astype(np.float64)
    p_topic /= p_topic.sum()
    topics = np.flatnonzero(p_topic)
    noise = truth.noise * rng.standard_normal((len(topics), draws, len(truth.noise)), np.float32)
    vectors = noise + (truth.style(row) + truth.topics[topics])[:, None]
    codes = quantizer(vectors.reshape(-1, vectors.shape[-1]))
    # the codes that were drawn, numbered from 0
    known, number = np.unique(codes, return_inverse=True)
    number = number.reshape(len(topics), 2, draws // 2)
    share = np.zeros((len(topics), 2, len(known)))
    for topic, half in np.ndindex(share.shape[:2]):
        share[topic, half] = np.bincount(number[topic, half], minlength=len(known)) / (draws // 2)
    weighted = share * p_topic[topics, None, None]
    one, other = weighted.sum(axis=0)
    accuracy = (other[one.argmax()] + one[other.argmax()]) / 2
    with_topic = sum((second[first.argmax()] + first[second.argmax()]) / 2 for first, second in weighted)
    return float(accuracy), float(with_topic)
