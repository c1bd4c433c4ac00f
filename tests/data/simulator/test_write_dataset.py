"""Tests of the simulated world against its own truth, Table 1 of Moment&Cross, and the rules of the canonical log."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from trainer.console.errors import UserError
from trainer.data.format.schema import DOMAINS, DatasetSpec
from trainer.data.format.shards import read_rows
from trainer.data.simulator.config import BEHAVIOURS, START_MS
from trainer.data.simulator.write_dataset import simulate

Log = dict[str, np.ndarray]

# A run is wrong, not unlucky, beyond so many standard errors.
SIGMAS = 4.5


def columns(path: Path, folder: str) -> Log:
    table = pa.concat_tables([pq.read_table(file) for file in sorted((path / folder).glob("part-*.parquet"))])
    return {name: table.column(name).to_numpy() for name in table.column_names}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "dataset"
    simulate(out, users=2_000, days=5, partitions=3, seed=11)
    return out


@pytest.fixture(scope="module")
def events(path: Path) -> Log:
    return columns(path, "events")


@pytest.fixture(scope="module")
def truth(path: Path) -> Log:
    truth = columns(path, "truth")
    order = np.argsort(truth["visit_id"])
    return {name: column[order] for name, column in truth.items()}


@pytest.fixture(scope="module")
def items(path: Path) -> Log:
    table = pq.read_table(path / "items.parquet")
    return {name: table.column(name).to_numpy() for name in table.column_names}


@pytest.fixture(scope="module")
def visits(events: Log, truth: Log) -> Log:
    """Return ids, ``domain``, ``request`` and delays ``exit`` and ``first_B`` (-1: never) in the order of ``truth``."""
    at = np.searchsorted(truth["visit_id"], events["visit_id"])
    out: Log = {name: np.empty(len(truth["visit_id"]), np.int64) for name in ("item_id", "author_id", "domain")}
    out |= {"user_id": truth["user_id"], "request": truth["request_ms"]}
    for name in ("item_id", "author_id", "domain"):
        out[name][at] = events[name]
    for name, column in (("exit", "exit"), *((name, f"first_{name}") for name in BEHAVIOURS)):
        rows = np.flatnonzero(events["event"] == name)
        first = np.full(len(truth["visit_id"]), np.iinfo(np.int64).max)
        np.minimum.at(first, at[rows], events["time_ms"][rows] - truth["request_ms"][at[rows]])
        out[column] = np.where(first == np.iinfo(np.int64).max, -1, first)
    return out


def test_truth_is_calibrated(visits: Log, truth: Log) -> None:
    for domain, name in enumerate(DOMAINS):
        rows = visits["domain"] == domain
        for behaviour in BEHAVIOURS:
            p, happened = truth[f"p_{behaviour}"][rows].astype(np.float64), visits[f"first_{behaviour}"][rows] >= 0
            for part in np.array_split(np.argsort(p, kind="stable"), 8):
                error = np.sqrt((p[part] * (1 - p[part])).sum())
                difference = abs(happened[part].sum() - p[part].sum())
                assert difference <= SIGMAS * error, (name, behaviour, p[part].mean(), happened[part].mean())


def test_truth_covers_every_exposure_and_only_possible_behaviours(path: Path, visits: Log, truth: Log) -> None:
    assert len(np.unique(truth["visit_id"])) == len(truth["visit_id"]) == DatasetSpec.load(path).exposures
    video = visits["domain"] == DOMAINS.index("video")
    assert (truth["p_gift"][video] == 0).all() and (truth["p_gift"][~video] > 0).all()
    possible = np.stack([truth[f"p_{behaviour}"] for behaviour in BEHAVIOURS])
    assert np.isfinite(possible).all() and possible.min() >= 0 and possible.max() < 1


def test_base_rates(path: Path, visits: Log) -> None:
    live = visits["domain"] == DOMAINS.index("live")
    assert 0.09 < live.mean() < 0.11
    rate = {behaviour: (visits[f"first_{behaviour}"][live] >= 0).mean() for behaviour in BEHAVIOURS}
    assert 0.2 < rate["click"] < 0.32
    assert rate["click"] > rate["effective_view"] > rate["long_view"] > rate["like"]
    assert 0.025 < rate["like"] < 0.055 and 0.02 < rate["comment"] < 0.04
    assert 0.006 < rate["gift"] < 0.016 and 0.01 < rate["follow"] < 0.025
    rows = read_rows(str(path), DatasetSpec.load(path))
    assert len(rows["visit_id"]) == live.sum()
    np.testing.assert_allclose(rows["label"].mean(axis=0), [rate[behaviour] for behaviour in BEHAVIOURS], rtol=1e-6)


def test_table_1_of_the_whole_log(visits: Log, truth: Log, events: Log) -> None:
    """Test Table 1 on the written files; test_visit_outcome.py is sharper but tests the draw only."""
    live = visits["domain"] == DOMAINS.index("live")
    for behaviour, share in {"click": 0.96, "long_view": 1.0, "like": 0.79, "comment": 0.78, "gift": 0.68}.items():
        first = visits[f"first_{behaviour}"][live]
        first = first[(first >= 0) & (first <= 3_600_000)]
        error = np.sqrt(share * (1 - share) / len(first))
        assert abs((first <= 300_000).mean() - share) <= SIGMAS * error, behaviour

    gift = np.flatnonzero(events["event"] == "gift")
    visit = np.searchsorted(truth["visit_id"], events["visit_id"][gift])
    delay, price = events["time_ms"][gift] - truth["request_ms"][visit], events["value"][gift].astype(np.float64)
    kept = delay <= 3_600_000
    early, money = (
        np.bincount(visit[kept], price[kept] * (delay[kept] <= 300_000)),
        np.bincount(visit[kept], price[kept]),
    )
    share = early.sum() / money.sum()
    # delta method, over visits
    error = np.sqrt(((early - share * money) ** 2).sum()) / money.sum()
    assert abs(share - 0.34) <= SIGMAS * error and error < 0.05


def test_interactions_follow_a_click_and_exit_is_last(visits: Log, events: Log, truth: Log) -> None:
    for behaviour in ("like", "comment", "gift", "follow"):
        acted = visits[f"first_{behaviour}"] >= 0
        assert acted.any()
        assert (visits["first_click"][acted] >= 0).all()
        assert (visits[f"first_{behaviour}"][acted] >= visits["first_click"][acted]).all()
    assert (visits["first_effective_view"][visits["first_long_view"] >= 0] >= 0).all()
    live = visits["domain"] == DOMAINS.index("live")
    # the views say how long the watching was, no more and no less
    np.testing.assert_array_equal(visits["first_effective_view"][live] >= 0, visits["exit"][live] >= 15_000)
    np.testing.assert_array_equal(visits["first_long_view"][live] >= 0, visits["exit"][live] >= 60_000)
    order = np.lexsort((events["time_ms"], events["visit_id"]))
    last = np.append(events["visit_id"][order][1:] != events["visit_id"][order][:-1], True)
    exit_time = np.where(events["event"] == "exit", events["time_ms"], -1)[order]
    assert (
        np.maximum.reduceat(exit_time, np.flatnonzero(np.append(True, last[:-1]))) == events["time_ms"][order][last]
    ).all()


def test_gifts_have_prices_and_behaviours_repeat(events: Log) -> None:
    assert (events["value"][events["event"] == "gift"] > 0).all()
    for name, least in (("like", 2), ("comment", 2), ("gift", 3)):
        rows = events["event"] == name
        assert np.unique(events["visit_id"][rows], return_counts=True)[1].max() >= least
    for name in ("click", "effective_view", "long_view", "follow", "exposure", "enter", "exit"):
        assert np.unique(events["visit_id"][events["event"] == name], return_counts=True)[1].max() == 1


def test_nobody_watches_two_things_at_once(visits: Log) -> None:
    order = np.lexsort((visits["request"], visits["user_id"]))
    request, user = visits["request"][order], visits["user_id"][order]
    end = request + visits["exit"][order]
    assert (request[1:] >= end[:-1])[user[1:] == user[:-1]].all()


def test_only_what_exists_is_shown(path: Path, visits: Log, items: Log) -> None:
    np.testing.assert_array_equal(items["item_id"], np.arange(len(items["item_id"])))
    item, live = visits["item_id"], visits["domain"] == DOMAINS.index("live")
    np.testing.assert_array_equal(items["domain"][item], visits["domain"])
    np.testing.assert_array_equal(items["author_id"][item], visits["author_id"])
    assert (items["start_ms"][item] <= visits["request"]).all()
    assert (visits["request"] + visits["exit"] <= items["end_ms"][item])[live].all()
    assert (visits["request"] >= START_MS).all() and (visits["request"] < START_MS + 5 * 86_400_000).all()
    assert DatasetSpec.load(path).span_ms == (visits["request"].min(), visits["request"].max())


def test_a_user_follows_an_author_once_and_then_clicks_more(visits: Log, truth: Log) -> None:
    pair = visits["user_id"] << 32 | visits["author_id"]
    followed = np.flatnonzero(visits["first_follow"] >= 0)
    assert len(np.unique(pair[followed])) == len(followed)
    when = dict(zip(pair[followed].tolist(), visits["request"][followed].tolist(), strict=True))
    moment = np.array([when.get(key, -1) for key in pair.tolist()])
    before, after = (moment > 0) & (visits["request"] < moment), (moment > 0) & (visits["request"] > moment)
    assert before.sum() > 100 and after.sum() > 100
    assert (truth["p_follow"][after] == 0).all() and (truth["p_follow"][before] > 0).all()
    assert truth["p_click"][after].mean() > truth["p_click"][before].mean() + 0.05


def test_rooms_are_made_of_segments(path: Path, items: Log) -> None:
    segments = pq.read_table(path / "segments.parquet").to_pydict()
    room, number, start = (np.array(segments[name]) for name in ("item_id", "segment", "start_ms"))
    rooms = np.flatnonzero(items["domain"] == DOMAINS.index("live"))
    length = (items["end_ms"] - items["start_ms"])[rooms]
    np.testing.assert_array_equal(np.bincount(room, minlength=len(items["item_id"]))[rooms] * 30_000, length)
    np.testing.assert_array_equal(start, items["start_ms"][room] + 30_000 * number)
    assert 50 * 60_000 < length.mean() < 70 * 60_000
    videos = (items["end_ms"] - items["start_ms"])[: len(items["item_id"]) - len(rooms)]
    assert 50_000 < videos.mean() < 60_000
    topics = np.array(DatasetSpec.load(path).extra["topics"])[np.array(segments["topic"])]
    intensity = np.array(segments["intensity"])
    assert intensity.min() >= 0 and intensity.max() <= 1
    for peak, rest in (("dance", "chat"), ("climax", "match"), ("link", "pitch")):
        assert intensity[topics == peak].min() > intensity[topics == rest].mean()
    # a room keeps to the topics of its category
    category = np.array(["chat dance", "lobby match climax", "pitch demonstration link"])
    genre = items["item_genre"][room] - 1
    assert all(topic in names.split() for topic, names in zip(topics[::7], category[genre // 8][::7], strict=True))


def test_a_segment_is_known_some_seconds_after_its_end(path: Path) -> None:
    table = pq.read_table(path / "segments.parquet")
    delay = (table.column("known_ms").to_numpy() - table.column("start_ms").to_numpy() - 30_000) / 1000
    assert delay.min() >= 1 and 3.3 < np.median(delay) < 3.7 and 12 < np.quantile(delay, 0.99) < 16
    assert len(np.unique(delay)) > 1000
    # one delay has nothing to do with the next one
    assert abs(np.corrcoef(delay[1:], delay[:-1])[0, 1]) < SIGMAS / np.sqrt(len(delay))


FORMER = {
    ".": ("f2f5718ab1c6a768", 3316.894, 25),
    "events": ("11fe08a07e8732a8", 55943990.0, 16),
    "history": ("6de9ddd83e303234", 0.0, 10),
    "rows": ("2b8cf9e7a06eb0dd", 27294.833, 14),
    "texts": ("c8789b12c1f51acd", 0.0, 29),
    "truth": ("ffd7b58a6b31430c", 61648.799, 30),
}
"""Folder -> hash of its whole numbers and texts, sum of its other numbers, and number of its columns.

