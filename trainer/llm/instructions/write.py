"""Instruction samples of a dataset as files, split by time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.load import parse_time
from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec
from trainer.llm.instructions.buckets import bucket_of, fit_edges, ranges
from trainer.llm.instructions.tasks import LETTERS, PLACES, TASKS, Record, Tasks
from trainer.llm.instructions.visits import Visits
from trainer.llm.models.prompt_templates import Template

MANIFEST = "manifest.json"
GENERAL = "general.jsonl"
"""Texts of the training days to learn as they are, for ``data.general`` of a job."""
SPLITS: tuple[str, ...] = ("train", "evaluate")
OF_A_VIDEO = {"train": 12, "evaluate": 1}
"""Most ``top_comment`` samples of a video: its comments stay the same, by and large."""


@dataclass(frozen=True)
class Plan:
    """What samples to make.

    Attributes:
        evaluate_from: a date or time, in the dataset's time zone: visits that ended before it are trained on, those
            that began at it or later are evaluated on.
        samples: of each task to train on, at most.
        most: task -> the same for a task that is to have more or fewer.
        evaluate_samples: of each task to evaluate on, at most.
        candidates: comments to choose from.
        buckets: ranges of staytimes.
        history: earlier stays or interactions in a prompt.
        characters: of a text; a longer one is cut there, and counted.
        templates: folder of ``staytime.txt``, ``top_comment.txt`` and ``user_comment.txt``.
        seed: of which visits are drawn, and of the order of candidates.
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


def write_instructions(
    dataset: str | Path, out: str | Path, plan: Plan, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, Any]:
    """Write ``train.jsonl``, ``general.jsonl``, ``evaluate.jsonl`` and ``manifest.json`` to a new directory.

    The manifest has the plan, the edges of the staytime ranges with their shares, name, hash and text of the templates,
    and counts. No video has a ``top_comment`` sample in both files.

    Args:
        dataset: with texts.
        out: directory to make; must not exist.
        plan: what samples to make.
        progress: told the task, how many samples it has, and how many at most.

    Returns:
        The manifest.

    Raises:
        UserError: ``out`` exists, the dataset has no texts, a setting or a template is wrong, or a file would be empty.
    """
    _check(plan)
    place = Path(out)
    if place.exists():
        raise UserError(f"{out}: exists already; choose another directory or remove it")
    templates = {task: Template.read(Path(plan.templates) / f"{task}.txt", PLACES[task]) for task in TASKS}
    spec = DatasetSpec.load(dataset)
    border = parse_time(plan.evaluate_from, spec.timezone, "--evaluate-from")
    visits = Visits.read(dataset)
    at = {"train": np.flatnonzero(visits.known_ms < border), "evaluate": np.flatnonzero(visits.request_ms >= border)}
    for split, some in at.items():
        if not len(some):
            raise UserError(
                f"{dataset}: no visit to {split} with before and after --evaluate-from {plan.evaluate_from}"
            )
    edges = fit_edges(visits.staytime_ms[at["train"]], plan.buckets)
    tasks = Tasks(
        dataset,
        visits,
        templates,
        edges,
        at["train"],
        candidates=plan.candidates,
        history=plan.history,
        characters=plan.characters,
        seed=plan.seed,
    )
    aside = place.with_name(f"{place.name}.partial-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        counts = _write_splits(aside, visits, at, tasks, plan, progress or (lambda what, done, total: None))
        with open(aside / GENERAL, "w", encoding="utf-8") as file:
            counts["general"] = {"liked": _write_lines(file, tasks.liked(border))}
        share = np.bincount(bucket_of(visits.staytime_ms[at["train"]], edges), minlength=plan.buckets)
        manifest = {
            "dataset": spec.name,
            "plan": asdict(plan),
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
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False))
        os.rename(aside, place)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({os.strerror(error.errno) if error.errno else error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


def _write_splits(
    folder: Path,
    visits: Visits,
    at: dict[str, np.ndarray],
    tasks: Tasks,
    plan: Plan,
    report: Callable[[str, int, int], None],
) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    seen_videos = np.empty(0, np.int64)
    for split in SPLITS:
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for number, task in enumerate(TASKS):
                most = plan.most.get(task, plan.samples) if split == "train" else plan.evaluate_samples
                rng = np.random.default_rng([plan.seed, SPLITS.index(split), number])
                drawn = rng.permutation(at[split])
                if task == "user_comment":
                    drawn = drawn[visits.interacted.lengths[drawn] > 0]
                if task == "top_comment":
                    drawn = drawn[~np.isin(visits.item_id[drawn], seen_videos)]
                    drawn = drawn[_first_of_each(visits.item_id[drawn], OF_A_VIDEO[split])]
                    seen_videos = visits.item_id[drawn]
                records = _reported(tasks.samples(task, drawn, most), f"{split} {task}", min(most, len(drawn)), report)
                counts[split][task] = _write_lines(file, records)
        if not any(counts[split].values()):
            raise UserError(f"{folder}: not one sample to {split} with; the comments have no texts or were never shown")
    return counts


def _first_of_each(keys: np.ndarray, most: int) -> np.ndarray:
    """Positions, increasing, of the first ``most`` occurrences of each key."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    return np.sort(order[np.arange(len(keys)) - np.searchsorted(ordered, ordered) < most])


def _reported(
    records: Iterable[Record], what: str, total: int, report: Callable[[str, int, int], None]
) -> Iterable[Record]:
    done = 0
    for done, record in enumerate(records, 1):
        if done % 1000 == 0:
            report(what, done, total)
        yield record
    report(what, done, done)


def _write_lines(file: Any, records: Iterable[Record]) -> int:
    lines = 0
    for record in records:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        lines += 1
    return lines


def _check(plan: Plan) -> None:
    least = {
        "samples": 1,
        "evaluate_samples": 1,
        "candidates": 2,
        "buckets": 2,
        "history": 0,
        "characters": 1,
        "seed": 0,
    }
    for name, lowest in least.items():
        value = getattr(plan, name)
        if value < lowest:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be {lowest} or more")
    for task, most in plan.most.items():
        if task not in TASKS or most < 0:
            raise UserError(f"--most {task}={most}: write TASK=N; tasks are {', '.join(TASKS)}, N is 0 or more")
    for name in ("candidates", "buckets"):
        if getattr(plan, name) > len(LETTERS):
            raise UserError(f"--{name} is {getattr(plan, name)}; there are letters for {len(LETTERS)}")
