"""Precision of a dense network beside embedding tables: ``train.precision`` and DeepSpeed's settings as one choice.

The tables, the optimizers' states and the weights that are saved are float32 in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from trainer.config.deepspeed import is_enabled
from trainer.config.load import load_deepspeed
from trainer.config.sections import DistributedTrainConfig
from trainer.console.errors import UserError

Precision = Literal["auto", "bf16", "tf32", "fp32"]

PrecisionKey = Annotated[
    Precision,
    Field(
        description="Precision of the dense network; tables are float32. `bf16`: bfloat16 with float32 weights in the "
        "optimizer; needs ZeRO stage 1 or 2. `tf32`: float32 with TF32 products on a GPU; a CPU computes in "
        "float32. `fp32`: float32. `auto`: the run's own if it is resumed; `bf16` if the DeepSpeed settings enable it, "
        "and on GPUs with ZeRO; `tf32` on GPUs without ZeRO; `fp32` on a CPU."
    ),
]


class HybridTrainConfig(DistributedTrainConfig):
    """Keys of training loops of a dense network beside embedding tables."""

    precision: PrecisionKey = "auto"


def dense_settings(train: DistributedTrainConfig) -> dict[str, Any]:
    """Return DeepSpeed's settings of a job, with its precision; the settings of the file alone with ``auto``.

    Raises:
        UserError: the file cannot be read, or it contradicts the precision.
    """
    settings = load_deepspeed(train.deepspeed)
    if not isinstance(train, HybridTrainConfig) or train.precision == "auto":
        return settings
    half = settings.get("bf16")
    if train.precision == "bf16":
        if is_enabled(half):
            return settings
        if half is not None:
            raise UserError(f"train.precision = 'bf16': {train.deepspeed} turns bf16 off; remove the key there")
        types = {"grad_accum_dtype": "fp32", **settings.get("data_types", {})}
        return {**settings, "bf16": {"enabled": True}, "data_types": types}
    if is_enabled(half):
        raise UserError(
            f"train.precision = {train.precision!r}: {train.deepspeed} enables bf16; use 'bf16' or other settings"
        )
    return settings


def resolve_precision(train: HybridTrainConfig, device: str) -> Precision:
    """Return the precision that ``auto`` means in a new run, or the one that is set.

    Args:
        train: training loop of the job.
        device: type of the device, ``cuda`` or ``cpu``.

    Raises:
        UserError: the DeepSpeed settings cannot be read.
    """
    if train.precision != "auto":
        return train.precision
    settings = load_deepspeed(train.deepspeed)
    if device != "cuda" or "bf16" in settings:
        return precision_of(settings)
    zero = settings.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    return "bf16" if stage else "tf32"


def precision_of(settings: Mapping[str, Any]) -> Precision:
    """Return the precision of a run whose job does not name it: that of its DeepSpeed settings."""
    return "bf16" if is_enabled(settings.get("bf16")) else "fp32"


def describe_precision(precision: Precision, device: str) -> str:
    """Return the line that states the precision of a run."""
    dense = {
        "bf16": "bfloat16, its optimizer float32",
        "tf32": "float32 with TF32 products",
        "fp32": "float32",
        "auto": "as in the DeepSpeed settings",
    }[precision]
    if precision == "tf32" and device != "cuda":
        dense = "float32, since TF32 is for GPUs only"
    return f"precision {precision}: the dense network is {dense}; the tables are float32"
