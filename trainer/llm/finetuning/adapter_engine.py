"""A LoRA adapter under DeepSpeed's ZeRO: one optimizer step over any number of ranks, and its whole state."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.checkpoint.model_state import State, in_blocks, read_state
from trainer.config.finetune import FinetuneOptimizerConfig
from trainer.engine.dense_engine import check_settings, start_deepspeed
from trainer.llm.finetuning.answer_loss import AnswerModel
from trainer.llm.finetuning.packed_batch import Batch

_MOMENTS = ("exp_avg", "exp_avg_sq")


@contextmanager
def in_shares(settings: Mapping[str, Any]) -> Iterator[None]:
    """Inside, transformers loads a model in the shares of the ranks where ZeRO 3 is asked for: no rank holds it whole.

    Args:
        settings: of :func:`trainer.config.deepspeed.complete_settings`.
    """
    if settings["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    start_deepspeed()
    # transformers knows of it for as long as it lives.
    asked = HfDeepSpeedConfig(dict(settings))
    try:
        yield
    finally:
        del asked


class AdapterEngine:
    """A model with an adapter in a DeepSpeed engine, trained with AdamW on the ranks of the default process group.

    Args:
        model: of :func:`trainer.llm.models.base_model.add_adapter`, with the same initial values on all ranks; what
            requires a gradient is trained, and nothing else is in the optimizer or in a checkpoint.
        optimizer: AdamW's hyper-parameters.
        settings: of :func:`trainer.config.deepspeed.complete_settings`.
        device: of this rank.
        checkpointing: compute the layers' activations again in the backward pass.

    Attributes:
        parts: micro-batches of a step (``gradient_accumulation_steps``).
        network: as DeepSpeed trains it.
        zero_stage: over how much the ranks share the memory.

    Raises:
        UserError: a setting that DeepSpeed refuses.
        RuntimeError: what came out is not the DeepSpeed engine that was asked for.
    """

    def __init__(
        self,
        model: Any,
        optimizer: FinetuneOptimizerConfig,
        settings: Mapping[str, Any],
        *,
        device: torch.device,
        checkpointing: bool = False,
    ) -> None:
        deepspeed = start_deepspeed()
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        network = AnswerModel(model).train()
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.parts: int = settings["gradient_accumulation_steps"]
        self.zero_stage: int = settings["zero_optimization"]["stage"]
        self._model = model
        self._world = dist.get_world_size()
        # torch's own: DeepSpeed's would compile a kernel first, minutes of work that need a compiler.
        self._adam = torch.optim.AdamW(
            trained, lr=optimizer.learning_rate, betas=optimizer.betas, weight_decay=optimizer.weight_decay
        )
        completed = {
            **settings,
            # DeepSpeed makes a buffer of the first size, by default of 500 million elements; and would insist on its
            # own Adam where the optimizer is kept in host memory.
            "zero_optimization": {
                "reduce_bucket_size": sum(map(torch.numel, trained)),
                **settings["zero_optimization"],
            },
            "zero_force_ds_cpu_optimizer": False,
        }
        check_settings(deepspeed, completed)
        # One of DeepSpeed's optimizers prints its memory usage, whatever the level of its log.
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(model=network.to(device), optimizer=self._adam, config=completed)
        if not isinstance(self._engine, deepspeed.DeepSpeedEngine) or (
            self._engine.zero_optimization_stage() != self.zero_stage
        ):
            raise RuntimeError(f"asked for ZeRO {self.zero_stage} of DeepSpeed, got {type(self._engine).__name__}")
        self.network: nn.Module = self._engine.module

    @property
    def names(self) -> tuple[str, str]:
        """Class of the engine and of its optimizer, for the record."""
        return type(self._engine).__name__, type(self._engine.optimizer).__name__

    def backward(self, batches: Sequence[Batch], weight: float) -> float:
        """Gradients of this rank's micro-batches: the weighted mean of the losses of all answer tokens of the step.

        Args:
            batches: ``parts`` of them.
            weight: of all answers in the step, of all ranks; their tokens if every token counts for 1.

        Returns:
            Sum of the losses of this rank's answer tokens, each counted once.
        """
        # DeepSpeed averages over ranks and over micro-batches, which may have any numbers of answer tokens.
        scale = self._world * self.parts / weight
        total = 0.0
        for part, batch in enumerate(batches):
            losses = self._engine(batch)
            weights = batch.weights[batch.segments[batch.answered]]
            self._engine.backward((losses * weights).sum() * scale)
            if part + 1 < self.parts:
                self._engine.step()
            total += float(losses.detach().sum())
        return total

    def step(self) -> None:
        """Update the adapter; :meth:`backward` came before it."""
        self._engine.step()

    def set_learning_rate(self, learning_rate: float) -> None:
        """Learning rate from now on."""
        for group in self._adam.param_groups:
            group["lr"] = learning_rate

    @torch.no_grad()
    def answer_losses(self, batch: Batch) -> Tensor:
        """``[answer tokens]`` negative log-likelihoods without dropout. Collective under ZeRO 3."""
        # DeepSpeed's forward pass expects a backward pass to follow.
        self.network.eval()
        try:
            losses: Tensor = self.network(batch)
        finally:
            self.network.train()
        return losses

    def adapter(self) -> dict[str, Tensor]:
        """Whole float32 values of what is trained, by peft's names; the same on all ranks. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(parameter) for name, parameter in self._trained()}

    def state(self, *, copy: bool = False) -> dict[str, Any]:
        """What is trained, with its moments, whole and in float32, and Adam's step. Collective.

        Args:
            copy: into host memory of its own.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        self._materialise_moments()
        adapter = {
            name: {"parameter": values} | {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
            for (name, parameter), values in zip(self._trained(), self.adapter().values(), strict=True)
        }
        steps = [state["step"] for state in self._adam.state.values() if "step" in state]
        return in_blocks({"adapter": adapter, "adapter_step": steps[0].cpu().clone()}, copy=copy)

    def load(self, path: Path, steps: int) -> None:
        """Take over a :meth:`state` from a checkpoint of any number of ranks and ZeRO stage. Collective.

        Args:
            path: of the checkpoint's model.
            steps: that it has been trained.

        Raises:
            UserError: it cannot be read, or is of another adapter.
        """
        state = self.state()
        group = dist.group.WORLD
        assert group is not None
        read_state(state, path, group)
        self._load(state, steps)

    @torch.no_grad()
    def _load(self, state: State, steps: int) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        saved = state["adapter"]
        for name, parameter in self._trained():
            safe_set_full_fp32_param(parameter, saved[name]["parameter"])
            for key in _MOMENTS:
                safe_set_full_optimizer_state(parameter, saved[name][key], key)
        # DeepSpeed's setter leaves the copy that the network computes with as it was.
        trained = [parameter for _, parameter in self._trained()]
        with deepspeed.zero.GatheredParameters(trained, modifier_rank=0, enabled=self.zero_stage == 3):
            for name, parameter in self._trained():
                parameter.copy_(saved[name]["parameter"])
        for moments in self._adam.state.values():
            if "step" in moments:
                moments["step"].fill_(float(state["adapter_step"]))
        self._engine.global_steps = steps
        self._engine.micro_steps = steps * self.parts
        self._engine.global_samples = steps * self._engine.train_batch_size()

    def close(self) -> None:
        """Take DeepSpeed's hooks off the network."""
        self._engine.destroy()

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, value) for name, value in self._model.named_parameters() if value.requires_grad)

    def _materialise_moments(self) -> None:
        """Adam has no moments before its first step; make them, so that there is something to save or to load into."""
        zero = self._engine.optimizer
        if self.zero_stage == 3:
            flat = zero.fp32_partitioned_groups_flat
        else:
            flat = [parameter for group in self._adam.param_groups for parameter in group["params"]]
        for parameter in flat:
            state = self._adam.state[parameter]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state |= {key: torch.zeros_like(parameter) for key in _MOMENTS}
        if self.zero_stage != 3:
            zero._lazy_init_hp_params_optimizer_state()
