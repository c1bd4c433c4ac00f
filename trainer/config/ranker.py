"""The job file: one TOML file, parsed into typed, frozen objects before any process is started.

``load_config`` is the only way in. It names the file, the key and the value of a mistake, and what would be accepted.
``limelight config train`` prints every key.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from trainer.config.features import FeatureConfig
from trainer.config.load import load_job
from trainer.config.sections import (
    MAY_CHANGE,
    CheckpointConfig,
    DistributedTrainConfig,
    OptimizerConfig,
    Positive,
    Rate,
    ResumeConfig,
    RunConfig,
    Section,
    Share,
)
from trainer.config.stream import LabelConfig, StreamConfig
from trainer.config.toml import validate


class DataConfig(Section):
    """Which rows are trained on and which are held out. Times are ISO dates or times, in the dataset's time zone."""

    path: str = Field(
        ..., description="Dataset directory, or any fsspec URL of one.", min_length=1, json_schema_extra=MAY_CHANGE
    )
    behaviours: tuple[str, ...] = Field((), description="Behaviours to predict, in this order. Empty: all.")
    train_from: str = Field("", description="First moment of training. Empty: the dataset's first.")
    train_until: str = Field(
        "", description="End of training: only rows whose labels were complete before it. Empty: `eval_from`."
    )
    eval_from: str = Field("", description="First request of the held-out range. Empty: no evaluation.")
    eval_until: str = Field("", description="End of the held-out range. Empty: the dataset's end.")
    frozen: bool = Field(
        False,
        description="Evaluate with statistics and histories as of `train_until` (true), or as of each request (false).",
    )
    shuffle_minutes: Rate = Field(60.0, description="Rows are shuffled inside windows of this length, never across.")
    workers: int = Field(
        1, description="Loader processes per rank; 0 reads in the training process.", ge=0, json_schema_extra=MAY_CHANGE
    )
    prefetch: Positive = Field(
        4, description="Batches that each loader process prepares ahead.", json_schema_extra=MAY_CHANGE
    )
    on_corrupt: Literal["error", "skip"] = Field(
        "error",
        description="A corrupt record ends the run with its name (`error`) or is counted and left out (`skip`).",
        json_schema_extra=MAY_CHANGE,
    )


class TableOptimizerConfig(Section):
    """The optimizer fused into the embedding tables' backward pass."""

    optimizer: Literal["sgd", "adagrad", "rowwise_adagrad"] = Field(
        "rowwise_adagrad", description="`rowwise_adagrad` keeps one accumulator a row; column-wise tables need another."
    )
    learning_rate: Rate = Field(0.02, description="Peak learning rate of the tables.")
    eps: Rate = Field(1e-8, description="Added to the root of Adagrad's accumulator.")
    deduplicate: bool = Field(
        True,
        description="Look each id up and send it to its rank once in a step, however often a batch has it.",
        json_schema_extra=MAY_CHANGE,
    )


class ModelConfig(Section):
    """The dense network over the embeddings."""

    kind: Literal["ple", "cgc", "mmoe", "shared_bottom", "logistic"] = Field(
        "ple", description="Multi-task network; `logistic` is a logistic regression on the same inputs."
    )
    task_experts: Positive = Field(2, description="Experts of each behaviour (PLE, CGC); MMoE shares as many in all.")
    shared_experts: Positive = Field(2, description="Experts that all behaviours share.")
    expert_layers: tuple[tuple[Positive, ...], ...] = Field(
        ((256, 128), (128, 64)),
        description="Widths of the experts, one list an extraction layer. PLE uses all, the others the first.",
        min_length=1,
    )
    tower: tuple[Positive, ...] = Field((64,), description="Hidden widths of each behaviour's tower.")
    attention_kind: Literal["din", "multi_head", "twin"] = Field(
        "din",
        description="How histories are read: by a small network on candidate and entry (`din`), by multi-head target "
        "attention of all that describes the candidate (`multi_head`), or so with TWIN's split of item and cross "
        "features (`twin`).",
    )
    attention: tuple[Positive, ...] = Field((64, 16), description="Hidden widths of the network of `din`.")
    heads: Positive = Field(4, description="Heads of `multi_head` and `twin`.")
    head_dim: Positive = Field(16, description="Width of a head.")
    dropout: Share = Field(0.0, description="Dropout in experts and towers.")


