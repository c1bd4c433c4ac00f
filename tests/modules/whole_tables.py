"""Initial values for a TableSet that one process holds whole, as the reference of the sharded tables."""

from __future__ import annotations

import torch
from torchrec.modules.embedding_modules import EmbeddingCollection

from modules.embeddings import initial_rows
from modules.table_set import TableSet


@torch.no_grad()
def fill_tables(tables: TableSet, seed: int) -> None:
    """Fill every table of a set on a real device with the initial values that a sharded table starts from."""
    declared = {table.name: table for table in tables.tables}
    for collection in tables.collections:
        assert isinstance(collection, EmbeddingCollection)
        for name, module in collection.embeddings.items():
            module.weight.copy_(initial_rows(declared[name], seed, 0, declared[name].rows))
