"""Compare a small tuned model with the baselines on LCU's three tasks, and with a logit on the words.

    python -m benchmarks.quality.instructions --work build/instructions --out benchmarks/results/instructions.json

A simulated world of 3,000 users and ten days. The first eight are for training, the ninth for the calibration of the
probabilities, and the last one is reported. The samples and the job are those of ``configs/finetune_small.toml``, whose
settings were chosen on the eighth day. For every seed (of weights, adapters and order) the model is fine-tuned on one
rank. It is compared with the untuned model, the majority and popularity baselines, and ``words``: a logit on hand-made
features of the same prompts, which knows the world's lists of words. ``calibrated`` are the model's probabilities after
the correction of ``trainer/llm/finetuning/option_calibration.py``.

A finished run is kept in ``--work``, for its job and its samples; the same command continues with the others, and none
is started after ``--minutes``. Intervals are Student's t over the seeds; the popularity baseline is the same for all of
them. ``errors`` and ``change_errors`` are standard errors over the samples of the first seed, the latter of paired
differences.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import make_parser, mean_and_half_width, write_result
from benchmarks.quality.instruction_word_baseline import accuracy_of_words
from benchmarks.quality.kept_finetuning import finetune_once, finetuning_at, is_finished
from trainer.config.finetune import FinetuneConfig
from trainer.console.outputs import local_argument
from trainer.console.text_table import text_table
from trainer.data.simulator.write_dataset import simulate
from trainer.llm.finetuning.option_evaluation import CALIBRATED, CHANCE, MODELS
from trainer.llm.finetuning.samples import ReadCounts, read_samples
from trainer.llm.instructions.write import InstructionPlan, write_instructions

JOB = "configs/finetune_small.toml"
USERS, DAYS = 3000, 10
PLAN = InstructionPlan(
    evaluate_from="2024-03-13",
    tune_from="2024-03-12",
    evaluate_samples=1_000,
    samples=30_000,
    most={"staytime": 8_000},
)
BASELINES = ("majority", "popularity")


def prepare(work: Path, users: int, plan: InstructionPlan) -> Path:
    """Return the directory of the samples of a plan; make them if they are missing."""
    digest = hashlib.blake2b(json.dumps(asdict(plan), sort_keys=True).encode(), digest_size=8)
    world, samples = work / f"world-{users}", work / f"samples-{users}-{digest.hexdigest()}"
    if not world.exists():
        simulate(world, users, DAYS, 8, 1, texts=True)
    if not samples.exists():
        write_instructions(world, samples, plan)
    return samples


def job_of(work: Path, samples: Path, users: int, seed: int, overrides: Sequence[str]) -> FinetuneConfig:
    """Return the job of a run, which is kept in ``work``."""
    names = ("train", "tune", "evaluate", "general")
    return finetuning_at(work / f"run-{users}-{seed}", JOB, samples, names, [f"run.seed={seed}", *overrides])


def words(samples: Path) -> dict[str, float]:
    """Return the accuracy of the logit on hand-made features by task."""
    train, held_out = (
        list(read_samples([str(samples / f"{name}.jsonl")], ReadCounts())) for name in ("train", "evaluate")
    )
    tasks = dict.fromkeys(sample.task for sample in held_out)
    return {
        task: accuracy_of_words(*([sample for sample in some if sample.task == task] for some in (train, held_out)))
        for task in tasks
    }


def summarise(runs: Sequence[Mapping[str, Any]], words_accuracy: Mapping[str, float]) -> dict[str, Any]:
    """Return by task the means over the seeds and the half-widths of their 95 % intervals.

    ``gain`` is of the model over the better one of the baselines, and ``change`` of the calibrated probabilities over
    the model's own, seed by seed.
    """
    summary: dict[str, Any] = {}
    for task, first in runs[0].items():
        of_task: dict[str, Any] = {"samples": first["samples"], "words": words_accuracy.get(task)}
        for name in MODELS:
            of_task[name] = mean_and_half_width([run[task][name]["accuracy"] for run in runs])
        for metric in ("log_loss", "auc"):
            of_task[metric] = mean_and_half_width([run[task]["model"][metric] for run in runs])
        if CALIBRATED in first:
            of_task["chance"] = first[CHANCE]
            of_task[CALIBRATED] = {
                metric: mean_and_half_width([run[task][CALIBRATED][metric] for run in runs])
                for metric in ("accuracy", "log_loss", "auc")
            }
            of_task["change"] = {
                metric: mean_and_half_width(
                    [run[task][CALIBRATED][metric] - run[task]["model"][metric] for run in runs]
                )
                for metric in ("accuracy", "log_loss", "auc")
            }
            of_task["calibration"] = [run[task]["calibration"] for run in runs]
            of_task["errors"] = {name: first[name]["log_loss_error"] for name in ("model", CALIBRATED)}
            of_task["change_errors"] = {
                metric: first["change"][f"{metric}_error"] for metric in ("accuracy", "log_loss")
            }
        of_task["gain"] = mean_and_half_width(
            [run[task]["model"]["accuracy"] - max(run[task][name]["accuracy"] for name in BASELINES) for run in runs]
        )
        summary[task] = of_task
    return summary


def learning(directory: Path) -> dict[str, Any]:
    """Return the settings of a run's job that decide what it learns, without its files."""
    config = json.loads((directory / "config.json").read_text())
    return {
        **{name: config[name] for name in ("small", "lora", "optimizer")},
        "general_share": config["data"]["general_share"],
        **{name: config["train"][name] for name in ("batch_size", "epochs", "answer_weight")},
    }


