"""Choice of the attention of packed sequences: what works for a job, its model, and the machine of every rank."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from trainer.checkpoint.run_directory import load_finetune_run
from trainer.config.deepspeed import is_enabled
from trainer.config.finetune import AttentionKind, FinetuneConfig
from trainer.config.load import load_deepspeed
from trainer.console.errors import UserError
from trainer.llm.models.base_model import BaseModelFiles
from trainer.llm.models.small_model import small_shape
from trainer.runtime.compilers import triton_compiles
from trainer.runtime.distributed import World

logger = logging.getLogger(__name__)

_LEAST_WIDTH = 16
"""Smallest width of a head of flex attention on a GPU."""


def settled_attention(config: FinetuneConfig, directory: Path, world: World) -> FinetuneConfig:
    """Return a job whose ``model.attention`` is decided: that of the run in ``directory``, if any. Collective.

    ``auto`` of a new run is flex attention if samples are packed, all ranks are on GPUs and can compile it, and the
    model suits it; else PyTorch's own with a dense mask. A line of the log says why.

    Args:
        config: the job.
        directory: directory of the run, which may not exist yet.
        world: ranks of the job; the first one reads the run and the model's configuration.

    Raises:
        UserError: the attention that is set, or that of the run, does not work for the job or on the machine of a
            rank; or the run or the model cannot be read.
    """

    def named() -> AttentionKind:
        if config.model.attention == "auto" and (directory / "config.json").exists():
            return load_finetune_run(directory).model.attention
        return config.model.attention

    kind = world.on_first_rank(named)
    if kind == "auto" and not config.data.packing:
        return with_attention(config, "sdpa")
    wanted: AttentionKind = "flex" if kind == "auto" else kind
    problem = world.first_problem(machine_problem(wanted, world.device.type))
    if problem is None:
        problem = world.on_first_rank(lambda: job_problem(wanted, config) or model_problem(wanted, config))
    if problem is None:
        return with_attention(config, wanted)
    if kind != "auto":
        raise UserError(
            f"model.attention = {kind!r}: {problem}; set model.attention to 'auto' for a new run, or to 'sdpa'"
        )
    if world.device.type == "cuda" and world.rank == 0:
        logger.info(f"model.attention = 'auto' is 'sdpa' here, since 'flex' is not possible: {problem}")
    return with_attention(config, "sdpa")


def with_attention(config: FinetuneConfig, kind: AttentionKind) -> FinetuneConfig:
    """Return a job with a value of ``model.attention``."""
    return config.model_copy(update={"model": config.model.model_copy(update={"attention": kind})})


def machine_problem(kind: AttentionKind, device: str) -> str | None:
    """Return why an attention does not work on this machine, on a type of device, ``cuda`` or ``cpu``; else None."""
    if kind not in ("flex", "flash"):
        return None
    if device != "cuda":
        return f"works on GPUs only, and this rank uses the {device.upper()}"
    if kind == "flex":
        # Triton compiles flex attention.
        works = triton_compiles(torch.device(device))
        return None if works else "needs Triton and a C compiler (gcc or clang), and one of them is not here"
    from transformers.utils import is_flash_attn_2_available

    # Without the package transformers would download kernels, which are code, from the hub.
    return None if is_flash_attn_2_available() else "the package flash-attn is not installed, or cannot use this GPU"


def job_problem(kind: AttentionKind, config: FinetuneConfig) -> str | None:
    """Return why an attention does not work for the settings of a job; else None."""
    if kind != "flash":
        return None
    if not is_enabled(load_deepspeed(config.train.deepspeed).get("bf16")):
        return f"computes in bfloat16, which {config.train.deepspeed} does not enable"
    return "its gradients are not deterministic, as train.deterministic asks" if config.train.deterministic else None


def model_problem(kind: AttentionKind, config: FinetuneConfig) -> str | None:
    """Return why an attention does not work for the base model of a job; else None.

    Raises:
        UserError: the model cannot be read.
    """
    if kind != "flex":
        return None
    model = model_config(config)
    dropout = getattr(model, "attention_dropout", 0.0)
    if dropout > 0:
        return f"the model has attention_dropout = {dropout:g} in its config.json, and 'flex' drops out no weights"
    width = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    if width < _LEAST_WIDTH:
        return f"needs heads of {_LEAST_WIDTH} values or more, and the model's have {width}"
    return None


def model_config(config: FinetuneConfig) -> Any:
    """Return the configuration of a job's base model in transformers' names.

    Raises:
        UserError: the model cannot be read.
    """
    if config.model.path:
        return BaseModelFiles.open(config.model.path, config.model.tokenizer).config
    return SimpleNamespace(**small_shape(config.small, config.small.vocabulary, config.data.length))
