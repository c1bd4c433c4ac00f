"""Predict highlights of rooms: Foresight beside a GRU, a causal Transformer, rules and the truth.

    python -m benchmarks.quality.highlights --work runs/highlights --out benchmarks/results/highlights.json

The task is the second one of KuaiLive-M3: after each segment of a room, predict the score of the next segment. The
metrics are those of ``benchmarks/quality/highlight_metrics.py``, by room, averaged over the rooms. The score is the
intensity of a simulated world; with ``--dataset`` and ``--scores`` it is that of an imported dataset
(``benchmarks/quality/highlight_rooms.py`` has the columns of the file).

Rooms are split by time (``--borders``): rooms that end before the first border are trained on, those between the first
and the second choose the epoch, and those that begin from the third on are tested. The codebook is fitted, and
Foresight's predictor trained, before the first border. Scores and inputs are scaled by the training rooms. No input
knows how long the room will be; the published benchmark has the position over the final length as a feature.

Inputs are of two kinds. ``codes``: the codes of the author's segments up to now, those of earlier rooms among them; the
GRU and the Transformer read the codes' centroids. ``past scores``: codes, and the scores of the segments up to now.
Foresight's predictor has learnt to foresee the next code, without any score, and stays as it is (*frozen*): a small
head reads its outputs I, D and the expected centroid.

Means are over rooms and seeds; intervals are over authors (bootstrap: an author with all of its rooms is drawn, the
same for both models of a difference). Every finished part is kept under ``--work``, so the same command continues a
benchmark that was stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.kept_work import begin_work
from benchmarks.measure import make_parser, run_limelight, slug, write_result
from benchmarks.quality.foresight import (
    DAYS,
    ITERATIONS,
    NEVER,
    NEWCOMERS,
    PARTITIONS,
    PREDICTOR_JOB,
    QUANTIZE_JOB,
    USERS,
    WORLD_SEED,
)
from benchmarks.quality.highlight_metrics import METRICS, room_metrics
from benchmarks.quality.highlight_models import (
    HighlightTraining,
    SegmentInputs,
    SegmentsModel,
    Sequence_,
    train_and_predict,
)
from benchmarks.quality.highlight_rooms import (
    PARTS,
    TEST,
    TRAIN,
    HighlightRooms,
    Predictions,
    read_intensity,
    read_scores,
    rule_predictions,
    truth_predictions,
)
from benchmarks.quality.kept_runs import KeptTables, kept_facts
from benchmarks.quality.paired_users import DRAWS, Metric, paired_difference, user_rate
from trainer.config.foresight import ForesightConfig, load_foresight
from trainer.config.load import parse_time
from trainer.console.errors import UserError
from trainer.console.outputs import local_argument
from trainer.console.text_table import text_table
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.segment_codes import CodeFile
from trainer.data.simulator.segment_vectors import DEFAULT_NOISE
from trainer.data.simulator.write_dataset import simulate
from trainer.foresight import run_job
from trainer.metrics.user_bootstrap import ResampledMetric
from trainer.runtime.distributed import World
from trainer.runtime.files import write_json
from trainer.runtime.preemption import Preemption
from trainer.semantic_ids.code_files import read_codes
from trainer.semantic_ids.codebook_version import CodebookVersion
from trainer.semantic_ids.foresight_model import TrainedPredictor
from trainer.semantic_ids.foresight_rows import SegmentContexts

BORDERS = ("2024-03-08", "2024-03-09", "2024-03-11")
"""Borders of the simulated log, which begins on 4 March: four days to train on, one to choose by, three to test on."""

ROOMS = (240, 60, 200)
HISTORY = 64
"""Segments of an author's earlier rooms that the GRU and the Transformer read; Foresight reads 128 runs."""

RECENT = 5
ROWS_AT_ONCE = 256
FORESIGHT = "Foresight, frozen"

RULES, CODES, PAST, TRUTHS = "rules", "codes", "past scores", "truth"
GROUPS = (RULES, CODES, PAST, TRUTHS)


