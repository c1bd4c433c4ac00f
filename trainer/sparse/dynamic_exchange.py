"""How the ids of dynamic tables travel: as they are, to the rank that has their bucket, which knows their rows.

Only the owner of a bucket can tell whether an id has a row, and it does so between the training of one step and the
look-up of the next: what was sent ahead has changed nothing yet. Ids without a row read row 0 of their table, which one
rank has: it sends the row to the others, and they send it the sum of the row's gradients.
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
    """Which rank has the buckets of which lookups.

    Args:
        collection, sharding, keys, group: see :class:`trainer.sparse.cpu_exchange.CpuRouting`.
        served: those of the lookups that this is for, at least one; their tables are dynamic and have this sharding.
        rows: name -> this rank's rows of the tables.
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
        # Of a table that is cut by rows the first rank has row 0; a whole one has it beside all others.
        self.lends = self.cut and dist.get_rank(group) == 0
        self.borrows = self.cut and not self.lends


class DynamicExchange(CpuExchange):
    """The part of one step; see :class:`trainer.sparse.exchange.Exchange`.

    Args:
        routing: of the lookups of dynamic tables.
        ids: of this rank, for all lookups of the collection; any int64.
        clock: waiting for other ranks is counted as communication.
    """

    _routing: DynamicRouting

    def _sort(self, pieces: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        routing, ids = self._routing, torch.cat(list(pieces))
        if not routing.cut:
            return self._whole_table_counts(), ids
        hashed = torch.empty_like(ids)
        for table, piece, into in zip(routing.tables, pieces, hashed.split(self._sizes), strict=True):
            hash_rows(piece.numpy(), hash_salt(table.name), table.num_embeddings, into.numpy())
        counts, _ = self._bucketize(hashed)
        return counts, ids.index_select(0, torch.ops.fbgemm.invert_permute(self._sent_place))

    def _look_up(self, step: int | None) -> Tensor:
        routing = self._routing
        lent, lending = self._lend()
        self._of_table = routing.table_of.repeat(routing.world).repeat_interleave(self._counts.flatten())
        places = torch.zeros_like(self._ids)
        for number, rows in enumerate(routing.rows):
            mine = torch.nonzero(self._of_table == number).squeeze(1)
            if rows is not None and len(mine):
                places[mine] = rows.look_up(self._ids[mine], step)
        self._unserved = torch.nonzero(places < 0).squeeze(1)
        # Where row 0 is at home it is the first place; elsewhere the values of that place are replaced.
        places[self._unserved] = 0
        found = self._from_kernel(places)
        if lending is not None:
            with self._clock.phase("communication"):
                lending.wait()
        if routing.borrows and len(self._unserved):
            found = found.index_copy(0, self._unserved, lent[self._of_table[self._unserved]])
        return found

    def _lend(self) -> tuple[Tensor, dist.Work | None]:
        """Row 0 of each table, ``[tables, dim]``, on its way from the rank that has it."""
        routing = self._routing
        lent = torch.empty(len(routing.names), routing.dim)
        if not routing.cut:
            return lent, None
        if routing.lends:
            torch.stack([rows.values[0] for rows in routing.rows if rows is not None], out=lent)
        return lent, dist.broadcast(lent, src=0, group=routing.group, async_op=True)

    def _from_kernel(self, places: Tensor) -> Tensor:
        """The values at places of this rank's parts of the tables; row 0 is looked up too where it is lent."""
        kernel = self._routing.kernel
        if kernel is None or not (len(places) or self._routing.lends):
            self._looked_up = torch.empty(0, self._routing.dim)
            return self._looked_up
        first = torch.tensor([kernel.first_row[key] for key in self._routing.first_keys])
        numbers = first[self._of_table] + places
        if self._routing.lends:
            numbers = torch.cat([numbers, first])
        self._looked_up = kernel(numbers)
        return self._looked_up.detach()[: len(places)]

    def _train(self, gradients: Tensor) -> None:
        routing = self._routing
        if routing.cut:
            of_row_0 = torch.zeros(len(routing.names), routing.dim)
            if routing.borrows:
                of_row_0.index_add_(0, self._of_table[self._unserved], gradients[self._unserved])
                gradients = gradients.index_fill(0, self._unserved, 0.0)
            with self._clock.phase("communication"):
                dist.reduce(of_row_0, dst=0, group=routing.group)
            if routing.lends:
                gradients = torch.cat([gradients, of_row_0])
        if len(gradients):
            self._looked_up.backward(gradients)