def table(summary: Mapping[str, Any]) -> str:
    """Return the share of right choices as a table, by task."""

    def cell(value: Any) -> str:
        mean, half = value
        return f"{mean:.3f}" if half is None or half < 5e-4 else f"{mean:.3f} ± {half:.3f}"

    columns = ("model", "untuned", *BASELINES)
    lines = [
        [task, f"{row['samples']:,}", *(cell(row[name]) for name in columns), f"{row['words']:.3f}", cell(row["gain"])]
        for task, row in summary.items()
    ]
    found = text_table(["task", "samples", *columns, "words", "gain over the better baseline"], lines)
    if not all(CALIBRATED in row for row in summary.values()):
        return found
    lines = [
        [
            task,
            *(cell(value) for value in (row["model"], row[CALIBRATED]["accuracy"])),
            *(cell(value) for value in (row["log_loss"], row[CALIBRATED]["log_loss"])),
            f"{row['chance']['log_loss']:.3f}",
            *(f"{np.mean([fit[name] for fit in row['calibration']]):.3f}" for name in ("scale", "bare")),
        ]
        for task, row in summary.items()
    ]
    header = ["task", "right", "calibrated", "log loss", "calibrated", "chance", "scale", "bare"]
    return f"{found}\n\n{text_table(header, lines)}"


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Draw the share of right choices as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    shown = ("untuned", *BASELINES, "model", "words")
    for place, name in enumerate(shown):
        values = [(row[name], None) if name == "words" else row[name] for row in summary.values()]
        at = [task + (place - 2) * 0.16 for task in range(len(values))]
        axes.bar(at, [mean for mean, _ in values], 0.15, yerr=[half or 0 for _, half in values], label=name, capsize=2)
    axes.set_xticks(range(len(summary)), list(summary))
    axes.set_ylabel("share of right choices")
    figure.legend(loc="outside upper center", ncols=len(shown))
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("quality.instructions", __doc__)
    parser.add_argument("--work", type=local_argument, required=True, help="directory of data and runs")
    parser.add_argument("--users", type=int, default=USERS, help="users of the simulated world (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="number of runs (default: %(default)s)")
    parser.add_argument(
        "--evaluate-samples",
        type=int,
        default=PLAN.evaluate_samples,
        metavar="N",
        help="samples of a task to report, and to calibrate on (default: %(default)s)",
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the job")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    samples = prepare(options.work, options.users, replace(PLAN, evaluate_samples=options.evaluate_samples))
    deadline, runs, metrics = time.monotonic() + 60 * options.minutes, [], []
    jobs = [
        job_of(options.work, samples, options.users, seed, options.overrides) for seed in range(1, options.seeds + 1)
    ]
    for job in jobs:
        if time.monotonic() < deadline or is_finished(job):
            metrics.append(finetune_once(job))
            runs.append(metrics[-1]["evaluation"])
    summary = summarise(runs, words(samples))
    print(table(summary))
    document = {
        "question": "whether the small model beats the majority and popularity baselines on LCU's three tasks",
        "users": options.users,
        "days": DAYS,
        "seeds": len(runs),
        "settings": learning(Path(jobs[0].run.directory)),
        "steps": metrics[0]["training"]["steps"],
        "samples": metrics[0]["samples"],
        "tokens_per_second": [run["training"]["tokens_per_second"] for run in metrics],
        "tasks": summary,
    }
    write_result(options.out, document)
    if options.out:
        draw(summary, options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
