"""In-batch softmax of pairs of users and authors in the engine, with negatives from all ranks.

Every rank gathers the vectors of all ranks and computes the loss of its own rows (``modules/author_fusion.py``); then
the gradients of the authors' vectors are summed over the ranks. So loss and gradients are those of one process with the
joined batch, however the ranks share it.

The loss of a row needs the vectors of all micro-batches. With several of them the vectors are computed once without
gradients, and a second time in the pass that trains on them (Gao et al., 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from modules.author_fusion import in_batch_softmax
from trainer.data.loading.batch import RankingBatch
from trainer.engine.history_alignment import join_rows, row_counts
from trainer.engine.micro_batches import MicroBatch
from trainer.engine.step_loss import PartLoss

BUDGET_BYTES = 1 << 30
"""Memory of the scores that are held at the same time; see ``modules.author_fusion.in_batch_softmax``."""


@dataclass(frozen=True)
class InBatchSoftmax:
    """Loss of batches of pairs, which have ``author_id`` and ``log_q``.

    The network's output is ``[rows, 2 * dim + 1]``: user vector, author vector, and a column that has no loss.

    Attributes:
        temperature: divisor of the products of the vectors.
        control: a gloo group of all ranks.
    """

    temperature: float
    control: dist.ProcessGroup

    @property
    def labels(self) -> int:
        """Number of columns of the labels: every row is a positive pair."""
        return 0

    def begin(
        self, batch: RankingBatch, parts: Sequence[MicroBatch], forward: Callable[[MicroBatch], Tensor]
    ) -> PartLoss:
        """Return the loss of a micro-batch; its gradient is that of the whole batch of all ranks. Collective."""
        bounds = list(accumulate((len(part.dense) for part in parts), initial=0))
        found: tuple[Tensor, Tensor] | None = None
        if len(parts) > 1:
            with torch.no_grad():
                found = self._gradient(batch, torch.cat([forward(part) for part in parts]))

        def loss(number: int, output: Tensor) -> Tensor:
            total, gradient = self._gradient(batch, output.detach()) if found is None else found
            start, stop = list(pairwise(bounds))[number]
            product = (output * gradient[start:stop]).sum()
            # The value is the loss of the whole batch, once; the derivative is the gradient of this part.
            value = product - product.detach()
            return value if number else value + total

        return loss

    def _gradient(self, batch: RankingBatch, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of this rank's rows, and the gradient ``[rows, width]`` of the loss of all. Collective."""
        group = dist.group.WORLD
        assert group is not None
        dim = output.shape[1] // 2
        device = output.device
        no_ids, no_numbers = torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, device=device)
        # A rank that has run out of pairs has an empty batch without these columns.
        author_id = no_ids if batch.author_id is None else batch.author_id
        log_q = no_numbers if batch.log_q is None else batch.log_q
        sizes = row_counts(batch.rows, self.control)
        floats = join_rows(torch.cat([output[:, : 2 * dim].float(), log_q[:, None]], 1), sizes, group)
        ids = join_rows(torch.stack([batch.user_id, author_id], 1), sizes, group)
        first = sum(sizes[: dist.get_rank(group)])
        total, of_user, of_author = in_batch_softmax(
            floats[:, :dim],
            floats[:, dim : 2 * dim],
            floats[:, -1],
            ids[:, 0],
            ids[:, 1],
            slice(first, first + batch.rows),
            self.temperature,
            BUDGET_BYTES,
        )
        if len(sizes) > 1:
            dist.all_reduce(of_author, group=group)
        gradient = torch.zeros_like(output, dtype=torch.float32)
        gradient[:, :dim], gradient[:, dim : 2 * dim] = of_user, of_author[first : first + batch.rows]
        return total, gradient
