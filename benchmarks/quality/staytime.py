"""Measure what LCU's second stage, and each of its parts, adds to the prediction of seconds in the comments.

    python -m benchmarks.quality.staytime --work build/staytime --out benchmarks/results/staytime.json
    python -m benchmarks.quality.staytime --work build/staytime --parts bases grid --minutes 30
    python -m benchmarks.quality.staytime --work build/staytime --embeddings tuned=TABLES untuned=TABLES

A cell is one training on a simulated world with texts (``--users``, 14 days; the last two are held out, settings were
chosen on the day before): a base with and without LCU; other backbones; LCU without one of its losses, or without
texts; comments chosen by the outcome, which is a leak; weights of the two losses; the number of comments; days of
training; learning rates and epochs; and each peculiarity of the paper's released code. ``--kuairand`` adds the bases on
the real ``comment_stay_time`` of an imported KuaiRand, without texts.

A text's embedding is a sum of random vectors of its words. ``--embeddings NAME=DIRECTORY`` adds a cell with tables that
``limelight embed`` made (``DIRECTORY/items`` and ``DIRECTORY/comments``), such as those of the tuned and of the untuned
model, or of four prompt templates.

A finished cell is kept in ``--work`` as long as its job and its data are the same; the same command continues with the
others, and ``--minutes`` ends it early.
Every difference is between cells of one seed, with Student's t over the seeds of the training, in one world.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import make_parser, write_result
from benchmarks.quality.kept_runs import key_of
from benchmarks.quality.staytime_report import print_tables, summarise, write_pictures
from trainer.comment_staytime.evaluation import train_and_evaluate
from trainer.comment_staytime.inputs import StaytimeData, load_staytime
from trainer.config.load import load_job
from trainer.config.staytime import (
    PECULIARITIES,
    InputConfig,
    LcuConfig,
    StaytimeConfig,
    StaytimeDataConfig,
    WatchConfig,
)
from trainer.console.outputs import local_argument
from trainer.data.format.content_vectors import ContentVectors, read_manifest
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.text_schema import read_texts
from trainer.data.simulator.write_dataset import simulate
from trainer.runtime.files import write_json

JOB = "configs/staytime.toml"
PARTS = (
    "bases",
    "ablations",
    "embeddings",
    "corrections",
    "comments",
    "days",
    "grid",
    "backbones",
    "training",
    "kuairand",
)
LOSSES = ("vr", "wlr", "d2q", "ndt", "pcr", "tpm")
BACKBONES = ("dcn", "deepfm", "autoint", "mlp")
LAMBDA1 = (0.0, 0.01, 0.1, 1.0)
LAMBDA2 = (0.0, 0.1, 0.3, 1.0)
NUMBERS = (3, 6, 10)
DAYS = 14
FIRST_DAYS = {3: "2024-03-13", 6: "2024-03-10", 12: "2024-03-04"}
"""Days of training -> the first of them."""
TRAININGS = ((1, 1e-2), (2, 5e-3), (2, 2e-3))
"""Epochs and learning rate; the other parts have the first, the job file has the second."""
WORD_WIDTH = 32

READ = {"enabled", "item_embeddings", "comment_embeddings", "comments", "candidates"}
"""Settings of LCU that decide which data are read."""

WORLD_SETTINGS = (
    "data.eval_from=2024-03-16",
    # Without the features that say nothing about the staytime in this world, and in one epoch, so that a cell is cheap.
    'input.exclude=["city_tier", "device", "gender", "age_band", "spend_band", "user_tenure", "author_tenure", '
    '"author_category", "author_genre", "fans_band"]',
    "lcu.heads=2",
    "train.epochs=1",
    "train.learning_rate=1e-2",
)
KUAIRAND_SETTINGS = ("data.eval_from=2022-05-04", "lcu.enabled=false", "train.epochs=2", "train.learning_rate=2e-3")
BASE_ALONE = ("lcu.enabled=false",)
NO_CELLS = "no cell to run: these parts need --kuairand or --embeddings, or --seeds is below 1"
NO_KUAIRAND = "not run: --kuairand names no dataset (limelight data import kuairand makes one)"


@dataclass(frozen=True)
class StaytimeCell:
    """One training and its evaluation.

    Attributes:
        part: of the benchmark.
        name: in its part.
        seed: of the training.
        settings: changes to the job.
        texts: directory of the embedding tables; None without.
    """

    part: str
    name: str
    seed: int
    settings: tuple[str, ...]
    texts: Path | None

    @property
    def on_kuairand(self) -> bool:
        """True if the cell is trained on KuaiRand, which the part's name says."""
        return self.part.endswith("kuairand")

    def config(self, path: Path, overrides: Sequence[str]) -> StaytimeConfig:
        """Return the job on the dataset at ``path``."""
        fixed = KUAIRAND_SETTINGS if self.on_kuairand else WORLD_SETTINGS
        texts = []
        if self.texts is not None:
            texts = [f"lcu.{name}_embeddings={self.texts / f'{name}s'}" for name in ("item", "comment")]
        settings = [f"data.path={path}", f"run.seed={self.seed}", *fixed, *texts, *overrides, *self.settings]
        return load_job(StaytimeConfig, JOB, settings)


