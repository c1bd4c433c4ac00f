"""Opening of a run for prediction: its newest checkpoint, its fitted features and its dataset."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trainer.checkpoint.manifest import MODEL, find_checkpoint, read_manifest
from trainer.checkpoint.reader import stored_search
from trainer.checkpoint.run_directory import load_run, warn_of_accepted
from trainer.checkpoint.store import verify_together
from trainer.config.ranker import JobConfig
from trainer.console.errors import UserError
from trainer.data.features.code_inputs import open_codes
from trainer.data.features.content_inputs import open_reader
from trainer.data.features.content_tables import inside_dataset
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import FittedFeatures
from trainer.data.features.fitted_codes import check_dataset
from trainer.data.features.packed_batch import PackedBatch
from trainer.data.features.search_vectors import SearchSpace, stored_space
from trainer.data.format.carried_dataset import dataset_of
from trainer.data.format.dataset import Dataset
from trainer.data.loading.batch import unpack
from trainer.engine.hybrid_engine import HybridEngine
from trainer.ranking.setup import build_engine
from trainer.runtime.checksums import verify_checksums
from trainer.runtime.distributed import World
from trainer.runtime.host_copy import HostCopy, one_behind
from trainer.semantic_ids.store_address import open_existing_store


@dataclass(frozen=True)
class TrainedModel:
    """Model of a run, loaded for prediction.

    Attributes:
        config: settings of the job that trained the model.
        data: dataset that features, histories and statistics come from.
        features: map from stored rows to the model's inputs.
        engine: tables and network with the checkpoint's values.
        space: vectors that histories are searched with; None if no history is searched.
    """

    config: JobConfig
    data: Dataset
    features: FeatureMap
    engine: HybridEngine
    space: SearchSpace | None

    def logits(self, batches: Iterable[PackedBatch]) -> Iterator[Tensor]:
        """Yield the logits of each batch, ``[rows, behaviours]`` float32, on the CPU. Collective."""
        unpacked = (unpack(packed, self.features.layout, {}) for packed in batches)
        copies = ((None, HostCopy([logits.float()])) for _, logits in self.engine.predict(unpacked))
        return (logits for _, (logits,) in one_behind(copies))


def open_run(directory: str, world: World, data_path: str | None = None) -> TrainedModel:
    """Load the newest checkpoint of a run, with the run's own dataset or another one of the same layout.

    Raises:
        UserError: there is no run or no whole checkpoint, or the model does not fit the dataset.
    """
    config = load_run(directory)
    verify_checksums(Path(directory), ("config.json", "deepspeed.json"))
    path = dataset_of(directory, config.data.path, data_path)
    own, moved = inside_dataset(config.features, config.data.path, path)
    check_dataset(own.codes, config.data.path, path)
    accepted = own.content if config.resume.allow_new_data else moved
    config = config.model_copy(update={"data": config.data.model_copy(update={"path": path}), "features": own})
    data = Dataset.open(path, config.data.on_corrupt)
    data.verify(world)
    fitted = FittedFeatures.load(Path(directory) / "features")
    codes = open_codes(config.features, fitted.codes, open_existing_store)
    content = open_reader(config.features, config.data.path, fitted.content, accepted=accepted)
    features = FeatureMap(data.spec, config.features, fitted, config.data.behaviours, codes, content)
    engine = build_engine(config, features, config.model.kind, world)
    checkpoint = find_checkpoint(directory)
    manifest = read_manifest(checkpoint)
    if problem := verify_together(checkpoint, manifest, world):
        raise UserError(f"{checkpoint}: damaged ({problem}); `limelight checkpoint verify` lists all damaged files")
    if not manifest.finished and world.rank == 0:
        print(f"limelight: training has not finished; using {checkpoint}", file=sys.stderr, flush=True)
    if world.rank == 0:
        warn_of_accepted(config, Path(directory))
    engine.load(checkpoint / MODEL)
    engine.use_average()
    space = stored_space(stored_search(checkpoint)) if features.needs_space else None
    return TrainedModel(config, data, features, engine, space)


def with_range(config: JobConfig, since: str | None, until: str | None) -> JobConfig:
    """Return the job of a run with another held-out range.

    Raises:
        UserError: neither the run nor ``since`` gives a held-out range.
    """
    # Without the run's own end of training, a later --from would move it.
    changes = {"train_until": config.data.train_until or config.data.eval_from}
    changes |= {k: v for k, v in (("eval_from", since), ("eval_until", until)) if v is not None}
    if not changes.get("eval_from", config.data.eval_from):
        raise UserError("the run has no held-out range (data.eval_from is unset); give one with --from and --until")
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})
