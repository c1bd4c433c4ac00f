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
from trainer.sparse.device_ids import hash_tensor
from trainer.sparse.device_kernel import spread
from trainer.sparse.dynamic_tables import DynamicRows
from trainer.sparse.flat_exchange import FlatExchange, FlatRouting


class DynamicRouting(FlatRouting):
    """Owners of the buckets of some lookups of dynamic tables.

    Args:
        collection, sharding, keys, group: see :class:`trainer.sparse.flat_exchange.FlatRouting`.
        served: names of the lookups that this routing serves, at least one; their tables are dynamic and have this
            sharding.
        device_form: see :class:`trainer.sparse.flat_exchange.FlatRouting`.
        rows: table name -> this rank's rows of the table.

    Attributes:
        names: names of the tables, each once.
        rows: this rank's rows of each table of ``names``; None if it has none.
        table_of: index of each lookup's table in ``names``.
        first_rows: ``[tables]`` int64, number of the first row of each table of ``names`` in the kernel; 0 if this rank
            has no rows of it.
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
        device_form: bool,
        rows: Mapping[str, DynamicRows],
    ) -> None:
        # All ids without a row read row 0.
        super().__init__(collection, sharding, keys, group, served, device_form, unique=False)
        names = [table.name for table in self.tables]
        self.names = list(dict.fromkeys(names))
        self.rows = [rows.get(name) for name in self.names]
        self.table_of = [self.names.index(name) for name in names]
        held = {} if self.kernel is None else self.kernel.first_row
        first = [held.get(self.keys[names.index(name)], 0) for name in self.names]
        self.first_rows = torch.tensor(first, device=self.device)
        # The first rank holds row 0 of a row-wise sharded table. The owner of a whole table holds all its rows.
        self.lends = self.cut and dist.get_rank(group) == 0
        self.borrows = self.cut and not self.lends


class DynamicExchange(FlatExchange):
    """Exchange of one step for the lookups of dynamic tables; see :class:`trainer.sparse.exchange.Exchange`.

    Args:
        routing: routing of the lookups of dynamic tables.
        ids: ids of this rank, for all lookups of the collection; any int64 is valid.
        clock: counts the time of waiting for other ranks as communication.
    """

    _routing: DynamicRouting

    def _sort(self, ids_by_lookup: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Sort the raw ids by the owner of their bucket, as :meth:`FlatExchange._sort` does with row numbers."""
        routing, ids = self._routing, torch.cat(list(ids_by_lookup))
        if not routing.cut:
            return self._whole_table_counts(), ids
        hashed = torch.empty_like(ids)
        for table, of_lookup, rows in zip(routing.tables, ids_by_lookup, hashed.split(self._sizes), strict=True):
            if routing.device_form:
                rows.copy_(hash_tensor(of_lookup, hash_salt(table.name), table.num_embeddings))
            else:
                hash_rows(of_lookup.numpy(), hash_salt(table.name), table.num_embeddings, rows.numpy())
        # The hashed rows decide on the owners; the raw ids are then sent in the same order.
        counts, _ = self._bucketize(hashed)
        return counts, ids.index_select(0, self._order_of_sending())

    def _look_up(self, step: int | None) -> Tensor:
        """Return the rows of the received ids, ``[received, dim]`` float32; in training, admit new ids first."""
        routing = self._routing
        lent, broadcast = self._broadcast_row_0()
        table_of = torch.tensor(routing.table_of * routing.world)
        self._table_of_id = spread(table_of, self._counts.flatten(), len(self._ids), routing.device)
        # Sorted by sender, then by lookup.
        segments = list(self._ids.split([size for of_sender in self._segments for size in of_sender]))
        for table, rows in enumerate(routing.rows):
            members = [place for place, of_table in enumerate(routing.table_of * routing.world) if of_table == table]
            ids = torch.cat([segments[place] for place in members])
            if rows is not None and len(ids):
                found = rows.look_up(ids, step).split([len(segments[place]) for place in members])
                for place, part in zip(members, found, strict=True):
                    segments[place] = part
        places = torch.cat(segments)
        self._unserved = places < 0
        # On the rank that holds row 0, place 0 is that row. On other ranks the values of place 0 are replaced below.
        rows_found = self._from_kernel(places.clamp_(min=0))
        if broadcast is not None:
            with self._clock.phase("communication"):
                broadcast.wait()
        if routing.borrows:
            rows_found = self._with_row_0(rows_found, lent)
        return rows_found

    def _with_row_0(self, found: Tensor, lent: Tensor) -> Tensor:
        """Return the rows that were found, with the broadcast row 0 for ids without a row."""
        if self._routing.device_form:
            return torch.where(self._unserved[:, None], lent[self._table_of_id], found)
        unserved = torch.nonzero(self._unserved).squeeze(1)
        return found.index_copy(0, unserved, lent[self._table_of_id[unserved]])

    def _broadcast_row_0(self) -> tuple[Tensor, dist.Work | None]:
        """Start to broadcast row 0 of each table, ``[tables, dim]``; the transfer is None if no rank needs it."""
        routing = self._routing
        lent = torch.empty(len(routing.names), routing.dim, device=routing.device)
        if not routing.cut:
            return lent, None
        if routing.lends:
            torch.stack([rows.values[0] for rows in routing.rows if rows is not None], out=lent)
        return lent, dist.broadcast(lent, src=0, group=routing.group, async_op=True)

    def _from_kernel(self, places: Tensor) -> Tensor:
        """Return the values at places within this rank's shards; the lender also looks up row 0 of each table."""
        kernel, first = self._routing.kernel, self._routing.first_rows
        if kernel is None or not (len(places) or self._routing.lends):
            self._looked_up = torch.empty(0, self._routing.dim, device=self._routing.device)
            return self._looked_up
        numbers = first[self._table_of_id] + places
        if self._routing.lends:
            numbers = torch.cat([numbers, first])
        self._looked_up = kernel(numbers)
        return self._looked_up.detach()[: len(places)]

    def _train(self, gradients: Tensor, scale: float | Tensor) -> None:
        """Train the rows that were looked up, and row 0 on the sum of its gradients on all ranks. Collective."""
        routing, gradients = self._routing, gradients.mul_(scale)
        if routing.cut:
            row_0_gradients = torch.zeros(len(routing.names), routing.dim, device=routing.device)
            if routing.borrows:
                self._sum_unserved(gradients, row_0_gradients)
                # Place 0 of this rank's shard only stood in for row 0: it must not be trained.
                gradients = gradients.masked_fill(self._unserved[:, None], 0.0)
            with self._clock.phase("communication"):
                dist.reduce(row_0_gradients, dst=0, group=routing.group)
            if routing.lends:
                gradients = torch.cat([gradients, row_0_gradients])
        if len(gradients):
            self._looked_up.backward(gradients)

    def _sum_unserved(self, gradients: Tensor, into: Tensor) -> None:
        """Add the gradients of ids without a row to those of row 0 of their tables, ``[tables, dim]``."""
        if not self._routing.device_form:
            unserved = torch.nonzero(self._unserved).squeeze(1)
            into.index_add_(0, self._table_of_id[unserved], gradients[unserved])
            return
        for table, row_0 in enumerate(into):
            # A sum over all ids: additions one by one to the same row would wait for each other.
            of_table = self._unserved & (self._table_of_id == table)
            row_0 += torch.where(of_table[:, None], gradients, 0).sum(0)
