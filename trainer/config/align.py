"""Schema of a ``limelight align`` job file. ``limelight config align`` prints its reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from trainer.config.features import FeatureConfig
from trainer.config.load import load_job
from trainer.config.paths import InputFile
from trainer.config.precision import HybridTrainConfig
from trainer.config.ranker import JobConfig, TableOptimizerConfig
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


class AlignDataConfig(RowDataConfig):
    """Dataset with segments, training range and held-out range.

    Times are ISO dates or times in the dataset's time zone.
    """

    vectors: InputFile = Field(
        "",
        description="Directory of the table of segment vectors. Empty: `embeddings/segments` of the dataset.",
        json_schema_extra=MAY_CHANGE,
    )
    positives: tuple[str, ...] = Field(
        (),
        description="Behaviours, any of which makes user and author of a row a positive pair. Empty: `click` if the "
        "dataset has it, else its first behaviour.",
    )


class TowersConfig(Section):
    """The two towers, LARM section 3.3. The paper gives none of these numbers."""

    dim: Positive = Field(64, description="Width of the vectors of users and authors.")
    author: Literal["fused", "features", "content"] = Field(
        "fused",
        description="Author's tower: segment vectors and author features with a gate (`fused`), or one of the two "
        "alone, for comparison.",
    )
    user_layers: tuple[Positive, ...] = Field((128,), description="Hidden widths of the user's tower.")
    author_layers: tuple[Positive, ...] = Field(
        (128,), description="Hidden widths of each part of the author's tower: segment vectors, and author features."
    )
    gate_layers: tuple[Positive, ...] = Field((16,), description="Hidden widths of the gate over the author's id.")
    history: Literal["mean", "latest"] = Field(
        "mean", description="Summary of a history in the user's tower: the mean of its visits, or the latest one."
    )
    temperature: Rate = Field(0.1, description="Temperature: the cosine similarities are divided by it.")
    log_q: bool = Field(
        True,
        description="Correct the scores of the loss by the log of the author's share of the earlier positives: then "
        "popular authors are not pushed away for being more often in a batch.",
    )
    log_q_hours: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="Hours before a row in which positives count for `log_q`. The author's share is then that since "
        "its first positive in them: its popularity while on air, however late it began. 0: the share of all earlier "
        "positives, which is far too small for authors who began lately.",
        json_schema_extra={"before": 0.0},
    )
    smoothing: Rate = Field(1.0, description="Positives that each author has before the first one, for `log_q`.")
    unseen: Literal["content", "unknown_id"] = Field(
        "unknown_id",
        description="Inputs of authors that were not trained on: all inputs with the row of the unknown id in place of "
        "their own (`unknown_id`), or segment vectors alone (`content`).",
        json_schema_extra={"before": "content"},
    )
    content_only: Share = Field(
        0.1,
        description="Share of the training rows whose author uses segment vectors alone, with `unseen = "
        '"content"`. So the model learns to place such authors.',
    )
    id_dropout: Share = Field(
        0.2,
        description="Share of the training rows whose author reads the row of the unknown id, with `unseen = "
        '"unknown_id"`. So this row is trained.',
    )


class AlignTrainConfig(HybridTrainConfig):
    """Training loop of the alignment."""

    batch_size: Positive = Field(
        4096,
        description="Rows that are read for an optimizer step, over all ranks. The positives among them are the pairs "
        "of the step, and each other's negatives.",
    )
    epochs: Positive = Field(1, description="Passes over the training range.")
    overlap: bool = Field(
        True,
        description="Exchange the ids of the next batch while the dense network computes.",
        json_schema_extra=MAY_CHANGE,
    )


class AlignEvaluateConfig(Section):
    """Retrieval of the held-out positives' authors among all authors on air at the request."""

    recall_at: tuple[Positive, ...] = Field((10, 50, 100), description="Numbers of authors to retrieve.", min_length=1)
    refresh_seconds: Positive = Field(
        30,
        description="Interval in which the authors' vectors are renewed; a request uses those of its interval's start.",
    )
    requests: Positive = Field(
        10_000, description="Largest number of held-out positives that are evaluated, drawn by a hash of the visit."
    )


class AlignConfig(Section):
    """Job file of an alignment of authors: `limelight align`."""

    run: RunConfig = Field(default_factory=RunConfig)
    data: AlignDataConfig
    features: FeatureConfig = Field(default_factory=FeatureConfig)
    tables: TableOptimizerConfig = Field(default_factory=TableOptimizerConfig)
    towers: TowersConfig = Field(default_factory=TowersConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: AlignTrainConfig = Field(default_factory=AlignTrainConfig)
    evaluate: AlignEvaluateConfig = Field(default_factory=AlignEvaluateConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, json_schema_extra=MAY_CHANGE)
    resume: ResumeConfig = Field(default_factory=ResumeConfig, json_schema_extra=MAY_CHANGE)

    @model_validator(mode="after")
    def _check_histories(self) -> AlignConfig:
        """Refuse histories and counts that depend on a candidate, which the user's tower does not know, and codes."""
        for name in ("codes", "content"):
            if getattr(self.features, name):
                raise ValueError(f"features.{name}: the towers read data.vectors alone; remove the section")
        for name, history in self.features.history.items():
            if history.search != "latest":
                raise ValueError(
                    f"features.history.{name}.search = {history.search!r}: a search by the candidate, which the user's "
                    'tower does not know; use "latest"'
                )
        for name, past in self.features.past.items():
            if past.same != "any":
                raise ValueError(
                    f"features.past.{name}.same = {past.same!r}: counts of visits that share something with the "
                    'candidate, which the user\'s tower does not know; use "any"'
                )
        return self


EngineJob = JobConfig | AlignConfig
"""Jobs that train a model with the hybrid engine on the rows of a dataset."""


def load_align(path: str | Path, overrides: Sequence[str] = ()) -> AlignConfig:
    """Read a job file of ``limelight align``.

    Raises:
        UserError: as :func:`trainer.config.load.load_job`.
    """
    return load_job(AlignConfig, path, overrides)
