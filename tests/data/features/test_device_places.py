"""Places of histories on a device: each entry of a rank's users once, at the place that its run names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.data.format.test_history import make_visits, write
from trainer.data.features import device_places
from trainer.data.features.device_places import DevicePlaces
from trainer.data.format.schema import DOMAINS, partition_of

PARTITIONS = 5


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
        left = places.left(rows, first[:, domain], stop[:, domain], 4)
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
    left = places.left(np.arange(4), first[:, 0], stop[:, 0], 5)
    assert not left.lengths.any() and not left.first.any() and not left.stop.any()
