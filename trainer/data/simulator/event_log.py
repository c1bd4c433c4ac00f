"""Canonical tables of a simulated log: visits, repeated behaviours, gift prices and true probabilities."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from trainer.data.format.schema import EVENT_COLUMNS, VISIT_EVENTS, DatasetSpec, visit_schema
from trainer.data.simulator.behaviours import GIFT
from trainer.data.simulator.config import BEHAVIOURS, DAY_MS, HOUR_SHARE, MINUTE_MS, START_MS, local_hour
from trainer.data.simulator.content import LIVE, Items
from trainer.data.simulator.user_days import VisitColumns
from trainer.data.simulator.visit_outcome import FAST_MS, SEEN_AT_5_MINUTES
from trainer.data.simulator.world import SimulatedWorld

GIFT_PRICE_SEEN_AT_5_MINUTES = 0.34
"""Share of the gift money seen at 5 minutes: Table 1 of Moment&Cross. It is below the share of gifts: large gifts come
late."""
EARLY_PRICE = 12.0
"""Mean price in coins of an early gift of a user with average spending."""

REPEATS: dict[str, float] = {"like": 0.3, "comment": 0.4, "gift": 0.45}
"""Probability that each occurrence of a behaviour is followed by another one in the same visit."""
MOST_REPEATS = 6

EVENTS = (*VISIT_EVENTS, *BEHAVIOURS)


def visit_table(
    world: SimulatedWorld, spec: DatasetSpec, visits: VisitColumns, price: np.ndarray, rng: np.random.Generator
) -> pa.Table:
    """Return the visits as ``schema.visit_schema``. ``price [n]`` is that of the first gift, 0 without a gift."""
    request, item = visits["request_ms"], visits["item_id"]
    columns = {name: visits[name] for name in visits if name not in ("delay", "truth")}
    columns |= {f"delay_{name}": visits["delay"][k] for k, name in enumerate(BEHAVIOURS)}
    columns["exit_ms"] = request + visits["play_ms"]
    columns["value_gift"] = price
    columns["hour"] = 1 + local_hour(request)
    columns["weekday"] = 1 + (request - START_MS) // DAY_MS % 7
    is_live = visits["domain"] == LIVE
    age_ms = np.where(is_live, request - world.items.start_ms[item], 0)
    columns["log_room_age_s"] = np.log1p(age_ms / 1_000)
    columns["log_viewers"] = np.where(is_live, _log_viewers(world.items, item, request, age_ms, rng), 0)
    schema = visit_schema(spec)
    return pa.table([pa.array(columns[field.name]).cast(field.type, safe=False) for field in schema], schema=schema)


def truth_table(visits: VisitColumns) -> pa.Table:
    """Return the true probabilities of each visit, a column ``p_B`` for each behaviour ``B``."""
    keys = {name: visits[name] for name in ("visit_id", "user_id", "request_ms")}
    return pa.table(keys | {f"p_{name}": visits["truth"][k] for k, name in enumerate(BEHAVIOURS)})


def gift_prices(world: SimulatedWorld, visits: VisitColumns, rng: np.random.Generator) -> np.ndarray:
    """Draw the price in coins of the first gift of each visit, ``[n] float32``, 0 without a gift."""
    return np.where(visits["delay"][GIFT] >= 0, _price(world, visits["user_id"], visits["delay"][GIFT], rng), 0)


def repeat_table(world: SimulatedWorld, visits: VisitColumns, rng: np.random.Generator) -> pa.Table:
    """Draw the repeated behaviours of visits, as ``EVENT_COLUMNS``; not in time order.

    Repeats lie between the first behaviour of their kind and the end of the visit. If the first one is early (within 5
    minutes), so are its repeats: the shares of Table 1 then hold for all behaviours, not only for the first ones.
    """
    # one tuple per behaviour: event code, rows of the visits, delays, values
    parts: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
    for name, chance in REPEATS.items():
        k = BEHAVIOURS.index(name)
        rows = np.flatnonzero(visits["delay"][k] >= 0)
        # each occurrence is followed by another with the same probability, so their number is geometric
        more = np.minimum(rng.geometric(1 - chance, len(rows)) - 1, MOST_REPEATS)
        again, first = np.repeat(rows, more), np.repeat(visits["delay"][k][rows], more)
        last = visits["play_ms"][again]
        last = np.where(first <= FAST_MS, np.minimum(last, FAST_MS), last)
        delay = first + ((last - first) * rng.random(len(again))).astype(np.int64)
        price = _price(world, visits["user_id"][again], first, rng) if k == GIFT else np.zeros(len(again), np.float32)
        parts.append((EVENTS.index(name), again, delay, price))

    of_visit = np.concatenate([rows for _, rows, _, _ in parts])
    codes = np.repeat(np.array([code for code, *_ in parts], np.int8), [len(rows) for _, rows, _, _ in parts])
    columns = {name: visits[name][of_visit] for name in ("user_id", "author_id", "item_id", "visit_id")}
    columns["domain"] = visits["domain"].astype(np.int8)[of_visit]
    columns["event"] = pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(EVENTS))
    columns["time_ms"] = visits["request_ms"][of_visit] + np.concatenate([delay for _, _, delay, _ in parts])
    columns["value"] = np.concatenate([value for *_, value in parts])
    return pa.table([columns[name] for name in EVENT_COLUMNS.names], schema=EVENT_COLUMNS)


def _price(world: SimulatedWorld, user: np.ndarray, delay: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw log-normal gift prices, ``[n] float32``.

    Late gifts are more expensive by a factor that gives the share of the money at 5 minutes of Table 1.
    """
    share, money = SEEN_AT_5_MINUTES["gift"], GIFT_PRICE_SEEN_AT_5_MINUTES
    late = np.where(delay > FAST_MS, share * (1 - money) / ((1 - share) * money), 1.0)
    spending = 0.3 * world.users.trait[LIVE, user, GIFT]
    noise = 0.8 * rng.standard_normal(len(user)) - 0.32
    return (EARLY_PRICE * late * np.exp(spending + noise)).astype(np.float32)


def _log_viewers(
    items: Items, item: np.ndarray, request: np.ndarray, age_ms: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Draw the logarithm of the viewers of a room, as the platform would count them.

    It depends on popularity, hour and age of the room, not on the current segment.
    """
    crowd = np.log(HOUR_SHARE[local_hour(request)])
    filling = np.log1p(-np.exp(-(age_ms + MINUTE_MS) / (10 * MINUTE_MS)))
    return 4 + items.popularity[item] + crowd + filling + 0.15 * rng.standard_normal(len(item))