They belong to the world of 70 users, 2 days and seed 3 with texts, and were computed before segments had ``known_ms``.
"""


def test_a_world_is_the_same_as_that_of_earlier_versions(tmp_path: Path) -> None:
    simulate(tmp_path / "world", users=70, days=2, partitions=2, seed=3, texts=True)
    spec = DatasetSpec.load(tmp_path / "world")
    extra = ["users", "days", "seed", "exposures_per_day", "categories", "topics", "scenes", "comment_kinds"]
    assert list(spec.extra) == extra
    for folder, (digest, total, count) in FORMER.items():
        found = contents(tmp_path / "world", folder)
        whole, sums = hashlib.blake2b(digest_size=8), 0.0
        for name, values in sorted(found.items()):
            if values.dtype.kind == "f":
                sums += abs(float(values.sum(dtype=np.float64)))
            else:
                data = "\n".join(values).encode() if values.dtype.kind == "O" else values.astype(np.int64).tobytes()
                whole.update(name.encode() + data)
        # the last bit of a float may depend on the processor, so floats are compared by their sum
        assert (whole.hexdigest(), len(found)) == (digest, count), folder
        assert sums == pytest.approx(total, rel=1e-4), folder


def contents(path: Path, folder: str) -> Log:
    """Return all columns of the files of a folder, without those of the segments that earlier versions did not have."""
    columns = dict(read_rows(str(path), DatasetSpec.load(path))) if folder == "rows" else {}
    columns |= {file.stem: np.load(file) for file in (path / folder).glob("*.npy")}
    for file in (path / folder).glob("*.parquet"):
        table = pq.read_table(file)
        for name in table.column_names:
            if (file.name, name) == ("segments.parquet", "known_ms"):
                continue
            column = table.column(name).combine_chunks()
            if pa.types.is_list(column.type):
                columns[f"{file.stem}.{name}.lengths"] = pc.list_value_length(column).to_numpy()
                column = column.flatten()
            columns[f"{file.stem}.{name}"] = column.to_numpy(zero_copy_only=False)
    return columns


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    simulate(tmp_path / "a", users=70, days=2, partitions=2, seed=3)
    simulate(tmp_path / "b", users=70, days=2, partitions=2, seed=3)
    files = sorted(file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(tmp_path / "b") for file in (tmp_path / "b").rglob("*") if file.is_file())
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_partitions_only_sort_the_log(tmp_path: Path) -> None:
    logs = []
    for partitions in (1, 5):
        out = tmp_path / str(partitions)
        spec = simulate(out, users=70, days=2, partitions=partitions, seed=4)
        rows = read_rows(str(out), spec)
        rows.pop("partition")
        tables = [columns(out, "events"), columns(out, "truth"), rows]
        keys = [np.lexsort((table.get("event", table["visit_id"]), table["visit_id"])) for table in tables]
        logs.append(
            [{name: column[key] for name, column in table.items()} for table, key in zip(tables, keys, strict=True)]
        )
    for one, five in zip(*logs, strict=True):
        assert one.keys() == five.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], five[name], err_msg=name)


def test_another_seed_is_another_world(tmp_path: Path) -> None:
    one, two = (columns(simulate_and_path(tmp_path / str(seed), seed), "truth")["p_click"] for seed in (1, 2))
    assert len(one) != len(two) or not np.array_equal(one, two)


def simulate_and_path(out: Path, seed: int) -> Path:
    simulate(out, users=70, days=1, partitions=1, seed=seed)
    return out


def test_progress_is_reported(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    simulate(tmp_path / "a", users=70, days=3, partitions=1, seed=1, progress=lambda *call: calls.append(call))
    assert [call for call in calls if call[0] == "simulating"] == [("simulating", day, 3) for day in range(4)]


@pytest.mark.parametrize("size", [{"users": 0}, {"days": 0}, {"partitions": 0}, {"seed": -1}])
def test_impossible_sizes_are_refused(tmp_path: Path, size: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(size))} is {next(iter(size.values()))}"):
        simulate(tmp_path / "a", **{"users": 10, "days": 1, "partitions": 1, "seed": 0, **size})
    assert not list(tmp_path.iterdir())
