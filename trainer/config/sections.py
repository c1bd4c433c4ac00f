"""Sections and value types that several kinds of job files share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

MAY_CHANGE: JsonDict = {"may_change_on_resume": True}
"""``json_schema_extra`` of a key, or of a whole section, that may differ when a run is resumed: it changes neither the
result nor the data. DeepSpeed's settings are compared by themselves, and a dataset by its fingerprint."""

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

# Keys that several jobs have with defaults of their own: type and description are here, the default is in the section.
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    Field(description="`auto` uses the GPU if the machine has one, else the CPU.", json_schema_extra=MAY_CHANGE),
]
Decay = Literal["constant", "linear", "cosine"]
DeepSpeedFile = Annotated[
    str,
    Field(
        description="JSON file of DeepSpeed settings: ZeRO stage, precision, clipping, gradient accumulation.",
        json_schema_extra=MAY_CHANGE,
    ),
]
LogEvery = Annotated[
    int,
    Field(
        ge=1,
        description="Steps between two records of the loss and the rates in the metric history.",
        json_schema_extra=MAY_CHANGE,
    ),
]
WatchdogSeconds = Annotated[
    float,
    Field(
        ge=0,
        description="End the job if a rank finishes no step for this long; 0 waits forever.",
        json_schema_extra=MAY_CHANGE,
    ),
]


class Section(BaseModel):
    """A part of the job file. Unknown keys are rejected, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RunConfig(Section):
    """Where a run is written and what it is called."""

    name: str = Field(
        "run",
        description="Name of the run, part of its directory's default name.",
        min_length=1,
        json_schema_extra=MAY_CHANGE,
    )
    directory: str = Field(
        "",
        description="Directory of the run. Empty: that of the newest unfinished run of the same job, else "
        "`runs/<name>-<date>-<time>`.",
        json_schema_extra=MAY_CHANGE,
    )
    seed: int = Field(1, description="Seed of initial values, shuffling and dropout.", ge=0)


class DistributedTrainConfig(Section):
    """Keys of every training loop that runs on several ranks under DeepSpeed."""

    deepspeed: DeepSpeedFile = "configs/deepspeed/zero1.json"
    device: Device = "auto"
    log_every: LogEvery = 20
    watchdog_seconds: WatchdogSeconds = 600.0


class OptimizerConfig(Section):
    """AdamW on the dense network, and the schedule that both optimizers follow."""

    learning_rate: Rate = Field(1e-3, description="Peak learning rate of the dense network.")
    weight_decay: float = Field(0.0, description="Decoupled weight decay of the dense network.", ge=0)
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="Adam's moment decays.")
    warmup: Share = Field(0.0, description="Share of all steps over which learning rates rise from 0.")
    decay: Decay = Field("constant", description="How learning rates go on after warm-up; linear and cosine end at 0.")


class CheckpointConfig(Section):
    """When the state of training is saved to `RUN/checkpoints`. It is always saved at the end, and on SIGTERM."""

    every_minutes: float = Field(10.0, description="Minutes between two saves; 0 goes by steps alone.", ge=0)
    every_steps: int = Field(0, description="Steps between two saves; 0 goes by time alone.", ge=0)
    keep: Positive = Field(3, description="Newest checkpoints to keep.")
    keep_every: int = Field(0, description="Keep every Nth save for good as well; 0 keeps none so.", ge=0)
    background: bool = Field(
        True,
        description="Write while training goes on, from a copy in host memory; false stops for it and needs no copy.",
    )


class ResumeConfig(Section):
    """How the same command, given again, goes on with a run that has not finished."""

    enabled: bool = Field(True, description="Go on with it; false starts a new run, in a directory of its own.")
    allow_new_data: bool = Field(
        False, description="Accept that the dataset has changed, such as by later days; positions must still fit it."
    )