def world_cells(options: argparse.Namespace, words: Path) -> Iterator[StaytimeCell]:
    """Yield the cells of the simulated world, the most informative parts first."""

    def cells(part: str, name: str, *settings: str, texts: Path | None = words, seeds: int = options.seeds) -> Any:
        return [StaytimeCell(part, name, seed, settings, texts) for seed in range(1, seeds + 1)]

    for loss in LOSSES:
        yield from cells("bases", f"{loss} alone", f"base.loss={loss}", *BASE_ALONE)
        yield from cells("bases", f"{loss} with LCU", f"base.loss={loss}")
    yield from cells("ablations", "LCU")
    yield from cells("ablations", "without R1", "lcu.lambda1=0")
    yield from cells("ablations", "without R2", "lcu.lambda2=0")
    yield from cells("ablations", "without R1 and R2", "lcu.lambda1=0", "lcu.lambda2=0")
    yield from cells("ablations", "without embeddings", texts=None)
    yield from cells("ablations", "with comment ids", "lcu.comment_ids=true")
    yield from cells("ablations", "comments by outcome (leak)", "lcu.candidates=touched")
    for name, directory in options.embeddings:
        yield from cells("embeddings", name, texts=directory)
    yield from cells("corrections", "corrected")
    for peculiarity in PECULIARITIES:
        yield from cells("corrections", peculiarity, f"lcu.peculiarities=['{peculiarity}']")
    yield from cells("corrections", "released", "lcu.mode=released")
    for number in NUMBERS:
        yield from cells("comments", f"{number} comments", f"lcu.comments={number}")
    for days, start in FIRST_DAYS.items():
        yield from cells("days", f"{days} days alone", f"data.train_from={start}", *BASE_ALONE)
        yield from cells("days", f"{days} days with LCU", f"data.train_from={start}")
    for first in LAMBDA1:
        for second in LAMBDA2:
            settings = (f"lcu.lambda1={first}", f"lcu.lambda2={second}")
            yield from cells("grid", f"{first:g}, {second:g}", *settings, seeds=options.grid_seeds)
    for backbone in BACKBONES:
        yield from cells("backbones", f"{backbone} alone", f"base.backbone={backbone}", *BASE_ALONE)
        yield from cells("backbones", f"{backbone} with LCU", f"base.backbone={backbone}")
    for epochs, rate in TRAININGS:
        settings = (f"train.epochs={epochs}", f"train.learning_rate={rate}")
        yield from cells("training", f"{epochs} x {rate:g} alone", *settings, *BASE_ALONE)
        yield from cells("training", f"{epochs} x {rate:g} with LCU", *settings)


def kuairand_cells(seeds: int) -> Iterator[StaytimeCell]:
    """Yield all bases on KuaiRand."""
    for loss in LOSSES:
        for seed in range(1, seeds + 1):
            yield StaytimeCell("kuairand", loss, seed, (f"base.loss={loss}",), None)


def run_cell(config: StaytimeConfig) -> dict[str, Any]:
    """Train and evaluate one cell."""
    # Cells that read the same data share them in memory.
    reads = LcuConfig(**config.lcu.model_dump(include=READ))
    watch = WatchConfig(task="none" if config.watch.task == "none" else "joint")
    # Only the order of comments depends on the seed; cells of all seeds share data without comments.
    seed = config.run.seed if config.lcu.enabled else 0
    data = _load(config.data, config.input, reads, seed, watch)
    return train_and_evaluate(config, data, torch.device("cpu"), quiet=True)


@lru_cache(maxsize=16)
def _load(data: StaytimeDataConfig, inputs: InputConfig, lcu: LcuConfig, seed: int, watch: WatchConfig) -> StaytimeData:
    return load_staytime(data, inputs, lcu, seed, watch)


