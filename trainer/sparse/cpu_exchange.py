"""An exchange for CPUs: ids travel as one flat list, rows come back in the order in which they were asked for.

TorchRec's path rearranges what arrives by feature and batch row before and after every collective, and autograd does
all of it again on the way back. On a CPU these copies, and fbgemm's kernel for unpooled rows, cost several times the
work itself. Here a rank buckets its ids by owner, sends them off, and undoes the bucketing when their rows are back.
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
from trainer.sparse.cpu_kernel import CpuKernel, flat_kernel
from trainer.sparse.exchange import Gradients


class CpuRouting:
    """Which rank has the rows of which lookups, of one collection, whose tables are sharded alike.

    Args:
        collection: of tables on a CPU.
        sharding: ``table_wise`` or ``row_wise``.
        keys: the collection's lookups, in the order of the ids.
        group: of all ranks.
        served: those of the lookups that this is for, at least one; their tables have this sharding.
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
        # On one rank a table cut by rows is a whole one.
        self.cut = sharding == "row_wise" and self.world > 1
        if not self.cut:
            # Sorted by owner, the ids of whole tables lie in the order in which they are sent.
            self.positions.sort(key=lambda i: plans[keys[i]].ranks[0])
        self.keys = [keys[i] for i in self.positions]
        self.tables = [tables[key] for key in self.keys]
        self.dim = self.tables[0].embedding_dim
        owners = torch.tensor([plans[key].ranks[0] for key in self.keys])
        self.owns = (owners == torch.arange(self.world)[:, None]).long()
        self.block_rows = torch.tensor(
            [plans[key].sharding_spec.shards[0].shard_sizes[0] for key in self.keys], dtype=torch.int64
        )
        self.kernel: CpuKernel | None = flat_kernel(collection, sharding)


class CpuExchange:
    """The part of one step; see :class:`trainer.sparse.exchange.Exchange`.

    Args:
        routing: of some lookups of a collection.
        ids: of this rank, for all lookups of the collection.
        clock: waiting for other ranks is counted as communication.

    Raises:
        UserError: an id outside its table.
    """

    def __init__(self, routing: CpuRouting, ids: KeyedJaggedTensor, clock: PhaseClock) -> None:
        self._routing, self._clock = routing, clock
        pieces, sizes = ids.values().split(ids.length_per_key()), ids.length_per_key()
        pieces = [pieces[i] for i in routing.positions]
        self._sizes = [sizes[i] for i in routing.positions]
        counts, self._ids = self._sort(pieces)
        self._sent = counts.sum(1).tolist()
        self._counts, self._work = self._exchange(counts, [1] * routing.world, [1] * routing.world)

    def send(self) -> None:
        """See :class:`trainer.sparse.exchange.Exchange`."""
        self._wait()
        self._received = self._counts.sum(1).tolist()
        self._ids, self._work = self._exchange(self._ids, self._sent, self._received)

    def rows(self, step: int | None = None) -> dict[str, Tensor]:
        """See :class:`trainer.sparse.exchange.Exchange`."""
        self._wait()
        rows, self._work = self._exchange(self._look_up(step), self._received, self._sent)
        self._wait()
        if self._routing.cut:
            rows = rows.index_select(0, self._sent_to)
        return dict(zip(self._routing.keys, rows.split(self._sizes), strict=True))

    def update(self, gradients: Gradients, scale: float | Tensor) -> None:
        """See :class:`trainer.sparse.exchange.Exchange`."""
        given = torch.cat([part for key in self._routing.keys for part in gradients[key]])
        if self._routing.cut:
            given = given.index_select(0, torch.ops.fbgemm.invert_permute(self._sent_to))
        given, self._work = self._exchange(given, self._sent, self._received)
        self._wait()
        self._train(given.mul_(scale / self._routing.world))

    def drain(self) -> None:
        """See :class:`trainer.sparse.exchange.Exchange`."""
        self._wait()

    def _sort(self, pieces: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``[owners, lookups]`` how many ids are sent, and the ids of all lookups, sorted by owner, then by lookup."""
        routing = self._routing
        for table, piece in zip(routing.tables, pieces, strict=True):
            _check_range(table.name, table.num_embeddings, piece)
        ids = torch.cat(list(pieces))
        return self._bucketize(ids) if routing.cut else (self._counts_of_owners(), ids)

    def _counts_of_owners(self) -> Tensor:
        """Of tables that are whole."""
        return self._routing.owns * torch.tensor(self._sizes)

    def _bucketize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of tables that are cut; a row becomes its number in the owner's part of the table."""
        routing = self._routing
        counts, rows, _, _, self._sent_to = torch.ops.fbgemm.block_bucketize_sparse_features(
            torch.tensor(self._sizes), rows, False, True, routing.block_rows, routing.world
        )
        return counts.view(routing.world, -1), rows

    def _look_up(self, step: int | None) -> Tensor:
        """``[received, dim]``, the rows of the ids that were received."""
        kernel = self._routing.kernel
        if not len(self._ids):
            return torch.empty(0, self._routing.dim)
        assert kernel is not None
        self._held = kernel(kernel.number_rows(self._ids, self._counts, self._routing.keys))
        return self._held.detach()

    def _train(self, gradients: Tensor) -> None:
        """Train on the gradients ``[received, dim]`` of the rows that were looked up."""
        if len(self._ids):
            self._held.backward(gradients)

    def _exchange(self, given: Tensor, sent: Sequence[int], received: Sequence[int]) -> tuple[Tensor, dist.Work | None]:
        """Send the first ``sent[0]`` rows to rank 0, the next to rank 1 ...; what comes is there after ``_wait``."""
        if self._routing.world == 1:
            return given, None
        taken = given.new_empty(sum(received), *given.shape[1:])
        work = dist.all_to_all_single(
            taken, given, list(received), list(sent), group=self._routing.group, async_op=True
        )
        return taken, work

    def _wait(self) -> None:
        if self._work is not None:
            with self._clock.phase("communication"):
                self._work.wait()


def _check_range(table: str, rows: int, ids: Tensor) -> None:
    if len(ids):
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= rows:
            raise UserError(f"id {low if low < 0 else high} is not a row of table {table!r}, which has {rows:,}")
