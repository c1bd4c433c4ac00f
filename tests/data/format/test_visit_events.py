"""Events of visits, in parts of any size, against a sorted list of all events."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.small_visits import BEHAVIOURS, SPEC, make_visits
from trainer.data.format import visit_events as visits_module
from trainer.data.format.sorting import time_order
from trainer.data.format.visit_events import derive_events, event_names

IDS = ("user_id", "author_id", "item_id", "domain", "visit_id")
NAMES = event_names(SPEC)


def lines_of(columns: dict[str, np.ndarray]) -> list[dict]:
    return [dict(zip(columns, line, strict=True)) for line in zip(*(c.tolist() for c in columns.values()), strict=True)]


def expected_events(visits: dict[str, np.ndarray], repeats: dict[str, np.ndarray]) -> list[tuple]:
    happened = []  # time, place of the kind among the kinds, line, event
    for number, visit in enumerate(lines_of(visits)):
        ids, request = tuple(visit[name] for name in IDS), visit["request_ms"]
        happened.append((request, 0, number, (*ids, "exposure", 0.0)))
        happened.append((visit["exit_ms"], 99, number, (*ids, "exit", float(visit["play_ms"]))))
        if visit["play_ms"]:
            happened.append((request, 1, number, (*ids, "enter", 0.0)))
        for k, name in enumerate(BEHAVIOURS):
            if (delay := visit[f"delay_{name}"]) >= 0:
                value = visit["value_gift"] if name == "gift" else 0.0
                happened.append((request + delay, 2 + k, number, (*ids, name, value)))
    for number, line in enumerate(lines_of(repeats)):
        event = (*(line[name] for name in IDS), NAMES[line["event"]], line["value"])
        happened.append((line["time_ms"], 98, number, event))
    return [(*event, time) for time, _, _, event in sorted(happened, key=lambda entry: entry[:3])]


@pytest.mark.parametrize("per_part", [1, 7, 100, 1 << 15])
@pytest.mark.parametrize("seed", range(3))
def test_events_are_in_order_in_parts_of_any_size(monkeypatch, seed, per_part):
    monkeypatch.setattr(visits_module, "_VISITS_PER_PART", per_part)
    visits = make_visits(seed)
    order = time_order(visits["request_ms"], visits["visit_id"])
    visits = {name: column[order] for name, column in visits.items()}
    rng = np.random.default_rng(seed)
    of = rng.integers(0, len(order), 60)
    repeats = {
        **{name: visits[name][of] for name in IDS},
        "event": (3 + rng.integers(0, len(BEHAVIOURS), 60)).astype(np.int8),
        "time_ms": visits["request_ms"][of] + rng.integers(0, 200, 60),
        "value": rng.random(60).astype(np.float32),
    }
    parts = list(derive_events(SPEC, visits, repeats))
    assert len(parts) == -(-len(order) // per_part)
    found = [
        (*(line[name] for name in IDS), NAMES[line["event"]], line["value"], line["time_ms"])
        for part in parts
        for line in lines_of(part)
    ]
    assert found == expected_events(visits, repeats)


def test_no_visits_are_one_empty_part():
    visits = {name: column[:0] for name, column in make_visits(1).items()}
    (part,) = derive_events(SPEC, visits)
    assert {name: len(column) for name, column in part.items()} == dict.fromkeys((*IDS, "event", "time_ms", "value"), 0)
