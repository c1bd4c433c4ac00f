"""The model of an alignment: its settings against a dataset, the two towers in the engine, and a trained run."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modules.author_fusion import TwoTowers
from trainer.checkpoint.manifest import ALIGN, MODEL, find_checkpoint, model_hash, read_manifest
from trainer.checkpoint.run_directory import load_align_run
from trainer.checkpoint.store import verify_together
from trainer.config.align import AlignConfig
from trainer.config.deepspeed import complete_settings
from trainer.config.precision import dense_settings
from trainer.console.errors import UserError
from trainer.data.features.dataset_checks import check_names
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import FittedFeatures
from trainer.data.format.dataset import Dataset
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.time_selection import Selection
from trainer.data.loading.batch_plan import partitions_of_rank
from trainer.engine.build_engine import make_engine, rows_per_rank
from trainer.engine.hybrid_engine import HybridEngine
from trainer.engine.in_batch_softmax import InBatchSoftmax
from trainer.runtime.checksums import verify_checksums
from trainer.runtime.distributed import World
from trainer.runtime.files import write_json
from trainer.runtime.stored_files import read_json_object, stored_value
from trainer.semantic_ids.align_content import AuthorContent, ContentIdentity, ContentSource, check_vectors
from trainer.semantic_ids.align_features import PairFeatures, check_author_tables, choose_positives, tower_inputs
from trainer.semantic_ids.align_popularity import AuthorPopularity
from trainer.semantic_ids.segments import SegmentVectors

logger = logging.getLogger(__name__)

CONTENT, POPULARITY = "content.json", "popularity"

_HOUR_MS = 3_600_000


def check_alignment(config: AlignConfig, spec: DatasetSpec, ranks: int) -> dict[str, Any]:
    """Check a job against its dataset before anything is written or fitted. Returns DeepSpeed's settings.

    Raises:
        UserError: the batch size is not a multiple of the ranks, there are more ranks than partitions, a behaviour or a
            feature does not exist, or the DeepSpeed settings cannot be read or are not supported.
    """
    rows = rows_per_rank(config, ranks)
    partitions_of_rank(spec.partitions, 0, ranks)
    choose_positives(spec, config)
    check_names(spec, config.features, ())
    return complete_settings(dense_settings(config.train), rows, ranks, origin=config.train.deepspeed)


def open_segments(config: AlignConfig, data: Dataset) -> SegmentVectors:
    """Open the segment vectors of a job, and check what training and encoding read of authors before a run is made.

    Raises:
        UserError: the vectors are missing, damaged or not usable, or a table of the authors' features is missing.
    """
    segments = SegmentVectors.open(config.data.path, config.data.vectors)
    check_vectors(segments)
    check_author_tables(data)
    return segments


def store_content(config: AlignConfig, segments: SegmentVectors, scale: float, directory: Path) -> ContentIdentity:
    """Return the content of a run, which its first start stores in its directory. The first rank calls it.

    ``scale`` is that of the first start; later ones keep it.

    Raises:
        UserError: the run began with other segment vectors, and ``resume.allow_new_data`` is false; or they do not fit.
    """
    table, file = segments.table, directory / CONTENT
    if not file.exists():
        origin = table.origin.hash or table.origin.pooling
        identity = ContentIdentity(str(table.path), table.dim, origin, table.hash, scale)
        write_json(file, dataclasses.asdict(identity))
        return identity
    identity = read_content(directory)
    identity.check(table.path, table.dim, table.origin, directory)
    if identity.hash != table.hash and not config.resume.allow_new_data:
        raise UserError(
            f"{directory}: this run began with other segment vectors ({identity.table} then, {table.path} now, or they "
            "have changed); resume.allow_new_data=true accepts them"
        )
    return identity


def read_content(directory: Path) -> ContentIdentity:
    """Read the content of a run.

    Raises:
        UserError: it is missing or damaged.
    """
    file = directory / CONTENT
    try:
        return ContentIdentity(**read_json_object(file))
    except FileNotFoundError:
        raise UserError(f"{directory}: not a run of `limelight align` ({CONTENT} is missing)") from None
    except TypeError:
        raise UserError(f"{file}: damaged; its keys are {', '.join(ContentIdentity.__dataclass_fields__)}") from None


def finished_metrics(directory: Path, world: World) -> dict[str, Any] | None:
    """Return ``metrics.json`` of a run that an earlier start of the job finished, or ``None``. Collective.

    Raises:
        UserError: it is damaged.
    """
    file = directory / "metrics.json"

    def read() -> dict[str, Any] | None:
        if not file.exists():
            return None
        document = read_json_object(file)
        stored_value(document, file, "retrieval", dict)
        logger.info(f"finished already, in {directory}")
        return document

    return world.on_first_rank(read)


def count_positives(
    config: AlignConfig, data: Dataset, selection: Selection, directory: Path, world: World
) -> AuthorPopularity | None:
    """Count the positives of the training range on the first rank, if the run has not stored them yet. Collective.

    Raises:
        UserError: the range has no positive.
    """

    def count() -> AuthorPopularity | None:
        if (directory / POPULARITY).exists():
            return None
        positives = choose_positives(data.spec, config)
        columns = [data.spec.behaviours.index(name) for name in positives]
        popularity = AuthorPopularity.count(data, selection, columns)
        if not len(popularity.emit_ms):
            raise UserError(
                f"{config.data.path}: no positive pair in the training range: no row has {' or '.join(positives)} "
                "(data.positives)"
            )
        return popularity

    counted: list[AuthorPopularity | None] = []
    # Kept out of the result, which would be sent to all ranks.
    world.on_first_rank(lambda: counted.append(count()))
    return counted[0] if counted else None


def store_positives(counted: AuthorPopularity | None, directory: Path, world: World) -> AuthorPopularity:
    """Store the result of :func:`count_positives` once in a run, and return what is stored. Collective."""
    place = directory / POPULARITY
    if world.rank == 0 and counted is not None:
        tmp_path = directory / f".{POPULARITY}.partial"
        tmp_path.mkdir(exist_ok=True)
        counted.save(tmp_path)
        tmp_path.rename(place)
    world.barrier()
    return AuthorPopularity.load(place)


def make_features(
    config: AlignConfig,
    spec: DatasetSpec,
    fitted: FittedFeatures,
    content: ContentSource,
    popularity: AuthorPopularity,
) -> PairFeatures:
    """Return the features of a job's training rows; :meth:`PairFeatures.evaluated` has those of others."""
    towers = config.towers
    return PairFeatures(
        FeatureMap(spec, config.features, fitted),
        content,
        popularity,
        choose_positives(spec, config),
        smoothing=towers.smoothing if towers.log_q else None,
        window_ms=round(towers.log_q_hours * _HOUR_MS) if towers.log_q_hours else None,
        exclude=config.features.exclude,
        vocabulary=fitted.vocabularies.get("author"),
        content_only=towers.content_only if towers.author == "fused" else 0.0,
        id_dropout=towers.id_dropout if towers.unseen == "unknown_id" and towers.author != "content" else None,
        seed=config.run.seed,
    )


