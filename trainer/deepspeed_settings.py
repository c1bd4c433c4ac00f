"""DeepSpeed's own JSON settings: which of them the engine supports, and the batch sizes that it fills in."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from trainer.errors import UserError

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
    "optimizer": "the dense optimizer is AdamW, set in [optimizer] of the job file",
    "scheduler": "the learning rate schedule is set in [optimizer] of the job file",
    "fp16": "float16 would need its loss scale in the tables' gradients as well; use bf16",
    "amp": "use bf16",
}


def complete_settings(given: Mapping[str, Any], batch_size: int, world: int) -> dict[str, Any]:
    """DeepSpeed's JSON settings as a user gives them, checked, with the batch sizes filled in.

    Args:
        given: the settings.
        batch_size: rows of one rank in an optimizer step; they are cut into ``gradient_accumulation_steps`` parts.
        world: number of ranks.

    Raises:
        UserError: a key that is unknown or that the engine does not support, or a batch size that contradicts.
    """
    for key in given:
        if key in _REFUSED and _enabled(given[key]):
            raise UserError(f"deepspeed settings: {key!r} is not supported: {_REFUSED[key]}")
        if key not in _ACCEPTED and key not in _REFUSED:
            nearest = difflib.get_close_matches(key, _ACCEPTED, n=1, cutoff=0.0)[0]
            raise UserError(f"deepspeed settings: {key!r} is not supported; did you mean {nearest!r}?")
    zero = given.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2):
        raise UserError(
            f"deepspeed settings: zero_optimization.stage = {stage!r}: use 0, 1 or 2; "
            "stage 3 cuts the parameters themselves, and the dense network is small beside the tables"
        )
    for key in ("offload_optimizer", "offload_param", "cpu_offload"):
        if _enabled(zero.get(key)):
            raise UserError(f"deepspeed settings: zero_optimization.{key} is not supported; remove it")
    if stage == 0 and _enabled(given.get("bf16")):
        raise UserError(
            "deepspeed settings: bf16 with zero_optimization.stage = 0 keeps optimizer state that cannot be saved; "
            "use stage 1 or 2"
        )
    parts = given.get("gradient_accumulation_steps", 1)
    if not isinstance(parts, int) or parts < 1 or batch_size % parts:
        raise UserError(
            f"deepspeed settings: gradient_accumulation_steps = {parts!r} does not divide "
            f"the {batch_size} rows that a rank trains on in a step"
        )
    clipping = given.get("gradient_clipping", 0.0)
    if not isinstance(clipping, int | float) or clipping < 0:
        raise UserError(f"deepspeed settings: gradient_clipping = {clipping!r}: a number, 0 for none")
    sizes = {"train_batch_size": batch_size * world, "train_micro_batch_size_per_gpu": batch_size // parts}
    for key, size in sizes.items():
        if given.get(key, "auto") not in ("auto", size):
            raise UserError(
                f"deepspeed settings: {key} = {given[key]!r} contradicts the job, whose batch makes it {size}; "
                "remove it (train.batch_size sets it)"
            )
    return {
        "steps_per_print": 1 << 62,
        **{key: value for key, value in given.items() if key in _ACCEPTED},
        **sizes,
        "gradient_accumulation_steps": parts,
    }


def _enabled(section: Any) -> bool:
    """Whether a setting asks for something: ``{"enabled": false}`` and ``{"device": "none"}`` do not."""
    if isinstance(section, Mapping):
        return bool(section.get("enabled", section.get("device", True) != "none"))
    return bool(section)
