"""Optimizer step of a DeepSpeed engine for which the host waits for nothing of the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def step_without_waiting(
    engine: Any, adam: torch.optim.AdamW, finite: Tensor, whole: Sequence[nn.Parameter], clipping: float
) -> Tensor | None:
    """Update the parameters of an engine with its gradients, unless a flag or the norm of the gradient forbids it.

    DeepSpeed reads the norm of the gradient on the host, to leave out a step whose norm is not finite. Here the device
    itself leaves it out.

    Args:
        engine: a DeepSpeed engine without ZeRO, or under ZeRO 1 or 2 without offload.
        adam: its optimizer, PyTorch's fused AdamW.
        finite: bool scalar on the device; where it is False, neither the parameters nor the optimizer's state change.
        whole: the trained parameters without ZeRO, where every rank holds the whole averaged gradient; else empty.
        clipping: largest norm of the gradient; 0 for no limit.

    Returns:
        Norm of the gradient without ZeRO, if there is a limit; else None.
    """

    def skip_unless(valid: Tensor) -> None:
        # PyTorch's fused AdamW reads this flag on the device: with 1 it leaves parameters and moments as they are.
        adam.found_inf = (~valid).float()  # type: ignore[attr-defined]

    def norm_is_invalid(norm: Tensor) -> bool:
        skip_unless(finite & torch.isfinite(norm) & (norm >= 0))
        return False

    skip_unless(finite)
    norm: Tensor | None = None
    if clipping and whole:
        parameters = [parameter for parameter in whole if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        norm_is_invalid(norm)
        # DeepSpeed's clipping copies constants to the device in every step, which waits.
        engine.clip_fp32_gradients = partial(nn.utils.clip_grads_with_norm_, parameters, clipping, norm)
    # DeepSpeed tests the norm on the host, to leave the step out; the flag above does it on the device.
    with _nothing_read(engine.optimizer, norm_is_invalid):
        engine.step()
    return norm


@contextmanager
def _nothing_read(optimizer: Any, norm_is_invalid: Callable[[Tensor], bool]) -> Iterator[None]:
    """Replace what DeepSpeed's ZeRO optimizer reads from the device in a step.

    Args:
        optimizer: DeepSpeed's optimizer; PyTorch's own without ZeRO, which reads nothing.
        norm_is_invalid: replaces the test of the gradient's norm; with False the step is not left out.
    """
    from deepspeed.runtime.zero import stage_1_and_2

    def mark_invalid(norm: Tensor, device: object = None, val: float = -1.0) -> None:
        # DeepSpeed's own copies the value to the device first.
        norm.masked_fill_(~torch.isfinite(norm), val)

    replaced = {"is_invalid_grad_norm": norm_is_invalid, "mask_nan_or_inf_with_val_inplace": mark_invalid}
    originals = {name: getattr(stage_1_and_2, name) for name in replaced}
    for name, function in replaced.items():
        setattr(stage_1_and_2, name, function)
    # With bf16 every gradient would be tested on the host as well; the test of the norm finds the same.
    optimizer.check_overflow = lambda partition_gradients=True: None
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(stage_1_and_2, name, function)
