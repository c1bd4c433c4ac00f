"""Alignment of the histories in the engine: a loss on the looked-up rows, with negatives from all ranks.

The loss has no parameters but the tables (``modules/alignment.py``). So it is computed before the dense network runs,
on the whole batch of a step and not on micro-batches: the negatives are the rows of all ranks. Its gradients of the
looked-up rows are added to the network's, and both go back into the tables together.

The ranks need two more collectives. Every rank gathers the sides of all ranks and computes the loss of its own rows;
then the gradients of all sides are summed over the ranks. None of this runs inside a backward pass, so a rank without
rows takes the same steps as the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from modules.alignment import Detached, contrastive_gradient
from modules.embeddings import Lookup
from modules.pooling import mean_by_row

BUDGET_BYTES = 1 << 30
"""Memory of the scores that are held at the same time; see ``modules.alignment.contrastive_gradient``."""


@dataclass(frozen=True)
class Alignment:
    """Settings of the alignment of a model's histories.

    Attributes:
        histories: lookups of the entries of each history, the anchor's first; the first lookup of a history has one id
            for each entry.
        weight: weight of the loss relative to the loss of the behaviours.
        temperature, symmetric, detached: see :func:`modules.alignment.contrastive_loss`.
    """

    histories: Sequence[Sequence[Lookup]]
    weight: float
    temperature: float
    symmetric: bool
    detached: Detached

    def gradients(
        self,
        embedded: Mapping[str, Tensor],
        lengths: Mapping[str, Tensor],
        user_id: Tensor,
        group: dist.ProcessGroup,
        control: dist.ProcessGroup,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of this rank's rows and its gradients of the histories' looked-up rows. Collective.

        Args:
            embedded: lookup name -> ``[ids, dim]`` float32.
            lengths: lookup name -> number of ids of each row, ``[rows]`` int64.
            user_id: ``[rows]`` int64.
            group: group of all ranks for tensors on the device of the lookups.
            control: a gloo group of all ranks.

        Returns:
            The loss without its weight, summed over sides and this rank's rows, a scalar; and lookup name ->
            ``[ids, dim]``, the gradient of ``weight`` times the loss summed over the rows of all ranks.
        """
        names = [key.name for keys in self.histories for key in keys]
        leaves = {name: embedded[name].detach().requires_grad_() for name in names}
        with torch.enable_grad():
            sides = torch.stack([_means(keys, leaves, lengths) for keys in self.histories])
            present = torch.stack([lengths[keys[0].name] > 0 for keys in self.histories])
            sizes = row_counts(len(user_id), control)
            joined = join_rows(sides.detach().transpose(0, 1), sizes, group).transpose(0, 1)
            # User ids and presence flags share one gather.
            facts = join_rows(torch.cat([user_id[:, None], present.t().to(torch.int64)], 1), sizes, group)
            first = sum(sizes[: dist.get_rank(group)])
            own_rows = slice(first, first + len(user_id))
        # In chunks, because the scores of this rank's rows with the rows of all ranks grow with the number of ranks.
        losses, gradient = contrastive_gradient(
            joined,
            facts[:, 1:].t() > 0,
            facts[:, 0],
            own_rows,
            self.temperature,
            symmetric=self.symmetric,
            detached=self.detached,
            weight=self.weight,
            budget_bytes=BUDGET_BYTES,
        )
        if len(sizes) > 1:
            gradient = gradient.contiguous()
            dist.all_reduce(gradient, group=group)
        gradients = torch.autograd.grad(sides, list(leaves.values()), gradient[:, own_rows])
        return losses.sum(), dict(zip(leaves, gradients, strict=True))


def join_rows(rows: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Return the rows of all ranks, in the order of the ranks. Collective.

    Args:
        rows: ``[n, ...]``, rows of this rank.
        sizes: number of rows of each rank.
        group: group of all ranks for tensors on the device of the rows.

    Returns:
        ``[sum of sizes, ...]``.
    """
    most = max(sizes)
    # The ranks know all sizes, so none of them waits where there is nothing to gather.
    if len(sizes) == 1 or not most:
        return rows
    # all_gather_into_tensor needs the same shape on all ranks.
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = rows.new_empty(len(sizes) * most, *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, padded, group=group)
    return torch.cat([of_rank[:size] for of_rank, size in zip(gathered.split(most), sizes, strict=True)])


def row_counts(rows: int, control: dist.ProcessGroup) -> list[int]:
    """Return the number of rows of each rank. Collective."""
    if dist.get_world_size(control) == 1:
        return [rows]
    sizes = torch.empty(dist.get_world_size(control), dtype=torch.int64)
    dist.all_gather_into_tensor(sizes, torch.tensor([rows]), group=control)
    return sizes.tolist()


def _means(keys: Sequence[Lookup], rows: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of each row's entries, ``[batch, dim of an entry]``."""
    entries, count = len(rows[keys[0].name]), lengths[keys[0].name]
    parts = [rows[key.name].view(entries, key.ids_per_entry * rows[key.name].shape[1]) for key in keys]
    return torch.cat([mean_by_row(part, count) for part in parts], 1)
