"""Evaluation of a model as a choice among the answer options of each sample, against two baselines.

The score of an option is the log-probability of its tokens and the end-of-text token after the prompt. A softmax over
the options of a sample turns the scores into probabilities. No text is generated. With tuning samples the scores are
also calibrated, by task (``option_calibration.py``).

The majority baseline chooses the option that was most often the right answer in training. The popularity baseline
chooses the option with the largest popularity figure, if the samples have such figures. Options with equal scores share
the choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from trainer.console.errors import UserError
from trainer.console.progress import Progress
from trainer.console.text_table import text_table
from trainer.llm.finetuning.adapter_engine import AdapterEngine
from trainer.llm.finetuning.answer_loss import likelihood_of_samples
from trainer.llm.finetuning.option_calibration import Calibration, fit_calibration
from trainer.llm.finetuning.packed_batch import TokenBatch
from trainer.llm.finetuning.packing import epoch_packs
from trainer.llm.finetuning.samples import Sample
from trainer.llm.finetuning.token_files import Tokens
from trainer.metrics.behaviour_metrics import auc
from trainer.runtime.distributed import World
from trainer.runtime.host_copy import HostCopy

Scores = list[np.ndarray]
"""Scores ``[options]`` of each sample."""

Choices = Sequence[tuple[Sample, np.ndarray]]
"""Samples with their scores ``[options]``."""

MODELS = ("model", "untuned", "majority", "popularity")
CALIBRATED, CHANCE = "calibrated", "chance"
"""Names of the tuned model's calibrated scores, and of a choice by chance, in a report."""


@dataclass(frozen=True)
class Options:
    """Tokenised options of evaluation samples: one (prompt, option) pair per option.

    Attributes:
        samples: the samples that have the options.
        tokens: tokens of prompt and option, one option after another.
    """

    samples: Sequence[Sample]
    tokens: Tokens

    @staticmethod
    def of(samples: Sequence[Sample], tokenizer: Any, length: int, key: str = "data.evaluate") -> Options:
        """Tokenise the options; a prompt that is too long loses its beginning. Messages name ``key``.

        Raises:
            UserError: a sample has no options, or an option is as long as a sequence.
        """
        for number, sample in enumerate(samples, 1):
            if not sample.options:
                raise UserError(f"{key}: sample {number} (task {sample.task!r}) has no options to choose among")
        options = [Sample(sample.prompt, option, sample.task) for sample in samples for option in sample.options]
        tokens = Tokens.of(options, tokenizer, length)
        if tokens.counts.left_out:
            raise UserError(f"{key}: {tokens.counts.left_out} options leave no room for a prompt; raise data.length")
        return Options(samples, tokens)

    def split(self, values: np.ndarray) -> Scores:
        """Split values ``[options of all samples]`` into one array for each sample."""
        return np.split(values, np.cumsum([len(sample.options) for sample in self.samples])[:-1])


@dataclass(frozen=True)
class CalibrationOptions:
    """Tokenised options that a calibration needs beside those of the evaluation.

    Attributes:
        tuning: options of the tuning samples.
        bare_tuning: the same after the bare prompts, of the samples that have one; None if none has.
        bare: options of the evaluation samples after the bare prompts; None if none has one.
    """

    tuning: Options
    bare_tuning: Options | None
    bare: Options | None

    @staticmethod
    def of(tuning: Sequence[Sample], held_out: Sequence[Sample], tokenizer: Any, length: int) -> CalibrationOptions:
        """Tokenise the options of ``tuning`` and ``held_out``.

        Raises:
            UserError: as :meth:`Options.of`.
        """

        def bare(samples: Sequence[Sample], key: str) -> Options | None:
            there = [replace(sample, prompt=sample.bare_prompt) for sample in samples if sample.bare_prompt]
            return Options.of(there, tokenizer, length, key) if there else None

        return CalibrationOptions(
            Options.of(tuning, tokenizer, length, "data.tune"),
            bare(tuning, "data.tune"),
            bare(held_out, "data.evaluate"),
        )


