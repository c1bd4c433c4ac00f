"""Exchange for CPUs: ids are sent as one flat list, and rows return in the order of the ids.

TorchRec's path permutes the received data by feature and batch row before and after every collective, and autograd
repeats all of it in the backward pass. On a CPU these copies, and fbgemm's kernel for unpooled rows, cost several times
the work itself. Here a rank sorts its ids by owner, sends them, and undoes the sorting when the rows return.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.console.errors import UserError
from trainer.runtime.phase_timer import PhaseClock
from trainer.sparse.cpu_kernel import CpuKernel, cpu_kernel
from trainer.sparse.exchange import Gradients


class CpuRouting:
    """Owners of the rows of some lookups of one collection, whose tables all have the same sharding.

    Args:
        collection: a sharded collection on a CPU.
        sharding: ``table_wise`` or ``row_wise``.
        keys: names of the collection's lookups, in the order of the ids.
        group: process group of all ranks.
        served: names of the lookups that this routing serves, at least one; their tables have this sharding.

    Attributes:
        positions: places of the served lookups among ``keys``.
        cut: True if the tables are cut by rows over several ranks.
        keys: names of the served lookups, in the order of ``positions``.
        tables: TorchRec's configuration of each lookup's table.
        dim: width of the rows.
        owns: ``[ranks, lookups]`` int64, 1 where the rank has the (first shard of the) lookup's table.
        block_rows: ``[lookups]`` int64, rows of the first shard of each lookup's table.
        kernel: kernel of this rank's shards; None if it has none.
    """

    def __init__(
        self,
        collection: ShardedEmbeddingCollection,
        sharding: str,
        keys: Sequence[str],
        group: dist.ProcessGroup,
        served: frozenset[str],
    ) -> None:
        self.group, self.world = group, dist.get_world_size(group)
        tables = {key: table for table in collection._embedding_configs for key in table.feature_names}
        plans = {key: collection.module_sharding_plan[tables[key].name] for key in keys}
        self.positions = [i for i, key in enumerate(keys) if key in served]
        # On one rank a row-wise sharded table is a whole table.
        self.cut = sharding == "row_wise" and self.world > 1
        if not self.cut:
            # With the lookups sorted by owner, the ids of whole tables need no other sorting before they are sent.
            self.positions.sort(key=lambda i: plans[keys[i]].ranks[0])
        self.keys = [keys[i] for i in self.positions]
        self.tables = [tables[key] for key in self.keys]
        self.dim = self.tables[0].embedding_dim
        owners = torch.tensor([plans[key].ranks[0] for key in self.keys])
        self.owns = (owners == torch.arange(self.world)[:, None]).long()
        self.block_rows = torch.tensor(
            [plans[key].sharding_spec.shards[0].shard_sizes[0] for key in self.keys], dtype=torch.int64
        )
        self.kernel: CpuKernel | None = cpu_kernel(collection, sharding)


class CpuExchange:
    """Exchange of one step for the lookups of a routing; see :class:`trainer.sparse.exchange.Exchange`.

    Args:
        routing: routing of some lookups of a collection.
        ids: ids of this rank, for all lookups of the collection.
        clock: counts the time of waiting for other ranks as communication.
    """

    def __init__(self, routing: CpuRouting, ids: KeyedJaggedTensor, clock: PhaseClock) -> None:
        self._routing, self._clock = routing, clock
        by_lookup, sizes = ids.values().split(ids.length_per_key()), ids.length_per_key()
        self._ids_by_lookup = [by_lookup[i] for i in routing.positions]
        self._sizes = [sizes[i] for i in routing.positions]

    def start(self) -> None:
        """Sort the ids by owner and start to exchange their numbers.

        Raises:
            UserError: an id is outside its table.
        """
        counts, self._ids = self._sort(self._ids_by_lookup)
        self._sent = counts.sum(1).tolist()
        one_each = [1] * self._routing.world
        self._counts, self._work = self._all_to_all(counts, one_each, one_each)

    def send(self) -> None:
        """Wait for the numbers of ids and start to send the ids."""
        self._wait()
        self._received = self._counts.sum(1).tolist()
        self._ids, self._work = self._all_to_all(self._ids, self._sent, self._received)

    def rows(self, step: int | None = None) -> dict[str, Tensor]:
        """Look up the received ids and return the rows of this rank's ids."""
        self._wait()
        rows, self._work = self._all_to_all(self._look_up(step), self._received, self._sent)
        self._wait()
        if self._routing.cut:
            rows = rows.index_select(0, self._sent_place)
        return dict(zip(self._routing.keys, rows.split(self._sizes), strict=True))

    def update(self, gradients: Gradients, scale: float | Tensor) -> None:
        """Send the gradients to the owners of the rows and train the rows of this rank."""
        flat = torch.cat([part for key in self._routing.keys for part in gradients[key]])
        if self._routing.cut:
            flat = flat.index_select(0, torch.ops.fbgemm.invert_permute(self._sent_place))
        received, self._work = self._all_to_all(flat, self._sent, self._received)
        self._wait()
        self._train(received.mul_(scale / self._routing.world))

    def drain(self) -> None:
        """Wait for the ids and discard them."""
        self._wait()

    def _sort(self, ids_by_lookup: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the number of ids to send, ``[owners, lookups]``, and the ids, sorted by owner, then by lookup."""
        routing = self._routing
        for table, ids in zip(routing.tables, ids_by_lookup, strict=True):
            _check_range(table.name, table.num_embeddings, ids)
        joined = torch.cat(list(ids_by_lookup))
        return self._bucketize(joined) if routing.cut else (self._whole_table_counts(), joined)

    def _whole_table_counts(self) -> Tensor:
        """Return the number of ids for each owner and lookup, ``[owners, lookups]``, of table-wise sharded tables."""
        return self._routing.owns * torch.tensor(self._sizes)

    def _bucketize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Sort row numbers of row-wise sharded tables by owner, as :meth:`_sort` does.

        A row number becomes the number within the owner's shard. ``_sent_place`` keeps the new place of each one.
        """
        routing = self._routing
        counts, rows, _, _, self._sent_place = torch.ops.fbgemm.block_bucketize_sparse_features(
            torch.tensor(self._sizes), rows, False, True, routing.block_rows, routing.world
        )
        return counts.view(routing.world, -1), rows

    def _look_up(self, step: int | None) -> Tensor:
        """Return the rows of the received ids, ``[received, dim]`` float32."""
        kernel = self._routing.kernel
        if not len(self._ids):
            return torch.empty(0, self._routing.dim)
        assert kernel is not None
        # The rows with their graph: its backward pass is the fused optimizer.
        self._looked_up = kernel(kernel.number_rows(self._ids, self._counts, self._routing.keys))
        return self._looked_up.detach()

    def _train(self, gradients: Tensor) -> None:
        """Train the rows that were looked up on their gradients ``[received, dim]``."""
        if len(self._ids):
            self._looked_up.backward(gradients)

    def _all_to_all(
        self, outgoing: Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> tuple[Tensor, dist.Work | None]:
        """Start to send the first ``sent[0]`` rows to rank 0, the next ``sent[1]`` to rank 1 and so on.

        Returns:
            Memory for the ``sum(received)`` rows that arrive, valid after ``_wait``; and the transfer, None on one
            rank.
        """
        if self._routing.world == 1:
            return outgoing, None
        incoming = outgoing.new_empty(sum(received), *outgoing.shape[1:])
        work = dist.all_to_all_single(
            incoming, outgoing, list(received), list(sent), group=self._routing.group, async_op=True
        )
        return incoming, work

    def _wait(self) -> None:
        """Wait for the transfer in progress."""
        if self._work is not None:
            with self._clock.phase("communication"):
                self._work.wait()


def _check_range(table: str, rows: int, ids: Tensor) -> None:
    """Raise a UserError if an id is negative or at least ``rows``."""
    if len(ids):
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= rows:
            raise UserError(f"id {low if low < 0 else high} is not a row of table {table!r}, which has {rows:,}")
