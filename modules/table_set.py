"""Embedding tables as TorchRec modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from modules.embeddings import Lookup, Table, group_lookups, initial_rows


class TableSet(nn.Module):
    """All tables of a model: one TorchRec ``EmbeddingCollection`` per embedding dimension.

    On the meta device no memory is taken until a sharding plan says which rank holds which shard.

    Collections are few because each of them costs its own exchange of ids and of rows between ranks.

    Args:
        tables: their declarations.
        lookups: their declarations.
        device: ``meta`` to be sharded later; a real device holds every table whole, at zero until
            :meth:`initialise`.

    Attributes:
        groups: ``((dim, lookups), ...)``, see :func:`group_lookups`.

    Raises:
        ValueError: see :func:`group_lookups`.
    """

    def __init__(self, tables: Sequence[Table], lookups: Sequence[Lookup], device: torch.device | str = "meta") -> None:
        super().__init__()
        self.tables = tuple(tables)
        self.groups = group_lookups(tables, lookups)
        self.collections = nn.ModuleList(
            EmbeddingCollection(
                tables=[
                    EmbeddingConfig(
                        name=table.name,
                        num_embeddings=table.rows,
                        embedding_dim=table.dim,
                        feature_names=[lookup.name for lookup in members if lookup.table == table.name],
                        init_fn=nn.init.zeros_,
                    )
                    for table in tables
                    if table.dim == dim
                ],
                device=torch.device(device),
            )
            for dim, members in self.groups
        )

    def forward(self, ids: Sequence[KeyedJaggedTensor]) -> dict[str, JaggedTensor]:
        """Look all ids up.

        Args:
            ids: for each group, the int64 rows of its lookups.

        Returns:
            lookup name -> values ``[ids of the batch, dim]`` float32 in the order of the ids, lengths ``[batch]``.
        """
        # Every collection starts its exchange before the first result is waited for.
        found = [collection(keyed) for collection, keyed in zip(self.collections, ids, strict=True)]
        return {name: jagged for embedded in found for name, jagged in embedded.items()}

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fill tables that are held whole (not sharded, not on meta) with :func:`initial_rows`."""
        declared = {table.name: table for table in self.tables}
        for collection in self.collections:
            assert isinstance(collection, EmbeddingCollection)
            for name, module in collection.embeddings.items():
                module.weight.copy_(initial_rows(declared[name], seed, 0, declared[name].rows))
