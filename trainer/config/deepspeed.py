"""DeepSpeed's own JSON settings: which of them the engines support, and the batch sizes that they fill in."""

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
_NEVER = 1 << 62


@dataclass(frozen=True)
class Support:
    """What an engine supports of ZeRO.

    Attributes:
        stages: over how much the ranks may share the memory.
        said: what to use instead of another stage.
        offload: optimizer and parameters may be kept in host memory.
    """

    stages: tuple[int, ...]
    said: str
    offload: bool


DENSE_NETWORK = Support(
    (0, 1, 2),
    "use 0, 1 or 2 (3 cuts the parameters themselves, and the dense network is small beside the tables)",
    offload=False,
)
LANGUAGE_MODEL = Support((1, 2, 3), "use 1, 2 or 3", offload=True)


def complete_settings(
    given: Mapping[str, Any], batch_size: int, world: int, support: Support = DENSE_NETWORK
) -> dict[str, Any]:
    """DeepSpeed's settings as a user gives them, checked, with the batch sizes filled in.

    Args:
        given: the JSON.
        batch_size: rows of one rank in an optimizer step; they are cut into ``gradient_accumulation_steps`` parts.
        world: number of ranks.
        support: of the engine that takes them.

    Raises:
        UserError: a key that is unknown or that the engine does not support, or a batch size that contradicts.
    """
    for key, value in given.items():
        if key in _REFUSED and asks(value):
            raise UserError(f"deepspeed settings: {key!r} is not supported: {_REFUSED[key]}")
        if key not in _ACCEPTED and key not in _REFUSED:
            nearest = difflib.get_close_matches(key, _ACCEPTED, n=1, cutoff=0.0)[0]
            raise UserError(f"deepspeed settings: {key!r} is not supported; did you mean {nearest!r}?")
    accumulated = given.get("data_types", {}).get("grad_accum_dtype")
    if accumulated not in (None, "fp32") and not asks(given.get("bf16")):
        raise UserError(f'deepspeed settings: data_types.grad_accum_dtype = {accumulated!r} without bf16: use "fp32"')
    _check_zero(given.get("zero_optimization", {}), asks(given.get("bf16")), support)
    clipping = given.get("gradient_clipping", 0.0)
    if not isinstance(clipping, int | float) or clipping < 0:
        raise UserError(f"deepspeed settings: gradient_clipping = {clipping!r}: use a number above 0, or 0 for none")
    return {
        # DeepSpeed would report its own progress beside ours.
        "steps_per_print": _NEVER,
        **{key: value for key, value in given.items() if key in _ACCEPTED},
        **_batch_sizes(given, batch_size, world),
    }


def _check_zero(zero: Any, bf16: bool, support: Support) -> None:
    if not isinstance(zero, Mapping):
        raise UserError(f'deepspeed settings: zero_optimization = {zero!r}: use an object such as {{"stage": 1}}')
    stage = zero.get("stage", 0)
    if stage not in support.stages:
        raise UserError(f"deepspeed settings: zero_optimization.stage = {stage!r}: {support.said}")
    # The last is an old name of the first.
    for key in ("offload_optimizer", "offload_param", "cpu_offload"):
        if asks(zero.get(key)) and (not support.offload or key == "cpu_offload"):
            raise UserError(f"deepspeed settings: zero_optimization.{key} is not supported; remove it")
    if stage == 0 and bf16:
        raise UserError(
            "deepspeed settings: bf16 with zero_optimization.stage = 0 has an optimizer whose state cannot be saved; "
            "use stage 1 or 2"
        )


def _batch_sizes(given: Mapping[str, Any], batch_size: int, world: int) -> dict[str, int]:
    parts = given.get("gradient_accumulation_steps", 1)
    if not isinstance(parts, int) or parts < 1 or batch_size % parts:
        raise UserError(
            f"deepspeed settings: gradient_accumulation_steps = {parts!r} does not divide "
            f"the {batch_size} rows of a rank in a step"
        )
    sizes = {"train_batch_size": batch_size * world, "train_micro_batch_size_per_gpu": batch_size // parts}
    for key, size in sizes.items():
        if given.get(key, "auto") not in ("auto", size):
            raise UserError(
                f"deepspeed settings: {key} = {given[key]!r} contradicts the job, whose batch makes it {size}; "
                "remove it (train.batch_size sets it)"
            )
    return {**sizes, "gradient_accumulation_steps": parts}


def asks(setting: Any) -> bool:
    """Whether a setting asks for something; ``{"enabled": false}`` and ``{"device": "none"}`` do not."""
    if isinstance(setting, Mapping):
        return bool(setting.get("enabled", setting.get("device") != "none"))
    return bool(setting)
