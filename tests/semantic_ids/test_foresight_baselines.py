"""Rules that foresee the next code, beside plain definitions; and what they may know."""

from __future__ import annotations

from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.semantic_ids.test_foresight_rows import GAP_MS, Log, logs
from trainer.semantic_ids import foresight_baselines
from trainer.semantic_ids.foresight_baselines import WEIGHTS, Baselines, Quality
from trainer.semantic_ids.foresight_rows import ForesightRows
from trainer.semantic_ids.segments import TimeRange

CODES = 9


def plain_counts(log: Log, rows: ForesightRows, training: np.ndarray, row: int) -> dict[str, Counter[int]]:
    """Count what the rules of a row count, segment by segment."""
    code, author, as_of = int(rows.code[row]), rows.author[row], rows.as_of_ms[row]
    counts: dict[str, Counter[int]] = {name: Counter() for name in ("targets", "after", "runs", "segments", "follows")}
    for at in training:
        counts["targets"][int(rows.target[at])] += 1
        if rows.code[at] == code:
            counts["after"][int(rows.target[at])] += 1
    before: tuple[int, int] | None = None
    for time, _, of_segment in sorted(zip(log.known_ms, log.segment, log.code, strict=True)):
        at = int(np.flatnonzero(log.segment == _)[0])
        if log.author[at] != author or time > as_of:
            continue
        counts["segments"][int(of_segment)] += 1
        near = before is not None and time - before[1] <= GAP_MS
        if before is None or not near or before[0] != of_segment:
            counts["runs"][int(of_segment)] += 1
        if before is not None and near and before[0] == code:
            counts["follows"][int(of_segment)] += 1
        before = int(of_segment), int(time)
    return counts


CHAINS = {
    "last": ["targets", "last"],
    "most frequent": ["targets", "runs"],
    "by run length": ["targets", "segments"],
    "Markov": ["targets", "after"],
    "author's Markov": ["targets", "after", "segments", "follows"],
}


@settings(max_examples=60)
@given(log=logs(), border=st.integers(1, 26))
def test_probabilities_are_those_of_the_definition(log: Log, border: int) -> None:
    rows = log.rows()
    training = rows.training(TimeRange(until_ms=border))
    with patch.object(foresight_baselines, "ROWS_AT_ONCE", 3):
        baselines = Baselines(rows, training, CODES)
    assert list(baselines.names) == list(CHAINS)
    every = np.arange(len(rows))
    for name, chain in CHAINS.items():
        found = baselines.probabilities(name, every)
        assert found.shape == (len(rows), CODES)
        weights = baselines.weights[name]
        assert len(weights) == len(chain) and all(weight in WEIGHTS for weight in weights)
        for row in range(len(rows)):
            counts = plain_counts(log, rows, training, row) | {"last": Counter([int(rows.code[row])])}
            p = np.full(CODES, 1 / CODES)
            for link, weight in zip(chain, weights, strict=True):
                own = np.array([counts[link][code] for code in range(CODES)])
                p = (own + weight * p) / (own.sum() + weight)
            np.testing.assert_allclose(found[row], p, rtol=1e-9)
            assert found[row].sum() == pytest.approx(1)


