"""Tests of the segment vectors of a simulated world: their parts, and all else that stays the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.cluster import MiniBatchKMeans

from trainer.console.errors import UserError
from trainer.data.format.content_vectors import ContentVectors
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.verification import verify_dataset
from trainer.data.simulator import segment_vectors
from trainer.data.simulator.config import WorldConfig
from trainer.data.simulator.segment_vectors import (
    DEFAULT_NOISE,
    DIM,
    SPECTRUM,
    SegmentVectorGenerator,
    author_traits,
    day_and_share,
)
from trainer.data.simulator.world import SimulatedWorld, make_world
from trainer.data.simulator.write_dataset import simulate

USERS, DAYS, SEED, NOISE = 30, 3, 4, 0.5


@pytest.fixture(scope="module")
def world() -> SimulatedWorld:
    return make_world(WorldConfig(USERS, DAYS, SEED))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "vectors"
    simulate(out, USERS, DAYS, 2, SEED, segment_noise=NOISE)
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "plain"
    simulate(out, USERS, DAYS, 2, SEED)
    return out


def vectors_of(world: SimulatedWorld, noise: float) -> np.ndarray:
    return np.concatenate([vectors for _, vectors in SegmentVectorGenerator(world, noise).parts()])


def test_all_but_the_vectors_is_the_same_without_them(path: Path, plain: Path) -> None:
    changed = {"dataset.json", "checksums.json", "segments.parquet"}
    for file in sorted(file.relative_to(plain) for file in plain.rglob("*") if file.is_file()):
        if file.name not in changed:
            assert (path / file).read_bytes() == (plain / file).read_bytes(), file
    with_vectors = pq.read_table(path / "segments.parquet")
    assert with_vectors.drop_columns("vector").equals(pq.read_table(plain / "segments.parquet"))
    one, other = DatasetSpec.load(path).extra, DatasetSpec.load(plain).extra
    assert one == {**other, "segment_vectors": {"dim": DIM, "noise": NOISE}}
    names = {
        str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and "embeddings" not in str(file)
    }
    truth = {"truth/segments.parquet", "truth/segment_vectors.parquet"}
    assert names == {str(file.relative_to(plain)) for file in plain.rglob("*") if file.is_file()} | truth


def test_a_segment_names_its_vector_by_its_row(path: Path, world: SimulatedWorld) -> None:
    table = ContentVectors.open(path / "embeddings/segments")
    named = pq.read_table(path / "segments.parquet").column("vector").to_numpy()
    np.testing.assert_array_equal(named, np.arange(len(table)))
    np.testing.assert_array_equal(table.ids, named)
    assert table.dim == DIM and table.vectors.dtype == np.float16
    np.testing.assert_allclose(table.vectors[table.lookup(named)], vectors_of(world, NOISE), rtol=1e-3, atol=1e-4)


def test_the_truth_gives_the_vectors_but_for_the_noise(path: Path) -> None:
    """Subtract the parts in the truth file; the rest is the noise that the file describes."""
    segments, truth = pq.read_table(path / "segments.parquet"), pq.read_table(path / "truth/segment_vectors.parquet")
    items = pq.read_table(path / "items.parquet")
    author_of = dict(zip(items["item_id"].to_pylist(), items["author_id"].to_pylist(), strict=True))
    lines = truth.to_pylist()
    topics = {line["id"]: np.array(line["vector"]) for line in lines if line["part"] == "topic"}
    styles = {(line["id"], line["time_ms"]): np.array(line["vector"]) for line in lines if line["part"] == "author"}
    (noise,) = (np.array(line["vector"]) for line in lines if line["part"] == "noise")
    times = sorted({time for _, time in styles})
    assert set(np.diff(times)) == {86_400_000}
    rest = []
    vectors = ContentVectors.open(path / "embeddings/segments").vectors.astype(np.float64)
    for row in segments.slice(0, 6000).to_pylist():
        before = max(time for time in times if time <= row["start_ms"])
        share = (row["start_ms"] - before) / 86_400_000
        author = author_of[row["item_id"]]
        style = (1 - share) * styles[author, before] + share * styles[author, before + 86_400_000]
        rest.append(vectors[row["vector"]] - topics[row["topic"]] - style)
    scaled = np.stack(rest) / noise
    assert abs(scaled.mean()) < 0.01 and abs(scaled.std() - 1) < 0.01
    # the noise of a segment says nothing about that of the next, and one direction nothing about another
    assert abs((scaled[1:] * scaled[:-1]).mean()) < 0.01 and abs((scaled[:, 1:] * scaled[:, :-1]).mean()) < 0.01
    np.testing.assert_allclose(noise, NOISE * SPECTRUM, rtol=1e-6)


def test_without_noise_vectors_differ_by_author_topic_and_day(world: SimulatedWorld) -> None:
    vectors, items = vectors_of(world, 0), world.items
    times = items.segment_times(0, len(items.topic))
    author, topic = items.author[times["item_id"]], items.topic
    same_room = times["item_id"][1:] == times["item_id"][:-1]
    step = np.linalg.norm(np.diff(vectors, axis=0), axis=1)
    slow = same_room & (topic[1:] == topic[:-1])
    assert step[slow].max() < 0.01 and step[same_room & ~slow].min() > 0.5
    # the same author and topic, far apart in time: it has drifted
    for one in np.unique(author):
        rows = np.flatnonzero((author == one) & (topic == topic[author == one][0]))
        apart = times["start_ms"][rows[-1]] - times["start_ms"][rows[0]]
        moved = np.linalg.norm(vectors[rows[-1]] - vectors[rows[0]])
        if apart > 1.5 * 86_400_000:
            assert 0.2 < moved < 2
        assert moved < 2
    # the style is that of the author, so two authors differ with the same topic
    chat = [vectors[np.flatnonzero((author == one) & (topic == topic[0]))] for one in np.unique(author)]
    means = np.stack([part.mean(axis=0) for part in chat if len(part)])
    assert np.linalg.norm(means[1:] - means[:-1], axis=1).min() > 0.4


def test_parts_of_any_size_give_the_same_vectors(world: SimulatedWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = vectors_of(world, NOISE)
    monkeypatch.setattr(segment_vectors, "SEGMENTS_AT_ONCE", 777)
    np.testing.assert_array_equal(vectors_of(world, NOISE), whole)


def test_a_damaged_file_of_the_truth_is_found(path: Path) -> None:
    for name in ("truth/segments.parquet", "truth/segment_vectors.parquet", "embeddings/segments/vectors-*.npy"):
        (file,) = path.glob(name)
        content = file.read_bytes()
        file.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
        problems = verify_dataset(str(path), lambda what, done, total: None).problems
        file.write_bytes(content)
        assert len(problems) == 1 and file.name in problems[0]
    assert not verify_dataset(str(path), lambda what, done, total: None).problems


@pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf"), 1001.0])
def test_an_impossible_noise_is_refused(tmp_path: Path, noise: float) -> None:
    with pytest.raises(UserError, match=r"segment_noise is .*; it must be in \[0, 1000\]"):
        simulate(tmp_path / "a", 10, 1, 1, 0, segment_noise=noise)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_at_the_default_noise_the_two_rules_are_about_equally_good() -> None:
    """Repeat the measurement of docs/data.md with the k-means of scikit-learn: the last code against the usual one."""
    codes, days = 2000, 4
    big = make_world(WorldConfig(2000, days, 1))
    times = big.items.segment_times(0, len(big.items.topic))
    day, _ = day_and_share(times["start_ms"])
    vectors = vectors_of(big, DEFAULT_NOISE)
    earlier, later = day < days - 1, (day >= days - 1) & (times["segment"] > 0)
    means = MiniBatchKMeans(codes, batch_size=8192, n_init=1, init="random", max_iter=20, random_state=0)
    code = means.fit(vectors[earlier]).predict(vectors)
    author = big.items.author[times["item_id"]]
    counts = np.zeros((big.config.authors, codes), np.int32)
    np.add.at(counts, (author[earlier], code[earlier]), 1)
    rows = np.flatnonzero(later)
    last, most_frequent = (
        (code[rows] == code[rows - 1]).mean(),
        (code[rows] == counts.argmax(axis=1)[author[rows]]).mean(),
    )
    assert 0.1 < last < 0.17 and 0.1 < most_frequent < 0.17
    assert abs(last - most_frequent) < 0.02


def test_styles_follow_the_traits_that_viewers_like_as_far_as_asked(world: SimulatedWorld) -> None:
    """A linear regression of the styles on the traits explains the share that was asked for."""
    traits = author_traits(world.authors)
    inputs = np.column_stack([traits, np.ones(len(traits))])
    # A regression on k of n random columns explains k / n of anything.
    chance = inputs.shape[1] / len(inputs)
    for taste in (0.0, 0.5, 1.0):
        generator = SegmentVectorGenerator(world, NOISE, taste)
        style = generator._style / SPECTRUM
        residual = style - inputs @ np.linalg.lstsq(inputs, style, rcond=None)[0]
        explained = 1 - residual.var() / style.var()
        assert abs(explained - (taste + (1 - taste) * chance)) < 0.05
        assert abs(float((generator._style**2).sum(axis=1).mean()) - 1) < 0.35


def test_taste_changes_the_vectors_only(path: Path, tmp_path: Path) -> None:
    simulate(tmp_path / "taste", USERS, DAYS, 2, SEED, segment_noise=NOISE, segment_taste=0.5)
    for file in sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file()):
        if "vectors" not in file.name and file.name not in {"dataset.json", "checksums.json", "manifest.json"}:
            other = tmp_path / "taste" / file
            assert not other.exists() or (path / file).read_bytes() == other.read_bytes() or "embeddings" in str(file)
    assert DatasetSpec.load(tmp_path / "taste").extra["segment_vectors"]["taste"] == 0.5
