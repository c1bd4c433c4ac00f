"""Schema of a ``limelight embed`` job file. ``limelight config embed`` prints its reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from modules.text_pooling import Pooling
from trainer.config.load import load_job
from trainer.config.paths import InputFile, TableDirectory
from trainer.config.sections import Device, Positive, Section

Kind = Literal["items", "comments", "segments", "authors"]


class EmbedDataConfig(Section):
    """The texts that become vectors."""

    path: InputFile = Field(..., description="Dataset directory with texts, or an fsspec URL of one.", min_length=1)
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
        description="Directory of a Qwen2-family model and its tokenizer, or a Hugging Face hub id.",
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
    pooling: Pooling = Field(
        "last",
        description="Pooling of the token states into one vector: state of the `last` token, `mean` of all tokens, or "
        "a mean weighted by a learned `query` vector, which is fitted so that comments are close to their own video.",
    )
    length: Positive = Field(
        128, description="Maximum tokens of a text with its template; a longer text is truncated at its end."
    )
    tokens: Positive = Field(16_384, description="Maximum tokens of a batch, including padding.")
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


class EmbeddingJob(Section):
    """An embedding job."""

    data: EmbedDataConfig
    model: EmbedModelConfig
    embed: EmbedConfig


def load_embedding(path: str | Path, overrides: Sequence[str] = ()) -> EmbeddingJob:
    """Read a job file of ``limelight embed``.

    Raises:
        UserError: as :func:`trainer.config.load.load_job`.
    """
    return load_job(EmbeddingJob, path, overrides)
