"""Places of histories on a device: each entry of a rank's users once, at the place that its run names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.data.format.test_history import make_visits, spec, write
from trainer.config.features import FeatureConfig
from trainer.data.features import device_listings, device_places
from trainer.data.features.device_listings import listing_of
from trainer.data.features.device_places import DevicePlaces
from trainer.data.features.history_reads import HistoryRead
from trainer.data.features.history_sequences import HistoryReader
from trainer.data.format import history
from trainer.data.format.schema import DOMAINS, Rows, partition_of

PARTITIONS = 5
SEARCHES = [
    *(("latest", domain, require) for domain in (0, 1, None) for require in (0, 2, 5)),
    *(("author", domain, 0) for domain in (0, 1)),
]


def candidates(rng: np.random.Generator, user_id: np.ndarray) -> Rows:
    """Return rows of users, for candidates of authors of whom some have no visit."""
    return {"user_id": user_id, "author_id": rng.integers(-1, 11, len(user_id))}


def on_device(places: DevicePlaces, name: str) -> np.ndarray:
    """Return a column of all entries in the order of their places."""
    return np.concatenate([np.empty(0, np.int64), *(getattr(visits, name) for visits in places.read())])


@pytest.mark.parametrize("own", [[0, 3], [4], [1, 2], list(range(PARTITIONS))])
@pytest.mark.parametrize("seed", range(2))
def test_runs_have_the_same_entries_on_the_device(
    tmp_path: Path, own: list[int], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_places, "CHUNK_ENTRIES", 7)
    rng = np.random.default_rng(seed)
    # Partition 4 has no user, and some users have visits in one domain only.
    users = np.array([user for user in range(40) if partition_of(np.array([user]), PARTITIONS)[0] != 4])
    visits = make_visits(rng, 300, users)
    visits["domain"][visits["user_id"] % 3 == 0] = 1
    histories = write(tmp_path, visits, PARTITIONS)
    places = DevicePlaces(histories, PARTITIONS, own)
    items = on_device(places, "item_id")
    kept = np.isin(partition_of(visits["user_id"], PARTITIONS), own)
    assert sorted(items) == np.flatnonzero(kept).tolist() and places.entries == kept.sum()
    np.testing.assert_array_equal(on_device(places, "domain"), visits["domain"][items])

    # Users of these partitions, also such without a history.
    rows = rng.integers(0, 60, 200)
    rows = rows[np.isin(partition_of(rows, PARTITIONS), own)]
    first, stop = histories.runs(rows, rng.integers(0, 80, len(rows)))
    for domain in range(len(DOMAINS)):
        read = HistoryRead("top", domain, 4, 0)
        left = places.left(candidates(rng, rows), first[:, domain], stop[:, domain], read)
        np.testing.assert_array_equal(left.lengths, np.minimum(stop - first, 4)[:, domain])
        for row in range(len(rows)):
            there = histories.column("item_id")[first[row, domain] : stop[row, domain]]
            assert items[left.first[row] : left.stop[row]].tolist() == there.tolist()


def test_histories_without_a_user(tmp_path: Path) -> None:
    none = {name: column[:0] for name, column in make_visits(np.random.default_rng(0), 1, np.arange(1)).items()}
    histories = write(tmp_path, none)
    places = DevicePlaces(histories, 3, [0, 2])
    assert places.entries == 0 and list(places.read()) == []
    first, stop = histories.runs(np.arange(4), np.full(4, 9))
    rows = candidates(np.random.default_rng(0), np.arange(4))
    for search, domain, require in SEARCHES:
        runs = (first, stop) if domain is None else (first[:, domain], stop[:, domain])
        left = places.left(rows, *runs, HistoryRead(search, domain, 5, require))
        assert not left.lengths.any() and not left.first.any() and not left.stop.any()


@pytest.mark.parametrize(("search", "domain", "require"), SEARCHES)
@pytest.mark.parametrize("limit", [10_000, 12])
def test_a_run_of_a_listing_is_what_the_search_finds(
    tmp_path: Path, search: str, domain: int | None, require: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "HISTORY_LIMIT", limit)
    monkeypatch.setattr(device_listings, "CHUNK_ENTRIES", 5)
    rng, lengths = np.random.default_rng([limit, require]), set[int]()
    for own in ([0, 3], [2, 4], list(range(PARTITIONS))):
        visits = make_visits(rng, 400, np.arange(20))
        # Some users have visits in one domain only, and one has none at all.
        visits["domain"][visits["user_id"] % 5 == 0] = 1
        visits["author_id"][visits["user_id"] == 7] = -1
        histories = write(tmp_path / str(own), visits, PARTITIONS)
        places = DevicePlaces(histories, PARTITIONS, own)
        items, read = on_device(places, "item_id"), HistoryRead(search, domain, 2, require)
        users = rng.integers(0, 23, 300)
        rows = candidates(rng, users[np.isin(partition_of(users, PARTITIONS), own)])
        as_of_ms = rng.integers(0, 80, len(rows["user_id"]))
        name = {None: "both", 0: "video", 1: "live"}[domain]
        needed = tuple(behaviour for bit, behaviour in enumerate(spec().behaviours) if require >> bit & 1)
        settings = {"one": {"search": search, "domain": name, "length": 2, "require": needed}}
        reader = HistoryReader(spec(), FeatureConfig.model_validate({"history": settings}), {})
        expected = reader.read(rows, histories, as_of_ms, None)["one"]
        slices, left = reader.read_or_leave(rows, histories, as_of_ms, places)
        assert slices == {} and reader.reads == {"one": read}
        assert left["one"].lengths.tolist() == expected.lengths.tolist()
        key = listing_of(read)
        listed = np.arange(places.entries)
        if key is not None:
            listed = np.concatenate([np.empty(0, np.int64), *places.listing(key).places()])
            assert len(listed) == len(places.listing(key)) == len(np.unique(listed))
        found = [items[listed[a:b]].tolist() for a, b in zip(left["one"].first, left["one"].stop, strict=True)]
        # Items number the visits.
        assert [item for of_row in found for item in of_row] == expected.item_id.tolist()
        assert [len(of_row) for of_row in found] == expected.lengths.tolist()
        lengths |= set(expected.lengths.tolist())
    assert lengths == {0, 1, 2}
