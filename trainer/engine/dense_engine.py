"""The DeepSpeed side of the engine: the dense network and its optimizer."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from trainer.console.errors import UserError
from trainer.runtime.phase_timer import PhaseClock

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class DenseOptimizer:
    """AdamW of the dense network (Loshchilov and Hutter, 2019)."""

    learning_rate: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)


class DenseNetwork:
    """A module in a DeepSpeed engine, trained with AdamW on the ranks of the default process group.

    Args:
        module: the first rank's initial values are sent to the others.
        optimizer: its hyper-parameters.
        settings: of :func:`trainer.config.deepspeed.complete_settings`.
        device: of this rank.
        clock: the reduction of gradients is counted as communication.

    Attributes:
        parts: into how many parts the rows of a step are cut (``gradient_accumulation_steps``).
        module: as DeepSpeed trains it.
        zero_stage: over how much of the optimizer the ranks share the memory.

    Raises:
        UserError: a setting that DeepSpeed refuses.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: DenseOptimizer,
        settings: Mapping[str, Any],
        *,
        device: torch.device,
        clock: PhaseClock,
    ) -> None:
        deepspeed = start_deepspeed()
        settings = dict(settings)
        if "zero_optimization" in settings:
            # DeepSpeed makes a buffer of this size in every step, by default of 500 million elements.
            elements = sum(parameter.numel() for parameter in module.parameters())
            settings["zero_optimization"] = {"reduce_bucket_size": elements, **settings["zero_optimization"]}
        self.parts: int = settings["gradient_accumulation_steps"]
        self._clipping = float(settings.get("gradient_clipping", 0.0))
        self.zero_stage: int = settings.get("zero_optimization", {}).get("stage", 0)
        self._zero = self.zero_stage > 0
        # torch's own: DeepSpeed's would compile a kernel first, minutes of work that need a compiler.
        self._adam = torch.optim.AdamW(
            module.to(device).parameters(),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        check_settings(deepspeed, settings)
        # One of DeepSpeed's optimizers prints its memory usage, whatever the level of its log.
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=self._adam, config=settings)
        self.module: nn.Module = self._engine.module
        if dist.get_world_size() == 1 and not self._zero:
            # There is nothing to reduce, and DeepSpeed would copy all gradients to do so.
            self._engine.enable_backward_allreduce = False
        reduce = self._engine.allreduce_gradients

        def timed_reduce(*arguments: Any, **options: Any) -> None:
            with clock.phase("communication"):
                reduce(*arguments, **options)

        self._engine.allreduce_gradients = timed_reduce

    def __call__(self, embedded: Mapping[str, Tensor], lengths: Mapping[str, Tensor], dense: Tensor) -> Tensor:
        """Logits ``[rows, behaviours]``. The module gets float32, whatever the type of its parameters."""
        # DeepSpeed's forward pass expects a backward pass to follow.
        module = self._engine if self.module.training else self.module
        return module(embedded, lengths, dense)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Gradients of one part of a step; after the ``last`` they are averaged over the ranks."""
        self._engine.backward(loss)
        if not last:
            self._engine.step()

    def step(self) -> float | Tensor:
        """Update the parameters; returns the factor by which clipping has scaled the gradient, 1 without."""
        norm = None
        if self._clipping and not self._zero:
            # DeepSpeed clips without telling the norm; every rank has the whole averaged gradient here.
            norm = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        self._engine.step()
        if not self._clipping:
            return 1.0
        if norm is None:
            norm = torch.as_tensor(self._engine.get_global_grad_norm())
        return (self._clipping / (norm + 1e-6)).clamp(max=1.0)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Learning rate from now on."""
        for group in self._adam.param_groups:
            group["lr"] = learning_rate

    def close(self) -> None:
        """Take DeepSpeed's hooks off the module."""
        self._engine.destroy()

    def state(self) -> dict[str, Any]:
        """Whole float32 parameters and moments by name, buffers, and Adam's step; the same on all ranks. Collective."""
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
        return {"dense": parameters, "buffers": dict(self.module.named_buffers()), "dense_step": steps[0].cpu().clone()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any], steps: int) -> None:
        """Take over a :meth:`state` of this or another number of ranks or ZeRO stage, ``steps`` steps into training."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.set_parameters({name: saved["parameter"] for name, saved in state["dense"].items()})
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
        """Give every parameter a whole float32 value; the optimizer's moments stay. Collective."""
        from deepspeed.utils import safe_set_full_fp32_param

        self._materialise_moments()
        for name, parameter in self.module.named_parameters():
            # DeepSpeed's setter leaves the copy that the network computes with as it was.
            parameter.copy_(values[name])
            if self._zero:
                safe_set_full_fp32_param(parameter, values[name])

    def _materialise_moments(self) -> None:
        """Adam has no moments before its first step; make them, so that there is something to save or to load into."""
        for group in self._adam.param_groups:
            for parameter in group["params"]:
                state = self._adam.state[parameter]
                if "step" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state |= {key: torch.zeros_like(parameter) for key in _MOMENTS}
        if self._zero:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def check_settings(deepspeed: Any, settings: dict[str, Any]) -> None:
    """DeepSpeed's own check of its settings, told in a line.

    Raises:
        UserError: a setting that it refuses.
    """
    try:
        deepspeed.DeepSpeedConfig(settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"deepspeed settings: {key} = {first['input']!r}: {first['msg']}") from None
    except (ValueError, deepspeed.DeepSpeedConfigError) as error:
        raise UserError(f"deepspeed settings: {' '.join(str(error).split())}") from None


def start_deepspeed() -> Any:
    """DeepSpeed on the default process group; imported late, since ``World.join`` decides which device it finds."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Nothing is compiled: among the ops is an all-reduce for inference on CPUs, which would be built when the process
    # group is taken over, and only looking which ops could be built starts compilers.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    return deepspeed