@dataclass(frozen=True)
class ModelInputs:
    """Inputs of a model by name, see ``HighlightWork.inputs``.

    Attributes:
        kind: sequence network; empty for none.
        sequence: read by the sequence network.
        row: read by the head at the position.
    """

    kind: Sequence_ = ""
    sequence: tuple[str, ...] = ()
    row: tuple[str, ...] = ()


MODELS: dict[tuple[str, str], ModelInputs] = {
    (CODES, "last code"): ModelInputs(row=("code",)),
    (CODES, "GRU"): ModelInputs("gru", ("code",)),
    (CODES, "Transformer"): ModelInputs("transformer", ("code",)),
    (CODES, FORESIGHT): ModelInputs(row=("foresight",)),
    (CODES, "GRU + Foresight"): ModelInputs("gru", ("code",), ("foresight",)),
    (PAST, "GRU"): ModelInputs("gru", ("code", "score")),
    (PAST, FORESIGHT): ModelInputs(row=("foresight", "recent")),
}
"""Group and name -> inputs."""

PAIRS = (
    ((CODES, FORESIGHT), (CODES, "last code")),
    ((CODES, FORESIGHT), (CODES, "GRU")),
    ((CODES, FORESIGHT), (CODES, "Transformer")),
    ((CODES, "GRU + Foresight"), (CODES, "GRU")),
    ((PAST, FORESIGHT), (PAST, "GRU")),
    ((PAST, FORESIGHT), (RULES, "last score")),
)
"""Comparisons: a model, and the one that it is compared with."""


