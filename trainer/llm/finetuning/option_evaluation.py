"""How well a model chooses among the answers of a task, beside choosing by frequency and by popularity.

Every option of a sample is scored by the probability that the model gives to its tokens and the end of the text after
the prompt; among the options these are made to sum to 1. Nothing is generated.

The majority baseline takes the answer that was the right one most often in training; the popularity baseline takes the
option with the largest figure, where the samples have such figures. Options with equal scores share the choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.console.errors import UserError
from trainer.console.progress import Progress
from trainer.console.text_table import text_table
from trainer.llm.finetuning.adapter_engine import AdapterEngine
from trainer.llm.finetuning.answer_loss import likelihood_of_samples
from trainer.llm.finetuning.packed_batch import TokenBatch
from trainer.llm.finetuning.packing import epoch_packs
from trainer.llm.finetuning.samples import Sample
from trainer.llm.finetuning.token_files import Tokens
from trainer.metrics.behaviour_metrics import auc
from trainer.runtime.distributed import World

Scores = list[np.ndarray]
"""A score of each option, for each sample."""

MODELS = ("model", "untuned", "majority", "popularity")


@dataclass(frozen=True)
class Options:
    """The options of samples as samples of their own.

    Attributes:
        samples: that they are of.
        tokens: of prompt and option, one option after another.
    """

    samples: Sequence[Sample]
    tokens: Tokens

    @staticmethod
    def of(samples: Sequence[Sample], tokenizer: Any, length: int) -> Options:
        """Tokenise; a prompt that is too long loses its beginning.

        Raises:
            UserError: a sample without options, or an option as long as a sequence.
        """
        for number, sample in enumerate(samples, 1):
            if not sample.options:
                raise UserError(f"data.evaluate: sample {number} (task {sample.task!r}) has no options to choose among")
        options = [Sample(sample.prompt, option, sample.task) for sample in samples for option in sample.options]
        tokens = Tokens.of(options, tokenizer, length)
        if tokens.counts.left_out:
            raise UserError(
                f"data.evaluate: {tokens.counts.left_out} options leave no room for a prompt; raise data.length"
            )
        return Options(samples, tokens)

    def split(self, values: np.ndarray) -> Scores:
        """Values of all options as those of each sample."""
        return np.split(values, np.cumsum([len(sample.options) for sample in self.samples])[:-1])


def score_options(
    engine: AdapterEngine, options: Options, *, length: int, rows: int, world: World, label: str
) -> Scores:
    """Log-probability of every option, on all ranks. Collective.

    Args:
        engine: the model.
        options: to score.
        length: tokens of a sequence; options are packed.
        rows: sequences of a forward pass.
        world: the ranks, which share the work.
        label: of the progress.
    """
    packs = epoch_packs(options.tokens.lengths, length, seed=0, epoch=0, packing=True)
    mine = packs[world.rank :: world.size]
    # Under ZeRO 3 a forward pass is collective: every rank does the same number, at last on nothing.
    passes = -(-len(packs) // (world.size * rows))
    found: list[tuple[np.ndarray, np.ndarray]] = []
    with Progress(label, passes, "passes", quiet=world.rank > 0) as progress:
        for number in range(passes):
            batch = TokenBatch.of(mine[number * rows : (number + 1) * rows], options.tokens, world.device)
            likelihoods = likelihood_of_samples(engine.answer_losses(batch), batch)
            found.append((batch.samples, likelihoods.double().cpu().numpy()))
            progress.advance(1)
    scores = np.empty(len(options.tokens.lengths))
    for of_rank in world.agree(world.gather(found)) or []:
        for samples, values in of_rank:
            scores[samples] = values
    return options.split(scores)


def baseline_scores(
    samples: Sequence[Sample], answers: Mapping[str, Mapping[str, int]]
) -> tuple[Scores, list[np.ndarray | None]]:
    """Scores of the majority and the popularity baseline; None for a sample without figures.

    Args:
        samples: to choose for.
        answers: task -> answer -> how often it was the right one in training.
    """
    majority = [
        np.log([1.0 + answers.get(sample.task, {}).get(option, 0) for option in sample.options]) for sample in samples
    ]
    popularity = [np.array(sample.popularity) if sample.popularity else None for sample in samples]
    return majority, popularity


def report_of(samples: Sequence[Sample], scores: Mapping[str, Sequence[np.ndarray | None]]) -> dict[str, Any]:
    """Metrics by task.

    Args:
        samples: that were chosen for.
        scores: model or baseline -> a score of each option of each sample; None where it has none.

    Returns:
        task -> ``samples``, and model or baseline -> ``accuracy``; ``log_loss`` of a choice with the scores as logits,
        in nats; and ``auc`` of these probabilities over all pairs of a sample and an option. Popularity figures are no
        logits and have an accuracy only. None for a baseline that lacks figures, or an AUC of one class.
    """
    tasks: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        tasks.setdefault(sample.task, []).append(number)
    report: dict[str, Any] = {}
    for task, numbers in tasks.items():
        of_task: dict[str, Any] = {"samples": len(numbers)}
        for name, every in scores.items():
            chosen = [(samples[number], every[number]) for number in numbers]
            values = [(sample, value) for sample, value in chosen if value is not None]
            of_task[name] = _metrics(values, logits=name != "popularity") if len(values) == len(chosen) else None
        report[task] = of_task
    return report


def _metrics(chosen: Sequence[tuple[Sample, np.ndarray]], *, logits: bool) -> dict[str, float | None]:
    hits, losses, probabilities, right = [], [], [], []
    for sample, scores in chosen:
        answer = sample.options.index(sample.answer)
        best = scores == scores.max()
        hits.append(best[answer] / best.sum())
        if logits:
            weights = np.exp(scores - scores.max())
            probability = weights / weights.sum()
            losses.append(-np.log(max(probability[answer], 1e-300)))
            probabilities.append(probability)
            right.append(np.arange(len(scores)) == answer)
    metrics: dict[str, float | None] = {"accuracy": float(np.mean(hits))}
    if logits:
        metrics["log_loss"] = float(np.mean(losses))
        metrics["auc"] = auc(np.concatenate(probabilities), np.concatenate(right).astype(np.float32))
    return metrics


def report_table(report: Mapping[str, Any]) -> str:
    """The report as text: accuracy of all, log-loss and AUC of model and majority."""

    def cell(of_task: Mapping[str, Any], name: str, metric: str) -> str:
        value = (of_task.get(name) or {}).get(metric)
        return "-" if value is None else f"{value:.4f}"

    header = ["task", "samples", *MODELS, "log loss", "majority", "AUC", "majority"]
    lines = [
        [
            task,
            f"{of_task['samples']:,}",
            *(cell(of_task, name, "accuracy") for name in MODELS),
            *(cell(of_task, name, metric) for metric in ("log_loss", "auc") for name in ("model", "majority")),
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
) -> dict[str, Any]:
    """The report of a tuned model beside the untuned one and the baselines, on all ranks. Collective.

    Args:
        engine: the model.
        model: peft's wrapper in it.
        options: of the samples.
        answers: of training, see :func:`baseline_scores`.
        length: tokens of a sequence.
        rows: sequences of a forward pass.
        world: the ranks.
    """
    tuned = score_options(engine, options, length=length, rows=rows, world=world, label="evaluate")
    with model.disable_adapter(), torch.no_grad():
        untuned = score_options(engine, options, length=length, rows=rows, world=world, label="evaluate untuned")
    majority, popularity = baseline_scores(options.samples, answers)
    every = (tuned, untuned, majority, popularity)
    scores: dict[str, Sequence[np.ndarray | None]] = dict(zip(MODELS, every, strict=True))
    return report_of(options.samples, scores)
