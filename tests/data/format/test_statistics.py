"""Incremental and frozen statistics against a dictionary, and against a reference over all pairs of rows."""

from __future__ import annotations

import itertools
import pickle
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.statistics_reference import ID_COLUMN, statistics_as_of
from trainer.data.format import statistics as module
from trainer.data.format.schema import DatasetSpec, SideFeature
from trainer.data.format.statistics import FrozenStatistics, Statistics, StatisticsAsOf, smoothed_rates

KEYS = (("user",), ("hour",), ("item", "hour"), ("user", "author"), ("hour", "city"), ("user", "author", "item"))


def make_spec(behaviours: int, keys=KEYS) -> DatasetSpec:
    names = tuple(f"b{k}" for k in range(behaviours))
    return DatasetSpec(
        name="t",
        source="",
        licence="",
        partitions=1,
        timezone="UTC",
        behaviours=names,
        applies={name: ("video", "live") for name in names},
        candidates=("live",),
        side=(SideFeature("city", "user", 3), SideFeature("hour", "context", 4)),
        statistics=keys,
    )


def make_rows(seed: int, n: int, behaviours: int, span: int = 60, ids: int = 3, far_apart: bool = False):
    """Make rows with many ties in time and in every key; with ``far_apart``, ids up to the largest int64."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**62, ids) if far_apart else np.arange(ids)
    request = np.sort(rng.integers(0, span, n))
    return {
        **{name: values[rng.integers(0, ids, n)] for name in ID_COLUMN.values()},
        "side": rng.integers(0, 3, (n, 2)).astype(np.int32),
        "request_ms": request,
        "emit_ms": request + rng.integers(0, 20, n),
        "label": rng.integers(0, 2, (n, behaviours)).astype(np.uint8),
        "mask": rng.integers(0, 2, (n, behaviours)).astype(np.uint8),
    }


def key_of(spec: DatasetSpec, rows, row: int, key: tuple[str, ...]) -> tuple:
    side = [feature.name for feature in spec.side]
    return tuple(
        int(rows[ID_COLUMN[part]][row]) if part in ID_COLUMN else int(rows["side"][row, side.index(part)])
        for part in key
    )


def by_definition(spec: DatasetSpec, rows, as_of_ms) -> np.ndarray:
    """Count, for each row and key, the rows with the same key emitted before, then those with each behaviour."""
    result = []
    for row, as_of in enumerate(as_of_ms):
        counts: dict[tuple, list[int]] = defaultdict(lambda: [0] * (1 + len(spec.behaviours)))
        for other in np.flatnonzero(rows["emit_ms"] < as_of):
            outcome = [1, *(rows["label"][other] * rows["mask"][other]).tolist()]
            for number, key in enumerate(spec.statistics):
                where = counts[number, key_of(spec, rows, other, key)]
                where[:] = [a + b for a, b in zip(where, outcome, strict=True)]
        found = [counts[number, key_of(spec, rows, row, key)] for number, key in enumerate(spec.statistics)]
        result.append(np.concatenate(found))
    return np.array(result, np.float32).reshape(len(as_of_ms), len(spec.statistics) * (1 + len(spec.behaviours)))


def cut(rows, places):
    edges = [0, *sorted(places), len(rows["request_ms"])]
    return [{name: column[a:b] for name, column in rows.items()} for a, b in itertools.pairwise(edges)]


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(0, 40),
    behaviours=st.sampled_from([1, 3, 4, 8]),
    places=st.lists(st.integers(0, 40), max_size=6),
    far_apart=st.booleans(),
)
def test_any_slicing_gives_the_definition(seed, n, behaviours, places, far_apart):
    spec = make_spec(behaviours)
    rows = make_rows(seed, n, behaviours, far_apart=far_apart)
    expected = by_definition(spec, rows, rows["request_ms"])
    incremental = Statistics(spec)
    slices = [incremental.advance(part) for part in cut(rows, [min(place, n) for place in places])]
    np.testing.assert_array_equal(np.concatenate(slices), expected)
    requests = {name: column[::-1] for name, column in rows.items()}
    as_of = StatisticsAsOf(spec, requests)
    for part in reversed(cut(rows, [min(place, n) for place in places])):
        as_of.add(part)
    np.testing.assert_array_equal(as_of.lookup(), expected[::-1])
    np.testing.assert_array_equal(statistics_as_of(spec, rows, rows["request_ms"]), expected)


@pytest.mark.parametrize("seed", range(3))
def test_the_reference_takes_rows_and_times_in_any_order(seed):
    spec = make_spec(2)
    rows = make_rows(seed, 60, 2)
    rng = np.random.default_rng(seed + 100)
    shuffled = {name: column[rng.permutation(60)] if name == "emit_ms" else column for name, column in rows.items()}
    as_of = rng.integers(-5, 90, 60)
    np.testing.assert_array_equal(statistics_as_of(spec, shuffled, as_of), by_definition(spec, shuffled, as_of))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_chunk_size_does_not_matter(monkeypatch, chunk):
    spec = make_spec(5)
    rows = make_rows(11, 200, 5)
    expected = Statistics(spec).advance(rows)
    monkeypatch.setattr(module, "_CHUNK", chunk)
    np.testing.assert_array_equal(Statistics(spec).advance(rows), expected)
    frozen = FrozenStatistics(spec)
    frozen.add(rows)
    np.testing.assert_array_equal(frozen.lookup(rows), statistics_as_of(spec, rows, np.full(200, 1000)))


def test_many_rows_of_one_key_do_not_run_over():
    """One key has more rows than 16 bits can count, all positive, so that every lane is as full as it can be."""
    n = 200_000
    spec = make_spec(7, keys=(("user",),))
    rows = {
        "user_id": np.zeros(n, np.int64),
        "side": np.zeros((n, 2), np.int32),
        "request_ms": np.arange(n),
        "emit_ms": np.arange(n),
        "label": np.ones((n, 7), np.uint8),
        "mask": np.ones((n, 7), np.uint8),
    }
    incremental = Statistics(spec)
    stat = np.concatenate([incremental.advance(part) for part in cut(rows, [1, 70_000, 150_000])])
    np.testing.assert_array_equal(stat, np.repeat(np.arange(n, dtype=np.float32)[:, None], 8, axis=1))
    frozen = FrozenStatistics(spec)
    frozen.add(rows)
    np.testing.assert_array_equal(frozen.lookup(cut(rows, [1])[0]), np.full((1, 8), n))


@pytest.mark.parametrize("seed", range(4))
def test_the_future_can_be_anything(seed):
    """Rows emitted at or after a cut in time do not change the statistics of requests up to the cut."""
    spec = make_spec(3)
    rows = make_rows(seed, 300, 3)
    moment = int(rows["request_ms"][150])
    rng = np.random.default_rng(seed + 50)
    unknown = rows["emit_ms"] >= moment
    altered = {name: column.copy() for name, column in rows.items()}
    for name in ("label", "mask"):
        altered[name][unknown] = rng.integers(0, 2, altered[name][unknown].shape)
    altered["emit_ms"][unknown] = np.maximum(moment, altered["request_ms"][unknown]) + rng.integers(
        0, 99, unknown.sum()
    )
    later = np.flatnonzero(rows["request_ms"] > moment)
    for name in ("user_id", "author_id", "item_id", "side"):
        altered[name][later] = altered[name][rng.permutation(later)]

    past = rows["request_ms"] <= moment
    assert unknown[past].any() and later.size
    for statistics in (
        lambda rows: Statistics(spec).advance(rows),
        lambda rows: statistics_as_of(spec, rows, rows["request_ms"]),
    ):
        before, after = statistics(rows), statistics(altered)
        np.testing.assert_array_equal(before[past], after[past])
        assert (before != after).any()


@pytest.mark.parametrize("moment", [0, 17, 40, 200])
def test_frozen_counts_are_those_of_the_moment(moment):
    spec = make_spec(3)
    rows = make_rows(3, 120, 3)
    expected = statistics_as_of(spec, rows, np.full(120, moment))
    frozen = FrozenStatistics(spec)
    known = np.flatnonzero(rows["emit_ms"] < moment)
    for part in np.array_split(np.random.default_rng(0).permutation(known), 3):
        frozen.add({name: column[part] for name, column in rows.items()})
    np.testing.assert_array_equal(frozen.lookup(rows), expected)

    copy = pickle.loads(pickle.dumps(frozen))
    frozen.add(rows)
    np.testing.assert_array_equal(copy.lookup(rows), expected)


def test_time_cannot_go_back():
    spec = make_spec(1)
    rows = make_rows(0, 10, 1)
    incremental = Statistics(spec)
    incremental.advance(rows)
    with pytest.raises(ValueError, match="order of request_ms"):
        incremental.advance({name: column[:1] for name, column in rows.items()})
    with pytest.raises(ValueError, match="order of request_ms"):
        Statistics(spec).advance({name: column[::-1] for name, column in rows.items()})


def test_no_keys_and_no_rows():
    spec = make_spec(2, keys=())
    assert Statistics(spec).advance(make_rows(0, 5, 2)).shape == (5, 0)
    nothing = Statistics(make_spec(2)).advance(make_rows(0, 0, 2))
    assert nothing.shape == (0, len(KEYS) * 3)
    assert smoothed_rates(nothing, np.full(2, 0.5), 1.0).shape == (0, len(KEYS) * 3)
    assert FrozenStatistics(make_spec(2)).lookup(make_rows(0, 4, 2)).tolist() == [[0] * len(KEYS) * 3] * 4


def test_smoothed_rates_are_logits_of_smoothed_ratios():
    rng = np.random.default_rng(0)
    shown = rng.integers(0, 1000, (50, 2, 1))
    counts = np.concatenate([shown, rng.binomial(shown, 0.2, (50, 2, 3))], axis=2)
    prior, strength = np.array([0.3, 0.01, 0.5]), 20.0
    rate = (counts[:, :, 1:] + strength * prior) / (counts[:, :, :1] + strength)
    logit = np.log(rate / (1 - rate)).reshape(50, -1)
    result = smoothed_rates(counts.reshape(50, -1).astype(np.float32), prior, strength)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[:, :6], logit, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result[:, 6:], np.log1p(counts[:, :, 0]), rtol=1e-6)


@pytest.mark.parametrize(("prior", "strength"), [([0.0], 1.0), ([1.0], 1.0), ([0.5], 0.0)])
def test_smoothing_needs_a_prior_inside_and_a_strength(prior, strength):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        smoothed_rates(np.zeros((1, 2)), np.array(prior), strength)
