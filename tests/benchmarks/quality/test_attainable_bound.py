"""The attainable bound: it is the truth where nothing is hidden, and its filters believe what they may."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.quality import attainable_bound
from benchmarks.quality.attainable_bound import (
    ATTAINABLE,
    VARIANTS,
    attainable_probabilities,
    exceeds,
    expected_probabilities,
    kept_probabilities,
    room_below,
    world_of,
)
from benchmarks.quality.hidden_state import (
    ROOM_TRAITS,
    USER_TRAITS,
    SimulatedLog,
    draw_content,
    log_likelihood,
    mood_probability,
    room_beliefs,
    user_beliefs,
)
from launch.python_path import ROOT
from tests.benchmarks.quality.weighted_auc import weighted_auc
from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.text_schema import SEGMENT_MS
from trainer.data.simulator.behaviours import behaviour_probabilities
from trainer.data.simulator.config import BEHAVIOURS, DAY_MS, START_MS, WorldConfig
from trainer.data.simulator.content import LIVE
from trainer.data.simulator.segment_truth import next_topics
from trainer.data.simulator.world import make_world
from trainer.data.simulator.write_dataset import simulate

RESULTS = ROOT / "benchmarks/results"
CONFIG = WorldConfig(users=300, days=3, seed=1, lookahead=True)


@pytest.fixture(scope="module")
def log() -> SimulatedLog:
    return SimulatedLog(make_world(CONFIG))


@pytest.fixture(scope="module")
def rows(log: SimulatedLog) -> np.ndarray:
    """Live visits from the second day on."""
    columns = log.columns
    return np.flatnonzero((columns["domain"] == LIVE) & (columns["request_ms"] >= START_MS + DAY_MS))


def test_a_world_is_found_from_its_description(tmp_path: Path) -> None:
    choices: tuple[dict[str, Any], ...] = (
        {},
        {"lookahead": True, "newcomers": 0.5, "interest_correlation": 0.0, "conflict": 0.5},
    )
    for options in choices:
        simulate(tmp_path / str(len(options)), 10, 1, 1, 3, **options)
        found = world_of(DatasetSpec.load(tmp_path / str(len(options))))
        assert found == WorldConfig(10, 1, 3, **options)


def test_it_is_the_truth_if_nothing_is_hidden(log: SimulatedLog, rows: np.ndarray) -> None:
    found = expected_probabilities(log.inputs(rows))
    assert np.allclose(found, log.columns["truth"][:, rows], atol=1e-6)
    # A belief that is the truth is no other case.
    inputs = log.inputs(rows)
    match = (log.world.items.genre[inputs.shown.item] == log.columns["mood"][rows]).astype(np.float64)
    sure = expected_probabilities(inputs, match, inputs.room_traits().T[:, None], None, inputs.user_traits().T[:, None])
    assert np.allclose(sure, found, atol=1e-5)


def test_what_is_hidden_changes_nothing(log: SimulatedLog, rows: np.ndarray) -> None:
    """The same beliefs give the same probabilities, whatever the users, rooms, segments and moods are in truth."""
    rng, rows = np.random.default_rng(1), rows[:200]
    users, items = log.world.users, log.world.items

    def changed(part: Any, names: tuple[str, ...]) -> Any:
        values = {name: getattr(part, name) for name in names}
        return replace(part, **{name: old + rng.standard_normal(old.shape, np.float32) for name, old in values.items()})

    other = copy.copy(log)
    shows = replace(
        changed(items, ("vector", "quality", "bait")),
        topic=rng.permutation(items.topic),
        intensity=rng.random(len(items.intensity), np.float32),
    )
    hidden = ("vector", "category_interest", "topic_taste", "trait", "novelty")
    other.world = replace(log.world, users=changed(users, hidden), items=shows)
    other.columns = log.columns | {"mood": rng.permutation(log.columns["mood"])}
    one, two = log.inputs(rows), other.inputs(rows)
    draws, mood = 8, rng.random(len(rows))
    rooms = rng.standard_normal((len(rows), draws, ROOM_TRAITS), np.float32)
    believed = one.user_traits().T[:, None] + rng.standard_normal((len(rows), draws, USER_TRAITS), np.float32)
    content = draw_content(log.world, one.shown.item, one.shown.time_ms, draws, rng)
    found = [expected_probabilities(inputs, mood, rooms, content, believed) for inputs in (one, two)]
    assert not np.allclose(one.logits(), two.logits(), atol=1)
    assert np.allclose(*found, atol=1e-4)


def test_what_happened_is_as_likely_as_the_branches_of_the_visit(log: SimulatedLog, rows: np.ndarray) -> None:
    inputs = log.inputs(rows)
    probabilities = behaviour_probabilities(inputs.logits(), inputs.allowed)
    # The likelihoods of all outcomes of a visit sum up to one.
    outcomes = np.array(np.meshgrid(*[[False, True]] * len(BEHAVIOURS))).reshape(len(BEHAVIOURS), -1)
    view, long = outcomes[1], outcomes[2]
    possible = (view | ~long) & (outcomes[0] | ~outcomes[3:].any(axis=0))
    total = sum(
        np.exp(log_likelihood(probabilities, np.repeat(outcome[:, None], len(rows), axis=1)))
        for outcome in outcomes.T[possible]
    )
    assert np.allclose(total, 1, atol=1e-4)


def test_moods_are_believed_as_often_as_they_are_true(log: SimulatedLog) -> None:
    belief = mood_probability(log)
    true = log.world.items.genre[log.columns["item_id"]] == log.columns["mood"]
    assert weighted_auc(belief, true.astype(float), np.ones(len(true))) > 0.9
    for low, high in ((0.0, 0.1), (0.1, 0.4), (0.4, 0.7), (0.7, 1.0)):
        part = (belief >= low) & (belief < high)
        # Shown items have the genre of the mood more often, which the filter does not use.
        assert -0.01 < true[part].mean() - belief[part].mean() < 0.06


def test_a_belief_about_a_room_is_near_the_exact_posterior(log: SimulatedLog, rows: np.ndarray) -> None:
    belief, columns = room_beliefs(log, rows), log.columns
    live, ended = np.flatnonzero(columns["domain"] == LIVE), columns["request_ms"] + columns["play_ms"]
    spread = np.linalg.inv(belief.covariance)
    for place in np.einsum("ntt->n", belief.covariance).argsort()[:2]:
        own = live[columns["item_id"][live] == columns["item_id"][rows[place]]]
        past = own[ended[own] <= columns["request_ms"][rows[place]]]
        inputs, happened = log.inputs(past), log.happened(past)
        weights, true, logits = inputs.room_weights(), inputs.room_traits(), inputs.logits()
        assert len(past) > 20

        def density(traits: np.ndarray) -> float:
            shift = np.einsum("ktn,tn->kn", weights, traits[:, None] - true)  # noqa: B023
            probabilities = behaviour_probabilities(logits + shift, inputs.allowed)  # noqa: B023
            return float(log_likelihood(probabilities, happened).sum() - (traits**2).sum() / 2)  # noqa: B023

        best = density(belief.mean[place])
        for trait in range(ROOM_TRAITS):
            step = np.zeros(ROOM_TRAITS)
            step[trait] = 1
            less = best - (density(belief.mean[place] + step) + density(belief.mean[place] - step)) / 2
            # The density falls on both sides, as that of the normal distribution does.
            assert less == pytest.approx(spread[place, trait, trait] / 2, rel=0.2)
            assert abs(density(belief.mean[place] + step) - density(belief.mean[place] - step)) < less
    true = log.inputs(rows).room_traits().T
    variance = np.einsum("ntt->nt", belief.covariance)
    # Clicks depend on bait more than on any other trait.
    assert variance.mean(axis=0).argmin() == ROOM_TRAITS - 1 and ((true - belief.mean) ** 2).mean() < (true**2).mean()
    drawn = belief.draw(np.random.default_rng(1), 400)
    assert np.allclose(drawn.mean(axis=1), belief.mean, atol=0.3)
    assert np.allclose(drawn.var(axis=1).mean(axis=0), variance.mean(axis=0), rtol=0.05)


def test_log_odds_are_linear_in_the_traits_of_users(log: SimulatedLog, rows: np.ndarray) -> None:
    users, rng = log.world.users, np.random.default_rng(1)
    changed = {
        name: getattr(users, name) + rng.standard_normal(getattr(users, name).shape, np.float32)
        for name in ("vector", "category_interest", "topic_taste", "trait", "novelty")
    }
    other = copy.copy(log)
    other.world = replace(log.world, users=replace(users, **changed))
    some = np.concatenate([rows[:300], np.arange(300)])
    one, two = log.inputs(some), other.inputs(some)
    weights = one.user_weights()
    assert np.array_equal(weights, two.user_weights())
    # All traits count, but for the taste for the topic of videos.
    assert (~weights.any(axis=(0, 2))).sum() == 1
    shift = np.einsum("ktn,tn->kn", weights, two.user_traits() - one.user_traits())
    assert np.allclose(one.logits() + shift, two.logits(), atol=1e-3)


def test_a_belief_about_a_user_is_better_than_none_and_knows_its_error(log: SimulatedLog, rows: np.ndarray) -> None:
    rows = rows[log.columns["user_id"][rows] % 3 == 0]
    belief, true = user_beliefs(log, rows), log.inputs(rows).user_traits().T
    columns = log.columns
    order = np.argsort(columns["user_id"], kind="stable")
    begin = np.searchsorted(columns["user_id"][order], columns["user_id"][rows])
    before = np.argsort(order)[rows] - begin
    error, variance = (true - belief.mean) ** 2, np.einsum("ntt->nt", belief.covariance)
    low, high = np.quantile(before, [0.25, 0.75])
    early, late = before < low, before > high
    share = error / variance
    for part in (early, late):
        assert share[part].mean() == pytest.approx(1, rel=0.15)
    assert variance[late].mean() < 0.9 * variance[early].mean() and error[late].mean() < 0.95 * error[early].mean()


def test_the_first_visit_to_a_room_reveals_nothing_to_itself(log: SimulatedLog, rows: np.ndarray) -> None:
    live = np.flatnonzero(log.columns["domain"] == LIVE)
    live = live[np.argsort(log.columns["request_ms"][live], kind="stable")]
    first = live[np.unique(log.columns["item_id"][live], return_index=True)[1]]
    kept = rows[np.isin(rows, first)]
    belief = room_beliefs(log, kept)
    assert len(kept) > 50 and not belief.mean.any()
    assert np.array_equal(belief.covariance, np.tile(np.eye(ROOM_TRAITS), (len(kept), 1, 1)))


def test_drawn_topics_have_the_true_distribution_of_the_next_one(log: SimulatedLog) -> None:
    items = log.world.items
    rng = np.random.default_rng(1)
    # Just before the end of a segment that begins when the one before it is known.
    position = rng.choice(len(items.topic), 400, replace=False)
    item = np.searchsorted(items.first_segment, position, side="right") - 1
    number = position - items.first_segment[item]
    known = (number > 0) & (items.processing_ms[position - 1] < SEGMENT_MS - 1)
    position, item, number = position[known], item[known], number[known]
    time_ms = items.start_ms[item] + (number + 1) * SEGMENT_MS - 1
    drawn = draw_content(log.world, item, time_ms, 2000, rng)
    table = next_topics(items, 0, len(items.topic))
    p_next = np.stack(table["p_next"].to_numpy(zero_copy_only=False))[position - 1]
    share = np.stack([(drawn.topic[0] == topic).mean(axis=1) for topic in range(p_next.shape[1])], axis=1)
    assert np.abs(share - p_next).max() < 0.06
    # What is shown three minutes later follows the true frequencies of the world.
    later = drawn.intensity[-1].mean()
    inside = position + 6 < items.first_segment[item + 1]
    assert later == pytest.approx(items.intensity[position[inside] + 6].mean(), abs=0.06)


def test_it_lies_below_the_truth_and_is_calibrated(log: SimulatedLog, rows: np.ndarray) -> None:
    rows = rows[log.columns["user_id"][rows] % 3 == 0]
    visits, truth, label = log.columns["visit_id"][rows], log.columns["truth"][:, rows].T, log.happened(rows).T
    found = attainable_probabilities(CONFIG, visits, truth[:, :3], BEHAVIOURS[:3])
    assert set(found) == set(VARIANTS)
    one = np.ones(len(rows))
    for name, probability in found.items():
        click = weighted_auc(probability[:, 0], label[:, 0].astype(float), one)
        assert click < weighted_auc(truth[:, 0], label[:, 0].astype(float), one), name
        assert np.allclose(probability.mean(axis=0), truth[:, :3].mean(axis=0), rtol=0.15), name
        # The less is known, the farther from the truth.
        if name != ATTAINABLE:
            nearer, farther = (np.abs(other[:, 0] - truth[:, 0]).mean() for other in (probability, found[ATTAINABLE]))
            assert 0 < nearer < farther
    with pytest.raises(ValueError, match="another world"):
        attainable_probabilities(CONFIG, visits, truth[::-1, :3], BEHAVIOURS[:3])


def test_a_model_above_the_bound_is_found_and_noise_is_not() -> None:
    rng = np.random.default_rng(1)
    user = rng.integers(0, 50, 1000)
    odds = rng.standard_normal(1000)
    label = (rng.random(1000) < 1 / (1 + np.exp(-odds))).astype(np.uint8)
    far, near = (odds + noise * rng.standard_normal((2, 1000)) for noise in (2, 0.1))
    below = room_below(near[0], list(far), label, user)
    assert below.low is not None and 0 < below.low < (below.mean or 0) and len(below.seeds) == 2
    assert not exceeds(below) and exceeds(room_below(far[0], list(near), label, user))
    # Two models of the same noise differ by chance only, in a different direction on different draws of users.
    assert not exceeds(room_below(far[0], [far[1]], label, user)) and not exceeds(
        room_below(far[1], [far[0]], label, user)
    )
    assert not exceeds(room_below(near[0], [near[1]], np.zeros(1000, np.uint8), user)), "without positives"


def test_the_bound_is_kept_for_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visit, truth = np.arange(3), np.full((3, 1), 0.5)
    asked: list[np.ndarray] = []

    def compute(config: Any, visit_id: np.ndarray, *others: Any) -> dict[str, np.ndarray]:
        asked.append(visit_id)
        return {ATTAINABLE: np.full((len(visit_id), 1), 0.4, np.float32)}

    monkeypatch.setattr(attainable_bound, "attainable_probabilities", compute)
    file, wanted = tmp_path / "of" / "bound.npz", {ATTAINABLE: VARIANTS[ATTAINABLE]}

    def kept(visits: np.ndarray, probability: np.ndarray, variants: Any = wanted) -> dict[str, np.ndarray]:
        return kept_probabilities(file, CONFIG, visits, probability, ("click",), variants)

    first, again = kept(visit, truth), kept(visit, truth)
    assert len(asked) == 1 and list(again) == [ATTAINABLE] and np.array_equal(first[ATTAINABLE], again[ATTAINABLE])
    for visits, probability in ((visit + 1, truth), (visit, truth + 0.1)):
        with pytest.raises(UserError, match=r"bound\.npz: is about other rows"):
            kept(visits, probability)
    with pytest.raises(UserError, match=r"bound\.npz: damaged, or no attainable bound with .*users known"):
        kept(visit, truth, VARIANTS)
    for content in (b"", b"no archive", file.read_bytes()[:-30]):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"bound\.npz: damaged"):
            kept(visit, truth)


def test_no_published_model_exceeds_its_bound() -> None:
    checked = 0
    for name in ("full", "full_large", "gap", "recipe"):
        result = json.loads((RESULTS / f"{name}.json").read_text())
        for behaviour, found in (result["held-out"] if name == "recipe" else result)["behaviours"].items():
            assert not found.get("above_attainable"), (name, behaviour)
            if name == "gap":
                assert found["room"]["high"] > 0, behaviour
                bound, models = found["bounds"][ATTAINABLE]["auc"][0], {"run": found["run"]["auc"]}
            elif name == "recipe":
                bound = found["bounds"][ATTAINABLE]["auc"]
                models = {model: values["auc"] for model, values in found["recipes"].items()}
            else:
                bound = found["auc"]["bounds"][ATTAINABLE]
                models = {model: values["value"] for model, values in found["auc"]["systems"].items()}
            for model, (auc, half_width) in models.items():
                checked += 1
                assert auc - (half_width or 0) < bound, (name, behaviour, model)
    assert checked >= 7 * (2 * 7 + 1 + 3)