class AlignmentConfig(Section):
    """A contrastive loss that draws a user's histories towards one of them, Moment&Cross equation 6."""

    anchor: str = Field("", description="History that each other one is aligned with, such as `mixed`. Empty: none.")
    weight: Rate = Field(0.05, description="Weight of the loss beside that of the behaviours.")
    temperature: Rate = Field(0.1, description="Divides the cosines of two sides.")
    symmetric: bool = Field(
        True, description="Both directions, each with half the weight; false: from the anchor to the others."
    )
    detached: Literal["none", "anchor", "others"] = Field("none", description="Sides that the loss does not move.")


class TrainConfig(DistributedTrainConfig):
    """The training loop of the ranker."""

    batch_size: Positive = Field(2048, description="Rows of all ranks together in one optimizer step.")
    epochs: Positive = Field(1, description="Passes over the training range.")
    overlap: bool = Field(
        True, description="Exchange the next batch's ids while the dense network works.", json_schema_extra=MAY_CHANGE
    )
    baselines: tuple[Literal["ple", "cgc", "mmoe", "shared_bottom", "logistic"], ...] = Field(
        (),
        description="Networks to train after `model.kind` on the same data, for the same table of metrics.",
        json_schema_extra=MAY_CHANGE,
    )
    weights: dict[str, float] = Field({}, description="Loss weight of single behaviours; the others weigh 1.")


class ScoreConfig(Section):
    """The ranking score."""

    exponents: dict[str, float] = Field(
        {}, description="Exponent of (1 + p) per behaviour, Moment&Cross equation 4; the others have 1."
    )


class InitFromConfig(Section):
    """An old run whose tables a new model starts from."""

    run: str = Field("", description="A run, or one of its checkpoints. Empty: start anew.")
    tables: tuple[str, ...] = Field(
        (), description="Tables to take: `user`, `author`, `item`, `side`. Empty: all that both models have."
    )
    dense: bool = Field(False, description="Take the dense network too, which must have the same inputs and outputs.")

    @model_validator(mode="after")
    def _of_a_run(self) -> InitFromConfig:
        if (self.tables or self.dense) and not self.run:
            raise ValueError("`tables` and `dense` need a `run` to take them from")
        return self


class JobConfig(Section):
    """One training job."""

    run: RunConfig = Field(default_factory=RunConfig)
    data: DataConfig
    features: FeatureConfig = Field(default_factory=FeatureConfig)
    stream: StreamConfig | None = None
    labels: LabelConfig = Field(default_factory=LabelConfig)
    init_from: InitFromConfig = Field(default_factory=InitFromConfig)
    tables: TableOptimizerConfig = Field(default_factory=TableOptimizerConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    alignment: AlignmentConfig = Field(default_factory=AlignmentConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, json_schema_extra=MAY_CHANGE)
    resume: ResumeConfig = Field(default_factory=ResumeConfig, json_schema_extra=MAY_CHANGE)
    score: ScoreConfig = Field(default_factory=ScoreConfig, json_schema_extra=MAY_CHANGE)

    @model_validator(mode="after")
    def _fits_a_stream(self) -> JobConfig:
        if self.stream is None:
            if self.labels != LabelConfig():
                raise ValueError("[labels] is of a stream, and there is no section [stream]")
            return self
        if not self.data.train_until:
            raise ValueError(
                "[stream] needs data.train_until: features are fitted on what was known before, and the stream begins "
                "there"
            )
        for key, value, needed in (
            ("train.epochs", self.train.epochs, 1),
            ("optimizer.decay", self.optimizer.decay, "constant"),
            ("optimizer.warmup", self.optimizer.warmup, 0),
            ("data.frozen", self.data.frozen, False),
        ):
            if value != needed:
                raise ValueError(f"{key} = {value!r}: a stream has no end that is known; it needs {needed!r}")
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read the job file of a ranker, as :func:`load_job` does."""
    return load_job(JobConfig, path, overrides)


def parse_config(raw: dict[str, Any], origin: str) -> JobConfig:
    """Validate a nested mapping; ``origin`` is named in errors."""
    return validate(JobConfig, raw, origin)
