"""Sections and value types that several kinds of job files share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from trainer.config.paths import InputFile, RunDirectory, StoreDirectory

MAY_CHANGE: JsonDict = {"may_change_on_resume": True}
"""``json_schema_extra`` of a key or a section that may differ when a run is resumed, because it changes neither the
result nor the data. DeepSpeed's settings are compared separately, and a dataset by its fingerprint."""

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

# Several jobs have these keys with different defaults: type and description are here, the default is in the section.
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    Field(description="`auto` uses the GPU if the machine has one, else the CPU.", json_schema_extra=MAY_CHANGE),
]
Decay = Literal["constant", "linear", "cosine"]
DeepSpeedFile = Annotated[
    InputFile,
    Field(
        description="JSON file of DeepSpeed settings: ZeRO stage, precision, clipping, gradient accumulation.",
        json_schema_extra=MAY_CHANGE,
    ),
]
LogEvery = Annotated[
    int,
    Field(
        ge=1,
        description="Steps between two records of loss and rates in the metric history.",
        json_schema_extra=MAY_CHANGE,
    ),
]
WatchdogSeconds = Annotated[
    float,
    Field(
        ge=0,
        description="The job ends if a rank finishes no step for this long. 0: no limit.",
        json_schema_extra=MAY_CHANGE,
    ),
]


class Section(BaseModel):
    """Section of a job file. Unknown keys are rejected, and values cannot be changed after parsing."""

    model_config = ConfigDict(frozen=True, extra="forbid")


MlflowStore = Annotated[
    StoreDirectory,
    Field(
        description="Directory of an MLflow file store that gets settings, scalars, metrics and state of the run, and "
        "of each baseline; it needs the extra `mlflow`. Empty: none.",
        json_schema_extra=MAY_CHANGE,
    ),
]


class TrackingConfig(Section):
    """Name of a job's runs in an MLflow file store."""

    name: str
    mlflow: MlflowStore = ""


class RunConfig(TrackingConfig):
    """Name, directory and seed of a run."""

    name: str = Field(
        "run",
        description="Name of the run; the default directory contains it.",
        min_length=1,
        json_schema_extra=MAY_CHANGE,
    )
    directory: RunDirectory = Field(
        "",
        description="Directory of the run. Empty: the newest unfinished run of the same job continues; if there is "
        "none, `runs/<name>-<date>-<time>` is created.",
        json_schema_extra=MAY_CHANGE,
    )
    seed: int = Field(1, description="Seed of initial values, shuffling and dropout.", ge=0)


class DistributedTrainConfig(Section):
    """Keys that every training loop on several ranks under DeepSpeed has."""

    deepspeed: DeepSpeedFile = "configs/deepspeed/zero1.json"
    device: Device = "auto"
    deterministic: bool = Field(
        False,
        description="GPUs: use deterministic kernels, so that a repeated or resumed run gives the same bits on the "
        "same GPUs and versions; slower. On CPUs runs are repeatable in any case.",
        json_schema_extra=MAY_CHANGE,
    )
    bind_cores: bool = Field(
        True,
        description="GPUs: bind each rank to the cores of its GPU's NUMA node, if the machine has several nodes.",
        json_schema_extra=MAY_CHANGE,
    )
    log_every: LogEvery = 20
    watchdog_seconds: WatchdogSeconds = 600.0


class OptimizerConfig(Section):
    """AdamW for the dense network, and the learning rate schedule of both optimizers."""

    learning_rate: Rate = Field(1e-3, description="Peak learning rate of the dense network.")
    weight_decay: float = Field(0.0, description="Decoupled weight decay of the dense network.", ge=0)
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="Decay rates of Adam's two moments.")
    warmup: Share = Field(0.0, description="Share of all steps during which the learning rates rise from 0.")
    decay: Decay = Field(
        "constant", description="Schedule of the learning rates after warm-up; `linear` and `cosine` end at 0."
    )


class CheckpointConfig(Section):
    """Schedule of checkpoints in `RUN/checkpoints`. The state is also saved at the end of training and on SIGTERM."""

    every_minutes: float = Field(10.0, description="Minutes between two saves. 0: no saves by time.", ge=0)
    every_steps: int = Field(0, description="Steps between two saves. 0: no saves by steps.", ge=0)
    keep: Positive = Field(3, description="Number of newest checkpoints to keep.")
    keep_every: int = Field(0, description="Every Nth save is kept for ever. 0: none is.", ge=0)
    background: bool = Field(
        True,
        description="Write checkpoints while training continues, from a copy in host memory, which the job keeps for "
        "the next one and which is page-locked on GPUs (true), or pause training and make no copy (false).",
    )


class ResumeConfig(Section):
    """Continuation of an unfinished run when the same command is started again."""

    enabled: bool = Field(
        True, description="Continue an unfinished run (true), or start a new run in a new directory (false)."
    )
    allow_new_data: bool = Field(
        False,
        description="Accept that the dataset, or a table of pre-trained vectors, has changed, for example by later "
        "days. The stored positions must exist in it.",
    )


class RowDataConfig(Section):
    """Keys of the data of every job that learns from the rows of a dataset.

    Times are ISO dates or times in the dataset's time zone.
    """

    path: InputFile = Field(
        ..., description="Dataset: a directory or an fsspec URL.", min_length=1, json_schema_extra=MAY_CHANGE
    )
    train_from: str = Field("", description="Start of the training range. Empty: the start of the dataset.")
    train_until: str = Field(
        "", description="End of the training range; labels must be complete before it. Empty: `eval_from`."
    )
    eval_from: str = Field("", description="Time of the first held-out request. Empty: no evaluation.")
    eval_until: str = Field("", description="End of the held-out range. Empty: the end of the dataset.")
    shuffle_minutes: Rate = Field(
        60.0, description="Length of a time window. Rows are shuffled inside a window, never across windows."
    )
    workers: int | None = Field(
        None,
        description="Loader processes per rank. 0: the training process reads the data itself. Unset: by the cores of "
        "the rank that its own threads leave free, from 1 to 8. Batches are the same for any number.",
        ge=0,
        json_schema_extra=MAY_CHANGE,
    )
    prefetch: Positive = Field(
        4, description="Batches that each loader process prepares in advance.", json_schema_extra=MAY_CHANGE
    )
    on_corrupt: Literal["error", "skip"] = Field(
        "error",
        description="Treatment of a corrupt record: the run ends with a message that names it (`error`), or the record "
        "is counted and left out (`skip`).",
        json_schema_extra=MAY_CHANGE,
    )
