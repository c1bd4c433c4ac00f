"""Schema of a ``limelight embed`` job file. ``limelight config embed`` prints its reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from modules.choices import TextPooling
from trainer.config.load import load_job
from trainer.config.paths import InputFile, StoreAddress, TableDirectory
from trainer.config.sections import MAY_CHANGE, Device, Positive, Section, TrackingConfig
from trainer.console.errors import UserError

Kind = Literal["items", "comments", "segments", "authors"]


class EmbedRunConfig(TrackingConfig):
    """Name of the job in an MLflow file store, and the store."""

    name: str = Field(
        "embed",
        description="Name of the experiment in the MLflow file store.",
        min_length=1,
        json_schema_extra=MAY_CHANGE,
    )


class EmbedDataConfig(Section):
    """The texts that become vectors."""

    path: InputFile = Field(
        "",
        description="Dataset directory with texts, or an fsspec URL of one. Needed, except by `--follow` with a source "
        "other than `replay` and a pooling other than `query`.",
    )
    kinds: tuple[Kind, ...] = Field(
        ("items", "comments"),
        description="Kinds of text to embed: videos and rooms (`items`), `comments`, 30-second `segments` of rooms, "
        "`authors`.",
        min_length=1,
    )


class EmbedModelConfig(Section):
    """The language model that encodes the texts."""

    path: InputFile = Field(
        ...,
        description="Directory of a Qwen2-family model and its tokenizer, or a Hugging Face hub id. A model of the "
        "Qwen2-VL family embeds texts, and with `follow.frames` pictures.",
        min_length=1,
    )
    tokenizer: InputFile = Field(
        "", description="Directory or hub id of another tokenizer. Empty: the model's own tokenizer."
    )
    adapter: InputFile = Field("", description="Directory of a peft adapter, such as `RUN/adapter`. Empty: no adapter.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of weights and activations. `auto`: bfloat16 on a GPU, float32 on a CPU."
    )
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="Attention implementation of transformers.")


class EmbedConfig(Section):
    """Encoding of texts into vectors, and the tables to write."""

    directory: TableDirectory = Field(
        ...,
        description="Output directory. Each kind has its own table in it, such as `DIRECTORY/items`.",
        min_length=1,
    )
    template: InputFile = Field(
        "configs/templates/embed.txt", description="Prompt template: a text file with one section for each kind."
    )
    pooling: TextPooling = Field(
        "last",
        description="Pooling of the token states into one vector: state of the `last` token, `mean` of all tokens, or "
        "a mean weighted by a learned `query` vector, which is fitted so that comments are close to their own video.",
    )
    length: Positive = Field(
        128, description="Maximum tokens of a text with its template; a longer text is truncated at its end."
    )
    tokens: Positive = Field(
        16_384,
        description="Maximum tokens of a batch, including padding. A live segment whose frames and text have more is "
        "not embedded.",
    )
    part: Positive = Field(
        8_192,
        description="Texts that are written to disk together. A killed job loses at most one such part on each rank.",
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="Type of the stored vectors.")
    incremental: bool = Field(
        True,
        description="Keep the vectors of unchanged texts if model, adapter and template are the same as before.",
    )
    seed: int = Field(1, description="Seed of the sample that the learned query is fitted on.", ge=0)
    device: Device = "auto"


class FollowConfig(Section):
    """Segments of live rooms, embedded as they become known; `limelight embed --follow` reads this section.

    Vectors go to `DIRECTORY/follow/cache`, messages that cannot be used to `DIRECTORY/follow/dead-letters.jsonl`.
    """

    source: Literal["lines", "kafka", "replay"] = Field(
        "lines",
        description="Source of the segments: growing files of JSON `lines`, a `kafka` topic, or a `replay` of the "
        "dataset `data.path` in the order in which its segments became known.",
    )
    path: InputFile = Field("", description="`lines`: a file, or a folder whose files `*.jsonl` are read side by side.")
    replay_speed: float = Field(
        1.0,
        description="`replay`: 1 is real time, 60 plays an hour in a minute, 0 is as fast as possible.",
        ge=0,
        allow_inf_nan=False,
    )
    brokers: str = Field("", description="`kafka`: bootstrap brokers, `host:port,host:port`.")
    topic: str = Field("", description="`kafka`: topic. One process reads all of its partitions.")
    properties: InputFile = Field(
        "", description="`kafka`: file of librdkafka properties, one `key=value` per line, such as for TLS and SASL."
    )
    begin: Literal["earliest", "latest"] = Field(
        "earliest", description="`kafka`: offset at which the first start reads a topic; later starts continue."
    )
    on_gap: Literal["error", "earliest"] = Field(
        "error",
        description="`kafka`: action if the topic no longer has the messages at the position: `error` ends the job, "
        "`earliest` continues at the first message that the topic has.",
    )
    until_end: bool = Field(
        False,
        description="End after the last segment that is there, and not wait for more; a replay always ends.",
    )
    frames: InputFile = Field(
        "",
        description="Directory that the paths of frames are relative to. Empty: frames are not read. They need a model "
        "of the Qwen2-VL family.",
    )
    codebook: InputFile = Field(
        "", description="Directory of the codebook version that turns vectors into codes. Empty: no codes."
    )
    align: InputFile = Field(
        "",
        description="Directory of a run of `limelight align`: codes are those of fused author vectors, which go to "
        "`DIRECTORY/follow/authors`. Empty: codes of the segment vectors.",
    )
    align_data: InputFile = Field(
        "",
        description="Dataset with the features, rows and earlier segments of the authors, for `align`. Empty: the "
        "dataset of its run, or with a `replay` the replayed one.",
    )
    store: StoreAddress = Field(
        "",
        description="Store of recent codes: the path of an SQLite file, or `redis://HOST:PORT/DATABASE`. It needs a "
        "codebook.",
    )
    retry_seconds: float = Field(
        60.0, description="Total time of retries while store or brokers do not answer.", gt=0, allow_inf_nan=False
    )
    keep_hours: float = Field(
        72.0,
        description="Hours for which the cache keeps vectors. Older ones stay in the mean of their author only.",
        gt=0,
        le=87_600,
    )
    batch: Positive = Field(
        16,
        description="Segments that are embedded together. Every batch is filled up to this number, so that a vector "
        "does not depend on the others of its batch; a GPU wants more than a CPU.",
    )
    wait_seconds: float = Field(
        0.5, description="Longest time that a segment waits for others of its batch.", ge=0, allow_inf_nan=False
    )
    behind_seconds: float = Field(
        30.0,
        description="Lag from which a model that is too slow for the rooms on air takes every second segment only.",
        gt=0,
        allow_inf_nan=False,
    )
    report_seconds: float = Field(
        60.0, description="Time between two reports of lag and counts.", gt=0, allow_inf_nan=False
    )

    @model_validator(mode="after")
    def _is_whole(self) -> FollowConfig:
        if self.source == "kafka" and not (self.brokers and self.topic):
            raise ValueError('source = "kafka" needs `brokers` and `topic`')
        if bool(self.codebook) != bool(self.store):
            raise ValueError("`codebook` and `store` need each other: set both, or none of them")
        if self.align_data and not self.align:
            raise ValueError("`align_data` is of an alignment: set `align`, too")
        return self


class EmbeddingJob(Section):
    """An embedding job."""

    run: EmbedRunConfig = EmbedRunConfig()
    data: EmbedDataConfig = EmbedDataConfig()
    model: EmbedModelConfig
    embed: EmbedConfig
    follow: FollowConfig = FollowConfig()


def load_embedding(path: str | Path, overrides: Sequence[str] = (), *, follow: bool = False) -> EmbeddingJob:
    """Read a job file of ``limelight embed``.

    Args:
        path: the job file.
        overrides: words of the command line.
        follow: the job follows live rooms.

    Raises:
        UserError: as :func:`trainer.config.load.load_job`; or a key is missing that the job needs.
    """
    job = load_job(EmbeddingJob, path, overrides)
    if not job.data.path and (not follow or job.follow.source == "replay" or job.embed.pooling == "query"):
        raise UserError(f"{path}: data.path is missing; name a dataset with texts")
    if follow and job.follow.source == "lines" and not job.follow.path:
        raise UserError(f"{path}: follow.path is missing; name a file or a folder of JSON lines, or another source")
    return job
