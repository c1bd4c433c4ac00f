"""Opens a finished run for prediction: its newest checkpoint, its features, its dataset."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trainer.checkpoint.manifest import MODEL, find_checkpoint, read_manifest
from trainer.checkpoint.reader import stored_search
from trainer.checkpoint.run_directory import load_run
from trainer.config.ranker import JobConfig
from trainer.console.errors import UserError
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import FittedFeatures
from trainer.data.features.packed_batch import PackedBatch
from trainer.data.features.search_vectors import SearchSpace, stored_space
from trainer.data.format.dataset import Dataset
from trainer.data.loading.batch import unpack
from trainer.engine.hybrid_engine import HybridEngine
from trainer.ranking.setup import build_engine
from trainer.runtime.distributed import World


@dataclass(frozen=True)
class TrainedModel:
    """A finished run, opened again."""

    config: JobConfig
    data: Dataset
    features: FeatureMap
    engine: HybridEngine
    space: SearchSpace | None

    def logits(self, batches: Iterable[PackedBatch]) -> Iterator[Tensor]:
        """``[rows, behaviours]`` float32 of each batch, on the CPU. Collective."""
        unpacked = (unpack(packed, self.features.layout, {}) for packed in batches)
        return (found.float().cpu() for _, found in self.engine.predict(unpacked))


def open_run(directory: str, world: World, data_path: str | None = None) -> TrainedModel:
    """Load the model of a finished run over its own dataset, or another one of the same layout.

    Raises:
        UserError: no finished run there, or a dataset that the model does not fit.
    """
    config = load_run(directory)
    data = Dataset.open(data_path or config.data.path, config.data.on_corrupt)
    features = FeatureMap(
        data.spec, config.features, FittedFeatures.load(Path(directory) / "features"), config.data.behaviours
    )
    engine = build_engine(config, features, config.model.kind, world)
    checkpoint = find_checkpoint(directory)
    manifest = read_manifest(checkpoint)
    if not manifest.finished and world.rank == 0:
        print(f"limelight: training has not finished; taking {checkpoint}", file=sys.stderr, flush=True)
    engine.load(checkpoint / MODEL)
    space = stored_space(stored_search(checkpoint)) if features.needs_space else None
    return TrainedModel(config, data, features, engine, space)


def with_range(config: JobConfig, data: str | None, since: str | None, until: str | None) -> JobConfig:
    """The job of a run with another dataset or held-out range; the end of training stays the run's."""
    changes = {"train_until": config.data.train_until or config.data.eval_from}
    changes |= {k: v for k, v in (("path", data), ("eval_from", since), ("eval_until", until)) if v is not None}
    if not changes.get("eval_from", config.data.eval_from):
        raise UserError("the run has no held-out range of its own; say which by --from and --until")
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})