class HighlightWork:
    """Files of the benchmark, made when they are first needed.

    Args:
        options: of the command line.
        world: ranks, one.
    """

    def __init__(self, options: argparse.Namespace, world: World) -> None:
        self._options, self._ranks = options, world
        self._folder: Path = options.work
        self._tables: dict[tuple[str, int], np.ndarray] = {}
        self._jobs = KeptTables(self._folder)

    @cached_property
    def dataset(self) -> Path:
        """Dataset of the rooms: a simulated world, unless one is named."""
        if self._options.dataset is not None:
            return Path(self._options.dataset)
        path = self._folder / "world"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            size = self._options.users, self._options.days, PARTITIONS, WORLD_SEED
            simulate(path, *size, segment_noise=DEFAULT_NOISE, newcomers=NEWCOMERS)
        return path

    @cached_property
    def version(self) -> CodebookVersion:
        """Codebook, fitted before the first border."""
        path = self._folder / "codebook"
        if not path.exists():
            settings = [f"data.path={self.dataset}", f"data.fit_until={self._options.borders[0]}"]
            settings += [f"codebook.levels=[{self._options.codes}]", f"codebook.directory={path}"]
            settings += [f"codebook.iterations={ITERATIONS}", 'codebook.start="random"']
            run_limelight("quantize", QUANTIZE_JOB, *settings)
        return CodebookVersion.open(path)

    @cached_property
    def codes(self) -> CodeFile:
        """Codes of all segments."""
        version, file = self.version, self._folder / "codes.parquet"
        if not file.exists():
            run_limelight("quantize", "assign", version.path, self.dataset, file)
        return read_codes(file, version)

    @cached_property
    def rooms(self) -> HighlightRooms:
        """Rooms by part, with their scores."""
        options, timezone = self._options, DatasetSpec.load(self.dataset).timezone
        borders = [parse_time(text, timezone, "--borders") for text in options.borders]
        if options.dataset is None:
            score = read_intensity(self.dataset, self.codes)
        else:
            score = read_scores(options.scores, self.codes)
        return HighlightRooms.make(self.codes, score, borders, HISTORY, options.rooms)

    @cached_property
    def contexts(self) -> tuple[SegmentContexts, np.ndarray]:
        """Contexts of all segments, and the place of each segment of the code file in them."""
        codes = self.codes
        found = SegmentContexts.of_all(codes.author_id, codes.segment, codes.known_ms, codes.codes[:, 0])
        place = np.zeros(len(codes), np.int64)
        place[found.segment] = np.arange(len(found))
        return found, place

    def inputs(self, name: str, seed: int) -> np.ndarray:
        """Return the vectors of all segments ``[n, width] float32``, of mean 0 and deviation 1 over training rooms.

        Args:
            name: ``code``, the centroid of the segment's code; ``score``, its score, and whether that is known;
                ``recent``, its score and the means of the latest scores and of all scores of its room up to it;
                ``foresight``, the outputs of the predictor after it.
            seed: of the predictor; the others are the same for all.
        """
        key = name, seed if name == "foresight" else 0
        if key not in self._tables:
            make = {"code": self._centroids, "score": self._scores, "recent": self._recent}
            values = self._foreseen(seed) if name == "foresight" else make[name]()
            trained = values[self.rooms.positions(TRAIN)].astype(np.float64)
            mean, deviation = trained.mean(0), trained.std(0)
            self._tables[key] = ((values - mean) / np.maximum(deviation, 1e-6)).astype(np.float32)
        return self._tables[key]

    def predictions(self, model: tuple[str, str], seed: int) -> tuple[Predictions, dict[str, float]]:
        """Return the predictions of a model for the test rooms, and facts about its training."""
        file = self._folder / f"seed-{seed}" / f"{slug('-'.join(model))}.npz"
        schedule = HighlightTraining(self._options.epochs, self._options.rate, seed)
        key = self._key(model, seed, schedule)
        if _key_in(file) != key:
            print(f"{', '.join(model)}, seed {seed}", file=sys.stderr, flush=True)
            started = time.process_time()
            found, best = train_and_predict(self._maker(model, seed), self.rooms, schedule)
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as out:
                numbers = np.array([best["epoch"], best["mAP"], time.process_time() - started])
                np.savez(out, predicted=np.concatenate(found), facts=numbers, key=np.array(key))
        with np.load(file, allow_pickle=False) as stored:
            ends = np.cumsum([len(room) for room in self.rooms.parts[TEST]])
            facts = dict(zip(("epoch", "mAP", "seconds"), stored["facts"].tolist(), strict=True))
            return np.split(stored["predicted"], ends[:-1]), facts

    def _maker(self, model: tuple[str, str], seed: int) -> Callable[[], nn.Module]:
        """Return a function that makes a model; its inputs are there before, so they draw no random number in it."""
        names = MODELS[model]
        parts = [
            np.concatenate([self.inputs(name, seed) for name in some], 1) if some else None
            for some in (names.sequence, names.row)
        ]
        longest = max(len(room) + len(room.history) for part in self.rooms.parts.values() for room in part)
        return lambda: SegmentsModel(SegmentInputs(*parts), names.kind, longest)

    def _key(self, model: tuple[str, str], seed: int, schedule: HighlightTraining) -> str:
        """Return what identifies the training of a model: its inputs and settings, and the job of the predictor."""
        names = MODELS[model]
        own = json.dumps([asdict(names), asdict(schedule), HISTORY, RECENT])
        return self._jobs.key_of(self._predictor_job(seed), more=own) if "foresight" in names.row else own

    def _predictor_job(self, seed: int) -> ForesightConfig:
        """Return the job of Foresight's predictor, trained before the first border."""
        overrides = [f"data.path={self.dataset}", f"data.codes={self.codes.path}"]
        overrides += [f"data.codebook={self.version.path}", f"data.train_until={self._options.borders[0]}"]
        overrides += [f"data.eval_from={NEVER}", f"run.seed={seed}"]
        overrides += [f"run.directory={self._folder / f'seed-{seed}' / 'predictor'}"]
        overrides += ["train.epochs=1", 'train.device="cpu"', *self._options.predictor]
        return load_foresight(PREDICTOR_JOB, overrides)

    def _predictor(self, seed: int) -> TrainedPredictor:
        """Return Foresight's predictor, trained unless a run of the same job is there."""
        job = self._predictor_job(seed)
        run, key = Path(job.run.directory), self._jobs.key_of(job)
        file = run.with_suffix(".json")
        if kept_facts(file, key) is None:
            if file.exists():
                file.unlink()
                shutil.rmtree(run, ignore_errors=True)
            run_job(job, self._ranks, Preemption())
            write_json(file, {"key": key})
        return TrainedPredictor.open(run)

    def _foreseen(self, seed: int) -> np.ndarray:
        """Return I of the newest run, D, and the expected centroid after each position; zeros at other segments."""
        predictor, centroids = self._predictor(seed).predictor(), self.version.codebook.levels[0]
        contexts, place = self.contexts
        rows = np.concatenate([self.rooms.positions(part) for part in PARTS])
        found = np.zeros((len(self.codes), predictor.size.dim + 2 * centroids.shape[1]), np.float32)
        with torch.no_grad():
            table = predictor.table()
            for begin in range(0, len(rows), ROWS_AT_ONCE):
                part = rows[begin : begin + ROWS_AT_ONCE]
                code, length = (torch.from_numpy(one) for one in contexts.contexts(place[part], predictor.size.runs))
                found[part] = torch.cat(predictor.forecast(code, length, "last", centroids, table), 1).numpy()
        return found

    def _centroids(self) -> np.ndarray:
        return self.version.codebook.levels[0].numpy()[self.codes.codes[:, 0]]

    def _scores(self) -> np.ndarray:
        score = self.rooms.score
        return np.stack([np.nan_to_num(score), ~np.isnan(score)], 1).astype(np.float32)

    def _recent(self) -> np.ndarray:
        found = np.zeros((len(self.codes), 3), np.float32)
        for room in (room for part in self.rooms.parts.values() for room in part):
            score = self.rooms.score[room.positions].astype(np.float64)
            total = np.append(0.0, np.cumsum(score))
            place = np.arange(1, len(total))
            begin = np.maximum(place - RECENT, 0)
            latest = (total[place] - total[begin]) / (place - begin)
            found[room.positions] = np.stack([score, latest, total[1:] / place], 1)
        return found


