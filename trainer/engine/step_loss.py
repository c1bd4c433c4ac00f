"""Losses that the hybrid engine trains its dense network on: one that each row has alone, and the interface of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from modules.losses import masked_bce, report_loss
from trainer.data.loading.batch import RankingBatch
from trainer.engine.micro_batches import MicroBatch

PartLoss = Callable[[int, Tensor], Tensor]
"""Loss of a micro-batch, given its number and the network's output: a scalar to be differentiated, in float32, summed
over its rows."""


class StepLoss(Protocol):
    """Loss of the rows of a step."""

    @property
    def labels(self) -> int:
        """Number of columns of the labels of a batch."""

    def begin(
        self, batch: RankingBatch, parts: Sequence[MicroBatch], forward: Callable[[MicroBatch], Tensor]
    ) -> PartLoss:
        """Return the loss of the micro-batches of one step. Collective if the loss compares rows of all ranks.

        Args:
            batch: rows of this rank.
            parts: its micro-batches, in the order in which their losses are asked for.
            forward: returns the network's output for a micro-batch without training on it; the engine computes the
                output that is trained on later, a second time.
        """


@dataclass(frozen=True)
class BehaviourLoss:
    """Masked binary cross-entropy of the behaviours, with retractions where a batch has rows of kind ``slow``.

    Attributes:
        weights: ``[behaviours]``, weights of the behaviours.
        retraction_limit: largest importance weight of a retraction; 0 for no limit.
    """

    weights: Tensor
    retraction_limit: float = 0.0

    @property
    def labels(self) -> int:
        """Number of behaviours."""
        return len(self.weights)

    def begin(
        self, batch: RankingBatch, parts: Sequence[MicroBatch], forward: Callable[[MicroBatch], Tensor]
    ) -> PartLoss:
        """Return the loss of a micro-batch, which needs no other rows."""
        weights = self.weights.to(batch.dense.device)

        def loss(number: int, logits: Tensor) -> Tensor:
            part = parts[number]
            if part.slow is None:
                return masked_bce(logits, part.label, part.mask, weights)[0]
            return report_loss(logits, part.label, part.mask, part.slow, weights, self.retraction_limit)[0]

        return loss
