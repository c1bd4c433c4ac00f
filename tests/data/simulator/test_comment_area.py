"""Tests of texts and comment areas of the simulated world against their truth and the information at the request."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.data.format.text_schema import flat_lists, pad_lists, read_texts
from trainer.data.simulator.comment_area import READ, SHOWN, comment_areas, make_comment_readers
from trainer.data.simulator.comments import Comments, comment_table, make_comments
from trainer.data.simulator.config import DAY_MS, START_MS, WorldConfig
from trainer.data.simulator.words import BANDS, COMMENT_MARKS, FRAMES, KINDS, TOPIC_WORDS
from trainer.data.simulator.world import SimulatedWorld, make_world
from trainer.data.simulator.write_dataset import simulate

SIGMAS = 4.5
"""A run is wrong, not unlucky, beyond so many standard errors."""
USERS, DAYS, SEED = 600, 3, 5


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "texts"
    simulate(out, USERS, DAYS, 3, SEED, texts=True)
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "plain"
    simulate(out, USERS, DAYS, 3, SEED)
    return out


@pytest.fixture(scope="module")
def visits(path: Path) -> pa.Table:
    return read_texts(path, "visits")


@pytest.fixture(scope="module")
def truth(path: Path) -> pa.Table:
    return pq.read_table(path / "truth/staytime.parquet").sort_by(
        [("request_ms", "ascending"), ("visit_id", "ascending")]
    )


@pytest.fixture(scope="module")
def world() -> SimulatedWorld:
    return make_world(WorldConfig(USERS, DAYS, SEED))


@pytest.fixture(scope="module")
def comments(world: SimulatedWorld) -> Comments:
    return make_comments(world)


def test_all_but_the_texts_is_the_same_without_them(path: Path, plain: Path) -> None:
    for file in sorted(file.relative_to(plain) for file in plain.rglob("*") if file.is_file()):
        if file.name not in ("dataset.json", "checksums.json"):
            assert (path / file).read_bytes() == (plain / file).read_bytes(), file
    assert not (plain / "texts").exists()


def test_the_same_seed_gives_the_same_texts_in_any_number_of_partitions(path: Path, tmp_path: Path) -> None:
    simulate(tmp_path / "again", USERS, DAYS, 1, SEED, texts=True)
    for name in ("items", "authors", "segments", "comments", "visits"):
        assert read_texts(tmp_path / "again", name).equals(read_texts(path, name)), name


def test_openings_staytimes_and_interactions_are_calibrated(visits: pa.Table, truth: pa.Table) -> None:
    assert visits.column("visit_id").equals(truth.column("visit_id"))
    p = truth.column("p_open").to_numpy().astype(np.float64)
    seconds = truth.column("seconds_if_open").to_numpy().astype(np.float64)
    stay = visits.column("staytime_ms").to_numpy() / 1000
    opened = stay > 0
    for part in np.array_split(np.argsort(p), 6):
        assert abs(opened[part].sum() - p[part].sum()) <= SIGMAS * np.sqrt((p[part] * (1 - p[part])).sum())
    for part in np.array_split(np.flatnonzero(opened)[np.argsort(seconds[opened])], 4):
        error = np.std(stay[part] - seconds[part]) * np.sqrt(len(part))
        assert abs((stay[part] - seconds[part]).sum()) <= SIGMAS * error
    shown, interacted = pad_lists(visits.column("shown"), SHOWN), pad_lists(visits.column("interacted"), SHOWN)
    chance = np.zeros(shown.shape)
    chance[shown >= 0] = truth.column("p_interact").combine_chunks().flatten().to_numpy()
    touched = (shown[:, :, None] == interacted[:, None, :]).any(axis=2) & (shown >= 0)
    assert touched.sum() == (interacted >= 0).sum()
    assert not touched[~opened].any()
    chance, touched = chance[opened], touched[opened]
    for place in (slice(0, 3), slice(3, 6), slice(6, SHOWN)):
        expected, error = chance[:, place].sum(), np.sqrt((chance * (1 - chance))[:, place].sum())
        assert abs(touched[:, place].sum() - expected) <= SIGMAS * error


def test_rates_are_those_of_a_comment_area(visits: pa.Table) -> None:
    stay = visits.column("staytime_ms").to_numpy() / 1000
    touched = np.diff(flat_lists(visits.column("interacted"))[1])[stay > 0]
    assert 0.1 < (stay > 0).mean() < 0.18
    assert 5 < np.median(stay[stay > 0]) < 20
    assert 0.15 < (touched > 0).mean() < 0.4
    assert stay[stay > 0][touched >= 2].mean() > 2 * stay[stay > 0][touched == 0].mean()


def test_what_is_shown_was_there_and_counts_only_what_was(path: Path, visits: pa.Table, comments: Comments) -> None:
    shown, offsets = flat_lists(visits.column("shown"))
    row = np.repeat(np.arange(visits.num_rows), np.diff(offsets))
    request = visits.column("request_ms").to_numpy()[row]
    assert (comments.item[shown] == visits.column("item_id").to_numpy()[row]).all()
    assert (comments.time_ms[shown] <= request).all()
    assert len(np.unique(row * 1_000_000 + shown)) == len(shown)
    likes = flat_lists(visits.column("shown_likes"))[0]
    np.testing.assert_array_equal(likes, comments.likes(shown, request))
    in_the_end = read_texts(path, "comments").column("likes").to_numpy()
    assert (likes <= in_the_end[shown]).all() and (likes < in_the_end[shown]).any()
    # a comment is missing only if there are as many others as fit
    some = visits.slice(0, 500).select(["item_id", "request_ms"]).to_pylist()
    written = [comments.time_ms[comments.first[one["item_id"]] : comments.first[one["item_id"] + 1]] for one in some]
    available = [(times <= one["request_ms"]).sum() for times, one in zip(written, some, strict=True)]
    np.testing.assert_array_equal(np.diff(offsets)[:500], np.minimum(available, SHOWN))
    assert min(available) < READ


def test_likes_grow_and_begin_at_nothing(comments: Comments) -> None:
    some = np.arange(0, len(comments.item), 97)
    times = comments.time_ms[some][:, None] + np.array([-DAY_MS, 0, DAY_MS // 24, DAY_MS, 100 * DAY_MS])
    likes = comments.likes(some[:, None], times)
    assert (likes[:, :2] == 0).all() and (np.diff(likes, axis=1) >= 0).all()
    np.testing.assert_allclose(likes[:, -1], comments.final_likes[some], atol=1, rtol=1e-6)
    np.testing.assert_allclose(likes[:, 3], (1 - np.exp(-1)) * comments.final_likes[some], atol=1, rtol=1e-4)


def test_words_tell_quality_kind_and_genre(world: SimulatedWorld, comments: Comments) -> None:
    texts = comment_table(world.config, comments).column("text").to_pylist()
    band_of_mark = {mark: band for band, marks in enumerate(COMMENT_MARKS) for mark in marks}
    kind_of_frame = {frame: KINDS.index(kind) for kind, frames in FRAMES.items() for frame in frames}
    bands = np.empty(len(texts), np.int64)
    for place, (text, genre, kind) in enumerate(zip(texts, comments.genre, comments.kind, strict=True)):
        mark = next(mark for mark in band_of_mark if text.startswith(f"{mark} "))
        frame = next(frame for frame in kind_of_frame if text.startswith(f"{mark} {frame} "))
        first, second = text.removeprefix(f"{mark} {frame} ").split()
        bands[place] = band_of_mark[mark]
        assert kind_of_frame[frame] == kind
        assert first != second and {first, second} <= set(TOPIC_WORDS[genre])
    assert np.corrcoef(bands, comments.quality)[0, 1] > 0.85
    assert set(np.unique(bands)) == set(range(BANDS))
    log_likes = np.log(comments.final_likes)
    assert np.corrcoef(bands, log_likes)[0, 1] > 0.6


def test_taste_decides_which_comment_appeals(world: SimulatedWorld, comments: Comments) -> None:
    readers = make_comment_readers(world)
    item = np.full(USERS, np.argmax(np.diff(comments.first)))
    request = np.full(USERS, START_MS + DAYS * DAY_MS)
    areas = comment_areas(world, comments, readers, np.arange(USERS), item, request, np.random.default_rng(0))
    kind = comments.kind[areas.shown]
    taste = readers.taste[np.arange(USERS)[:, None], kind]
    assert areas.filled.all()
    assert np.corrcoef(taste.ravel(), np.log(areas.interact).ravel())[0, 1] > 0.5


def test_segments_and_items_are_those_of_the_world(path: Path) -> None:
    segments, items = pq.read_table(path / "segments.parquet"), read_texts(path, "items")
    texts = read_texts(path, "segments")
    for name in ("item_id", "segment", "start_ms", "known_ms"):
        np.testing.assert_array_equal(texts.column(name).to_numpy(), segments.column(name).to_numpy())
    table = pq.read_table(path / "items.parquet")
    np.testing.assert_array_equal(items.column("author_id").to_numpy(), table.column("author_id").to_numpy())
    length = (table.column("end_ms").to_numpy() - table.column("start_ms").to_numpy())[
        table.column("domain").to_numpy() == 0
    ]
    np.testing.assert_array_equal(items.column("duration_ms").to_numpy()[: len(length)], length)
    assert (items.column("duration_ms").to_numpy()[len(length) :] == 0).all()
    assert len(read_texts(path, "authors")) == len(pq.read_table(path / "authors.parquet"))
