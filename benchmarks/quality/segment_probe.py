"""Linear probes of segment vectors before and after tuning on questions and descriptions of segments.

    python -m benchmarks.quality.segment_probe --work build/segment-probe --out benchmarks/results/segment_probe.json

The truth of a simulated world annotates its segments. For every seed (of weights, adapters and order) the small model
of ``configs/finetune_small.toml`` is tuned on rooms of the first days. A logistic regression of the topic and a ridge
regression of the intensity are then fitted on vectors of segments of these rooms, and measured on rooms of the same
days that were held out, and on all rooms of the last day. ``untuned`` has vectors of the same model before tuning.
``words`` is the same probe on counts of the words of the speech, so it is what a probe can find without a model. Probes
of few are fitted on 50 segments only: a probe that sees thousands may find anything.

The vectors are those of ``limelight embed``: with its default template by both poolings, and at the place where the
tuned model begins its description. No room of a test is in the tuning or in the fit of a probe, and no day of the later
test; the benchmark stops if one is.

A finished run is kept in ``--work``, for its job and its samples; the same command continues with the others. Intervals
are Student's t over the seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.measure import make_parser, mean_and_half_width, write_result
from benchmarks.quality.kept_finetuning import finetune_once, finetuning_at
from modules.choices import TextPooling
from trainer.config.finetune import FinetuneConfig
from trainer.console.outputs import local_argument
from trainer.console.text_table import text_table
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import read_table
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.text_schema import SEGMENTS_PER_ITEM, read_texts, segment_ids
from trainer.data.simulator.config import DAY_MS, START_MS
from trainer.data.simulator.write_dataset import simulate
from trainer.llm.embedding.text_encoder import Encoder
from trainer.llm.instructions.segment_tasks import SEGMENT_TASKS
from trainer.llm.instructions.world_truth import WorldTruth
from trainer.llm.instructions.write_segments import SegmentPlan, write_segment_instructions
from trainer.llm.models.adapter import load_adapter
from trainer.llm.models.base_model import BaseModelFiles
from trainer.llm.models.prompt_templates import Template

JOB = "configs/finetune_small.toml"
KINDS = ("items", "comments", "segments", "authors")
READINGS: dict[str, tuple[str, TextPooling]] = {
    "last": ("configs/templates/embed.txt", "last"),
    "mean": ("configs/templates/embed.txt", "mean"),
    "description": ("configs/templates/embed_description.txt", "last"),
}
"""Name -> template and pooling of ``limelight embed``."""
TESTS = ("held_out_rooms", "later_day")
TARGETS = ("topic", "intensity", "topic_of_few", "intensity_of_few")
FEW, REPEATS = 50, 10
"""Segments that a probe of few is fitted on, and number of such probes."""
HELD_OUT_SHARE = 0.25


@dataclass(frozen=True)
class ProbeSize:
    """Size of the world and of the samples.

    Attributes:
        users: users of the world.
        days: days of the world. The job is evaluated on the last but one, and the probes on the last.
        samples: samples of each task to tune on.
        segments: segments to fit a probe on, and in each test.
    """

    users: int = 400
    days: int = 6
    samples: int = 1_500
    segments: int = 2_000


@dataclass(frozen=True)
class ProbeSegments:
    """Segments of one set.

    Attributes:
        ids: ``[n] int64``, as in ``text_schema.segment_ids``.
        start_ms: ``[n] int64``.
        text: speech of each segment.
        topic: ``[n] int64``.
        intensity: ``[n] float64``.
    """

    ids: np.ndarray
    start_ms: np.ndarray
    text: list[str]
    topic: np.ndarray
    intensity: np.ndarray

    @property
    def rooms(self) -> set[int]:
        """Rooms of the segments."""
        return set((self.ids // SEGMENTS_PER_ITEM).tolist())

    @property
    def days(self) -> set[int]:
        """Days of the segments, counted from the start of the world."""
        return set(((self.start_ms - START_MS) // DAY_MS).tolist())


def prepare(work: Path, size: ProbeSize, world_seed: int) -> tuple[Path, Path]:
    """Return the world and its samples; make them if they are missing."""
    world = work / f"world-{size.users}-{size.days}-{world_seed}"
    samples = work / f"samples-{size.users}-{size.days}-{world_seed}-{size.samples}"
    if not world.exists():
        simulate(world, size.users, size.days, 2, world_seed, texts=True)
    if not samples.exists():
        file = work / "annotations.jsonl"
        write_annotations(world, file, size)
        plan = SegmentPlan(
            evaluate_from=day_text(size.days - 2),
            annotations=str(file),
            samples=size.samples,
            evaluate_samples=max(20, size.samples // 25),
        )
        write_segment_instructions(world, samples, plan)
    return world, samples


def day_text(day: int) -> str:
    """Return the date of a day of a world, for ``--evaluate-from``."""
    # START_MS is midnight in the world's time zone, eight hours before that of UTC
    return str(np.datetime64(START_MS + 8 * 3_600_000 + day * DAY_MS, "ms").astype("datetime64[D]"))


def write_annotations(world: Path, file: Path, size: ProbeSize) -> None:
    """Write the truth of the rooms that may be tuned on, and of the day on which the job is evaluated."""
    truth = WorldTruth(world, DatasetSpec.load(world))
    rooms = truth.ids // SEGMENTS_PER_ITEM
    start_ms = _starts(world)[0]
    day = (np.array([start_ms[one] for one in truth.ids.tolist()]) - START_MS) // DAY_MS
    # the part of a room behind midnight counts with its beginning
    first_day = np.minimum.reduceat(day, np.unique(rooms, return_index=True)[1])[
        np.unique(rooms, return_inverse=True)[1]
    ]
    wanted = (first_day == size.days - 2) | ((first_day < size.days - 2) & ~is_held_out(rooms))
    with file.open("w", encoding="utf-8") as out:
        out.writelines(one.line() for one in truth.read(np.flatnonzero(wanted)))


def is_held_out(rooms: np.ndarray) -> np.ndarray:
    """Return the rooms of the first days that are held out, ``[n] bool``; the choice depends on the room alone."""
    unique, inverse = np.unique(rooms, return_inverse=True)
    drawn = np.array([np.random.default_rng([17, int(room)]).random() for room in unique])
    return (drawn < HELD_OUT_SHARE)[inverse]


def _starts(world: Path) -> tuple[dict[int, int], dict[int, str]]:
    """Return start and speech of every segment by id."""
    table = read_texts(world, "segments", ["item_id", "segment", "start_ms", "text"])
    item, segment, start_ms, text = (column.to_pylist() for column in table.columns)
    ids = segment_ids(np.array(item), np.array(segment)).tolist()
    return dict(zip(ids, start_ms, strict=True)), dict(zip(ids, text, strict=True))


def probe_sets(world: Path, samples: Path, size: ProbeSize, seed: int = 3) -> dict[str, ProbeSegments]:
    """Draw the segments of the fit and of both tests.

    Raises:
        ValueError: a room or a day of a test is in the tuning or in the fit.
    """
    start_ms, speech = _starts(world)
    columns = ["item_id", "segment", "topic", "intensity"]
    stored = read_table(DatasetFiles(world), "segments.parquet", columns)
    truth = {name: stored.column(name).to_numpy() for name in columns}
    ids = segment_ids(truth["item_id"], truth["segment"])
    rooms, starts = truth["item_id"], np.array([start_ms[one] for one in ids.tolist()])
    day = (starts - START_MS) // DAY_MS
    order = np.argsort(rooms, kind="stable")
    unique, first, inverse = np.unique(rooms[order], return_index=True, return_inverse=True)
    of_room = np.minimum.reduceat(day[order], first)
    latest = np.maximum.reduceat(day[order], first)
    tuned = tuned_rooms(samples)
    room_is_tuned = np.isin(unique, list(tuned["train"]))
    early = latest < size.days - 2
    masks = {
        "fit": room_is_tuned & early,
        "held_out_rooms": early & is_held_out(unique),
        "later_day": of_room == size.days - 1,
    }
    sets, rng = {}, np.random.default_rng(seed)
    for name, mask in masks.items():
        rows = rng.permutation(order[mask[inverse]])[: size.segments]
        sets[name] = ProbeSegments(
            ids[rows],
            starts[rows],
            [speech[one] for one in ids[rows].tolist()],
            truth["topic"][rows].astype(np.int64),
            truth["intensity"][rows].astype(np.float64),
        )
    check_apart(sets, tuned["train"] | tuned["evaluate"], size.days - 1)
    return sets


def tuned_rooms(samples: Path) -> dict[str, set[int]]:
    """Return the rooms of all samples by split."""
    rooms = {}
    for split in ("train", "evaluate"):
        with (samples / f"{split}.jsonl").open(encoding="utf-8") as file:
            rooms[split] = {json.loads(line)["item_id"] for line in file}
    return rooms


def check_apart(sets: Mapping[str, ProbeSegments], tuned: set[int], later: int) -> None:
    """Check that nothing of a test was seen before.

    Args:
        sets: ``fit`` and the tests.
        tuned: rooms of the samples, also of those that the job is only evaluated on.
        later: the day of the later test.

    Raises:
        ValueError: a room or a day of a test is in the tuning or in the fit, or a set is empty.
    """
    for name in TESTS:
        if not len(sets[name].ids):
            raise ValueError(f"{name} has no segments")
        for what, seen in (("tuning", tuned), ("fit of the probes", sets["fit"].rooms)):
            if shared := sets[name].rooms & seen:
                raise ValueError(f"{len(shared)} rooms of {name} are in the {what}")
    if max(sets["fit"].days) >= later or min(sets["later_day"].days) < later:
        raise ValueError("a day of later_day is in the fit of the probes")


def job_of(work: Path, samples: Path, seed: int, overrides: Sequence[str]) -> FinetuneConfig:
    """Return the job of a run, which is kept in ``work``."""
    settings = [f"run.seed={seed}", "data.general=[]", "data.general_share=0", *overrides]
    return finetuning_at(work / f"run-{samples.name}-{seed}", JOB, samples, ("train", "evaluate"), settings)


def vectors(directory: Path, reading: str, tuned: bool, sets: Mapping[str, ProbeSegments]) -> dict[str, np.ndarray]:
    """Return the vectors ``[n, dim]`` of each set, from the model of a run before or after tuning."""
    file, pooling = READINGS[reading]
    template = Template.read(file, dict.fromkeys(KINDS, frozenset({"text"})))
    base = BaseModelFiles.open(str(directory / "base"))
    model = base.load(bf16=False)
    if tuned:
        model = load_adapter(base, model, directory / "adapter")
    encoder = Encoder(model.eval(), base.tokenizer, torch.device("cpu"), length=128, tokens=16_384)
    encoder.pool_with(pooling)
    return {
        name: encoder.vectors([template.fill("segments", text=text) for text in segments.text])
        for name, segments in sets.items()
    }


def probe(features: Mapping[str, Any], sets: Mapping[str, ProbeSegments]) -> dict[str, dict[str, float]]:
    """Fit both probes and return test -> share of right topics, and R2 of the intensity.

    ``topic_of_few`` and ``intensity_of_few`` are means of probes that are fitted on ``FEW`` segments each.
    """
    every = len(sets["fit"].ids)
    few = [slice(first, first + FEW) for first in range(0, min(every, FEW * REPEATS), FEW)]
    whole = _scores(features, sets, [slice(0, every)])
    return {
        name: whole[name] | {f"{target}_of_few": score for target, score in scores.items()}
        for name, scores in _scores(features, sets, few).items()
    }


def _scores(
    features: Mapping[str, Any], sets: Mapping[str, ProbeSegments], parts: Sequence[slice]
) -> dict[str, dict[str, float]]:
    """Return test -> target -> mean score of the probes that are fitted on each of the parts of ``fit``."""
    found: dict[str, dict[str, list[float]]] = {name: {"topic": [], "intensity": []} for name in TESTS}
    for part in parts:
        scale = StandardScaler(with_mean=isinstance(features["fit"], np.ndarray))
        topic = make_pipeline(scale, LogisticRegression(max_iter=2_000))
        intensity = make_pipeline(scale, RidgeCV(alphas=(1.0, 10.0, 100.0, 1_000.0)))
        topic.fit(features["fit"][part], sets["fit"].topic[part])
        intensity.fit(features["fit"][part], sets["fit"].intensity[part])
        for name, scores in found.items():
            scores["topic"].append(float(topic.score(features[name], sets[name].topic)))
            scores["intensity"].append(float(intensity.score(features[name], sets[name].intensity)))
    return {name: {target: float(np.mean(some)) for target, some in scores.items()} for name, scores in found.items()}


def word_counts(sets: Mapping[str, ProbeSegments]) -> dict[str, Any]:
    """Return the counts of words of each set as sparse matrices; the words are those of the fit."""
    counter = CountVectorizer().fit(sets["fit"].text)
    return {name: counter.transform(segments.text) for name, segments in sets.items()}


def majority(sets: Mapping[str, ProbeSegments]) -> dict[str, float]:
    """Return the share of right topics of the most frequent topic of the fit, by test."""
    values, counts = np.unique(sets["fit"].topic, return_counts=True)
    return {name: float((sets[name].topic == values[counts.argmax()]).mean()) for name in TESTS}


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return reading -> test -> target -> means over the seeds with half of their 95 % intervals.

    ``gain`` is of the tuned model over the untuned one, seed by seed.
    """
    summary: dict[str, Any] = {}
    for reading in READINGS:
        for test in TESTS:
            for target in TARGETS:
                pairs = [tuple(run[reading][when][test][target] for when in ("untuned", "tuned")) for run in runs]
                summary.setdefault(reading, {}).setdefault(test, {})[target] = {
                    "untuned": mean_and_half_width([before for before, _ in pairs]),
                    "tuned": mean_and_half_width([after for _, after in pairs]),
                    "gain": mean_and_half_width([after - before for before, after in pairs]),
                }
    return summary