def _key_in(file: Path) -> str | None:
    """Return the key of kept predictions; None if there are none."""
    if not file.exists():
        return None
    with np.load(file, allow_pickle=False) as stored:
        return str(stored["key"]) if "key" in stored.files else None


def measure_models(work: HighlightWork, seeds: Sequence[int]) -> dict[str, Any]:
    """Return by group and model the metrics and facts, and the differences of ``PAIRS``, in points."""
    rooms = work.rooms.parts[TEST]
    _, author = np.unique([room.author for room in rooms], return_inverse=True)
    authors = int(author.max()) + 1
    fixed = {(RULES, name): found for name, found in rule_predictions(work.rooms).items()}
    if work.dataset.joinpath("truth").exists():
        fixed |= {
            (TRUTHS, name): found for name, found in truth_predictions(work.dataset, work.codes, work.rooms).items()
        }
    metrics: dict[tuple[str, str], dict[str, list[Metric]]] = {}
    facts: dict[tuple[str, str], dict[str, float]] = {}
    for model in [*fixed, *MODELS]:
        if model in fixed:
            of_seeds = [fixed[model]]
        else:
            runs = [work.predictions(model, seed) for seed in seeds]
            of_seeds = [found for found, _ in runs]
            facts[model] = {name: float(np.mean([fact[name] for _, fact in runs])) for name in ("epoch", "seconds")}
        values = [_by_room(found, rooms) for found in of_seeds]
        metrics[model] = {
            name: [user_rate(author[known], one[name][known]) for one in values for known in [np.isfinite(one[name])]]
            for name in METRICS
        }
    nothing: list[Metric] = [lambda counts: ResampledMetric(0.0, np.zeros(len(counts) - 1))]
    groups: dict[str, Any] = {}
    for group in GROUPS:
        for model in (model for model in metrics if model[0] == group):
            found = {
                name: asdict(paired_difference(nothing * len(of_seeds), of_seeds, authors))
                for name, of_seeds in metrics[model].items()
            }
            groups.setdefault(group, {})[model[1]] = {"metrics": found, **facts.get(model, {})}
    differences = []
    for model, other in PAIRS:
        found = {}
        for name in METRICS:
            one, two = metrics[other][name], metrics[model][name]
            found[name] = asdict(paired_difference(one * (len(two) // len(one)), two, authors))
        differences.append({"model": list(model), "to": list(other), "metrics": found})
    return {"groups": groups, "differences": differences, "authors": authors}


def _by_room(predictions: Predictions, rooms: Sequence[Any]) -> dict[str, np.ndarray]:
    found = [
        room_metrics(predicted, room.score, room.highlight) for predicted, room in zip(predictions, rooms, strict=True)
    ]
    return {name: np.array([one[name] for one in found]) for name in METRICS}


def tables(result: Mapping[str, Any]) -> str:
    """Return the metrics and the differences as tables, in points."""
    lines = [
        [group, name, *(_cell(one["metrics"][metric], "") for metric in METRICS)]
        for group, models in result["groups"].items()
        for name, one in models.items()
    ]
    pairs = [
        [" ".join(one["model"]), " ".join(one["to"]), *(_cell(one["metrics"][metric], "+") for metric in METRICS)]
        for one in result["differences"]
    ]
    return "\n\n".join(
        [text_table(["inputs", "model", *METRICS], lines), text_table(["model", "less", *METRICS], pairs)]
    )


def _cell(value: Mapping[str, Any], sign: str) -> str:
    if value["mean"] is None:
        return "-"
    text = f"{value['mean']:{sign}.2f}"
    return text if value["low"] is None else f"{text} [{value['low']:{sign}.2f}, {value['high']:{sign}.2f}]"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("quality.highlights", __doc__)
    parser.add_argument(
        "--work", type=local_argument, default=Path("runs/highlights"), help="keeps all parts (default: %(default)s)"
    )
    parser.add_argument("--users", type=int, default=USERS, help="users of the world (default: %(default)s)")
    parser.add_argument("--days", type=int, default=DAYS, help="days of the world (default: %(default)s)")
    parser.add_argument(
        "--dataset", type=local_argument, help="imported dataset with segment vectors (default: a world)"
    )
    parser.add_argument(
        "--scores", type=local_argument, help="scores of its segments: Parquet with room, segment, score"
    )
    parser.add_argument(
        "--borders", nargs=3, default=BORDERS, metavar="TIME", help="of the parts (default: %(default)s)"
    )
    parser.add_argument(
        "--rooms", type=int, nargs=3, default=ROOMS, help="most rooms of each part (default: %(default)s)"
    )
    parser.add_argument("--codes", type=int, default=2000, help="of the codebook (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of the models (default: 1 to 5)")
    parser.add_argument("--epochs", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--predictor", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the predictor")
    options = parser.parse_args(argv)
    if (options.dataset is None) != (options.scores is None):
        parser.error("--dataset and --scores belong together: a dataset, and the scores of its segments")
    if options.scores is not None and not options.scores.exists():
        parser.error(f"--scores: {options.scores}: no such file")
    contents = {"--dataset": options.dataset, "--scores": options.scores}
    contents |= {job: job for job in (QUANTIZE_JOB, PREDICTOR_JOB)}
    begin_work("quality.highlights", options, free=("dataset", "scores", "seeds"), contents=contents)
    torch.set_num_threads(1)
    if options.scores is None:
        print("score: the intensity of a simulated world; no --scores of imported data are named", file=sys.stderr)
    with World.join("cpu") as ranks:
        work = HighlightWork(options, ranks)
        try:
            rooms = work.rooms
        except UserError as error:
            parser.error(str(error))
        result = measure_models(work, options.seeds)
    print(tables(result))
    facts = {
        "question": "how well highlights of rooms are predicted one segment ahead, in points",
        "source": "simulated world" if options.dataset is None else str(options.dataset),
        **{name: getattr(options, name) for name in ("users", "days", "borders", "codes", "seeds", "epochs", "rate")},
        "predictor": options.predictor,
        "history": HISTORY,
        "draws": DRAWS,
        "rooms": {part: len(found) for part, found in rooms.parts.items()},
        "positions": {part: int(sum(map(len, found))) for part, found in rooms.parts.items()},
        "highlights": float(np.concatenate([room.highlight for room in rooms.parts[TEST]]).mean()),
        "without_scores": rooms.without_scores,
    }
    write_result(options.out, {**facts, **result})


if __name__ == "__main__":
    main()
