"""Writer of a dataset's instruction samples to files, split by time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.load import parse_time
from trainer.config.paths import absolute
from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec
from trainer.llm.instructions.buckets import bucket_of, fit_edges, ranges
from trainer.llm.instructions.sample_files import (
    SPLITS,
    Report,
    check_least,
    check_most,
    check_new,
    new_samples,
    no_report,
    reported,
    write_lines,
    write_manifest,
)
from trainer.llm.instructions.tasks import LETTERS, PLACEHOLDERS, TASKS, TaskSampler
from trainer.llm.instructions.visits import OpenedVisits
from trainer.llm.models.prompt_templates import Template

GENERAL = "general.jsonl"
"""File of plain texts of the training days, for the key ``data.general`` of a job."""
TUNE = "tune"
"""Split between training and evaluation, for what is fitted on the scores of a trained model."""
MOST_PER_VIDEO = {"train": 12, TUNE: 1, "evaluate": 1}
"""Most ``top_comment`` samples of a video by split. More would repeat each other: its comments hardly change."""


@dataclass(frozen=True)
class InstructionPlan:
    """Settings of the samples.

    Attributes:
        evaluate_from: date or time in the dataset's time zone. Visits that ended before it are for training, visits
            that began at it or later are for evaluation.
        tune_from: an earlier date or time. Visits between the two are for ``tune.jsonl``, and training ends at this
            one. Empty: no such file.
        samples: most training samples of each task.
        most: most training samples of a task, by task; replaces ``samples``.
        evaluate_samples: most evaluation samples of each task, and most samples to tune on.
        candidates: number of comments to choose from.
        buckets: number of ranges of staytimes.
        history: most earlier stays or interactions in a prompt.
        characters: most characters of a text; a longer text is cut and counted.
        templates: folder of ``staytime.txt``, ``top_comment.txt`` and ``user_comment.txt``.
        seed: seed of the selection of visits and of the order of candidates.
    """

    evaluate_from: str
    samples: int = 20_000
    evaluate_samples: int = 2_000
    candidates: int = 4
    buckets: int = 4
    history: int = 6
    characters: int = 200
    templates: str = "configs/templates"
    seed: int = 1
    most: Mapping[str, int] = field(default_factory=dict)
    tune_from: str = ""


def write_instructions(
    dataset: str | Path, out: str | Path, plan: InstructionPlan, progress: Report | None = None
) -> dict[str, Any]:
    """Write ``train.jsonl``, ``general.jsonl``, ``evaluate.jsonl`` and ``manifest.json`` to a new directory.

    With ``plan.tune_from`` there is a ``tune.jsonl`` as well.

    The manifest has the plan, the edges of the staytime ranges with their shares, name, hash and text of the templates,
    and counts. No video has a ``top_comment`` sample in two files.

    Args:
        dataset: path of a dataset with texts.
        out: directory to make; must not exist.
        plan: settings of the samples.
        progress: callback that gets split and task, the number of samples so far and the most there can be.

    Returns:
        The manifest.

    Raises:
        UserError: ``out`` exists, the dataset has no texts, a setting or a template is wrong, or a file would be empty.
    """
    _check(plan)
    check_new(out)
    templates = {task: Template.read(Path(plan.templates) / f"{task}.txt", PLACEHOLDERS[task]) for task in TASKS}
    spec = DatasetSpec.load(dataset)
    border = parse_time(plan.evaluate_from, spec.timezone, "--evaluate-from")
    visits = OpenedVisits.read(dataset)
    tune_from = parse_time(plan.tune_from, spec.timezone, "--tune-from") if plan.tune_from else border
    if tune_from > border:
        raise UserError(f"--tune-from {plan.tune_from} must be before --evaluate-from {plan.evaluate_from}")
    split_rows = {
        "train": np.flatnonzero(visits.known_ms < tune_from),
        TUNE: np.flatnonzero((visits.request_ms >= tune_from) & (visits.known_ms < border)),
        "evaluate": np.flatnonzero(visits.request_ms >= border),
    }
    if not plan.tune_from:
        del split_rows[TUNE]
    for split, rows in split_rows.items():
        if not len(rows):
            borders = f"--tune-from {plan.tune_from} and " if plan.tune_from else ""
            raise UserError(
                f"{dataset}: no visits to {split} on; {borders}--evaluate-from {plan.evaluate_from} must leave visits "
                "with an opened comment area before and after it"
            )
    edges = fit_edges(visits.staytime_ms[split_rows["train"]], plan.buckets)
    tasks = TaskSampler(
        dataset,
        visits,
        templates,
        edges,
        split_rows["train"],
        candidates=plan.candidates,
        history=plan.history,
        characters=plan.characters,
        seed=plan.seed,
    )
    with new_samples(out) as tmp_path:
        counts = _write_splits(tmp_path, visits, split_rows, tasks, plan, progress or no_report)
        with open(tmp_path / GENERAL, "w", encoding="utf-8") as file:
            counts["general"] = {"liked": write_lines(file, tasks.liked(tune_from))}
        share = np.bincount(bucket_of(visits.staytime_ms[split_rows["train"]], edges), minlength=plan.buckets)
        manifest = {
            "dataset": spec.name,
            "plan": asdict(replace(plan, templates=absolute(plan.templates))),
            "edges_s": edges,
            "ranges": dict(zip(LETTERS, ranges(edges), strict=False)),
            "range_shares": (share / share.sum()).tolist(),
            "templates": {
                task: {"hash": template.hash, "sections": template.sections} for task, template in templates.items()
            },
            "samples": counts,
            "texts_cut": tasks.counts.cut,
            "visits_without_sample": tasks.counts.without_sample,
        }
        write_manifest(tmp_path, manifest)
    return manifest


def _write_splits(
    folder: Path,
    visits: OpenedVisits,
    split_rows: dict[str, np.ndarray],
    tasks: TaskSampler,
    plan: InstructionPlan,
    report: Report,
) -> dict[str, dict[str, int]]:
    """Write the samples of all splits to ``folder``; return their numbers by split and task.

    ``split_rows`` has the positions of each split's visits.

    Raises:
        UserError: a split has no samples.
    """
    counts: dict[str, dict[str, int]] = {split: {} for split in split_rows}
    seen_videos = np.empty(0, np.int64)
    for split in split_rows:
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for number, task in enumerate(TASKS):
                most = plan.most.get(task, plan.samples) if split == "train" else plan.evaluate_samples
                # The stream of a split is the same with and without samples to tune on.
                rng = np.random.default_rng([plan.seed, (*SPLITS, TUNE).index(split), number])
                drawn = rng.permutation(split_rows[split])
                if task == "user_comment":
                    drawn = drawn[visits.interacted.lengths[drawn] > 0]
                if task == "top_comment":
                    # the answer of a video hardly changes, so its training samples would give away that of evaluation
                    drawn = drawn[~np.isin(visits.item_id[drawn], seen_videos)]
                    drawn = drawn[_first_of_each(visits.item_id[drawn], MOST_PER_VIDEO[split])]
                    seen_videos = np.union1d(seen_videos, visits.item_id[drawn])
                made = tasks.samples(task, drawn, most, bare=split != "train")
                records = reported(made, f"{split} {task}", min(most, len(drawn)), report)
                counts[split][task] = write_lines(file, records)
        if not any(counts[split].values()):
            raise UserError(f"{folder}: no samples to {split} on; the comments have no texts or were never shown")
    return counts


def _first_of_each(keys: np.ndarray, most: int) -> np.ndarray:
    """Return the increasing positions of the first ``most`` occurrences of each key."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    return np.sort(order[np.arange(len(keys)) - np.searchsorted(ordered, ordered) < most])


def _check(plan: InstructionPlan) -> None:
    """Check the settings of a plan.

    Raises:
        UserError: a setting is out of range, or ``most`` names an unknown task.
    """
    least = {
        "samples": 1,
        "evaluate_samples": 1,
        "candidates": 2,
        "buckets": 2,
        "history": 0,
        "characters": 1,
        "seed": 0,
    }
    check_least(plan, least)
    check_most(plan.most, TASKS)
    for name in ("candidates", "buckets"):
        if getattr(plan, name) > len(LETTERS):
            raise UserError(
                f"--{name} is {getattr(plan, name)}; it must be {len(LETTERS)} or less, one letter for each"
            )