@pytest.mark.parametrize("seed", range(2))
def test_weights_are_the_best_ones_for_the_last_fifth_of_training_after_the_rest_of_it(seed: int) -> None:
    log = cycle(60, seed=seed)
    rows = log.rows()
    training = rows.training(TimeRange(until_ms=50))
    baselines = Baselines(rows, training, CODES)
    earlier, tuning = training[: -(len(training) // 5)], training[-(len(training) // 5) :]
    assert min(WEIGHTS) < 1e-3 and max(WEIGHTS) > 3e4
    counted = [plain_counts(log, rows, earlier, row) | {"last": Counter([int(rows.code[row])])} for row in tuning]
    for name, chain in CHAINS.items():
        own = np.array([[[counts[link][code] for code in range(CODES)] for link in chain] for counts in counted])

        def loss(weights: tuple[float, ...], own: np.ndarray = own) -> float:
            p = np.full((len(own), CODES), 1 / CODES)
            for link, weight in enumerate(weights):
                p = (own[:, link] + weight * p) / (own[:, link].sum(1, keepdims=True) + weight)
            return float(-np.log(p[np.arange(len(own)), rows.target[tuning]]).mean())

        best = baselines.weights[name]
        others = [(*best[:link], weight, *best[link + 1 :]) for link in range(len(best)) for weight in WEIGHTS]
        assert loss(best) <= min(map(loss, others)) + 1e-9


@given(log=logs(), border=st.integers(1, 26))
def test_later_segments_change_no_probability(log: Log, border: int) -> None:
    """Segments that are known after the range of training and the row change neither weights nor forecasts."""
    rows = log.rows()
    early = np.flatnonzero(rows.as_of_ms < border)
    changed = Log(*(column.copy() for column in vars(log).values()))
    changed.code[log.known_ms >= border] = (changed.code[log.known_ms >= border] + 1) % CODES
    found = []
    for other in (log, changed):
        made = other.rows()
        baselines = Baselines(made, made.training(TimeRange(until_ms=border)), CODES)
        found.append((baselines.weights, [baselines.probabilities(name, early).tolist() for name in CHAINS]))
    assert found[0] == found[1]


def cycle(length: int, authors: int = 2, seed: int = 0) -> Log:
    """Segments every unit of time: author 0 shows 0, 1, 2 in turn, the others 0, 2, 1, each with some noise."""
    rng = np.random.default_rng(seed)
    author = np.repeat(np.arange(authors), length)
    step = np.tile(np.arange(length), authors)
    code = np.where(author == 0, step % 3, np.array([0, 2, 1])[step % 3])
    noisy = rng.random(len(code)) < 0.1
    code[noisy] = rng.integers(3, CODES, noisy.sum())
    return Log(author, author, np.arange(len(code)), step + 1, code.astype(np.int32))


def test_the_author_s_transitions_are_worth_most_where_authors_differ() -> None:
    rows = cycle(300).rows()
    training, held_out = rows.training(TimeRange(until_ms=200)), rows.evaluation(TimeRange(200))
    found = {name: quality.document() for name, quality in Baselines(rows, training, CODES).measure(held_out).items()}
    top = {name: document["top_1"] for name, document in found.items()}
    assert top["author's Markov"] > 0.7 > 0.5 > top["Markov"]  # type: ignore[operator]
    assert top["last"] < 0.05 and found["author's Markov"]["nll"] == min(found[name]["nll"] for name in found)  # type: ignore[operator, type-var]


def test_the_truth_is_the_best_rule() -> None:
    log = cycle(300)
    after = {0: {0: 1, 1: 2, 2: 0}, 1: {0: 2, 2: 1, 1: 0}}
    step = (log.known_ms - 1) % 3
    shown = np.where(log.author == 0, step, np.array([0, 2, 1])[step])
    truth = np.zeros((len(log.code), CODES))
    truth[:, 3:] = 0.1 / 6
    truth[np.arange(len(shown)), [after[a][c] for a, c in zip(log.author.tolist(), shown.tolist(), strict=True)]] = 0.9
    rows = log.rows()
    baselines = Baselines(rows, rows.training(TimeRange(until_ms=200)), CODES, truth)
    found = baselines.measure(rows.evaluation(TimeRange(200)))
    best = found.pop("bayes")
    assert all(best.loss < quality.loss and best.first >= quality.first for quality in found.values())
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1 / 6))
    assert best.document()["nll"] == pytest.approx(entropy, abs=0.2)


def test_quality_counts_ties_by_the_number_of_the_code() -> None:
    quality = Quality()
    assert quality.document() == {"top_1": None, "top_10": None, "nll": None}
    log_p = np.log(np.array([[0.25, 0.25, 0.5], [0.25, 0.25, 0.5], [0.4, 0.4, 0.2]]))
    quality.add(log_p, np.array([2, 0, 1]))
    assert (quality.rows, quality.first, quality.among_ten) == (3, 1, 3)
    many = Quality()
    many.add(np.zeros((2, 30)), np.array([9, 10]))
    assert (many.first, many.among_ten) == (0, 1)
    ordered = Quality()
    ordered.add(log_p[:1], np.array([1]), np.array([[0, 1, 0]]))
    assert ordered.first == 1 and ordered.loss == pytest.approx(-np.log(0.25))
    quality += many
    assert quality.rows == 5 and quality.loss == pytest.approx(-np.log([0.5, 0.25, 0.4]).sum())


def test_without_rows_of_training_all_codes_are_equally_probable() -> None:
    rows = cycle(5).rows()
    baselines = Baselines(rows, np.empty(0, np.int64), CODES)
    np.testing.assert_allclose(baselines.probabilities("Markov", np.arange(3)), 1 / CODES)
