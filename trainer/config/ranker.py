"""Schema of a ranker's job file: typed, frozen objects, parsed before any rank is started.

``load_config`` reads the file. Its message about a mistake has the file, the key, the value and what would be accepted.
``limelight config train`` prints every key.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from trainer.config.features import FeatureConfig
from trainer.config.load import load_job
from trainer.config.paths import InputFile
from trainer.config.precision import HybridTrainConfig
from trainer.config.sections import (
    MAY_CHANGE,
    CheckpointConfig,
    OptimizerConfig,
    Positive,
    Rate,
    ResumeConfig,
    RowDataConfig,
    RunConfig,
    Section,
    Share,
)
from trainer.config.stream import LabelConfig, StreamConfig
from trainer.config.toml import validate

NetworkName = Literal["ple", "cgc", "mmoe", "shared_bottom", "dcn", "logistic"]


class DataConfig(RowDataConfig):
    """Dataset, training range and held-out range. Times are ISO dates or times in the dataset's time zone."""

    behaviours: tuple[str, ...] = Field((), description="Behaviours to predict, in this order. Empty: all.")
    eval_domains: tuple[Literal["video", "live"], ...] = Field(
        (),
        description="Domains of the held-out rows, where a dataset has rows of both; training uses all. Empty: all.",
    )
    frozen: bool = Field(
        False,
        description="Evaluate with statistics and histories as of `train_until` (true), or as of each request (false).",
    )


class TableOptimizerConfig(Section):
    """Optimizer of the embedding tables, fused into their backward pass."""

    optimizer: Literal["sgd", "adagrad", "rowwise_adagrad"] = Field(
        "rowwise_adagrad",
        description="Optimizer. `rowwise_adagrad` keeps one accumulator per row, so column-wise sharded tables cannot "
        "use it.",
    )
    learning_rate: Rate = Field(0.02, description="Peak learning rate of the tables.")
    eps: Rate = Field(1e-8, description="Constant that is added to the root of Adagrad's accumulator.")
    deduplicate: bool = Field(
        True,
        description="Send and look up each id once per step, however often it occurs in the batch.",
        json_schema_extra=MAY_CHANGE,
    )


class ModelConfig(Section):
    """Dense network over the embeddings."""

    kind: NetworkName = Field(
        "ple",
        description="Multi-task network. `dcn` is a Deep & Cross Network (version 2) that all behaviours share. "
        "`logistic` is a logistic regression on the same inputs.",
    )
    task_experts: Positive = Field(
        2, description="Experts per behaviour (PLE, CGC). MMoE has the same total number of experts, all shared."
    )
    shared_experts: Positive = Field(2, description="Experts that all behaviours share.")
    expert_layers: tuple[tuple[Positive, ...], ...] = Field(
        ((256, 128), (128, 64)),
        description="Widths of the experts, one list per extraction layer. PLE uses all lists, the others the first: "
        "for `shared_bottom` and `dcn` these are the widths of the shared layers.",
        min_length=1,
    )
    dcn_layers: Positive = Field(3, description="Number of cross layers of `dcn`, below its shared layers.")
    dcn_rank: int = Field(
        0,
        description="Rank of the matrices of `dcn`'s cross layers; it saves time below half of the number of inputs. "
        "0: full matrices.",
        ge=0,
    )
    tower: tuple[Positive, ...] = Field((64,), description="Hidden widths of each behaviour's tower.")
    attention_kind: Literal["din", "multi_head", "twin"] = Field(
        "din",
        description="Attention to histories: a small network on candidate and entry (`din`), multi-head target "
        "attention with a query from all features of the candidate (`multi_head`), or the same with TWIN's split of "
        "item and cross features (`twin`).",
    )
    attention: tuple[Positive, ...] = Field((64, 16), description="Hidden widths of the attention network of `din`.")
    compiled_attention: Literal["auto", True, False] = Field(
        "auto",
        description="Compute `din` by loops that are compiled for the processor, in less than half of the time, where "
        "the network is on a CPU with AVX-512 or AVX2 (true), or by PyTorch's operations (false). They round sums "
        "in different orders, so the last digits of metrics differ. `auto`: the run's own if it is resumed, otherwise "
        "true.",
        json_schema_extra={"before": False},
    )
    compiled_experts: Literal["auto", True, False] = Field(
        "auto",
        description="Compute the layers of experts, shared networks and towers in the same way, where they are float32 "
        "and drop no values (true), or by PyTorch's operations (false). `auto` as above.",
        json_schema_extra={"before": False},
    )
    heads: Positive = Field(4, description="Number of heads of `multi_head` and `twin`.")
    head_dim: Positive = Field(16, description="Width of one head.")
    dropout: Share = Field(0.0, description="Dropout in experts and towers.")


