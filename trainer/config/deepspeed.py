"""DeepSpeed's JSON settings: the check that the engines support them, and the batch sizes that Limelight adds."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.console.errors import UserError

_ACCEPTED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "bf16",
    "data_types",
    "communication_data_type",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
)
_REFUSED = {
    "optimizer": "the optimizer is AdamW, set in [optimizer] of the job file",
    "scheduler": "the learning rate schedule is set in [optimizer] of the job file",
    "fp16": "float16 would need a loss scale, which the engines do not keep; use bf16",
    "amp": "use bf16",
}
_OBJECTS = {
    "zero_optimization": '{"stage": 1}',
    "bf16": '{"enabled": true}',
    "data_types": '{"grad_accum_dtype": "fp32"}',
    "comms_logger": '{"enabled": true}',
    "flops_profiler": '{"enabled": true}',
}
"""Keys whose value is an object -> an example."""

_NEVER = 1 << 62

SETTINGS = "deepspeed settings"
"""Name of settings that come from no file, in messages."""


@dataclass(frozen=True)
class ZeroSupport:
    """ZeRO features that an engine supports.

    Attributes:
        stages: stages of ZeRO (0: nothing is partitioned, 1: optimizer state, 2: also gradients, 3: also parameters).
        advice: end of the message that refuses another stage.
        offload: True if optimizer state and parameters may be kept in host memory.
    """

    stages: tuple[int, ...]
    advice: str
    offload: bool


DENSE_NETWORK = ZeroSupport(
    (0, 1, 2),
    "use 0, 1 or 2 (3 partitions the parameters, but the dense network is small compared with the tables)",
    offload=False,
)
LANGUAGE_MODEL = ZeroSupport((1, 2, 3), "use 1, 2 or 3", offload=True)


def complete_settings(
    settings: Mapping[str, Any],
    batch_size: int,
    world: int,
    support: ZeroSupport = DENSE_NETWORK,
    origin: str = SETTINGS,
) -> dict[str, Any]:
    """Check a user's DeepSpeed settings and return them with the batch sizes added.

    Args:
        settings: the JSON object.
        batch_size: rows of one rank in an optimizer step, split into ``gradient_accumulation_steps`` micro-batches.
        world: number of ranks.
        support: ZeRO features of the engine that receives the settings.
        origin: file that the settings come from, for the messages.

    Raises:
        UserError: a key is unknown or the engine does not support it, or a batch size contradicts the job.
    """
    for key, value in settings.items():
        if key in _REFUSED and is_enabled(value):
            raise UserError(f"{origin}: {key!r} is not supported: {_REFUSED[key]}")
        if key not in _ACCEPTED and key not in _REFUSED:
            nearest = difflib.get_close_matches(key, _ACCEPTED, n=1, cutoff=0.0)[0]
            raise UserError(f"{origin}: {key!r} is not supported; did you mean {nearest!r}?")
    for key, example in _OBJECTS.items():
        if not isinstance(settings.get(key, {}), Mapping):
            raise UserError(f"{origin}: {key} = {settings[key]!r}: use an object such as {example}")
    accumulated = settings.get("data_types", {}).get("grad_accum_dtype")
    if accumulated not in (None, "fp32") and not is_enabled(settings.get("bf16")):
        raise UserError(f'{origin}: data_types.grad_accum_dtype = {accumulated!r} without bf16: use "fp32"')
    _check_zero(settings.get("zero_optimization", {}), is_enabled(settings.get("bf16")), support, origin)
    clipping = settings.get("gradient_clipping", 0.0)
    if isinstance(clipping, bool) or not isinstance(clipping, int | float) or not 0 <= clipping < float("inf"):
        raise UserError(f"{origin}: gradient_clipping = {clipping!r}: use a number above 0, or 0 for none")
    return {
        # DeepSpeed would print progress lines of its own.
        "steps_per_print": _NEVER,
        **{key: value for key, value in settings.items() if key in _ACCEPTED},
        # DeepSpeed would clip at a norm of 1 without this key, and the tables' gradients would not be scaled along.
        "gradient_clipping": clipping,
        **_batch_sizes(settings, batch_size, world, origin),
    }


def _check_zero(zero: Mapping[str, Any], bf16: bool, support: ZeroSupport, origin: str) -> None:
    """Raise UserError if the engine does not support the settings in ``zero_optimization``."""
    stage = zero.get("stage", 0)
    # A list would not be hashable, and True is equal to 1.
    if type(stage) is not int or stage not in support.stages:
        raise UserError(f"{origin}: zero_optimization.stage = {stage!r}: {support.advice}")
    # `cpu_offload` is DeepSpeed's old name of `offload_optimizer`; it is refused for every engine.
    for key in ("offload_optimizer", "offload_param", "cpu_offload"):
        if is_enabled(zero.get(key)) and (not support.offload or key == "cpu_offload"):
            raise UserError(f"{origin}: zero_optimization.{key} is not supported; remove it")
    if stage == 0 and bf16:
        raise UserError(
            f"{origin}: bf16 with zero_optimization.stage = 0 uses an optimizer whose state cannot be saved; "
            "use stage 1 or 2"
        )


def _batch_sizes(settings: Mapping[str, Any], batch_size: int, world: int, origin: str) -> dict[str, int]:
    """Return DeepSpeed's three batch sizes; raise UserError if a setting contradicts them."""
    parts = settings.get("gradient_accumulation_steps", 1)
    if type(parts) is not int or parts < 1 or batch_size % parts:
        raise UserError(
            f"{origin}: gradient_accumulation_steps = {parts!r} does not divide "
            f"the {batch_size} rows of a rank in a step"
        )
    sizes = {"train_batch_size": batch_size * world, "train_micro_batch_size_per_gpu": batch_size // parts}
    for key, size in sizes.items():
        if settings.get(key, "auto") not in ("auto", size):
            raise UserError(
                f"{origin}: {key} = {settings[key]!r} contradicts the job, which needs {size}; remove the "
                "key, train.batch_size sets it"
            )
    return {**sizes, "gradient_accumulation_steps": parts}


def is_enabled(setting: Any) -> bool:
    """True if a setting turns a feature on; ``{"enabled": false}`` and ``{"device": "none"}`` do not."""
    if isinstance(setting, Mapping):
        return bool(setting.get("enabled", setting.get("device") != "none"))
    return bool(setting)
