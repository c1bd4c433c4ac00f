"""Fine-tunings that a benchmark keeps in its directory, so that none is repeated.

As a kept ranker (:mod:`benchmarks.quality.kept_runs`), a fine-tuning belongs to its whole job and to the content of its
samples. Their hash is at the end of its directory's name, so another job has another directory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kept_work import content_of
from trainer.config.finetune import FinetuneConfig, load_finetune
from trainer.finetune import run_job
from trainer.runtime.distributed import World
from trainer.runtime.preemption import Preemption


def finetuning_at(
    place: Path, job: str, samples: Path, names: Sequence[str], settings: Sequence[str]
) -> FinetuneConfig:
    """Return a job on samples, on one CPU rank.

    Args:
        place: directory of the run; a hash of the job and of the samples is added to its name.
        job: job file.
        samples: directory of the samples.
        names: of the sets of samples that the job reads, such as ``train``.
        settings: further ones.
    """
    files = {name: samples / f"{name}.jsonl" for name in names}
    own = [f"run.directory={place}", "train.device=cpu", *(f'data.{name}=["{file}"]' for name, file in files.items())]
    config = load_finetune(job, [*own, *settings])
    digest = hashlib.blake2b(config.model_dump_json().encode(), digest_size=8)
    for file in files.values():
        digest.update(content_of(file).encode())
    run = config.run.model_copy(update={"directory": f"{place}-{digest.hexdigest()}"})
    return config.model_copy(update={"run": run})


def is_finished(config: FinetuneConfig) -> bool:
    """Return whether a job of :func:`finetuning_at` has been done."""
    return _metrics_file(config).exists()


def finetune_once(config: FinetuneConfig) -> dict[str, Any]:
    """Return the metrics of a job of :func:`finetuning_at`, which is done if it is missing or not finished."""
    if not is_finished(config):
        with World.join("cpu") as world:
            run_job(config, world, Preemption())
    metrics: dict[str, Any] = json.loads(_metrics_file(config).read_text())
    return metrics


def _metrics_file(config: FinetuneConfig) -> Path:
    return Path(config.run.directory) / "metrics.json"
