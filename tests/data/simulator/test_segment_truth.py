"""Tests of the truth of segments against the drawn topics, and of the reference accuracy against brute force."""

from __future__ import annotations

from math import erf, sqrt
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from trainer.console.errors import UserError
from trainer.data.format.content_vectors import ContentVectors
from trainer.data.simulator.config import WorldConfig
from trainer.data.simulator.content import PHASES
from trainer.data.simulator.population import TOPICS
from trainer.data.simulator.segment_truth import nearest_centroid, next_topics, reference_accuracy
from trainer.data.simulator.world import make_world
from trainer.data.simulator.write_dataset import simulate

SIGMAS = 4.5
"""A run is wrong, not unlucky, beyond so many standard errors."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "vectors"
    simulate(out, 30, 2, 2, 4, segment_noise=1.0)
    return out


def test_the_next_topic_is_calibrated() -> None:
    """Test that the topics after the segments with one distribution are distributed like it."""
    world = make_world(WorldConfig(300, 3, 9))
    items = world.items
    p = np.stack(next_topics(items, 0, len(items.topic)).column("p_next").to_pylist())
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-6)
    follows = np.flatnonzero(np.diff(np.repeat(np.arange(len(items.author)), np.diff(items.first_segment))) == 0)
    stay = p[follows, items.topic[follows]].astype(np.float64)
    stayed = items.topic[follows + 1] == items.topic[follows]
    assert (p[follows, items.topic[follows + 1]] > 0).all(), "no topic comes that was impossible"
    np.testing.assert_allclose(np.unique(stay), [*(1 - 1 / np.arange(1, 16)), 1], rtol=1e-6)
    for value in np.unique(stay):
        rows = stay == value
        assert abs(stayed[rows].mean() - value) <= SIGMAS * np.sqrt(value * (1 - value) / rows.sum()) + 1e-12, value


def test_the_next_topic_is_that_of_the_phases() -> None:
    """Compare with the rules of the phases, written out for one segment after the other."""
    world = make_world(WorldConfig(60, 2, 9))
    items, p = world.items, next_topics(world.items, 0, len(world.items.topic))
    lengths = {name: (least, most, phases) for phases in PHASES for name, least, most, _, _ in phases}
    lasted, room = 0, -1
    for row in p.slice(0, 3000).to_pylist():
        place = items.first_segment[row["item_id"]] + row["segment"]
        name = TOPICS[items.topic[place]]
        lasted = lasted + 1 if row["item_id"] == room and items.topic[place] == items.topic[place - 1] else 1
        room = row["item_id"]
        least, most, phases = lengths[name]
        names = [phase[0] for phase in phases]
        possible = [length for length in range(least, most + 1) if length >= lasted]
        ends = possible.count(lasted) / len(possible)
        expected = np.zeros(len(TOPICS))
        expected[TOPICS.index(name)] = 1 - ends
        expected[TOPICS.index(names[(names.index(name) + 1) % len(names)])] = ends
        np.testing.assert_allclose(row["p_next"], expected, atol=1e-6)


@pytest.mark.parametrize("first", [1, 5, 23, 24, 25, 100, 1001])
def test_a_part_has_the_distributions_of_the_whole(first: int) -> None:
    items = make_world(WorldConfig(60, 1, 9)).items
    whole = next_topics(items, 0, len(items.topic))
    assert next_topics(items, first, first + 50).equals(whole.slice(first, 50))


def means_of(path: Path, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return noise, means for each next topic ``[rows, topics, dim]`` and its probabilities, in plain steps."""
    truth = pq.read_table(path / "truth/segment_vectors.parquet").to_pylist()
    topics = {line["id"]: np.array(line["vector"]) for line in truth if line["part"] == "topic"}
    styles = {(line["id"], line["time_ms"]): np.array(line["vector"]) for line in truth if line["part"] == "author"}
    (noise,) = (np.array(line["vector"]) for line in truth if line["part"] == "noise")
    segments = pq.read_table(path / "segments.parquet").to_pylist()
    items = pq.read_table(path / "items.parquet")
    author_of = dict(zip(items["item_id"].to_pylist(), items["author_id"].to_pylist(), strict=True))
    p_next = pq.read_table(path / "truth/segments.parquet")["p_next"].to_pylist()
    means, chances = [], []
    for row in rows.tolist():
        start, author = segments[row]["start_ms"], author_of[segments[row]["item_id"]]
        before = max(time for one, time in styles if one == author and time <= start)
        share = (start - before) / 86_400_000
        style = (1 - share) * styles[author, before] + share * styles[author, before + 86_400_000]
        means.append([style + topics.get(topic, np.nan) for topic in range(len(TOPICS))])
        chances.append(p_next[row - 1])
    return noise, np.array(means), np.array(chances)


def targets_of(path: Path) -> np.ndarray:
    segment = pq.read_table(path / "segments.parquet").column("segment").to_numpy()
    return np.flatnonzero(segment > 0)


