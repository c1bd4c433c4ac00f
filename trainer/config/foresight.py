"""Schema of a ``limelight foresight`` job file. ``limelight config foresight`` prints its reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from trainer.config.load import load_job
from trainer.config.paths import InputFile
from trainer.config.sections import (
    MAY_CHANGE,
    CheckpointConfig,
    Decay,
    DistributedTrainConfig,
    OptimizerConfig,
    Positive,
    Rate,
    ResumeConfig,
    RunConfig,
    Section,
    Share,
)


class ForesightRunConfig(RunConfig):
    """Name, directory and seed of a run."""

    name: str = Field(
        "foresight",
        description="Name of the run; the default directory contains it.",
        min_length=1,
        json_schema_extra=MAY_CHANGE,
    )


class ForesightDataConfig(Section):
    """Codes of segments, and the ranges of time of training and of evaluation.

    A row stands for a segment after which its room went on: the author's latest runs of codes at the time when the
    segment became known, and a code that came later. Times are ISO dates or times, in the dataset's time zone.
    """

    path: InputFile = Field(
        ...,
        description="Dataset of the segments. Its time zone is used, and of a simulated world the truth.",
        min_length=1,
    )
    codes: InputFile = Field(..., description="Code file of `limelight quantize assign`.", min_length=1)
    codebook: InputFile = Field(
        ..., description="Directory of the codebook version of the codes. It must have one level.", min_length=1
    )
    target: Literal["next", "change"] = Field(
        "next",
        description="Code to foresee: of the room's next segment (`next`), or the room's next code that differs from "
        "the present one (`change`).",
    )
    runs: int = Field(100, description="Latest runs of an author that are read.", ge=1, le=10_000)
    train_from: str = Field("", description="Start of the range of training. Empty: the first segment.")
    train_until: str = Field(
        "",
        description="End of the range of training: targets that become known from then on are left out. Empty: none.",
    )
    eval_from: str = Field(
        "",
        description="Start of the held-out range, which must not overlap the range of training. Empty: `train_until`.",
    )
    eval_until: str = Field("", description="End of the held-out range. Empty: none.")


class ForesightModelConfig(Section):
    """The predictor: a Transformer encoder over the runs, and a decoder with one query (`modules/foresight.py`)."""

    dim: Positive = Field(64, description="Width of the model, a multiple of `heads`.")
    heads: Positive = Field(4, description="Attention heads.")
    encoder_layers: Positive = Field(2, description="Layers of the encoder.")
    encoded_runs: int = Field(
        0,
        description="Newest runs that the encoder reads. The decoder reads the older ones as they are. 0: all, as in "
        "the paper.",
        ge=0,
    )
    decoder_layers: Positive = Field(1, description="Layers of the decoder.")
    feed_forward: Positive = Field(256, description="Width inside a feed-forward part.")
    dropout: Share = Field(0.1, description="Dropout in training.")
    table: Literal["frozen", "learnt", "random"] = Field(
        "frozen",
        description="Table of the codes, which is both input and softmax: the codebook's centroids that stay "
        "(`frozen`) or are trained (`learnt`), or random vectors that are trained (`random`). A trained projection "
        "brings each of them to the model's width.",
    )
    copy_runs: bool = Field(
        True,
        description="Mix the softmax with the codes of the runs, each by its attention, so that the next code can be "
        "copied from an author's latest ones. The paper has the softmax alone (false).",
    )
    softmax: Literal["product", "distance"] = Field(
        "product",
        description="Logit of a code, before its bias: the product of the decoder's output with the code's vector, as "
        "in the paper, or half of the negative squared distance between them (`distance`), which foresees better.",
    )

    @model_validator(mode="after")
    def _check_heads(self) -> ForesightModelConfig:
        if self.dim % self.heads:
            raise ValueError(f"dim = {self.dim} must be a multiple of heads = {self.heads}")
        return self


class ForesightOptimizerConfig(OptimizerConfig):
    """AdamW on the predictor, and the learning rate schedule."""

    learning_rate: Rate = Field(3e-3, description="Peak learning rate.")
    weight_decay: float = Field(0.01, description="Decoupled weight decay.", ge=0)
    betas: tuple[Share, Share] = Field((0.9, 0.98), description="Decay rates of Adam's two moments.")
    warmup: Share = Field(0.05, description="Share of all steps during which the learning rate rises from 0.")
    decay: Decay = Field("cosine", description="Schedule after the warm-up; `linear` and `cosine` end at 0.")


class ForesightTrainConfig(DistributedTrainConfig):
    """The training loop."""

    batch_size: Positive = Field(128, description="Rows of one optimizer step, over all ranks.")
    epochs: Positive = Field(6, description="Passes over the rows.")
    sampled_codes: int = Field(
        0,
        description="Codes that stand for all others in the softmax of a step, drawn by their frequency. 0: the full "
        "softmax.",
        ge=0,
    )
    sampling_power: float = Field(
        0.75, description="Codes are drawn in proportion to their frequency to the power of this.", ge=0, le=1
    )
    without_context: Share = Field(
        0.01,
        description="Share of the rows whose runs are hidden in training. From these the predictor learns what to "
        "foresee of an author without codes.",
    )


class ForesightFollowConfig(Section):
    """`limelight foresight follow`: forecasts and training in the order of time. `fit` does not read this section."""

    init_from: InputFile = Field(
        "", description="Finished run of `limelight foresight` whose predictor is the first one. Empty: from scratch."
    )
    since: str = Field(
        "",
        description="Time from which on segments have a forecast and targets are trained on. Empty: the end of the "
        "range of training of `init_from`, else the first segment.",
    )
    until: str = Field("", description="End of that range. Empty: none.", json_schema_extra=MAY_CHANGE)
    tick_seconds: Rate = Field(
        30.0,
        description="Length of a tick in event time. Its segments are forecast before its targets are trained on.",
    )
    warmup_steps: int = Field(
        50, description="Steps during which the learning rate rises from 0; it is constant after them.", ge=0
    )
    pooling: Literal["mean", "last", "attention"] = Field(
        "mean", description="Pooling of the encoder's output over the runs, as of `limelight foresight forecast`."
    )


class ForesightEvaluateConfig(Section):
    """Evaluation on the held-out range."""

    reference_targets: int = Field(
        500,
        description="Simulated worlds: segments on which the accuracy of a predictor is computed that knows the "
        "author's true style and the distribution of the next topic. 0: not computed.",
        ge=0,
    )


class ForesightConfig(Section):
    """A job that trains Foresight's predictor."""

    run: ForesightRunConfig = Field(default_factory=ForesightRunConfig)
    data: ForesightDataConfig
    model: ForesightModelConfig = Field(default_factory=ForesightModelConfig)
    optimizer: ForesightOptimizerConfig = Field(default_factory=ForesightOptimizerConfig)
    train: ForesightTrainConfig = Field(default_factory=ForesightTrainConfig)
    evaluate: ForesightEvaluateConfig = Field(default_factory=ForesightEvaluateConfig, json_schema_extra=MAY_CHANGE)
    follow: ForesightFollowConfig | None = None
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, json_schema_extra=MAY_CHANGE)
    resume: ResumeConfig = Field(default_factory=ResumeConfig, json_schema_extra=MAY_CHANGE)

    @model_validator(mode="after")
    def _check_ranges(self) -> ForesightConfig:
        if self.data.eval_until and not (self.data.eval_from or self.data.train_until):
            raise ValueError("data.eval_until needs data.eval_from or data.train_until")
        return self


def load_foresight(path: str | Path, overrides: Sequence[str] = ()) -> ForesightConfig:
    """Read a job file of ``limelight foresight fit``, without its section ``[follow]``.

    Raises:
        UserError: as :func:`trainer.config.load.load_job`.
    """
    return load_job(ForesightConfig, path, overrides).model_copy(update={"follow": None})


def load_foresight_follow(path: str | Path, overrides: Sequence[str] = ()) -> ForesightConfig:
    """Read a job file of ``limelight foresight follow``, with a section ``[follow]`` even if the file has none.

    A run keeps its settings with this section or without, and so it is known which command it belongs to.

    Raises:
        UserError: as :func:`trainer.config.load.load_job`.
    """
    config = load_job(ForesightConfig, path, overrides)
    return config.model_copy(update={"follow": config.follow or ForesightFollowConfig()})
