"""Pre-trained vectors as inputs of the ranker: a learnt projection of the distinct vectors of a batch.

A table of vectors is never trained. A batch brings each of its vectors once, and for each id the place of its vector.
So a vector is projected once, however many entries of histories have it, and the result is read like the rows of an
embedding table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

EPSILON = 1e-12
"""Mean square that is added to that of a vector, so that a vector of zeros stays one."""

LARGE = 1e15
"""Largest element whose vector is squared as it is; squares stay finite in float32, also in sums."""


@dataclass(frozen=True)
class BatchVectors:
    """Vectors of one table in a batch.

    Attributes:
        vectors: distinct vectors, ``[distinct, width]`` float16 or float32.
        places: lookup -> index of each id's vector in ``vectors``, ``[ids]`` int64; -1 for an id without a vector.
        entries: lookup of a history -> lookup of a table with one id for each entry, which has the same lengths; the
            lookups that are not here have one id for each row.
    """

    vectors: Tensor
    places: dict[str, Tensor]
    entries: dict[str, str] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """Return all tensors."""
        return [self.vectors, *self.places.values()]

    def changed(self, change: Any) -> BatchVectors:
        """Return the vectors with ``change`` applied to each tensor."""
        places = {name: change(places) for name, places in self.places.items()}
        return BatchVectors(change(self.vectors), places, self.entries)

    def part(self, bounds: dict[str, tuple[int, int]]) -> BatchVectors:
        """Return a part of the ids, with the vectors of these alone.

        Args:
            bounds: lookup -> first id, and the one after the last.
        """
        places = {name: self.places[name][start:stop] for name, (start, stop) in bounds.items()}
        # Place 0 stands for no vector here, so that no mask of the ids is needed.
        used = torch.zeros(len(self.vectors) + 1, dtype=torch.bool, device=self.vectors.device)
        for of_lookup in places.values():
            used[of_lookup + 1] = True
        used[0] = False
        new_place = used.cumsum(0) - 1
        new_place[0] = -1
        return BatchVectors(
            self.vectors[used[1:]], {name: new_place[at + 1] for name, at in places.items()}, self.entries
        )


class VectorProjection(nn.Module):
    """Learnt linear projection of vectors, with a learnt vector for ids that have none.

    A vector x is divided by its root mean square first, because language models give vectors of very different lengths.
    The initial weights give results of length about 1, so that the product of two of them begins like a cosine.

    Args:
        width: width of the vectors.
        dim: width of the results.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dim)
        self.missing = nn.Parameter(torch.zeros(dim))
        with torch.no_grad():
            self.linear.weight.uniform_(-1, 1).mul_(math.sqrt(3 / (width * dim)))
            self.linear.bias.zero_()

    def forward(self, vectors: BatchVectors) -> dict[str, Tensor]:
        """Return lookup -> projected vectors of its ids, ``[ids, dim]``, of the parameters' type."""
        x = vectors.vectors.float()
        # Squares of elements above 1e19 are infinite in float32.
        largest = x.abs().amax(1, keepdim=True)
        x = x / torch.where(largest > LARGE, largest, 1)
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPSILON)
        rows = torch.cat([self.missing[None], self.linear(x.to(self.missing.dtype))])
        return {name: rows.index_select(0, places + 1) for name, places in vectors.places.items()}


class VectorProjections(nn.ModuleDict):
    """Projections by the name of their table, which may be any identifier.

    A plain ``ModuleDict`` refuses the names of its methods, such as ``items`` and ``type``.

    Args:
        sizes: table -> width of its vectors, and width of the results.
    """

    def __init__(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__({name: VectorProjection(width, dim) for name, (width, dim) in sizes.items()})

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a projection; a method or attribute of the same name stays what it is."""
        assert module is not None, "a projection cannot be left out"
        self._modules[name] = module

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, such as the mode ``training``; projections are items only."""
        object.__setattr__(self, name, value)
