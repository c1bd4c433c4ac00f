"""The job file of ``limelight finetune``. ``python -m trainer.config.finetune`` prints its reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from trainer.config.load import load_job
from trainer.config.reference import reference
from trainer.config.sections import CheckpointConfig, Positive, Rate, ResumeConfig, Section, Share
from trainer.config.sections import RunConfig as RankerRunConfig


class RunConfig(RankerRunConfig):
    """Where a run is written and what it is called."""

    name: str = Field("finetune", description="Name of the run, part of its directory's default name.", min_length=1)
    seed: int = Field(1, description="Seed of adapters, the order of samples and dropout.", ge=0)


class DataConfig(Section):
    """Instructions to learn from: files of JSON lines, see `trainer/llm/finetuning/samples.py`."""

    train: tuple[str, ...] = Field(..., description="Files of samples to train on.", min_length=1)
    evaluate: tuple[str, ...] = Field(
        (), description="Files of samples with `options`, of later days. Empty: no evaluation."
    )
    general: tuple[str, ...] = Field((), description="Files of general samples, mixed in against forgetting.")
    general_share: Share = Field(0.0, description="Share of general samples among all, drawn once by the seed.")
    length: int = Field(1024, description="Tokens of a sequence; a longer sample loses its prompt's beginning.", ge=8)
    packing: bool = Field(True, description="Put several samples into a sequence, apart in attention and positions.")

    @model_validator(mode="after")
    def _general_in_full(self) -> DataConfig:
        if bool(self.general) != bool(self.general_share):
            raise ValueError("`general` and `general_share` need each other")
        return self


class ModelConfig(Section):
    """The model that is adapted."""

    path: str = Field(
        "",
        description="Directory of a Qwen2-family model and its tokenizer, or a hub id. Empty: a small one with random "
        "weights, see `[small]`.",
    )
    tokenizer: str = Field("", description="Directory or hub id of another tokenizer. Empty: the model's own.")
    gradient_checkpointing: bool = Field(False, description="Compute activations again in the backward pass.")
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="Implementation of attention in transformers.")


class SmallConfig(Section):
    """The model that is made where `model.path` is empty; its tokenizer is trained on the samples' texts."""

    vocabulary: int = Field(2048, description="Most entries of the tokenizer (byte-level BPE).", ge=300)
    hidden: Positive = Field(128, description="Width; a multiple of `heads`.")
    layers: Positive = Field(2, description="Number of layers.")
    heads: Positive = Field(4, description="Attention heads; half as many for keys and values if that is whole.")


class LoraConfig(Section):
    """The adapter (Hu et al., 2021), as peft has it."""

    rank: Positive = Field(16, description="Rank r.")
    alpha: Rate = Field(32.0, description="The adapter's output is scaled by alpha / r.")
    dropout: Share = Field(0.0, description="Dropout before the adapter.")
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="Names of the linear layers that get one.",
        min_length=1,
    )
    modules_to_save: tuple[str, ...] = Field(
        (), description="Names of modules that are trained whole and saved with the adapter, such as `lm_head`."
    )


class OptimizerConfig(Section):
    """AdamW on the adapter's parameters, and its schedule."""

    learning_rate: Rate = Field(2e-4, description="Peak learning rate.")
    weight_decay: float = Field(0.0, description="Decoupled weight decay.", ge=0)
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="Adam's moment decays.")
    warmup: Share = Field(0.03, description="Share of all steps over which the learning rate rises from 0.")
    decay: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="How it goes on after warm-up; linear and cosine end at 0."
    )


class TrainConfig(Section):
    """The loop."""

    batch_size: Positive = Field(32, description="Sequences of all ranks together in one optimizer step.")
    epochs: Positive = Field(1, description="Passes over the samples.")
    answer_weight: AnswerWeight = Field(
        "tokens",
        description="What an answer of n tokens counts for in the loss: n (`tokens`), its root (`root`), or 1 (`one`).",
    )
    deepspeed: str = Field(
        "configs/deepspeed/zero2.json",
        description="DeepSpeed's own settings: ZeRO stage 1 to 3, offload, precision, clipping, accumulation.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto` takes the GPU if there is one.")
    log_every: Positive = Field(10, description="Steps between two entries of the trace.")
    watchdog_seconds: float = Field(
        1800.0, description="End the job when a rank makes no step for so long; 0 waits for ever.", ge=0
    )


class FinetuneConfig(Section):
    """One fine-tuning job."""

    run: RunConfig = Field(default_factory=RunConfig)
    data: DataConfig
    model: ModelConfig = Field(default_factory=ModelConfig)
    small: SmallConfig = Field(default_factory=SmallConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    resume: ResumeConfig = Field(default_factory=ResumeConfig)


def load_finetune(path: str | Path, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Read a job file of ``limelight finetune``.

    Raises:
        UserError: as :func:`trainer.config.load.load_job`.
    """
    return load_job(FinetuneConfig, path, overrides)


if __name__ == "__main__":
    print(reference(FinetuneConfig))


AnswerWeight = Literal["tokens", "root", "one"]
"""What an answer of n tokens counts for: n, the root of n, or 1."""
