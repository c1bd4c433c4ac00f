"""Contrastive loss of the histories, one row and one negative at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def alignment_loss(
    histories: list[list[Tensor]],
    user_id: list[int],
    temperature: float,
    *,
    symmetric: bool = True,
    detached: str = "none",
) -> Tensor:
    """Return the loss, summed over rows, of each history but the first, which is the anchor.

    Args:
        histories: for each history and row, its entries ``[entries, dim]``.
        user_id: user of each row.
    """

    def unit(entries: Tensor) -> Tensor | None:
        if not len(entries):
            return None
        mean = entries.mean(0)
        return mean / mean.norm()

    def one_way(queries: list[Tensor | None], keys: list[Tensor | None]) -> Tensor:
        total = histories[0][0].new_zeros(())
        for i, query in enumerate(queries):
            own = keys[i]
            if query is None or own is None:
                continue
            compared = [query @ own / temperature]
            for j, key in enumerate(keys):
                if key is not None and user_id[j] != user_id[i]:
                    compared.append(query @ key / temperature)
            total = total - torch.stack(compared).log_softmax(0)[0]
        return total

    anchor, *others = ([unit(entries) for entries in rows] for rows in histories)
    if detached == "anchor":
        anchor = [side if side is None else side.detach() for side in anchor]
    if detached == "others":
        others = [[side if side is None else side.detach() for side in rows] for rows in others]
    if not symmetric:
        return torch.stack([one_way(anchor, other) for other in others])
    return torch.stack([(one_way(anchor, other) + one_way(other, anchor)) / 2 for other in others])
