"""Engine of Foresight's predictor under DeepSpeed: gradients of a step on any number of ranks, its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from modules.foresight import CodeSample, ForesightPredictor
from trainer.checkpoint.model_state import in_blocks, read_state
from trainer.checkpoint.snapshot_memory import SnapshotMemory
from trainer.config.deepspeed import SETTINGS
from trainer.engine.dense_engine import DenseNetwork, DenseOptimizer
from trainer.runtime.host_copy import HostCopy
from trainer.runtime.phase_timer import PhaseClock
from trainer.semantic_ids.foresight_data import ForesightBatch


class PredictorEngine:
    """DeepSpeed engine around the predictor, trained with AdamW on the ranks of the default process group.

    Args:
        predictor: the predictor; the initial values of the first rank are sent to the others.
        optimizer: hyper-parameters of AdamW.
        settings: settings of :func:`trainer.config.deepspeed.complete_settings`.
        device: device of this rank.
        origin: file that the settings come from, for messages.

    Attributes:
        predictor: the predictor as DeepSpeed trains it.
        parts: number of micro-batches of a step.

    Raises:
        UserError: a setting that DeepSpeed refuses.
    """

    def __init__(
        self,
        predictor: ForesightPredictor,
        optimizer: DenseOptimizer,
        settings: Mapping[str, Any],
        device: torch.device,
        origin: str = SETTINGS,
    ) -> None:
        self._clock = PhaseClock(device)
        self._network = DenseNetwork(
            predictor.train(), optimizer, settings, device=device, clock=self._clock, origin=origin
        )
        assert isinstance(self._network.module, ForesightPredictor)
        self.predictor: ForesightPredictor = self._network.module
        self.parts, self._world = self._network.parts, dist.get_world_size()
        self._snapshot = SnapshotMemory()
        # The loss was read before the step; the norm of the gradient is tested on the device.
        self._finite = torch.ones((), dtype=torch.bool, device=device)

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage."""
        return self._network.zero_stage

    def backward(self, batches: Sequence[ForesightBatch], rows: int, sample: CodeSample | None) -> float:
        """Accumulate the gradients of this rank's micro-batches; the loss of a step is the mean over all its rows.

        Args:
            batches: ``parts`` micro-batches; some may be empty.
            rows: rows of the step, over all ranks.
            sample: codes of a sampled softmax; None for the full one.

        Returns:
            Sum of the losses of this rank's rows.
        """
        # DeepSpeed averages over ranks and micro-batches, which may have different numbers of rows.
        scale = self._world * self.parts / rows
        losses = []
        for part, batch in enumerate(batches):
            found = self._network(batch.code, batch.length)
            loss = self.predictor.losses(batch.code, found, batch.target, sample).sum()
            # Copied before the backward pass is queued, with which a GPU is then busy while the loss is read.
            losses.append(HostCopy((loss,)))
            self._network.backward(loss * scale, last=part + 1 == self.parts)
        self._clock.lap()
        return sum(number for copy in losses for number in copy.numbers())

    def step(self) -> None:
        """Update the predictor with the gradients of :meth:`backward`."""
        self._network.step(self._finite)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the following steps."""
        self._network.set_learning_rate(learning_rate)

    def state(self, *, copy: bool = False) -> dict[str, Any]:
        """Return parameters, moments and buffers in full; ``copy`` them into separate host memory. Collective."""
        return in_blocks(self._network.state(), self._snapshot if copy else None)

    def load(self, path: Path, steps: int, control: dist.ProcessGroup) -> None:
        """Load a :meth:`state` from a checkpoint that was written after ``steps`` steps. Collective.

        Raises:
            UserError: the checkpoint cannot be read, or belongs to a predictor of another size.
        """
        # A copy of the state has tensors of the right shapes to read into.
        state = self.state(copy=True)
        read_state(state, path, control)
        self._network.load_state(state, steps)

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the predictor."""
        self._network.close()
