"""DeepSpeed side of the engine: the dense network and its optimizer."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from modules import blocks
from modules.din import TargetAttention
from modules.esu import SequenceAttention
from modules.multitask import BatchedMLP
from trainer.config.deepspeed import SETTINGS
from trainer.console.errors import UserError
from trainer.engine.step_without_waiting import step_without_waiting
from trainer.engine.weight_average import WeightAverage
from trainer.runtime.phase_timer import PhaseClock

INDUCTOR = "inductor"
"""PyTorch's compiler: C++ on a CPU, Triton on a GPU."""

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's moments of a parameter."""


@dataclass(frozen=True)
class DenseOptimizer:
    """Hyper-parameters of the dense network's AdamW (Loshchilov and Hutter, 2019)."""

    learning_rate: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)


class DenseNetwork:
    """Module in a DeepSpeed engine, trained with AdamW on the ranks of the default process group.

    Args:
        module: the dense network; the initial values of the first rank are sent to the others.
        optimizer: hyper-parameters of AdamW.
        settings: settings of :func:`trainer.config.deepspeed.complete_settings`.
        device: device of this rank.
        clock: counts the reduction of gradients as communication.
        origin: file that the settings come from, for messages.
        averaged: keep a mean of the parameters over time.
        compiler: backend of ``torch.compile`` for the passes of training; None computes operation by operation.

    Attributes:
        average: the mean; None if there is none.
        parts: number of micro-batches of a step (``gradient_accumulation_steps``).
        module: the module as DeepSpeed trains it.
        zero_stage: DeepSpeed's ZeRO stage: 0 shares no memory among ranks, 1 the optimizer's, 2 the gradients' too.

    Raises:
        UserError: a setting that DeepSpeed refuses, or there is no C++ compiler for ``compiler``.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: DenseOptimizer,
        settings: Mapping[str, Any],
        *,
        device: torch.device,
        clock: PhaseClock,
        origin: str = SETTINGS,
        averaged: bool = False,
        compiler: str | None = None,
    ) -> None:
        deepspeed = start_deepspeed()
        settings = dict(settings)
        if "zero_optimization" in settings:
            # DeepSpeed allocates a buffer of this size in every step; its default is 500 million elements.
            elements = sum(parameter.numel() for parameter in module.parameters())
            settings["zero_optimization"] = {"reduce_bucket_size": elements, **settings["zero_optimization"]}
        self.parts: int = settings["gradient_accumulation_steps"]
        self._clipping = float(settings.get("gradient_clipping", 0.0))
        self.zero_stage: int = settings.get("zero_optimization", {}).get("stage", 0)
        self._zero = self.zero_stage > 0
        # PyTorch's AdamW: DeepSpeed's would first compile a kernel for minutes, and needs a compiler.
        self._adam = torch.optim.AdamW(
            module.to(device).parameters(),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        check_settings(deepspeed, settings, origin)
        # One of DeepSpeed's optimizers prints its memory usage to stdout, whatever the log level.
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=self._adam, config=settings)
        self.module: nn.Module = self._engine.module
        self.average = WeightAverage(self.module) if averaged else None
        self._compiled = compiler is not None
        if compiler is not None:
            compile_network(self.module, compiler, device)
        if dist.get_world_size() == 1 and not self._zero:
            # There is nothing to reduce, but DeepSpeed would still copy all gradients.
            self._engine.enable_backward_allreduce = False
        reduce = self._engine.allreduce_gradients

        # DeepSpeed calls this method in its backward pass, so wrapping it times the reduction alone.
        def timed_reduce(*arguments: Any, **options: Any) -> None:
            with clock.phase("communication"):
                reduce(*arguments, **options)

        self._engine.allreduce_gradients = timed_reduce

    def __call__(self, *inputs: Any, whole: bool = True) -> Any:
        """Return the module's output. Inputs are float32 or whole numbers, whatever the type of the parameters.

        Args:
            inputs: arguments of the module.
            whole: no size of an input that varies is 0 or 1. The compiler makes these sizes part of a program, and
                would compile another one for the few batches that have them; they are computed without it.
        """
        if not self.module.training:
            return self.module.forward(*inputs)
        # DeepSpeed's forward pass expects a backward pass to follow.
        if whole or not self._compiled:
            return self._engine(*inputs)
        with torch.compiler.set_stance("force_eager"):
            return self._engine(*inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch; after the ``last`` one they are averaged over the ranks."""
        self._engine.backward(loss)
        if not last:
            self._engine.step()

    def step(self, finite: Tensor | None = None) -> float | Tensor:
        """Update the parameters and return the factor by which clipping scaled the gradient, 1 without clipping.

        Args:
            finite: bool scalar on the device; where it is False, neither the parameters nor the optimizer's state
                change. The host then waits for nothing. None: the host knows that the loss is finite.
        """
        norm = None
        if finite is not None:
            parameters = [] if self._zero else list(self.module.parameters())
            norm = step_without_waiting(self._engine, self._adam, finite, parameters, self._clipping)
        else:
            if self._clipping and not self._zero:
                # DeepSpeed clips but does not return the norm. Without ZeRO every rank holds the whole averaged
                # gradient.
                norm = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
            self._engine.step()
        if not self._clipping:
            return 1.0
        if norm is None:
            norm = torch.as_tensor(self._engine.get_global_grad_norm())
        return (self._clipping / (norm + 1e-6)).clamp(max=1.0)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate."""
        for group in self._adam.param_groups:
            group["lr"] = learning_rate

    def allocate(self) -> int:
        """Allocate the optimizer's state now, not in the first step.

        Returns:
            The bytes that gradients take in each step, with the bucket in which ZeRO reduces them.
        """
        self._materialise_moments()
        return (1 + self._zero) * sum(parameter.nbytes for parameter in self.module.parameters())

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the module."""
        self._engine.destroy()

    def state(self) -> dict[str, Any]:
        """Return whole float32 parameters, moments and means by name, buffers, and Adam's step. Collective.

        The state is the same on all ranks.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._materialise_moments()
        parameters: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.module.named_parameters():
            if self._zero:
                parameters[name] = {"parameter": safe_get_full_fp32_param(parameter)}
                parameters[name] |= {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
            else:
                moments = self._adam.state[parameter]
                parameters[name] = {"parameter": parameter.detach()} | {key: moments[key] for key in _MOMENTS}
        steps = [state["step"] for state in self._adam.state.values()]
        whole = {
            "dense": parameters,
            "buffers": dict(self.module.named_buffers()),
            "dense_step": steps[0].cpu().clone(),
        }
        if self.average is None:
            return whole
        for name, mean in self.average.values.items():
            parameters[name]["average"] = mean
        return {**whole, "dense_average": self.average.weight}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any], steps: int) -> None:
        """Load a :meth:`state`, also of another number of ranks or ZeRO stage, that was taken after ``steps`` steps."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.set_parameters({name: saved["parameter"] for name, saved in state["dense"].items()})
        if self.average is not None:
            means = {name: saved["average"] for name, saved in state["dense"].items()}
            self.average.load(means, state["dense_average"])
        for name, parameter in self.module.named_parameters():
            saved = state["dense"][name]
            for key in _MOMENTS:
                if self._zero:
                    safe_set_full_optimizer_state(parameter, saved[key], key)
                else:
                    self._adam.state[parameter][key].copy_(saved[key])
        for name, buffer in self.module.named_buffers():
            buffer.copy_(state["buffers"][name])
        for moments in self._adam.state.values():
            moments["step"].fill_(float(state["dense_step"]))
        self._engine.global_steps = steps
        self._engine.micro_steps = steps * self.parts
        self._engine.global_samples = steps * self._engine.train_batch_size()

    @torch.no_grad()
    def set_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Set every parameter to a whole float32 value; the optimizer's moments do not change. Collective."""
        from deepspeed.utils import safe_set_full_fp32_param

        self._materialise_moments()
        for name, parameter in self.module.named_parameters():
            # DeepSpeed's setter only sets its float32 copy, not the parameter that the network computes with.
            parameter.copy_(values[name])
            if self._zero:
                safe_set_full_fp32_param(parameter, values[name])
        if self.average is not None:
            self.average.restart()

    def _materialise_moments(self) -> None:
        """Create Adam's moments, which do not exist before its first step."""
        for group in self._adam.param_groups:
            for parameter in group["params"]:
                state = self._adam.state[parameter]
                if "step" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state |= {key: torch.zeros_like(parameter) for key in _MOMENTS}
        if self._zero:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def compile_network(module: nn.Module, backend: str, device: torch.device) -> None:
    """Let ``torch.compile`` compile a network in place, with sizes that may vary from batch to batch.

    The names of parameters, and so checkpoints, stay as they are. ``module.forward`` itself is not compiled. On a CPU
    parts are left out: the attention over histories, whose blocks depend on the lengths of the batch, and what the
    loops of ``modules/compiled.py`` compute.

    Raises:
        UserError: there is no C++ compiler.
    """
    problem = compiler_problem(device) if backend == INDUCTOR else None
    if problem is not None:
        raise UserError(problem)
    on_cpu = blocks.reads_lengths(device)
    for part in module.modules():
        if on_cpu and (isinstance(part, TargetAttention | SequenceAttention) or getattr(part, "compiled", False)):
            part.forward = torch.compiler.disable(part.forward)
        elif isinstance(part, TargetAttention | BatchedMLP):
            part.compiled = False
    module.compile(backend=backend, dynamic=True)


