"""Trainings of rankers that a benchmark keeps in its directory, so that none is repeated.

A kept training belongs to its whole job: it has a hash of all settings and of the dataset. Where a benchmark asks for
another job in its place, it is trained again and never reported, whatever changed: overrides, a recipe, or the dataset.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kept_work import content_of
from benchmarks.measure import slug
from benchmarks.quality.larm_report import Scores
from benchmarks.quality.ranker_runs import trained_ranker
from trainer.config.foresight import ForesightConfig
from trainer.config.ranker import JobConfig
from trainer.config.staytime import StaytimeConfig
from trainer.data.format.dataset import fingerprint
from trainer.data.format.schema import DatasetSpec
from trainer.runtime.distributed import World
from trainer.runtime.files import write_json


@dataclass(frozen=True)
class Recipe:
    """Changes to another recipe.

    Attributes:
        than: recipe that it changes, and that it is compared with; empty for the job as it is.
        settings: the changes.
    """

    than: str
    settings: tuple[str, ...]


def settings_of(recipes: Mapping[str, Recipe], name: str) -> tuple[str, ...]:
    """Return all changes of a recipe to the job, those of the recipes that it changes first."""
    found = recipes[name]
    return (*(settings_of(recipes, found.than) if found.than else ()), *found.settings)


@dataclass(frozen=True)
class KeptRun:
    """A ranker of one variant and one seed.

    Attributes:
        scores: predictions of the rows of the days.
        rows, seconds: of the training; processor seconds.
    """

    scores: Scores
    rows: int
    seconds: float


Job = JobConfig | StaytimeConfig | ForesightConfig


class KeptTables:
    """Hashes of what a benchmark has made for its trainings: vectors, codes and codebooks. Each is read once.

    Args:
        folder: directory of the benchmark.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._contents: dict[Path, str] = {}

    def key_of(self, *jobs: Job, more: str = "") -> str:
        """Return :func:`key_of`, with the content of all paths below the directory that the jobs name.

        The datasets and the directories of the runs are not among them.
        """
        left_out = {Path(path).absolute() for job in jobs for path in (job.data.path, job.run.directory)}
        named = {path for job in jobs for path in self._paths(job.model_dump(mode="json"))}
        found = sorted(named - left_out)
        for path in (path for path in found if path not in self._contents):
            self._contents[path] = content_of(path)
        return key_of(*jobs, more=" ".join([*(self._contents[path] for path in found), *([more] if more else [])]))

    def _paths(self, value: Any) -> list[Path]:
        """Return the files and directories below the directory of the benchmark that settings name."""
        if isinstance(value, dict | list):
            inner = value.values() if isinstance(value, dict) else value
            return [path for each in inner for path in self._paths(each)]
        if not isinstance(value, str) or not value:
            return []
        # Jobs make some of their paths absolute.
        path = Path(value).absolute()
        return [path] if path.is_relative_to(self._folder) and path.exists() else []


def key_of(*jobs: Job, more: str = "") -> str:
    """Return a hash of all settings of the jobs that make one training, and of the dataset that they read.

    Args:
        jobs: at least one.
        more: whatever else the training depends on.
    """
    path = jobs[0].data.path
    digest = hashlib.blake2b(fingerprint(path, DatasetSpec.load(path)).encode(), digest_size=16)
    for text in (*(job.model_dump_json() for job in jobs), more):
        digest.update(text.encode())
    return digest.hexdigest()


def kept_facts(file: Path, key: str) -> dict[str, Any] | None:
    """Return the facts of a finished training; None if there is none, or one of another key."""
    if not file.exists():
        return None
    facts: dict[str, Any] = json.loads(file.read_text())
    # Trainings of the first versions have no key.
    return facts if facts.pop("key", "") == key else None


def train_once(file: Path, job: JobConfig, world: World, title: str, key: str = "") -> None:
    """Train a job and predict its held-out rows, unless this is done already for the same job.

    Args:
        file: JSON file of the facts of the training; its predictions are beside it.
        job: the training.
        world: ranks, one.
        title: printed when a training begins.
        key: of the training; the default is that of the job alone.
    """
    key = key or key_of(job)
    if kept_facts(file, key) is not None:
        return
    print(title, file=sys.stderr, flush=True)
    with trained_ranker(job, world) as ranker:
        scores = Scores.of(ranker.predict(), ranker.features.behaviours, ranker.seconds)
        facts = {"rows": ranker.rows, "seconds": ranker.seconds, "key": key}
    file.parent.mkdir(parents=True, exist_ok=True)
    # Predictions of one job must never stand beside the facts of another.
    file.unlink(missing_ok=True)
    scores.write(file.with_suffix(".npz"))
    # Last, since a training with its facts is whole.
    write_json(file, facts)


def run_file(folder: Path, seed: int, name: str) -> Path:
    """Return the file of a training of :func:`train_once`, in a folder for the trainings that can be compared."""
    return folder / f"seed-{seed}" / f"{slug(name)}.json"


def read_runs(
    folder: Path, names: Iterable[str], job_of: Callable[[str, int], JobConfig]
) -> dict[str, dict[int, KeptRun]]:
    """Return the finished trainings of a folder: name -> seed -> run, in the order of ``names``.

    The scores are in the order of ``visit_id``. A training of another job than that of its name and seed is left out,
    with a line that says so.

    Args:
        folder: of the trainings.
        names: of the variants.
        job_of: returns the job of a variant and a seed.
    """
    found: dict[str, dict[int, KeptRun]] = {}
    for name in names:
        for file in sorted(folder.glob(f"seed-*/{slug(name)}.json")):
            seed = int(file.parent.name.removeprefix("seed-"))
            facts = kept_facts(file, key_of(job_of(name, seed)))
            if facts is None:
                print(f"{file}: of other settings or data than those asked for; left out", file=sys.stderr)
                continue
            # The order of the rows depends on the batches.
            scores = by_visit(Scores.read(file.with_suffix(".npz")))
            found.setdefault(name, {})[seed] = KeptRun(scores, **facts)
    return found


def by_visit(scores: Scores) -> Scores:
    """Return scores in the order of ``visit_id``."""
    return select(scores, np.argsort(scores.visit_id, kind="stable"))


def select(scores: Scores, rows: np.ndarray) -> Scores:
    """Return the scores of some rows, which are places or a mask."""
    columns = ("user_id", "visit_id", "probability", "label", "mask")
    return replace(scores, **{name: getattr(scores, name)[rows] for name in columns})
