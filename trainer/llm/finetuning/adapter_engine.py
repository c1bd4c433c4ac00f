"""Training engine of a LoRA adapter under DeepSpeed's ZeRO: optimizer steps, saving and loading the full state."""

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
from trainer.checkpoint.snapshot_memory import SnapshotMemory
from trainer.config.deepspeed import SETTINGS
from trainer.config.finetune import FinetuneOptimizerConfig
from trainer.engine.dense_engine import check_settings, start_deepspeed
from trainer.engine.step_without_waiting import step_without_waiting
from trainer.llm.finetuning.answer_loss import AnswerModel
from trainer.llm.finetuning.packed_attention import row_multiple
from trainer.llm.finetuning.packed_batch import TokenBatch
from trainer.runtime.host_copy import HostCopy

_MOMENTS = ("exp_avg", "exp_avg_sq")


@contextmanager
def partitioned_loading(settings: Mapping[str, Any]) -> Iterator[None]:
    """Make transformers load a model partitioned over the ranks under ZeRO 3, so that no rank holds the whole model.

    Args:
        settings: DeepSpeed settings from :func:`trainer.config.deepspeed.complete_settings`. Under ZeRO 1 and 2 the
            context manager does nothing.
    """
    if settings["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    start_deepspeed()
    # transformers keeps a weak reference to this object: partitioned loading is on while the object is alive.
    keep_alive = HfDeepSpeedConfig(dict(settings))
    try:
        yield
    finally:
        del keep_alive


class AdapterEngine:
    """DeepSpeed engine around a model with an adapter, trained with AdamW on the ranks of the default process group.

    Args:
        model: model from :func:`trainer.llm.models.base_model.add_adapter`, with the same initial values on all
            ranks. Only parameters that require a gradient are trained, kept in the optimizer and saved in checkpoints.
        optimizer: AdamW hyper-parameters.
        settings: DeepSpeed settings from :func:`trainer.config.deepspeed.complete_settings`.
        device: device of this rank.
        checkpointing: recompute the layers' activations in the backward pass (gradient checkpointing).
        origin: file that the settings come from, for messages.
        without_waiting: let the device test the norm of the gradient, so that the host waits for the device once in a
            step, for the loss. Not under ZeRO 3 or with offload, where DeepSpeed itself waits. None: on a GPU, where
            it is possible.

    Attributes:
        parts: number of micro-batches in a step (``gradient_accumulation_steps``).
        row_multiple: number of tokens of which the row length of a batch is a multiple.
        network: the module that DeepSpeed trains.
        zero_stage: ZeRO stage: 1 partitions optimizer states, 2 also gradients, 3 also parameters.
        parameters: numbers of ``trainable`` and of ``all`` parameters, of all ranks together.

    Raises:
        UserError: DeepSpeed refuses a setting.
        RuntimeError: DeepSpeed returned another engine or ZeRO stage than requested.
    """

    def __init__(
        self,
        model: Any,
        optimizer: FinetuneOptimizerConfig,
        settings: Mapping[str, Any],
        *,
        device: torch.device,
        checkpointing: bool = False,
        origin: str = SETTINGS,
        without_waiting: bool | None = None,
    ) -> None:
        deepspeed = start_deepspeed()
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        network = AnswerModel(model).train()
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        # Under ZeRO 3 a parameter that was loaded in parts holds no values, but knows its size.
        sizes = [(getattr(value, "ds_numel", value.numel()), value.requires_grad) for value in network.parameters()]
        self.parameters = {"trainable": sum(n for n, own in sizes if own), "all": sum(n for n, _ in sizes)}
        self.parts: int = settings["gradient_accumulation_steps"]
        self.row_multiple = row_multiple(network.causal.config._attn_implementation)
        self.zero_stage: int = settings["zero_optimization"]["stage"]
        if without_waiting is None:
            without_waiting = device.type == "cuda" and not _waits(settings["zero_optimization"])
        self._model, self._snapshot = model, SnapshotMemory()
        self._world = dist.get_world_size()
        # AdamW of torch, because DeepSpeed's AdamW compiles a kernel first, which takes minutes and needs a compiler.
        self._adam = torch.optim.AdamW(
            trained,
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
            # Only the fused form can leave out an update without asking the host.
            fused=True if without_waiting else None,
        )
        # The loss is read before the step; the norm of the gradient is tested on the device.
        self._finite = torch.ones((), dtype=torch.bool, device=device) if without_waiting else None
        completed = {
            **settings,
            # DeepSpeed allocates a buffer of reduce_bucket_size elements, 500 million by default. With optimizer
            # offload it requires its own Adam unless zero_force_ds_cpu_optimizer is false.
            "zero_optimization": {
                "reduce_bucket_size": sum(map(torch.numel, trained)),
                **settings["zero_optimization"],
            },
            "zero_force_ds_cpu_optimizer": False,
        }
        check_settings(deepspeed, completed, origin)
        # One of DeepSpeed's optimizers prints its memory usage to stdout at any log level.
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(model=network.to(device), optimizer=self._adam, config=completed)
        if not isinstance(self._engine, deepspeed.DeepSpeedEngine) or (
            self._engine.zero_optimization_stage() != self.zero_stage
        ):
            raise RuntimeError(f"requested DeepSpeed ZeRO {self.zero_stage}, got {type(self._engine).__name__}")
        self.network: nn.Module = self._engine.module

    @property
    def names(self) -> tuple[str, str]:
        """Class names of the DeepSpeed engine and its optimizer, for ``metrics.json``."""
        return type(self._engine).__name__, type(self._engine.optimizer).__name__

    def backward(self, batches: Sequence[TokenBatch], weight: float) -> float:
        """Accumulate the gradients of this rank's micro-batches.

        The loss of a step is the weighted mean over all its answer tokens, on all ranks.

        Args:
            batches: ``parts`` micro-batches.
            weight: sum of the weights of all answers in the step, over all ranks. It is the number of answer tokens
                if every token has weight 1.

        Returns:
            Unweighted sum of the losses of this rank's answer tokens.
        """
        # DeepSpeed averages over ranks and micro-batches, but these have different numbers of answer tokens: undo its
        # average and divide by the total weight of the step instead.
        scale = self._world * self.parts / weight
        sums: list[Tensor] = []
        for part, batch in enumerate(batches):
            losses = self._engine(batch)
            weights = batch.weights.index_select(0, batch.of_answers(batch.segments))
            sums.append(losses.detach().sum())
            if part + 1 == self.parts:
                # Before the last backward pass is queued, with which a GPU is then busy while the sums are read.
                copy = HostCopy(sums)
            self._engine.backward((losses * weights).sum() * scale)
            if part + 1 < self.parts:
                # DeepSpeed counts micro-batches in step(); only the call after the last one updates the parameters.
                self._engine.step()
        return sum(copy.numbers())

    def step(self) -> None:
        """Update the adapter with the gradients of :meth:`backward`, unless their norm is not finite."""
        if self._finite is None:
            self._engine.step()
        else:
            step_without_waiting(self._engine, self._adam, self._finite, (), self._engine.gradient_clipping())

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the following steps."""
        for group in self._adam.param_groups:
            group["lr"] = learning_rate

    @torch.no_grad()
    def answer_losses(self, batch: TokenBatch) -> Tensor:
        """Compute negative log-likelihoods ``[answer tokens]`` without dropout. Collective under ZeRO 3."""
        # Not self._engine(batch): DeepSpeed's forward pass expects a backward pass to follow.
        self.network.eval()
        try:
            losses: Tensor = self.network(batch)
        finally:
            self.network.train()
        return losses

    def adapter(self) -> dict[str, Tensor]:
        """Return full float32 values of the trained parameters by peft's names, the same on all ranks. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(parameter) for name, parameter in self._trained()}

    def state(self, *, copy: bool = False) -> dict[str, Any]:
        """Return the trained parameters and their Adam moments in full and float32, and Adam's step. Collective.

        Args:
            copy: copy the tensors into separate host memory.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        self._materialise_moments()
        adapter = {
            name: {"parameter": values} | {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
            for (name, parameter), values in zip(self._trained(), self.adapter().values(), strict=True)
        }
        steps = [state["step"] for state in self._adam.state.values() if "step" in state]
        return in_blocks({"adapter": adapter, "adapter_step": steps[0].cpu().clone()}, self._snapshot if copy else None)

    def load(self, path: Path, steps: int, control: dist.ProcessGroup) -> None:
        """Load a :meth:`state` from a checkpoint, written by any number of ranks under any ZeRO stage. Collective.

        Args:
            path: model directory of the checkpoint.
            steps: number of optimizer steps of the checkpoint.
            control: a gloo group of all ranks.

        Raises:
            UserError: the checkpoint cannot be read, or belongs to another adapter.
        """
        # A state of the current adapter provides tensors of the expected shapes to read into.
        state = self.state()
        read_state(state, path, control)
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
        # DeepSpeed's setters change the float32 master copy only; update the copy that the network computes with too.
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
        """Remove DeepSpeed's hooks from the network."""
        self._engine.destroy()

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, value) for name, value in self._model.named_parameters() if value.requires_grad)

    def _materialise_moments(self) -> None:
        """Create Adam's moments, which do not exist before the first step, so that they can be saved or loaded into."""
        zero = self._engine.optimizer
        if self.zero_stage == 3:
            flat = zero.fp32_partitioned_groups_flat
        else:
            flat = [parameter for group in self._adam.param_groups for parameter in group["params"]]
        for parameter in flat:
            state = self._adam.state[parameter]
            if "step" not in state:
                # The fused form counts its steps on the device.
                counter = parameter.device if self._finite is not None else torch.device("cpu")
                state["step"] = torch.zeros((), dtype=torch.float32, device=counter)
                state |= {key: torch.zeros_like(parameter) for key in _MOMENTS}
        if self.zero_stage != 3:
            # ZeRO 1 and 2 link parameters to their moments lazily; the accessors of deepspeed.utils need the links.
            zero._lazy_init_hp_params_optimizer_state()


def _waits(zero: Mapping[str, Any]) -> bool:
    """Return whether DeepSpeed's optimizer waits for the device in each step, by its settings of ZeRO."""
    offload = zero.get("offload_optimizer") or {}
    return zero["stage"] == 3 or offload.get("device", "none") != "none"