def score_options(
    engine: AdapterEngine, options: Options, *, length: int, rows: int, world: World, label: str
) -> Scores:
    """Compute the log-probability of every option; every rank gets all scores. Collective.

    Args:
        engine: engine that holds the model.
        options: options to score.
        length: maximum tokens of a sequence; several options are packed into one.
        rows: sequences of a forward pass.
        world: the ranks that share the work.
        label: label of the progress bar.
    """
    packs = epoch_packs(options.tokens.lengths, length, seed=0, epoch=0, packing=True)
    rank_packs = packs[world.rank :: world.size]
    # Under ZeRO 3 a forward pass is collective, so every rank makes the same number of passes, the last on padding if
    # its own sequences are used up.
    passes = -(-len(packs) // (world.size * rows))
    scored: list[tuple[np.ndarray, HostCopy]] = []
    with Progress(label, passes, "passes", quiet=world.rank > 0) as progress:
        for number in range(passes):
            of_pass = rank_packs[number * rows : (number + 1) * rows]
            batch = TokenBatch.of(of_pass, options.tokens, world.device, multiple=engine.row_multiple)
            likelihoods = likelihood_of_samples(engine.answer_losses(batch), batch)
            # Read after the last pass, so that the next one is queued while a GPU computes this one.
            scored.append((batch.samples, HostCopy((likelihoods,))))
            progress.advance(1)
    own = [(samples, copy.read()[0].double().numpy()) for samples, copy in scored]
    scores = np.empty(len(options.tokens.lengths))
    for rank_scores in world.agree(world.gather(own)) or []:
        for samples, values in rank_scores:
            scores[samples] = values
    return options.split(scores)


def baseline_scores(
    samples: Sequence[Sample], answers: Mapping[str, Mapping[str, int]]
) -> tuple[Scores, list[np.ndarray | None]]:
    """Compute the scores of the majority and the popularity baseline; None for a sample without popularity figures.

    Args:
        samples: samples to score.
        answers: task -> answer -> number of training samples with that answer.
    """
    # Add one to each count, so that an answer that never occurred in training has a finite score.
    majority = [
        np.log([1.0 + answers.get(sample.task, {}).get(option, 0) for option in sample.options]) for sample in samples
    ]
    popularity = [np.array(sample.popularity) if sample.popularity else None for sample in samples]
    return majority, popularity


def report_of(samples: Sequence[Sample], scores: Mapping[str, Sequence[np.ndarray | None]]) -> dict[str, Any]:
    """Compute the metrics by task.

    Args:
        samples: the samples that were scored.
        scores: name of model or baseline -> scores ``[options]`` of each sample; None for a sample without scores.

    Returns:
        task -> ``samples`` (their number), and name of model or baseline -> ``accuracy``; ``log_loss`` in nats, with
        the scores as logits, and ``log_loss_error``, its standard error over the samples; ``auc`` of the resulting
        probabilities over all (sample, option) pairs. Popularity figures are not logits, so that baseline has an
        accuracy only. A baseline without figures for some sample, and an AUC with one class only, are None. With
        calibrated scores a task also has their ``change`` of the model's ``accuracy`` and ``log_loss``, each with the
        standard error of the paired changes over the samples.
    """
    tasks: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        tasks.setdefault(sample.task, []).append(number)
    report: dict[str, Any] = {}
    for task, numbers in tasks.items():
        of_task: dict[str, Any] = {"samples": len(numbers)}
        scored: dict[str, Choices] = {}
        for name, every in scores.items():
            chosen = [(samples[number], every[number]) for number in numbers]
            values = [(sample, value) for sample, value in chosen if value is not None]
            of_task[name] = None
            if len(values) == len(chosen):
                of_task[name], scored[name] = _metrics(values, logits=name != "popularity"), values
        if {"model", CALIBRATED} <= scored.keys():
            of_task["change"] = _change(scored["model"], scored[CALIBRATED])
        report[task] = of_task
    return report


def _metrics(chosen: Choices, *, logits: bool) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {"accuracy": float(np.mean(_hits(chosen)))}
    if logits:
        losses = _losses(chosen)
        metrics["log_loss"] = float(np.mean(losses))
        metrics["log_loss_error"] = _error(losses)
        right = [np.arange(len(scores)) == sample.options.index(sample.answer) for sample, scores in chosen]
        probabilities = np.concatenate([_softmax(scores) for _, scores in chosen])
        metrics["auc"] = auc(probabilities, np.concatenate(right).astype(np.float32))
    return metrics


def _change(before: Choices, after: Choices) -> dict[str, float]:
    """Return the changes of accuracy and log loss on the same samples, with standard errors of the paired changes."""
    found: dict[str, float] = {}
    for metric, of_samples in (("accuracy", _hits), ("log_loss", _losses)):
        change = of_samples(after) - of_samples(before)
        found |= {metric: float(np.mean(change)), f"{metric}_error": _error(change)}
    return found


def _hits(chosen: Choices) -> np.ndarray:
    """Return for each sample 1 if its best option is right, ``[samples]``; options that tie share the choice."""
    hits = []
    for sample, scores in chosen:
        best = scores == scores.max()
        hits.append(best[sample.options.index(sample.answer)] / best.sum())
    return np.array(hits)


def _losses(chosen: Choices) -> np.ndarray:
    """Return the log loss of each sample's right option in nats, ``[samples]``; the scores are logits."""
    right = [_softmax(scores)[sample.options.index(sample.answer)] for sample, scores in chosen]
    return -np.log(np.maximum(right, 1e-300))


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights: np.ndarray = np.exp(scores - scores.max())
    return weights / weights.sum()


def _error(values: np.ndarray) -> float:
    """Return the standard error of the mean."""
    return float(np.std(values) / np.sqrt(len(values)))


def report_table(report: Mapping[str, Any]) -> str:
    """Format the report as a text table: accuracy of all, log loss and AUC of model and majority.

    The calibrated model has columns of its own if a task has it.
    """

    def cell(of_task: Mapping[str, Any], name: str, metric: str) -> str:
        value = (of_task.get(name) or {}).get(metric)
        return "-" if value is None else f"{value:.4f}"

    calibrated = [CALIBRATED] if any(of_task.get(CALIBRATED) for of_task in report.values()) else []
    compared = ("model", *calibrated, "majority")
    header = ["task", "samples", *MODELS, *calibrated]
    header += ["log loss", *calibrated, "majority", "AUC", *calibrated, "majority"]
    lines = [
        [
            task,
            f"{of_task['samples']:,}",
            *(cell(of_task, name, "accuracy") for name in (*MODELS, *calibrated)),
            *(cell(of_task, name, metric) for metric in ("log_loss", "auc") for name in compared),
        ]
        for task, of_task in report.items()
    ]
    return text_table(header, lines)


def evaluate(
    engine: AdapterEngine,
    model: Any,
    options: Options,
    answers: Mapping[str, Mapping[str, int]],
    *,
    length: int,
    rows: int,
    world: World,
    calibration: CalibrationOptions | None = None,
) -> dict[str, Any]:
    """Evaluate the tuned model, the untuned model and the baselines; every rank gets the report. Collective.

    Args:
        engine: engine that holds the tuned model.
        model: peft's wrapper inside the engine; its adapter is switched off for the untuned model.
        options: options of the evaluation samples.
        answers: answer counts of training, see :func:`baseline_scores`.
        length: maximum tokens of a sequence.
        rows: sequences of a forward pass.
        world: the ranks that share the work.
        calibration: options to fit and to apply a calibration; None for none. With it the report of a task that has
            tuning samples also has the metrics of ``calibrated``, and ``calibration``, its fitted numbers.
    """
    score = partial(score_options, engine, length=length, rows=rows, world=world)
    tuned = score(options, label="evaluate")
    with model.disable_adapter(), torch.no_grad():
        untuned = score(options, label="evaluate untuned")
    majority, popularity = baseline_scores(options.samples, answers)
    scores: dict[str, Sequence[np.ndarray | None]] = dict(
        zip(MODELS, (tuned, untuned, majority, popularity), strict=True)
    )
    scores[CHANCE] = [np.zeros(len(sample.options)) for sample in options.samples]
    if calibration is None:
        return report_of(options.samples, scores)
    tuning, bare_tuning, bare = (
        None if some is None else score(some, label=f"calibrate, {number} of 3")
        for number, some in enumerate((calibration.tuning, calibration.bare_tuning, calibration.bare), 1)
    )
    assert tuning is not None
    fitted = fit_by_task(calibration.tuning.samples, tuning, bare_tuning)
    scores[CALIBRATED] = calibrate(fitted, options.samples, tuned, bare)
    report = report_of(options.samples, scores)
    for task, numbers in fitted.items():
        if task in report:
            report[task]["calibration"] = asdict(numbers)
    return report


def fit_by_task(samples: Sequence[Sample], scores: Scores, bare_scores: Scores | None) -> dict[str, Calibration]:
    """Fit the calibration of each task that has samples.

    Args:
        samples: tuning samples.
        scores: their scores.
        bare_scores: scores after the bare prompts of the samples that have one, in their order; None if none has.
    """
    spread = _spread(samples, bare_scores)
    fitted = {}
    for task in dict.fromkeys(sample.task for sample in samples):
        rows = [row for row, sample in enumerate(samples) if sample.task == task]
        fitted[task] = fit_calibration(
            [scores[row] for row in rows],
            [spread[row] for row in rows],
            [samples[row].options.index(samples[row].answer) for row in rows],
        )
    return fitted


def calibrate(
    fitted: Mapping[str, Calibration], samples: Sequence[Sample], scores: Scores, bare_scores: Scores | None
) -> list[np.ndarray | None]:
    """Return the calibrated scores of samples, with arguments as :func:`fit_by_task`; None for a task without a fit.

    A sample without a bare prompt, of a task whose fit uses them, has no calibrated scores either.
    """
    found: list[np.ndarray | None] = []
    for sample, values, bare in zip(samples, scores, _spread(samples, bare_scores), strict=True):
        numbers = fitted.get(sample.task)
        missing = numbers is None or (bare is None and numbers.bare != 0)
        found.append(None if numbers is None or missing else numbers.logits(values, bare))
    return found


def _spread(samples: Sequence[Sample], bare_scores: Scores | None) -> list[np.ndarray | None]:
    """Return the score after the bare prompt of each sample, None for a sample without one."""
    waiting = iter(bare_scores or ())
    return [next(waiting) if sample.bare_prompt else None for sample in samples]