def build_towers(config: AlignConfig, features: PairFeatures) -> TwoTowers:
    """Return the towers of a job with initial values from ``run.seed``."""
    torch.manual_seed(config.run.seed)
    base, towers = features.base, config.towers
    dims = {table.name: table.dim for table in base.tables}
    return TwoTowers(
        tower_inputs(features),
        {lookup.name: dims[lookup.table] for lookup in base.lookups},
        {lookup.name: lookup.ids_per_entry * dims[lookup.table] for lookup in base.lookups if lookup.length is None},
        {lookup.name: lookup.length for lookup in base.lookups if lookup.length is not None},
        dim=towers.dim,
        user_widths=towers.user_layers,
        author_widths=towers.author_layers,
        gate_widths=towers.gate_layers,
        parts=towers.author,
        pooling=towers.history,
    )


def build_engine(config: AlignConfig, features: PairFeatures, world: World) -> HybridEngine:
    """Return the model of a job: sharded tables and the towers, with their optimizers. Collective.

    Raises:
        UserError: the engine refuses a setting, with the reason.
    """
    loss = InBatchSoftmax(config.towers.temperature, world.control)
    return make_engine(config, features.base.tables, features.base.lookups, build_towers(config, features), loss, world)


def metrics_document(
    config: AlignConfig, features: PairFeatures, retrieval: dict[str, Any], training: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of ``metrics.json``; ``retrieval`` is empty for a job without a held-out range."""
    return {
        "model": ALIGN,
        "positives": list(features.positives),
        "retrieval": retrieval,
        "held_out": {"from": config.data.eval_from, "until": config.data.eval_until},
        "training": training,
    }


@dataclass(frozen=True)
class TrainedAlignment:
    """A trained model, ready to encode authors.

    Attributes:
        directory: of its run.
        config: its job, with the dataset to read.
        data: the dataset.
        features: of the dataset.
        engine: the model.
        version: hash of the checkpoint.
    """

    directory: Path
    config: AlignConfig
    data: Dataset
    features: PairFeatures
    engine: HybridEngine
    version: str

    @staticmethod
    def of(
        directory: Path, config: AlignConfig, data: Dataset, features: PairFeatures, engine: HybridEngine
    ) -> TrainedAlignment:
        """Return the model of a run that has just been trained, with the newest checkpoint of its directory."""
        return TrainedAlignment(
            directory, config, data, features.evaluated(), engine, model_hash(find_checkpoint(directory))
        )

    @staticmethod
    def open(directory: Path, dataset: str | None, vectors: str | None, world: World) -> TrainedAlignment:
        """Load the newest checkpoint of a run, with the run's dataset or another one of the same layout. Collective.

        Args:
            directory: of the run.
            dataset: path of another dataset; None for the run's own.
            vectors: table of the segment vectors; None for those of the job, or of the other dataset.
            world: the ranks.

        Raises:
            UserError: there is no run or no whole checkpoint, or dataset or vectors do not fit the model.
        """
        config = load_align_run(directory)
        path = dataset or config.data.path
        data = Dataset.open(path, config.data.on_corrupt)
        segments = SegmentVectors.open(path, vectors or ("" if dataset else config.data.vectors))
        identity = read_content(directory)
        identity.check(segments.table.path, segments.table.dim, segments.table.origin, directory)
        check_vectors(segments)
        data.verify(world)
        return TrainedAlignment.load(directory, config, data, AuthorContent(segments, identity.scale), world)

    @staticmethod
    def load(
        directory: Path, config: AlignConfig, data: Dataset, content: ContentSource, world: World
    ) -> TrainedAlignment:
        """Load the newest checkpoint of a run, with a source of content. Collective.

        Args:
            directory: of the run.
            config: job of the run.
            data: a dataset of the layout of the run's.
            content: segment vectors of the authors; of the kind that the run was trained on.
            world: the ranks.

        Raises:
            UserError: there is no whole checkpoint, or the dataset has another layout.
        """
        verify_checksums(directory, ("config.json", "deepspeed.json"))
        fitted = FittedFeatures.load(directory / "features")
        popularity = AuthorPopularity.load(directory / POPULARITY)
        features = make_features(config, data.spec, fitted, content, popularity).evaluated()
        engine = build_engine(config, features, world)
        checkpoint = find_checkpoint(directory)
        manifest = read_manifest(checkpoint)
        if problem := verify_together(checkpoint, manifest, world):
            raise UserError(f"{checkpoint}: damaged ({problem}); `limelight checkpoint verify` lists all damaged files")
        engine.load(checkpoint / MODEL)
        return TrainedAlignment(directory, config, data, features, engine, model_hash(checkpoint))
