"""Tests of last-touch attribution against a search event by event, and of the thresholds of views."""

from pathlib import Path

import numpy as np
import pytest

from trainer.data.format.schema import DatasetSpec
from trainer.data.importers.event_attribution import EventJoin, last_touch, no_behaviours
from trainer.data.importers.view_thresholds import live_view_delays, video_view_delays

SPEC = DatasetSpec(
    name="t",
    source="s",
    licence="l",
    partitions=2,
    timezone="UTC",
    behaviours=("like", "gift"),
    applies={"like": ("live",), "gift": ("live",)},
    candidates=("live",),
)


def random_log(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    n, m = 60, 200
    visits = {"user_id": rng.integers(0, 4, n), "item_id": rng.integers(0, 3, n), "request_ms": rng.integers(0, 40, n)}
    events = {"user_id": rng.integers(0, 5, m), "item_id": rng.integers(0, 4, m), "time_ms": rng.integers(0, 50, m)}
    events["time_ms"][:5] += 1 << 32
    return visits, events


def search(visits: dict[str, np.ndarray], user: int, item: int, time: int) -> int:
    """Return the first line of the latest visit; -1 if there is none or if it is too long ago."""
    found = -1
    for line in range(len(visits["user_id"])):
        begin = visits["request_ms"][line]
        own = visits["user_id"][line] == user and visits["item_id"][line] == item and begin <= time
        if own and (found < 0 or begin > visits["request_ms"][found]):
            found = line
    return found if found >= 0 and time - visits["request_ms"][found] < 1 << 31 else -1


@pytest.mark.parametrize("seed", range(4))
def test_last_touch(seed: int) -> None:
    visits, events = random_log(seed)
    expected = [search(visits, *event) for event in zip(*events.values(), strict=True)]
    assert last_touch(visits, events).tolist() == expected
    assert -1 in expected and max(expected) > 0


def test_last_touch_of_nothing() -> None:
    visits, events = random_log(0)
    none = {name: column[:0] for name, column in visits.items()}
    assert (last_touch(none, events) == -1).all()
    assert len(last_touch(visits, {name: column[:0] for name, column in events.items()})) == 0


@pytest.mark.parametrize("seed", range(3))
def test_join_gives_every_event_to_one_visit(tmp_path: Path, seed: int) -> None:
    """Test that first events become behaviours and others repeats, and that each event is counted exactly once."""
    visits, events = random_log(seed)
    # No two lines are equal: neither these events, nor the visits below, which differ in the time watched.
    events["line"] = np.arange(len(events["user_id"]))
    rng = np.random.default_rng(seed)
    gift = rng.random(len(events["user_id"])) < 0.5
    price = rng.integers(1, 9, len(gift)).astype(np.float32)
    n = len(visits["user_id"])
    columns = {**visits, "visit_id": np.arange(n), "author_id": visits["item_id"] * 7, "domain": np.ones(n, np.int8)}
    columns |= {"exit_ms": visits["request_ms"] + 3, "play_ms": np.arange(n), **no_behaviours(("like", "gift"), n)}
    join = EventJoin(tmp_path / "join", SPEC)
    join.visits(columns)
    join.events("like", {name: column[~gift] for name, column in events.items()})
    join.events("gift", {name: column[gift] for name, column in events.items()} | {"value": price[gift]})
    parts = [join.join(partition) for partition in range(2)]

    keys = (events[name] for name in ("user_id", "item_id", "time_ms"))
    owner = np.array([search(visits, *event) for event in zip(*keys, strict=True)])
    assert sum(part.orphans for part in parts) == (owner < 0).sum()
    made = {row["visit_id"]: row for part in parts for row in part.visits.to_pylist()}
    assert sorted(made) == list(range(n))
    repeats = [row for part in parts for row in part.repeats.to_pylist()]
    for visit, row in made.items():
        last = int(columns["exit_ms"][visit])
        for name, kind in (("like", ~gift), ("gift", gift)):
            rows = np.flatnonzero((owner == visit) & kind)
            times = sorted(events["time_ms"][rows].tolist())
            first = times[0] - visits["request_ms"][visit] if times else -1
            assert row[f"delay_{name}"] == first
            again = [row for row in repeats if row["visit_id"] == visit and row["event"] == name]
            assert sorted(event["time_ms"] for event in again) == times[1:]
            last = max([last, *times])
            if name == "gift" and times:
                assert sum(event["value"] for event in again) + row["value_gift"] == price[rows].sum()
        assert row["exit_ms"] == last


def test_views() -> None:
    live = live_view_delays(np.array([0, 14_999, 15_000, 59_999, 60_000]))
    assert live["delay_effective_view"].tolist() == [-1, -1, 15_000, 15_000, 15_000]
    assert live["delay_long_view"].tolist() == [-1, -1, -1, -1, 60_000]
    # Too short, a tenth, all of a short one, 18 s of a long one, of unknown length, and that but complete.
    play, length = np.array([999, 1_000, 5_000, 18_000, 17_000, 2_000]), np.array([10_000, 10_000, 5_000, 90_000, 0, 0])
    video = video_view_delays(play, length, np.array([False] * 5 + [True]))
    assert video["delay_effective_view"].tolist() == [-1, 1_000, 500, 9_000, -1, 2_000]
    assert video["delay_long_view"].tolist() == [-1, -1, 5_000, 18_000, -1, 2_000]