def word_tables(world: Path, directory: Path) -> None:
    """Write embeddings of a world's texts without a language model: the sum of a fixed random vector for each word."""
    for name, column in (("items", "item_id"), ("comments", "comment_id")):
        table = read_texts(world, name, [column, "text"])
        texts = [text.split() for text in table["text"].to_pylist()]
        known = {
            word: np.random.default_rng(zlib.crc32(word.encode())).standard_normal(WORD_WIDTH)
            for word in {word for text in texts for word in text}
        }
        vectors = np.stack([sum((known[word] for word in text), np.zeros(WORD_WIDTH)) for text in texts])
        ContentVectors.write(directory / name, table[column].to_numpy(), vectors)


def run_cells(
    cells: Sequence[StaytimeCell], paths: dict[str, Path], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return the results of the cells, finished ones from ``options.work``, until ``options.minutes`` are over."""
    folder = options.work / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    results = []
    for number, cell in enumerate(cells, 1):
        config = cell.config(paths["kuairand" if cell.on_kuairand else "world"], options.overrides)
        # The file is named by the job and its data, so a cell of several parts is trained once.
        file = folder / f"{key_of(config, more=_more_data(config))}.json"
        if not file.exists() and time.monotonic() < deadline:
            started = time.monotonic()
            write_json(file, run_cell(config))
            print(
                f"{number}/{len(cells)} {cell.part}: {cell.name}, seed {cell.seed}, {time.monotonic() - started:.0f} s"
            )
        if file.exists():
            facts = {"part": cell.part, "name": cell.name, "seed": cell.seed}
            results.append({**facts, "metrics": json.loads(file.read_text())})
    return results


def _more_data(config: StaytimeConfig) -> str:
    """Return a text that changes with any file that a cell reads beside the rows of its dataset."""
    tables = (config.lcu.item_embeddings, config.lcu.comment_embeddings) if config.lcu.enabled else ()
    hashes = [read_manifest(Path(table)).get("hash") for table in tables if table]
    return json.dumps([DatasetFiles(config.data.path).checksums, hashes])


def data_paths(options: argparse.Namespace) -> tuple[dict[str, Path], Path]:
    """Return the paths of the datasets, and that of the tables of word vectors."""
    world = options.work / f"world-{options.users}"
    return {"world": world, "kuairand": options.kuairand or world}, options.work / f"words-{options.users}"


def prepare(options: argparse.Namespace) -> None:
    """Make the simulated world and its tables of word vectors, if they are missing."""
    paths, words = data_paths(options)
    if not paths["world"].exists():
        simulate(paths["world"], options.users, DAYS, 2, 1, texts=True)
    if not words.exists():
        word_tables(paths["world"], words)


def named_directory(text: str) -> tuple[str, Path]:
    """Parse ``NAME=DIRECTORY`` of a command line."""
    name, equals, directory = text.partition("=")
    if not equals or not (Path(directory) / "comments").is_dir() or not (Path(directory) / "items").is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=DIRECTORY, with tables DIRECTORY/items and /comments")
    return name, Path(directory)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("quality.staytime", __doc__)
    parser.add_argument("--work", type=local_argument, required=True, help="directory of data and finished cells")
    parser.add_argument("--users", type=int, default=250, help="users of the simulated world (default: %(default)s)")
    parser.add_argument("--kuairand", type=Path, help="imported KuaiRand; adds its part")
    parser.add_argument(
        "--embeddings",
        type=named_directory,
        nargs="*",
        default=[],
        metavar="NAME=DIRECTORY",
        help="tables of `limelight embed`",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="parts to run (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of a cell (default: %(default)s)")
    parser.add_argument("--grid-seeds", type=int, default=5, help="seeds of a cell of the grid (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="start no cell after this time (default: no limit)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the job")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    paths, words = data_paths(options)
    cells = [*world_cells(options, words), *(kuairand_cells(options.seeds) if options.kuairand else ())]
    # Seed by seed: a run that is ended early has fewer seeds of everything, and cells of a seed share their data.
    cells = sorted(
        (cell for cell in cells if not options.parts or cell.part in options.parts), key=lambda cell: cell.seed
    )
    if not cells:
        parser.error(NO_CELLS)
    prepare(options)
    results = run_cells(cells, paths, options)
    summary = summarise(results)
    print_tables(summary)
    if not options.kuairand:
        print(f"\nkuairand: {NO_KUAIRAND}")
    facts = {"question": "what LCU's second stage is worth for the staytime", "users": options.users}
    facts |= {"days": DAYS, "settings": list(WORLD_SETTINGS)}
    facts |= {"cells_done": len(results), "cells": len(cells)}
    facts |= {} if options.kuairand else {"kuairand": NO_KUAIRAND}
    write_result(options.out, {**facts, "result": summary})
    if options.out:
        write_pictures(summary, options.out)
        print(json.dumps({"written": options.out.name, "cells": f"{len(results)} of {len(cells)}"}))


if __name__ == "__main__":
    main()