def test_two_centroids_give_the_accuracy_that_the_normal_distribution_gives(path: Path) -> None:
    vectors = ContentVectors.open(path / "embeddings/segments").vectors.astype(np.float32)
    centroids = vectors[[10, 4000]]
    start = pq.read_table(path / "segments.parquet").column("start_ms").to_numpy()
    from_ms, rows = int(np.quantile(start, 0.8)), targets_of(path)
    rows = rows[start[rows] >= from_ms]
    noise, means, chances = means_of(path, rows)
    # code 1 if w.x > b, and w.x is normal
    w = (centroids[1] - centroids[0]).astype(np.float64)
    b = ((centroids[1].astype(np.float64) ** 2).sum() - (centroids[0].astype(np.float64) ** 2).sum()) / 2
    z = (means @ w - b) / np.sqrt((w**2 * noise**2).sum())
    one = np.where(chances > 0, np.vectorize(lambda x: (1 + erf(x / sqrt(2))) / 2)(np.nan_to_num(z)), 0)
    mixture = (chances * one).sum(axis=1)
    best = np.maximum(mixture, 1 - mixture).mean()
    with_topic = (chances * np.maximum(one, 1 - one)).sum(axis=1).mean()
    found = reference_accuracy(path, nearest_centroid(centroids), from_ms=from_ms, targets=None, draws=64)
    assert found.targets == len(rows) > 1000 and found.standard_error < 0.01
    # Both are averages over the same targets, so the errors are smaller than those stated, which are over the targets,
    # too. A choice from half of the draws is wrong at times where both codes are about equally likely.
    assert -0.004 < found.accuracy - best < SIGMAS * found.standard_error
    assert -0.004 < found.with_next_topic - with_topic < SIGMAS * found.with_next_topic_error
    assert with_topic > best > 0.6


def test_the_reference_is_that_of_brute_force_for_several_codes(path: Path) -> None:
    vectors = ContentVectors.open(path / "embeddings/segments").vectors.astype(np.float32)
    centroids = vectors[::1500][:5]
    rows = targets_of(path)[::400]
    noise, means, chances = means_of(path, rows)
    rng = np.random.default_rng(1)
    best, with_topic = [], []
    for mean, chance in zip(means, chances, strict=True):
        shares = np.zeros((len(TOPICS), len(centroids)))
        for topic in np.flatnonzero(chance):
            drawn = mean[topic] + noise * rng.standard_normal((4000, len(noise)))
            distance = np.stack([((drawn - centroid) ** 2).sum(axis=1) for centroid in centroids], axis=1)
            shares[topic] = np.bincount(distance.argmin(axis=1), minlength=len(centroids)) / len(drawn)
        best.append((chance @ shares).max())
        with_topic.append((chance * shares.max(axis=1)).sum())
    start = pq.read_table(path / "segments.parquet").column("start_ms").to_numpy()
    found = reference_accuracy(path, nearest_centroid(centroids), targets=600, draws=400)
    spread = np.std(best) / np.sqrt(len(best))
    assert abs(found.accuracy - np.mean(best)) < SIGMAS * np.hypot(found.standard_error, spread)
    spread = np.std(with_topic) / np.sqrt(len(with_topic))
    assert abs(found.with_next_topic - np.mean(with_topic)) < SIGMAS * np.hypot(found.with_next_topic_error, spread)
    # one target, many draws: its own number
    row = rows[3]
    only = reference_accuracy(
        path, nearest_centroid(centroids), from_ms=int(start[row]), until_ms=int(start[row]) + 1, draws=20_000
    )
    assert only.targets == 1 and np.isnan(only.standard_error)
    assert only.accuracy == pytest.approx(best[3], abs=0.03)


def test_no_predictor_that_reads_the_past_is_better(path: Path) -> None:
    """Compare with the code of the segment before, which is at most as good."""
    vectors = ContentVectors.open(path / "embeddings/segments").vectors.astype(np.float32)
    rng = np.random.default_rng(0)
    quantizer = nearest_centroid(vectors[rng.choice(len(vectors), 40, replace=False)])
    code, rows = quantizer(vectors), targets_of(path)
    found = reference_accuracy(path, quantizer, targets=1500, draws=100)
    error = SIGMAS * np.hypot(found.standard_error, 0.5 / np.sqrt(len(rows)))
    assert (code[rows] == code[rows - 1]).mean() < found.accuracy + error
    assert found.with_next_topic > found.accuracy


def test_one_code_is_always_right(path: Path) -> None:
    found = reference_accuracy(path, lambda vectors: np.zeros(len(vectors), np.int64), targets=50, draws=2)
    assert found.accuracy == pytest.approx(1, abs=1e-12) and found.standard_error < 1e-12


def test_errors_are_one_line(path: Path, tmp_path: Path) -> None:
    simulate(tmp_path / "plain", 10, 1, 1, 4)
    quantizer = nearest_centroid(np.zeros((2, 128)))
    with pytest.raises(UserError, match=r"has no truth of segment vectors; .* --segment-vectors"):
        reference_accuracy(tmp_path / "plain", quantizer)
    with pytest.raises(UserError, match="no segment starts from 5 to 6"):
        reference_accuracy(path, quantizer, from_ms=5, until_ms=6)
    with pytest.raises(UserError, match="draws is 3; it must be an even number"):
        reference_accuracy(path, quantizer, draws=3)
