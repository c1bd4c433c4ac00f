"""Embedding tables as TorchRec modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from modules.embeddings import Lookup, Table, group_lookups


class TableSet(nn.Module):
    """All tables of a model: one TorchRec ``EmbeddingCollection`` for each embedding dimension.

    On the meta device the tables take no memory until a sharding plan assigns the shards to ranks.

    Tables of one dimension share a collection, because each collection costs one exchange of ids and of rows.

    Args:
        tables: declarations of the tables.
        lookups: declarations of the lookups.
        device: ``meta`` for tables that are sharded later; a real device holds every table whole, filled with zeros.

    Attributes:
        tables: the declarations as given.
        groups: ``((dim, lookups), ...)``, see :func:`group_lookups`.
        collections: one ``EmbeddingCollection`` for each group, in the same order.

    Raises:
        ValueError: wrong declarations, see :func:`group_lookups`.
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
        """Look up all ids.

        Args:
            ids: for each group the int64 row numbers of its lookups.

        Returns:
            Lookup name -> values ``[ids of the batch, dim]`` float32 in the order of the ids, lengths ``[batch]``.
        """
        # Sharded collections return awaitables: all of them start their exchange before the first one is waited for.
        found = [collection(keyed) for collection, keyed in zip(self.collections, ids, strict=True)]
        return {name: jagged for embedded in found for name, jagged in embedded.items()}
