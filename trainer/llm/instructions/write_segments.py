"""Writer of samples about segments of rooms to files, split by time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.load import parse_time
from trainer.config.paths import absolute
from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec
from trainer.llm.instructions.annotations import AnnotationFile
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
from trainer.llm.instructions.segment_tasks import (
    PLACEHOLDERS,
    SEGMENT_TASKS,
    AnnotationSource,
    SampleList,
    SegmentSampler,
)
from trainer.llm.instructions.segments import SegmentTexts
from trainer.llm.instructions.world_truth import WorldTruth
from trainer.llm.models.prompt_templates import Template

TEMPLATE = "segment.txt"
TRUTH = "annotations.jsonl"
"""File of a simulated world's truth, in the format of annotations."""

AskRows = Callable[[SegmentTexts, np.ndarray], Any]
"""Function that asks a larger model about the segments at some positions."""


@dataclass(frozen=True)
class SegmentPlan:
    """Settings of the samples about segments.

    Attributes:
        evaluate_from: date or time in the dataset's time zone. Segments that were known before it are for training.
            Segments that began at it or later are for evaluation, if their room has none before it.
        annotations: annotation file; empty takes the truth of a simulated world.
        samples: most training samples of each task.
        most: most training samples of a task, by task; replaces ``samples``.
        evaluate_samples: most evaluation samples of each task.
        candidates: options of an evaluation sample.
        comments: most comments in a prompt.
        characters: most characters of a text; a longer text is cut and counted.
        templates: folder of ``segment.txt``.
        seed: seed of the selection of samples and of the options.
    """

    evaluate_from: str
    annotations: str = ""
    samples: int = 20_000
    evaluate_samples: int = 2_000
    candidates: int = 4
    comments: int = 8
    characters: int = 200
    templates: str = "configs/templates"
    seed: int = 1
    most: Mapping[str, int] = field(default_factory=dict)


def write_segment_instructions(
    dataset: str | Path,
    out: str | Path,
    plan: SegmentPlan,
    progress: Report | None = None,
    ask: AskRows | None = None,
) -> dict[str, Any]:
    """Write ``train.jsonl``, ``evaluate.jsonl`` and ``manifest.json`` to a new directory.

    The truth of a simulated world, where it is the source, is written to ``annotations.jsonl`` for all segments with a
    sample. The manifest has the plan, the template, the counts of samples and those of annotations.

    Args:
        dataset: path of a dataset with texts of segments.
        out: directory to make; must not exist.
        plan: settings of the samples.
        progress: callback of the progress.
        ask: asks for annotations of the segments that are drawn, before the file is read.

    Returns:
        The manifest.

    Raises:
        UserError: ``out`` exists, the dataset has no texts of segments, a setting, the template or an annotation is
            wrong, or a file would be empty.
    """
    least = {"samples": 1, "evaluate_samples": 1, "candidates": 2, "comments": 0, "characters": 1, "seed": 0}
    check_least(plan, least)
    check_most(plan.most, SEGMENT_TASKS)
    check_new(out)
    template = Template.read(Path(plan.templates) / TEMPLATE, PLACEHOLDERS)
    spec = DatasetSpec.load(dataset)
    border = parse_time(plan.evaluate_from, spec.timezone, "--evaluate-from")
    segments = SegmentTexts(dataset, spec.timezone, comments=plan.comments, characters=plan.characters)
    of_split = split_segments(segments, border)
    for split, usable in of_split.items():
        if not (usable & segments.filled).any():
            raise UserError(
                f"{dataset}: no segments to {split} on; --evaluate-from {plan.evaluate_from} must leave rooms before "
                "and after it"
            )
    if ask is not None:
        ask(segments, rows_to_ask(segments, of_split, plan))
    source: AnnotationSource = AnnotationFile(plan.annotations) if plan.annotations else WorldTruth(dataset, spec)
    lists = {task: SampleList.of(source.index[kind], segments) for task, kind in SEGMENT_TASKS.items()}
    sampler = SegmentSampler(segments, source, template, candidates=plan.candidates, seed=plan.seed)
    # texts were cut for the larger model, too
    segments.cut = 0
    with new_samples(out) as tmp_path:
        counts: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
        sampled: list[np.ndarray] = []
        for split in SPLITS:
            with open(tmp_path / f"{split}.jsonl", "w", encoding="utf-8") as file:
                for task, samples in lists.items():
                    drawn = draw_samples(samples, of_split[split], split, task, plan)
                    sampled.append(drawn.offset)
                    make = sampler.training if split == "train" else sampler.evaluation
                    records = reported(make(task, drawn), f"{split} {task}", len(drawn.row), progress or no_report)
                    counts[split][task] = write_lines(file, records)
            if not any(counts[split].values()):
                raise UserError(f"{dataset}: no segment to {split} on has an annotation; {_advice(plan)}")
        if not plan.annotations:
            with open(tmp_path / TRUTH, "w", encoding="utf-8") as file:
                file.writelines(one.line() for one in source.read(np.unique(np.concatenate(sampled))))
        manifest = {
            "dataset": spec.name,
            "plan": asdict(replace(plan, templates=absolute(plan.templates), annotations=absolute(plan.annotations))),
            "templates": {"segment": {"hash": template.hash, "sections": template.sections}},
            "samples": counts,
            "texts_cut": segments.cut,
            "annotations": {
                "source": absolute(plan.annotations) or "truth of the simulated world",
                "lines": source.lines,
                **{kind: len(index.ids) for kind, index in source.index.items()},
                "of_unknown_segments": sum(samples.unknown for samples in lists.values()),
                "of_blank_segments": sum(samples.blank for samples in lists.values()),
            },
            "samples_without_options": sampler.without_options,
        }
        write_manifest(tmp_path, manifest)
    return manifest


def split_segments(segments: SegmentTexts, border_ms: int) -> dict[str, np.ndarray]:
    """Return the masks ``[n] bool`` of the segments to train and to evaluate on.

    A room that was on air at the border has segments to train on, so its later ones are in neither split.
    """
    _, room = np.unique(segments.item_id, return_inverse=True)
    first_ms = np.full(room.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first_ms, room, segments.start_ms)
    return {"train": segments.known_ms < border_ms, "evaluate": first_ms[room] >= border_ms}


def draw_samples(samples: SampleList, usable: np.ndarray, split: str, task: str, plan: SegmentPlan) -> SampleList:
    """Draw the samples of a split and a task; ``usable`` is the mask of the split's segments."""
    most = plan.most.get(task, plan.samples) if split == "train" else plan.evaluate_samples
    rng = np.random.default_rng([plan.seed, SPLITS.index(split), list(SEGMENT_TASKS).index(task)])
    positions = np.flatnonzero(usable[samples.row])
    return samples.at(rng.permutation(positions)[:most])


def rows_to_ask(segments: SegmentTexts, of_split: Mapping[str, np.ndarray], plan: SegmentPlan) -> np.ndarray:
    """Draw the segments that a larger model is asked about, as many as samples of a task are wanted."""
    drawn = []
    for number, (split, usable) in enumerate(of_split.items()):
        most = plan.samples if split == "train" else plan.evaluate_samples
        rng = np.random.default_rng([plan.seed, number])
        drawn.append(rng.permutation(np.flatnonzero(usable & segments.filled))[:most])
    return np.concatenate(drawn)


def _advice(plan: SegmentPlan) -> str:
    return f"add some to {plan.annotations}" if plan.annotations else "choose another --evaluate-from"