def compiler_problem(device: torch.device) -> str | None:
    """Return why ``torch.compile`` cannot compile for a device on this machine; None if it can."""
    names = [os.environ.get("CXX", "g++")]
    if device.type != "cpu":
        # Triton takes a C compiler.
        names += [os.environ.get("CC", "gcc"), "clang"]
    if any(map(shutil.which, names)):
        return None
    return (
        f"train.compile = true: no C++ compiler is here ({', '.join(names)}), which torch.compile needs; install one, "
        "or set train.compile=false"
    )


def check_settings(deepspeed: Any, settings: Mapping[str, Any], origin: str) -> None:
    """Let DeepSpeed check its settings.

    Args:
        deepspeed: the module.
        settings: settings of :func:`trainer.config.deepspeed.complete_settings`.
        origin: file that the settings come from, for the message.

    Raises:
        UserError: a setting that DeepSpeed refuses, in one line.
    """
    try:
        deepspeed.DeepSpeedConfig(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{origin}: {key} = {first['input']!r}: {first['msg']}") from None
    except (ValueError, deepspeed.DeepSpeedConfigError) as error:
        raise UserError(f"{origin}: {' '.join(str(error).split())}") from None


def import_deepspeed() -> Any:
    """Return the module ``deepspeed``, which prints only errors.

    It is imported late because ``World.join`` decides which device DeepSpeed finds.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def start_deepspeed() -> Any:
    """Return the module ``deepspeed``, initialised on the default process group."""
    deepspeed = import_deepspeed()
    # Prevent compilation: DeepSpeed would build an all-reduce for inference on CPUs when it takes over the process
    # group, and even its check of which ops could be built starts compilers.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    return deepspeed
