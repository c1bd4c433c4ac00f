"""Training loop of an adapter: the host waits for the device once in a step, and no bit of the result depends on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.device_waits import Waits
from tests.llm.tiny import BATCH, OPTIMIZER, STEPS, StopAfter, adapted, answers_of, batches, job, samples, write_samples
from trainer.config.deepspeed import LANGUAGE_MODEL, complete_settings
from trainer.finetune import run_job
from trainer.llm.finetuning import prepare
from trainer.llm.finetuning.adapter_engine import AdapterEngine
from trainer.llm.finetuning.token_files import Tokens
from trainer.llm.finetuning.train_loop import _AdapterSteps
from trainer.llm.models.base_model import BaseModelFiles
from trainer.runtime.distributed import World
from trainer.runtime.preemption import Preempted, Preemption

SETTINGS = """{
  "zero_optimization": {"stage": 2}, "gradient_clipping": 1.0, "gradient_accumulation_steps": 2,
  "bf16": {"enabled": %s}
}"""


class Trained(NamedTuple):
    """A run, with the calls of each step for which the host would have waited for a GPU."""

    losses: list[float]
    adapter: dict[str, torch.Tensor]
    waits: list[list[str]]


def train(directory: Path, name: str, *, without_waiting: bool, bf16: bool, stop_after: int | None = None) -> Trained:
    """Run a job, and if it is to stop in the middle, the same job again."""
    (directory / "settings.json").write_text(SETTINGS % str(bf16).lower())
    of_train = {"epochs": 2, "deepspeed": str(directory / "settings.json"), "deterministic": True}
    config = job(directory, directory / name, train=of_train)
    waits, starts = Waits(), list[int]()
    backward, begin = _AdapterSteps.backward, torch.optim.AdamW.__init__

    def counted_backward(self: _AdapterSteps, step: int) -> Any:
        starts.append(len(waits.calls))
        return backward(self, step)

    with pytest.MonkeyPatch.context() as patch, World.join("cpu") as world:
        patch.setattr(prepare, "AdapterEngine", partial(AdapterEngine, without_waiting=without_waiting))
        # The form of a GPU, which rounds in another order than the CPU's own.
        patch.setattr(torch.optim.AdamW, "__init__", lambda self, *a, fused=None, **k: begin(self, *a, fused=True, **k))
        patch.setattr(_AdapterSteps, "backward", counted_backward)
        if stop_after is not None:
            with suppress(Preempted):
                run_job(config, world, StopAfter(stop_after))
        with waits if without_waiting and stop_after is None else nullcontext():
            document = run_job(config, world, Preemption())
    adapter = load_file(directory / name / "adapter" / "adapter_model.safetensors")
    of_steps = [waits.calls[start:stop] for start, stop in pairwise(starts)]
    return Trained(document["training"]["loss"], adapter, of_steps)


def same(first: Trained, second: Trained) -> bool:
    return (
        first.losses == second.losses
        and first.adapter.keys() == second.adapter.keys()
        and all(torch.equal(value, second.adapter[name]) for name, value in first.adapter.items())
    )


@pytest.mark.parametrize("bf16", [False, True])
def test_the_host_waits_for_the_device_once_a_step_and_no_bit_changes(tmp_path: Path, bf16: bool) -> None:
    write_samples(tmp_path)
    at_once = train(tmp_path, "at once", without_waiting=False, bf16=bf16)
    late = train(tmp_path, "late", without_waiting=True, bf16=bf16)
    assert len(late.waits) > 3
    # Adam's moments and DeepSpeed's buffers are made in the first step.
    assert late.waits[1:] == (len(late.waits) - 1) * [["values of a step"]]
    assert same(at_once, late)
    if bf16:
        assert same(late, train(tmp_path, "stopped", without_waiting=True, bf16=bf16, stop_after=2))


@pytest.mark.parametrize("without_waiting", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing(base: BaseModelFiles, without_waiting: bool) -> None:
    tokens = Tokens.of(samples(150), base.tokenizer, 64)
    options = {"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0, "gradient_accumulation_steps": 2}
    with World.join("cpu") as world:
        settings = complete_settings(options, BATCH, 1, LANGUAGE_MODEL)
        engine = AdapterEngine(adapted(base), OPTIMIZER, settings, device=world.device, without_waiting=without_waiting)
        kept: dict[str, torch.Tensor] = {}
        for step in range(STEPS):
            before = {name: value.clone() for name, value in engine.adapter().items()}
            engine.backward(batches(tokens, step, 0, 1), float(answers_of(tokens, step).sum()))
            broken = step == 2
            if broken:
                next(iter(engine._engine.optimizer.averaged_gradients.values()))[0].fill_(torch.inf)
            engine.step()
            kept = {name: value.clone() for name, value in engine.adapter().items()}
            assert all(torch.equal(value, before[name]) == broken for name, value in kept.items()), step
        engine.close()
    assert all(value.isfinite().all() for value in kept.values())


READ, WRITTEN = "_local_scalar_dense in", "a value to the device in"
LOSS = {"values of a step": 1}
DEEPSPEED: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, int]]]] = {
    # The norm of the gradient decides on the host if the step is made.
    "zero 3": (
        {"stage": 3},
        lambda trained: {
            f"{WRITTEN} stage3.py:get_grad_norm_direct": 1,
            f"{READ} utils.py:is_invalid_grad_norm": 1,
            # Adam's number of steps, which this form has on the host.
            f"{READ} stage3.py:step_with_gradscaler": 1,
        },
    ),
    # The optimizer is on the host, and needs there what it must know of each parameter's gradient.
    "offload": (
        {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        lambda trained: {
            f"{READ} stage_1_and_2.py:update_offload_overflow_tracker": trained,
            f"{READ} stage_1_and_2.py:complete_grad_norm_calculation_for_cpu_offload": trained + 1,
            f"{WRITTEN} stage_1_and_2.py:complete_grad_norm_calculation_for_cpu_offload": 1,
            f"{READ} utils.py:is_invalid_grad_norm": 2,
            f"{READ} stage_1_and_2.py:_optimizer_step": 1,
        },
    ),
}


@pytest.mark.parametrize("case", DEEPSPEED)
def test_what_deepspeed_reads_on_the_host_in_a_step(base: BaseModelFiles, case: str) -> None:
    """Under ZeRO 3 and with offload. It also waits for its streams, which a CPU does not have."""
    zero, expected = DEEPSPEED[case]
    tokens, waits = Tokens.of(samples(150), base.tokenizer, 64), Waits()
    options = {"zero_optimization": zero, "gradient_clipping": 1.0, "gradient_accumulation_steps": 2}
    with World.join("cpu") as world:
        settings = complete_settings(options, BATCH, 1, LANGUAGE_MODEL)
        engine = AdapterEngine(adapted(base), OPTIMIZER, settings, device=world.device)
        for step in range(STEPS):
            parts, weight = batches(tokens, step, 0, 1), float(answers_of(tokens, step).sum())
            waits.calls.clear()
            with waits:
                engine.backward(parts, weight)
                engine.step()
        trained = len(engine.adapter())
        engine.close()
    assert trained > 1 and Counter(waits.calls) == LOSS | expected(trained)
