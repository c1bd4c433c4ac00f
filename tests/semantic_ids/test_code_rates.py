"""Rates of codes: the intervals, and how many of the named codes are false."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trainer.semantic_ids.code_rates import FALSE_FINDS, LEAST_CELLS, CellSums, code_rates, normal_of_t, t_of_normal


def sums(cell: np.ndarray, code: np.ndarray, events: np.ndarray, base: np.ndarray, codes: int) -> CellSums:
    """Return the sums over cells of one behaviour, by hand."""
    found = CellSums.zeros(codes, 1)
    keys, of = np.unique(cell * codes + code, return_inverse=True)
    found.add(0, keys % codes, np.bincount(of, events), np.bincount(of, base))
    return found


def draw(seed: int, codes: int = 12, effect: float = 1.0, rate: float = 4.0) -> tuple[CellSums, CellSums, np.ndarray]:
    """Draw spells of watching: authors and users with rates of their own, and gifts that come in bunches."""
    rng, n, authors, users = np.random.default_rng(seed), 20_000, 120, 800
    author, user = rng.integers(0, authors, n), rng.integers(0, users, n)
    # Half of what an author shows are a few own codes.
    own = rng.integers(0, codes, (authors, 3))[author, rng.integers(0, 3, n)]
    code = np.where(rng.random(n) < 0.5, own, rng.integers(0, codes, n))
    hours = rng.exponential(1 / 60, n)
    level = rate * np.exp(0.6 * rng.standard_normal(authors)[author] + 0.6 * rng.standard_normal(users)[user])
    carried = np.arange(codes) < 2
    first = rng.poisson(level * hours * np.where(carried[code], effect, 1.0))
    events = first + rng.poisson(0.5 * first)
    return sums(author, code, events, hours, codes), sums(user, code, events, hours, codes), carried


@given(st.floats(0.05, 6), st.floats(LEAST_CELLS - 1, 5000))
def test_the_deviate_has_the_tail_of_the_t_statistic(z: float, freedom: float) -> None:
    t = float(t_of_normal(z, np.array(freedom)))
    assert float(normal_of_t(np.array(t), np.array(freedom))) == pytest.approx(z, rel=1e-9)
    exact = stats.norm.isf(stats.t.sf(t, freedom))
    # The interval is never more than a little too narrow.
    assert z * 0.98 - 0.01 <= exact <= z * 1.05 + 0.01


@pytest.mark.parametrize("effect", [1.0, 5.0])
def test_an_interval_excludes_the_overall_rate_exactly_where_a_code_is_named(effect: float) -> None:
    for seed in range(5):
        found = code_rates(*draw(seed, effect=effect)[:2])
        tested = ~np.isnan(found.low)
        assert found.tested == tested.sum() > 0
        assert (found.low[tested] <= found.rate[tested]).all() and (found.rate[tested] <= found.high[tested]).all()
        above, below = found.low > found.overall, found.high < found.overall
        assert (found.carries == above.astype(int) - below.astype(int)).all()
        assert (found.p_value[found.carries != 0] <= 1 - found.level).all()


def test_planted_codes_are_found() -> None:
    named = true = 0
    for seed in range(10):
        authors, users, carried = draw(seed, effect=4.0)
        more = code_rates(authors, users).carries[:, 0] > 0
        named, true = named + more.sum(), true + (more & carried).sum()
    assert true >= 18 and named - true <= 1


def test_without_an_effect_false_finds_stay_below_the_stated_rate() -> None:
    worlds, false = 120, 0
    for seed in range(worlds):
        false += (code_rates(*draw(1000 + seed)[:2]).carries != 0).any()
    assert false <= FALSE_FINDS * worlds
    # Without any correction every world would have finds: this data is not that of independent events.
    plain = 0
    for seed in range(10):
        authors, _, _ = draw(1000 + seed)
        expected = authors.base * authors.events.sum() / authors.base.sum()
        plain += (np.abs(authors.events - expected) > 1.96 * np.sqrt(expected)).any()
    assert plain == 10


def test_the_interval_is_that_of_a_resampling_of_authors_where_events_are_many() -> None:
    rng, codes, authors, n = np.random.default_rng(3), 2, 200, 40_000
    author, code, hours = rng.integers(0, authors, n), rng.integers(0, codes, n), rng.exponential(1.0, n)
    events = rng.poisson(hours * np.exp(0.5 * rng.standard_normal(authors))[author])
    cells = sums(author, code, events, hours, codes)
    # Each spell is of another user, so the authors decide.
    found = code_rates(cells, sums(np.arange(n), code, events, hours, codes), false_finds=0.05 * codes)
    own = code == 0
    per_author = [np.bincount(author[own], column[own], minlength=authors) for column in (events, hours)]
    weight = rng.multinomial(authors, np.full(authors, 1 / authors), 4000)
    draws = (weight @ per_author[0]) / (weight @ per_author[1])
    low, high = np.quantile(draws, [0.025, 0.975])
    # With two codes and no find, the level is 1 - 0.05.
    assert found.level == pytest.approx(0.95)
    assert found.high[0, 0] - found.low[0, 0] == pytest.approx(high - low, rel=0.12)
    assert found.low[0, 0] == pytest.approx(low, rel=0.03) and found.high[0, 0] == pytest.approx(high, rel=0.03)


def test_few_authors_prove_nothing() -> None:
    base = np.ones(40)
    code = np.repeat([0, 1], 20)
    events = np.where(code == 0, 9.0, 1.0)
    by_user = sums(np.arange(40), code, events, base, 2)
    # Four authors stand behind the first code, and twenty behind the second.
    author = np.where(code == 0, np.arange(40) % 4, np.arange(40))
    found = code_rates(sums(author, code, events, base, 2), by_user)
    assert np.isnan(found.low[0, 0]) and found.carries[0, 0] == 0 and found.tested == 1
    assert code_rates(by_user, by_user).carries.tolist() == [[1], [-1]]


def test_a_code_without_events_or_without_watch_time_has_no_false_find() -> None:
    code, base = np.repeat([0, 1, 2], 30), np.ones(90)
    # One gift in 60 hours elsewhere: 30 hours without one are no wonder.
    events = np.where(np.arange(90) == 0, 1.0, 0.0)
    cells = sums(np.arange(90), code, events, base, 4)
    found = code_rates(cells, cells)
    assert (found.carries == 0).all() and found.low[1, 0] == 0 and found.high[1, 0] > found.overall[0]
    assert np.isnan(found.rate[3, 0]) and np.isnan(found.low[3, 0])
    nothing = sums(np.arange(90), code, np.zeros(90), base, 3)
    assert code_rates(nothing, nothing).tested == 0 and (code_rates(nothing, nothing).carries == 0).all()
