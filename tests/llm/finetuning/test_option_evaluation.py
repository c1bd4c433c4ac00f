"""Choice among options by the model's probabilities, by frequency and by popularity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from tests.llm.tiny import samples
from trainer.console.errors import UserError
from trainer.llm.finetuning.option_calibration import fit_calibration
from trainer.llm.finetuning.option_evaluation import (
    CalibrationOptions,
    Options,
    baseline_scores,
    calibrate,
    fit_by_task,
    report_of,
    report_table,
)
from trainer.llm.finetuning.samples import Sample
from trainer.llm.models.base_model import BaseModelFiles


def made(answer: str, options: str, popularity: tuple[float, ...] = (), task: str = "t") -> Sample:
    return Sample("p", answer, task, tuple(options), popularity)


def test_baselines_choose_by_hand() -> None:
    cases = [made("a", "ab", (1, 2)), made("b", "ab", (1, 2)), made("b", "ab", (3, 3)), made("c", "cd", task="u")]
    majority, popularity = baseline_scores(cases, {"t": {"a": 9, "b": 4}})
    report = report_of(cases, {"majority": majority, "popularity": popularity})
    # Majority: a, a, a; popularity: b, b, and a tie that is half right.
    assert report["t"]["majority"]["accuracy"] == pytest.approx(1 / 3)
    assert report["t"]["popularity"] == {"accuracy": pytest.approx(0.5)}
    share = 10 / 15
    assert report["t"]["majority"]["log_loss"] == pytest.approx(-(np.log(share) + 2 * np.log(1 - share)) / 3)
    # The other task has no training answers and no figures: all options tie, and popularity is undefined.
    assert report["u"]["majority"]["accuracy"] == 0.5
    assert report["u"]["popularity"] is None
    assert "0.3333" in report_table(report)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_scikit_learn(seed: int) -> None:
    generator = np.random.default_rng(seed)
    cases = [made(str(generator.choice(list("abc"))), "abc") for _ in range(200)]
    scores = [generator.normal(size=3) for _ in cases]
    report = report_of(cases, {"model": scores})["t"]["model"]
    probabilities = torch.tensor(np.array(scores)).softmax(-1).numpy()
    answers = ["abc".index(sample.answer) for sample in cases]
    assert report["accuracy"] == np.mean(probabilities.argmax(1) == answers)
    assert report["log_loss"] == pytest.approx(log_loss(answers, probabilities, labels=[0, 1, 2]))
    right = np.eye(3)[answers]
    assert report["auc"] == pytest.approx(roc_auc_score(right.ravel(), probabilities.ravel()))


def test_options_become_samples_and_their_values_go_back(base: BaseModelFiles) -> None:
    cases = [made("a", "abc"), made("d", "de"), made("f", "f")]
    options = Options.of(cases, base.tokenizer, 64)
    assert options.tokens.counts.samples == 6
    split = options.split(np.arange(6.0))
    assert [values.tolist() for values in split] == [[0, 1, 2], [3, 4], [5]]
    with pytest.raises(UserError, match=r"sample 2 .task 'u'. has no options"):
        Options.of([samples(1)[0], Sample("p", "a", "u")], base.tokenizer, 64)
    with pytest.raises(UserError, match=r"(^| )1 options leave no room"):
        Options.of([Sample("p", "a", "t", ("a", "river " * 30))], base.tokenizer, 8)


def test_calibration_pairs_every_sample_with_its_own_bare_score(base: BaseModelFiles) -> None:
    """Samples with and without a bare prompt, of three tasks, one of which has nothing to tune on."""
    random = np.random.default_rng(1)
    cases = [
        Sample(f"p {number}", "ab"[number % 2], task, ("a", "b"), (), f"bare {number}" if task == "text" else "")
        for number in range(40)
        for task in ("text", "letter")
    ]
    options = CalibrationOptions.of(cases, [*cases[:3], Sample("p", "a", "other", ("a", "b"))], base.tokenizer, 64)
    assert options.tuning.tokens.counts.samples == 160
    assert options.bare_tuning is not None and options.bare is not None
    assert [one.prompt for one in options.bare_tuning.samples][:2] == ["bare 0", "bare 1"]
    assert [one.prompt for one in options.bare.samples] == ["bare 0", "bare 1"]
    assert CalibrationOptions.of(cases[1:2], cases[1:2], base.tokenizer, 64).bare is None

    scores = [random.normal(size=2) for _ in cases]
    bare = [random.normal(size=2) for case in cases if case.bare_prompt]
    fitted = fit_by_task(cases, scores, bare)
    answers = [number % 2 for number in range(40)]
    assert fitted == {
        "text": fit_calibration(scores[::2], bare, answers),
        "letter": fit_calibration(scores[1::2], [None] * 40, answers),
    }
    other = Sample("p", "a", "other", ("a", "b"))
    unlike = Sample("p", "a", "text", ("a", "b"))
    found = calibrate(fitted, [*cases[:3], other, unlike], [*scores[:3], np.ones(2), np.ones(2)], bare[:2])
    numbers = fitted["text"]
    np.testing.assert_allclose(found[0], numbers.scale * scores[0] - numbers.bare * bare[0])
    np.testing.assert_allclose(found[1], fitted["letter"].scale * scores[1])
    np.testing.assert_allclose(found[2], numbers.scale * scores[2] - numbers.bare * bare[1])
    assert found[3] is None and found[4] is None


def test_a_calibrated_model_has_columns_of_its_own() -> None:
    cases = [made("a", "ab"), made("b", "ab")]
    scores = [np.array([3.0, 0.0]), np.array([3.0, 0.0])]
    report = report_of(cases, {"model": scores, "calibrated": [0.1 * one for one in scores]})
    assert report["t"]["calibrated"]["log_loss"] < report["t"]["model"]["log_loss"]
    assert report_table(report).count("calibrated") == 3
    assert "calibrated" not in report_table(report_of(cases, {"model": scores, "calibrated": [None, None]}))
    losses = -np.log(np.exp([3.0, 0.0]) / (1 + np.exp(3)))
    assert report["t"]["model"]["log_loss_error"] == pytest.approx(losses.std() / np.sqrt(2))


@pytest.mark.parametrize("seed", range(3))
def test_the_change_by_the_calibration_is_paired(seed: int) -> None:
    """Sample by sample; the second task has no calibrated scores."""
    random = np.random.default_rng(seed)
    cases = [made(str(random.choice(list("abc"))), "abc") for _ in range(50)] + [made("a", "ab", task="u")]
    scores = [random.normal(size=len(case.options)) for case in cases]
    calibrated = [*(0.3 * one + random.normal(size=3) for one in scores[:50]), None]
    report = report_of(cases, {"model": scores, "calibrated": calibrated})
    change, answers = report["t"]["change"], ["abc".index(case.answer) for case in cases[:50]]
    by_sample = []
    for some in (scores[:50], calibrated[:50]):
        probability = torch.tensor(np.array(some)).softmax(-1).numpy()
        losses = -np.log(probability[np.arange(50), answers])
        by_sample.append(np.stack([probability.argmax(1) == answers, losses], 1).astype(float))
    paired = by_sample[1] - by_sample[0]
    assert [change[name] for name in ("accuracy", "log_loss")] == pytest.approx(paired.mean(0))
    errors = [change[f"{name}_error"] for name in ("accuracy", "log_loss")]
    assert errors == pytest.approx(paired.std(0) / np.sqrt(50))
    assert "change" not in report["u"] and report["u"]["calibrated"] is None
