"""The job file of ``limelight embed``. ``python -m trainer.config.embed`` prints its reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from modules.text_pooling import Pooling
from trainer.config.load import load_job
from trainer.config.reference import reference
from trainer.config.sections import Positive, Section

Kind = Literal["items", "comments", "segments", "authors"]


class DataConfig(Section):
    """Which texts become vectors."""

    path: str = Field(..., description="Dataset directory with texts, or any fsspec URL of one.", min_length=1)
    kinds: tuple[Kind, ...] = Field(
        ("items", "comments"),
        description="Videos and rooms (`items`), comments, 30-second segments of rooms, authors.",
        min_length=1,
    )


class ModelConfig(Section):
    """The model that reads them."""

    path: str = Field(
        ..., description="Directory of a Qwen2-family model and its tokenizer, or a hub id.", min_length=1
    )
    tokenizer: str = Field("", description="Directory or hub id of another tokenizer. Empty: the model's own.")
    adapter: str = Field("", description="Directory of a peft adapter, such as a run's `adapter`. Empty: none.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of weights and activations; `auto`: bfloat16 on a GPU, float32 on a CPU."
    )
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="Implementation of attention in transformers.")


class EmbedConfig(Section):
    """How a text becomes a vector, and the tables that are written."""

    directory: str = Field(
        ..., description="Where the tables go, one a kind: `DIRECTORY/items` and so on.", min_length=1
    )
    template: str = Field("configs/templates/embed.txt", description="Text file with a section for each kind.")
    pooling: Pooling = Field(
        "last",
        description="`last` token, `mean` of all tokens, or their mean weighted by a learnt `query`: one vector, "
        "fitted so that comments are close to their own video.",
    )
    length: Positive = Field(128, description="Most tokens of a text with its template; its first ones are taken.")
    tokens: Positive = Field(16_384, description="Most tokens of a batch, padding included.")
    part: Positive = Field(
        8_192, description="Texts that are written together; a kill loses no more than one part of each rank."
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="In which vectors are stored.")
    incremental: bool = Field(
        True, description="Keep vectors of unchanged texts, if model, adapter and template are the same."
    )
    seed: int = Field(1, description="Of the sample that the learnt query is fitted on.", ge=0)
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto` takes the GPU if there is one.")


class EmbeddingJob(Section):
    """One embedding job."""

    data: DataConfig
    model: ModelConfig
    embed: EmbedConfig


def load_embedding(path: str | Path, overrides: Sequence[str] = ()) -> EmbeddingJob:
    """Read a job file of ``limelight embed``.

    Raises:
        UserError: as :func:`trainer.config.load.load_job`.
    """
    return load_job(EmbeddingJob, path, overrides)


if __name__ == "__main__":
    print(reference(EmbeddingJob))
