"""Exchange for dynamic tables: raw ids go to the rank that owns their bucket, which maps them to rows.

Only the owner of a bucket knows if an id has a row. It finds out between the training of one step and the lookup of the
next one, so ids that are sent early change nothing. Ids without a row read row 0 of their table. One rank holds this
row: it broadcasts the row to the others, and they reduce the row's gradients to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection

from trainer.data.features.id_map import hash_rows, hash_salt
from trainer.sparse.cpu_exchange import CpuExchange, CpuRouting
from trainer.sparse.dynamic_tables import DynamicRows


class DynamicRouting(CpuRouting):
    """Owners of the buckets of some lookups of dynamic tables.

    Args:
        collection, sharding, keys, group: see :class:`trainer.sparse.cpu_exchange.CpuRouting`.
        served: names of the lookups that this routing serves, at least one; their tables are dynamic and have this
            sharding.
        rows: table name -> this rank's rows of the table.

    Attributes:
        names: names of the tables, each once.
        rows: this rank's rows of each table of ``names``; None if it has none.
        first_keys: the first lookup of each table of ``names``.
        table_of: ``[lookups]`` int64, index of each lookup's table in ``names``.
        lends: True if this rank broadcasts row 0 of the tables.
        borrows: True if this rank receives row 0 of the tables.
    """

    def __init__(
        self,
        collection: ShardedEmbeddingCollection,
        sharding: str,
        keys: Sequence[str],
        group: dist.ProcessGroup,
        served: frozenset[str],
        rows: Mapping[str, DynamicRows],
    ) -> None:
        super().__init__(collection, sharding, keys, group, served)
        names = [table.name for table in self.tables]
        self.names = list(dict.fromkeys(names))
        self.rows = [rows.get(name) for name in self.names]
        self.first_keys = [self.keys[names.index(name)] for name in self.names]
        self.table_of = torch.tensor([self.names.index(name) for name in names], dtype=torch.int64)
        # The first rank holds row 0 of a row-wise sharded table. The owner of a whole table holds all its rows.
        self.lends = self.cut and dist.get_rank(group) == 0
        self.borrows = self.cut and not self.lends


class DynamicExchange(CpuExchange):
    """Exchange of one step for the lookups of dynamic tables; see :class:`trainer.sparse.exchange.Exchange`.

    Args:
        routing: routing of the lookups of dynamic tables.
        ids: ids of this rank, for all lookups of the collection; any int64 is valid.
        clock: counts the time of waiting for other ranks as communication.
    """

    _routing: DynamicRouting

    def _sort(self, ids_by_lookup: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Sort the raw ids by the owner of their bucket, as :meth:`CpuExchange._sort` does with row numbers."""
        routing, ids = self._routing, torch.cat(list(ids_by_lookup))
        if not routing.cut:
            return self._whole_table_counts(), ids
        hashed = torch.empty_like(ids)
        for table, of_lookup, rows in zip(routing.tables, ids_by_lookup, hashed.split(self._sizes), strict=True):
            hash_rows(of_lookup.numpy(), hash_salt(table.name), table.num_embeddings, rows.numpy())
        # The hashed rows decide on the owners; the raw ids are then sent in the same order.
        counts, _ = self._bucketize(hashed)
        return counts, ids.index_select(0, torch.ops.fbgemm.invert_permute(self._sent_place))

    def _look_up(self, step: int | None) -> Tensor:
        """Return the rows of the received ids, ``[received, dim]`` float32; in training, admit new ids first."""
        routing = self._routing
        lent, broadcast = self._broadcast_row_0()
        self._table_of_id = routing.table_of.repeat(routing.world).repeat_interleave(self._counts.flatten())
        places = torch.zeros_like(self._ids)
        for table, rows in enumerate(routing.rows):
            of_table = torch.nonzero(self._table_of_id == table).squeeze(1)
            if rows is not None and len(of_table):
                places[of_table] = rows.look_up(self._ids[of_table], step)
        self._unserved = torch.nonzero(places < 0).squeeze(1)
        # On the rank that holds row 0, place 0 is that row. On other ranks the values of place 0 are replaced below.
        places[self._unserved] = 0
        found = self._from_kernel(places)
        if broadcast is not None:
            with self._clock.phase("communication"):
                broadcast.wait()
        if routing.borrows and len(self._unserved):
            found = found.index_copy(0, self._unserved, lent[self._table_of_id[self._unserved]])
        return found

    def _broadcast_row_0(self) -> tuple[Tensor, dist.Work | None]:
        """Start to broadcast row 0 of each table, ``[tables, dim]``; the transfer is None if no rank needs it."""
        routing = self._routing
        lent = torch.empty(len(routing.names), routing.dim)
        if not routing.cut:
            return lent, None
        if routing.lends:
            torch.stack([rows.values[0] for rows in routing.rows if rows is not None], out=lent)
        return lent, dist.broadcast(lent, src=0, group=routing.group, async_op=True)

    def _from_kernel(self, places: Tensor) -> Tensor:
        """Return the values at places within this rank's shards; the lender also looks up row 0 of each table."""
        kernel = self._routing.kernel
        if kernel is None or not (len(places) or self._routing.lends):
            self._looked_up = torch.empty(0, self._routing.dim)
            return self._looked_up
        first = torch.tensor([kernel.first_row[key] for key in self._routing.first_keys])
        numbers = first[self._table_of_id] + places
        if self._routing.lends:
            numbers = torch.cat([numbers, first])
        self._looked_up = kernel(numbers)
        return self._looked_up.detach()[: len(places)]

    def _train(self, gradients: Tensor) -> None:
        """Train the rows that were looked up, and row 0 on the sum of its gradients on all ranks. Collective."""
        routing = self._routing
        if routing.cut:
            row_0_gradients = torch.zeros(len(routing.names), routing.dim)
            if routing.borrows:
                row_0_gradients.index_add_(0, self._table_of_id[self._unserved], gradients[self._unserved])
                # Place 0 of this rank's shard only stood in for row 0: it must not be trained.
                gradients = gradients.index_fill(0, self._unserved, 0.0)
            with self._clock.phase("communication"):
                dist.reduce(row_0_gradients, dst=0, group=routing.group)
            if routing.lends:
                gradients = torch.cat([gradients, row_0_gradients])
        if len(gradients):
            self._looked_up.backward(gradients)
