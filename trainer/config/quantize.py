"""Schema of a ``limelight quantize`` job file. ``limelight config quantize`` prints its reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.config.load import load_job
from trainer.config.paths import InputFile, VersionDirectory
from trainer.config.sections import MAY_CHANGE, Device, Positive, Section, TrackingConfig

MAX_CODES = 1 << 24
"""Largest number of codes of a level."""

MAX_LEVELS = 16

LevelSize = Annotated[int, Field(ge=1, le=MAX_CODES)]


class QuantizeRunConfig(TrackingConfig):
    """Name of the job in an MLflow file store, and the store."""

    name: str = Field(
        "quantize",
        description="Name of the experiment in the MLflow file store.",
        min_length=1,
        json_schema_extra=MAY_CHANGE,
    )


class QuantizeDataConfig(Section):
    """Segment vectors, and the ranges of time of fitting and of evaluation.

    A segment belongs to the range in which it became known (`known_ms`). Times are ISO dates or times, in the dataset's
    time zone.
    """

    path: InputFile = Field(..., description="Dataset directory with segments: rooms, authors and times.", min_length=1)
    vectors: InputFile = Field(
        "",
        description="Directory of the table of segment vectors. Empty: `embeddings/segments` of the dataset.",
    )
    fit_from: str = Field("", description="Start of the range of fitting. Empty: the first segment.")
    fit_until: str = Field(
        "",
        description="End of the range of fitting; a segment that becomes known at this time is left out. Empty: none.",
    )
    eval_from: str = Field(
        "", description="Start of the held-out range, which must not overlap the range of fitting. Empty: `fit_until`."
    )
    eval_until: str = Field("", description="End of the held-out range. Empty: none.")


class CodebookConfig(Section):
    """Residual k-means: the levels, how they are fitted, and the directory of the version."""

    directory: VersionDirectory = Field(
        ..., description="Directory of the new codebook version. It must not exist.", min_length=1
    )
    levels: tuple[LevelSize, ...] = Field(
        (256, 256, 256),
        description="Number of codes of each level. Every level after the first quantises what the levels before it "
        "left over (LARM). One level gives the codebook of Foresight, such as `[20000]`.",
        min_length=1,
        max_length=MAX_LEVELS,
    )
    normalize: bool = Field(False, description="Scale the residuals to length 1 before each level but the first.")
    start: Literal["k-means++", "random"] = Field(
        "k-means++", description="First centroids: k-means++ on a sample, or random different vectors."
    )
    iterations: Positive = Field(25, description="Maximum passes over the vectors for each level.")
    tolerance: float = Field(
        1e-4,
        description="A level ends before `iterations` when a pass lowers the distortion by less than this share.",
        ge=0,
    )
    mini_batch: int = Field(
        0,
        description="Vectors of a mini-batch of all ranks together. 0: an iteration is a pass over all vectors.",
        ge=0,
    )
    seed: int = Field(1, description="Seed of the first centroids and of the mini-batches.", ge=0)
    device: Device = "auto"


class QuantizeJob(Section):
    """A job that fits a codebook version."""

    run: QuantizeRunConfig = QuantizeRunConfig()
    data: QuantizeDataConfig
    codebook: CodebookConfig

    @model_validator(mode="after")
    def _check_ranges(self) -> QuantizeJob:
        if self.data.eval_until and not (self.data.eval_from or self.data.fit_until):
            raise ValueError("data.eval_until needs data.eval_from or data.fit_until")
        return self


def load_quantize(path: str | Path, overrides: Sequence[str] = ()) -> QuantizeJob:
    """Read a job file of ``limelight quantize``.

    Raises:
        UserError: as :func:`trainer.config.load.load_job`.
    """
    return load_job(QuantizeJob, path, overrides)