class AlignmentConfig(Section):
    """Contrastive loss that aligns a user's histories with one of them, Moment&Cross equation 6."""

    anchor: str = Field(
        "", description="History that all others are aligned with, such as `mixed`. Empty: no alignment loss."
    )
    weight: Rate = Field(0.05, description="Weight of this loss; the loss of the behaviours has weight 1.")
    temperature: Rate = Field(0.1, description="Temperature: the cosine similarities are divided by it.")
    symmetric: bool = Field(
        True,
        description="Use both directions, each with half the weight (true), or only the direction from the anchor to "
        "the others (false).",
    )
    detached: Literal["none", "anchor", "others"] = Field(
        "none", description="Histories that receive no gradient from this loss."
    )


class TrainConfig(HybridTrainConfig):
    """Training loop of the ranker."""

    batch_size: Positive = Field(2048, description="Rows per optimizer step, over all ranks.")
    epochs: Positive = Field(1, description="Passes over the training range.")
    overlap: bool = Field(
        True,
        description="Exchange the ids of the next batch while the dense network computes.",
        json_schema_extra=MAY_CHANGE,
    )
    baselines: tuple[NetworkName, ...] = Field(
        (),
        description="Networks to train after `model.kind` on the same data; the table of metrics compares them.",
        json_schema_extra=MAY_CHANGE,
    )
    weights: dict[str, float] = Field({}, description="Loss weight per behaviour; the default is 1.")
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="Compile the dense network by `torch.compile`, for fewer and larger kernels; needs a C++ compiler "
        "on the machine. Values differ by rounding. `auto`: false, until losses have been compared on a GPU.",
        json_schema_extra=MAY_CHANGE,
    )


class ScoreConfig(Section):
    """Ranking score of `limelight score`."""

    exponents: dict[str, float] = Field(
        {}, description="Exponent of (1 + p) per behaviour, Moment&Cross equation 4; the default is 1."
    )


class InitFromConfig(Section):
    """Warm start: an earlier run whose tables a new model starts from."""

    run: InputFile = Field("", description="A run, or one of its checkpoints. Empty: no warm start.")
    tables: tuple[str, ...] = Field(
        (), description="Tables to copy: `user`, `author`, `item`, `side`. Empty: all tables that both models have."
    )
    dense: bool = Field(
        False, description="Copy the dense network too; it must have the same inputs, outputs and shapes."
    )

    @model_validator(mode="after")
    def _require_run(self) -> InitFromConfig:
        """Refuse keys that have no effect without ``run``."""
        if (self.tables or self.dense) and not self.run:
            raise ValueError("`tables` and `dense` need a `run` to copy from; set init_from.run")
        return self


class JobConfig(Section):
    """Job file of a ranker: `limelight train`."""

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

    @property
    def averages(self) -> bool:
        """True if the job keeps a mean of the dense network's parameters."""
        return self.stream is not None and self.stream.average_hours > 0

    @model_validator(mode="after")
    def _check_stream(self) -> JobConfig:
        """Refuse settings that a stream cannot have, and labels without a stream."""
        if self.stream is None:
            if self.labels != LabelConfig():
                raise ValueError("[labels] belongs to a stream; add the section [stream], or remove [labels]")
            return self
        if not self.data.train_until:
            raise ValueError(
                "[stream] needs data.train_until: the stream starts at this time, and features are fitted on earlier "
                "rows"
            )
        for key, value, needed in (
            ("train.epochs", self.train.epochs, 1),
            ("optimizer.decay", self.optimizer.decay, "constant"),
            ("optimizer.warmup", self.optimizer.warmup, 0),
            ("data.frozen", self.data.frozen, False),
        ):
            if value != needed:
                raise ValueError(f"{key} = {value!r}: the end of a stream is unknown, so this must be {needed!r}")
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read the job file of a ranker; :func:`trainer.config.load.load_job` describes arguments and errors."""
    return load_job(JobConfig, path, overrides)


def parse_config(raw: dict[str, Any], origin: str) -> JobConfig:
    """Validate a nested mapping as a ranker's job; ``origin`` is the file that messages name."""
    return validate(JobConfig, raw, origin)
