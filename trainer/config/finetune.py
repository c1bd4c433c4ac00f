"""Schema of a ``limelight finetune`` job file. ``limelight config finetune`` prints its reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from trainer.config.load import load_job
from trainer.config.paths import InputFile, InputFiles
from trainer.config.sections import (
    MAY_CHANGE,
    CheckpointConfig,
    Decay,
    DeepSpeedFile,
    DistributedTrainConfig,
    LogEvery,
    Positive,
    Rate,
    ResumeConfig,
    RunConfig,
    Section,
    Share,
    WatchdogSeconds,
)

AnswerWeight = Literal["tokens", "root", "one"]
"""Weight of an answer of n tokens in the loss: n, the square root of n, or 1."""

AttentionKind = Literal["auto", "sdpa", "eager", "flex", "flash"]
"""Attention of packed sequences; see ``model.attention``."""


class FinetuneRunConfig(RunConfig):
    """Name, directory and seed of a run."""

    name: str = Field(
        "finetune",
        description="Name of the run. It is part of the default directory name.",
        min_length=1,
        json_schema_extra=MAY_CHANGE,
    )
    seed: int = Field(1, description="Seed of adapter initialisation, sample order and dropout.", ge=0)


class FinetuneDataConfig(Section):
    """Instruction samples: JSON Lines files, in the format of `trainer/llm/finetuning/samples.py`."""

    train: InputFiles = Field(..., description="Sample files to train on.", min_length=1)
    evaluate: InputFiles = Field(
        (),
        description="Sample files with `options`, of later days, to evaluate on. Empty: no evaluation.",
        json_schema_extra=MAY_CHANGE,
    )
    tune: InputFiles = Field(
        (),
        description="Sample files with `options`, of days between those of `train` and `evaluate`. The calibration of "
        "the options' probabilities is fitted on them, by task (`trainer/llm/finetuning/option_calibration.py`). "
        "Empty: no calibration.",
        json_schema_extra=MAY_CHANGE,
    )
    general: InputFiles = Field(
        (), description="Files of general-purpose samples that are mixed in to prevent forgetting."
    )
    general_share: Share = Field(
        0.0, description="Share of general samples among all samples. The seed decides which ones are drawn."
    )
    length: int = Field(
        1024, description="Tokens of a sequence. A longer sample loses the beginning of its prompt.", ge=8
    )
    packing: bool = Field(
        True, description="Pack several samples into one sequence, with separate attention masks and positions."
    )

    @model_validator(mode="after")
    def _general_in_full(self) -> FinetuneDataConfig:
        if bool(self.general) != bool(self.general_share):
            raise ValueError("`general` and `general_share` must be set together")
        if self.tune and not self.evaluate:
            raise ValueError("`tune` calibrates the evaluation; set `evaluate` as well")
        return self


class FinetuneModelConfig(Section):
    """The base model that the adapter is trained for."""

    path: InputFile = Field(
        "",
        description="Directory of a Qwen2-family model and its tokenizer, or a Hugging Face hub id. Empty: a small "
        "model with random weights, see `[small]`.",
        json_schema_extra=MAY_CHANGE,
    )
    tokenizer: InputFile = Field(
        "",
        description="Directory or hub id of another tokenizer. Empty: the model's own tokenizer.",
        json_schema_extra=MAY_CHANGE,
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )
    attention: AttentionKind = Field(
        "auto",
        description="Attention of packed sequences. `flex`: PyTorch's flex attention, which skips blocks of pairs "
        "between samples; on GPUs, with a C compiler on the machine. `flash`: the package flash-attn, with each sample "
        "as a sequence; on GPUs, in bfloat16. `sdpa` and `eager`: PyTorch's and transformers' own with a dense mask, "
        "which computes all pairs. `auto`: the run's own if it is resumed; `flex` where it works, if samples are "
        "packed; otherwise `sdpa`.",
        json_schema_extra=MAY_CHANGE,
    )


class SmallConfig(Section):
    """The small random model that is used if `model.path` is empty; its tokenizer is trained on the samples."""

    vocabulary: int = Field(2048, description="Maximum vocabulary size of the tokenizer (byte-level BPE).", ge=300)
    hidden: Positive = Field(128, description="Hidden size; a multiple of 2 x `heads`.")
    layers: Positive = Field(2, description="Number of layers.")
    heads: Positive = Field(
        4, description="Attention heads. Keys and values have half as many heads if this number is even."
    )


class LoraConfig(Section):
    """The LoRA adapter (Hu et al., 2021), with the parameters of peft."""

    rank: Positive = Field(16, description="Rank r of the adapter matrices.")
    alpha: Rate = Field(32.0, description="The adapter's output is scaled by alpha / r.")
    dropout: Share = Field(0.0, description="Dropout on the adapter's input.")
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="Names of the linear layers that get an adapter.",
        min_length=1,
    )
    modules_to_save: tuple[str, ...] = Field(
        (),
        description="Names of modules, such as `lm_head`, that are trained in full and saved with the adapter.",
    )


class FinetuneOptimizerConfig(Section):
    """AdamW on the adapter's parameters, and the learning-rate schedule."""

    learning_rate: Rate = Field(2e-4, description="Peak learning rate.")
    weight_decay: float = Field(0.0, description="Decoupled weight decay.", ge=0)
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="Decay rates of Adam's first and second moment.")
    warmup: Share = Field(0.03, description="Share of all steps over which the learning rate rises from 0.")
    decay: Decay = Field("cosine", description="Schedule after the warm-up; `linear` and `cosine` end at 0.")


class FinetuneTrainConfig(DistributedTrainConfig):
    """The fine-tuning loop."""

    batch_size: Positive = Field(32, description="Sequences of one optimizer step, over all ranks.")
    epochs: Positive = Field(1, description="Passes over the samples.")
    answer_weight: AnswerWeight = Field(
        "tokens",
        description="Weight of an answer of n tokens in the loss: n (`tokens`), the square root of n (`root`), or 1 "
        "(`one`).",
    )
    deepspeed: DeepSpeedFile = "configs/deepspeed/zero2.json"
    log_every: LogEvery = 10
    watchdog_seconds: WatchdogSeconds = 1800.0


class FinetuneConfig(Section):
    """A fine-tuning job."""

    run: FinetuneRunConfig = Field(default_factory=FinetuneRunConfig)
    data: FinetuneDataConfig
    model: FinetuneModelConfig = Field(default_factory=FinetuneModelConfig)
    small: SmallConfig = Field(default_factory=SmallConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    optimizer: FinetuneOptimizerConfig = Field(default_factory=FinetuneOptimizerConfig)
    train: FinetuneTrainConfig = Field(default_factory=FinetuneTrainConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, json_schema_extra=MAY_CHANGE)
    resume: ResumeConfig = Field(default_factory=ResumeConfig, json_schema_extra=MAY_CHANGE)


def load_finetune(path: str | Path, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Read a job file of ``limelight finetune``.

    Raises:
        UserError: as :func:`trainer.config.load.load_job`.
    """
    return load_job(FinetuneConfig, path, overrides)