def table(summary: Mapping[str, Any], words: Mapping[str, Any]) -> str:
    """Return the summary as a table."""

    def cell(value: Sequence[float | None]) -> str:
        mean, half = value
        return f"{mean:.3f}" if half is None else f"{mean:.3f} ± {half:.3f}"

    lines = [
        [
            reading,
            test,
            target,
            *(cell(row[name]) for name in ("untuned", "tuned", "gain")),
            f"{words[test][target]:.3f}",
        ]
        for reading, tests in summary.items()
        for test, targets in tests.items()
        for target, row in targets.items()
    ]
    return text_table(["reading", "test", "target", "untuned", "tuned", "gain", "words"], lines)


def measure_seed(
    work: Path, samples: Path, sets: Mapping[str, ProbeSegments], seed: int, overrides: Sequence[str]
) -> Any:
    """Return reading -> untuned and tuned -> results of the probes, and the metrics of the job."""
    job = job_of(work, samples, seed, overrides)
    metrics, directory = finetune_once(job), Path(job.run.directory)
    probes = {
        reading: {
            when: probe(vectors(directory, reading, when == "tuned", sets), sets) for when in ("untuned", "tuned")
        }
        for reading in READINGS
    }
    return {
        **probes,
        "job": {task: metrics["evaluation"][task] for task in SEGMENT_TASKS},
        "training": metrics["training"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("quality.segment_probe", __doc__)
    parser.add_argument("--work", type=local_argument, required=True, help="directory of data and runs")
    parser.add_argument("--seeds", type=int, default=5, help="number of runs (default: %(default)s)")
    parser.add_argument("--world-seed", type=int, default=1, help="seed of the world (default: %(default)s)")
    for name, value in ProbeSize().__dict__.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="size (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the job")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    size = ProbeSize(options.users, options.days, options.samples, options.segments)
    options.work.mkdir(parents=True, exist_ok=True)
    world, samples = prepare(options.work, size, options.world_seed)
    sets = probe_sets(world, samples, size)
    runs = [measure_seed(options.work, samples, sets, seed, options.overrides) for seed in range(1, options.seeds + 1)]
    summary, words = summarise(runs), probe(word_counts(sets), sets)
    print(table(summary, words))
    tuned = tuned_rooms(samples)
    document = {
        "question": "whether tuning on segments makes topic and intensity easier to read from segment vectors",
        **size.__dict__,
        "few": FEW,
        "seeds": len(runs),
        "tuned_rooms": len(tuned["train"]),
        "sets": {name: {"segments": len(one.ids), "rooms": len(one.rooms)} for name, one in sets.items()},
        "steps": runs[0]["training"]["steps"],
        "probes": summary,
        "words": words,
        "majority": majority(sets),
        "job": {
            task: {
                name: mean_and_half_width([run["job"][task][name]["accuracy"] for run in runs])
                for name in ("untuned", "model")
            }
            for task in SEGMENT_TASKS
        },
        "runs": runs,
    }
    write_result(options.out, document)


if __name__ == "__main__":
    main()
