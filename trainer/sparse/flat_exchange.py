"""Exchange of ids as one flat list; rows return in the order of the ids.

TorchRec's path permutes the received data by feature and batch row before and after every collective, and autograd
repeats all of it in the backward pass. On a CPU these copies, and fbgemm's kernel for unpooled rows, cost several times
the work itself. Here a rank sorts its ids by owner, sends them, and undoes the sorting when the rows return.

On a GPU this exchange carries the tables of a collection that has a dynamic table. There the host waits for the device
once, in ``send``, for the numbers of ids that the ranks send to each other, and for the check of their range. Both were
queued when the exchange started, on a stream of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.runtime.host_copy import to_device
from trainer.runtime.phase_timer import PhaseClock
from trainer.sparse.cpu_kernel import CpuKernel
from trainer.sparse.device_kernel import DeviceKernel, inverse
from trainer.sparse.exchange import Gradients, on_stream, pass_to_current_stream
from trainer.sparse.range_check import RangeCheck, check_range

Copies = Mapping[str, tuple[str, Tensor]]
"""Lookup -> lookup of the exchange that has its ids, and the place of each of its ids there, ``[ids]``."""


class FlatRouting:
    """Owners of the rows of some lookups of one collection, whose tables all have the same sharding.

    Args:
        collection: a sharded collection.
        sharding: ``table_wise`` or ``row_wise``.
        keys: names of the collection's lookups, in the order of the ids.
        group: process group of all ranks.
        served: names of the lookups that this routing serves, at least one; their tables have this sharding.
        device_form: True for operations that any device has, False for the faster ones of a CPU.
        unique: True if a rank sends each id of a table once in a step, and no two ids read the same row.

    Attributes:
        device: device of the tables.
        device_form: as given.
        positions: places of the served lookups among ``keys``.
        cut: True if the tables are cut by rows over several ranks.
        keys: names of the served lookups, in the order of ``positions``.
        tables: TorchRec's configuration of each lookup's table.
        dim: width of the rows.
        owns: ``[ranks, lookups]`` int64, 1 where the rank has the (first shard of the) lookup's table.
        block_rows: ``[lookups]`` int64, rows of the first shard of each lookup's table.
        kernel: kernel of this rank's shards; None if it has none.
        alone: True if this rank has all rows, reads them by a kernel of a CPU, and no two ids read the same row.
    """

    def __init__(
        self,
        collection: ShardedEmbeddingCollection,
        sharding: str,
        keys: Sequence[str],
        group: dist.ProcessGroup,
        served: frozenset[str],
        device_form: bool,
        unique: bool,
    ) -> None:
        self.device: torch.device = collection._device
        self.device_form = device_form
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
        # Two ranks may send the same id.
        self.alone = unique and self.world == 1 and not device_form
        self.kernel = self._kernel(collection, sharding, unique=self.alone)

    def _kernel(
        self, collection: ShardedEmbeddingCollection, sharding: str, *, unique: bool
    ) -> CpuKernel | DeviceKernel | None:
        """Return the kernel of this rank's shards of the tables with a sharding; None if it has no shard."""
        lookup = collection._lookups[collection._sharding_types.index(sharding)]
        found = [module for module in lookup.modules() if isinstance(module, BatchedFusedEmbedding)]
        if len(found) > 1:
            raise RuntimeError(f"TorchRec made {len(found)} kernels for the {sharding} tables of one collection, not 1")
        if not found:
            return None
        return DeviceKernel(found[0], self.device) if self.device_form else CpuKernel(found[0], unique=unique)


class FlatExchange:
    """Exchange of one step for the lookups of a routing; see :class:`trainer.sparse.exchange.Exchange`.

    Args:
        routing: routing of some lookups of a collection.
        ids: ids of this rank, for all lookups of the collection.
        clock: counts the time of waiting for other ranks as communication.
    """

    def __init__(self, routing: FlatRouting, ids: KeyedJaggedTensor, clock: PhaseClock) -> None:
        self._routing, self._clock = routing, clock
        by_lookup, sizes = ids.values().split(ids.length_per_key()), ids.length_per_key()
        self._ids_by_lookup = [by_lookup[i] for i in routing.positions]
        self._sizes = [sizes[i] for i in routing.positions]
        self._check: RangeCheck | None = None

    def start(self) -> None:
        """Sort the ids by owner and start to exchange their numbers.

        Raises:
            UserError: an id is outside its table; of the device form, :meth:`send` raises it.
        """
        on_gpu = self._routing.device.type == "cuda"
        self._stream = torch.cuda.current_stream() if on_gpu else None
        self._own_counts, self._ids = self._sort(self._ids_by_lookup)
        one_each = [1] * self._routing.world
        self._counts, self._work = self._all_to_all(self._own_counts, one_each, one_each)

    def send(self) -> None:
        """Wait for the numbers of ids and start to send the ids.

        Raises:
            UserError: an id is outside its table.
        """
        self._wait()
        if self._check is not None:
            self._check.raise_if_outside()
        # One copy to the host for both, since each would wait for the device.
        own, self._segments = torch.stack([self._own_counts, self._counts]).tolist()
        self._sent, self._received = ([sum(of_rank) for of_rank in counts] for counts in (own, self._segments))
        self._ids, self._work = self._all_to_all(self._ids, self._sent, self._received)

    @property
    def keys(self) -> Sequence[str]:
        """Names of the lookups, in the order of the joined gradients of :meth:`update_joined`."""
        return self._routing.keys

    def rows(self, step: int | None = None, copies: Copies | None = None) -> dict[str, Tensor]:
        """Look up the received ids and return the rows of this rank's ids, or of copies of them.

        Args:
            step: see :meth:`trainer.sparse.exchange.Exchange.rows`.
            copies: lookups whose rows are returned; None for the exchange's own.
        """
        self._wait_for_ids()
        if copies is not None and self._routing.alone:
            return self._read_copies(copies)
        if self._stream is not None:
            sorting = (self._sent_place, self._sent_order) if self._routing.cut else ()
            pass_to_current_stream(self._stream, (self._ids, self._counts, *sorting))
        rows, self._work = self._all_to_all(self._look_up(step), self._received, self._sent)
        self._wait()
        if self._routing.cut:
            rows = rows.index_select(0, self._sent_place)
        found = dict(zip(self.keys, rows.split(self._sizes), strict=True))
        if copies is None:
            return found
        return {key: found[of].index_select(0, places) for key, (of, places) in copies.items()}

    def update(self, gradients: Gradients, scale: float | Tensor) -> None:
        """Send the gradients to the owners of the rows and train the rows of this rank."""
        self.update_joined(torch.cat([part for key in self.keys for part in gradients[key]]), scale)

    def update_joined(self, gradients: Tensor, scale: float | Tensor) -> None:
        """Do the same with gradients ``[ids, dim]`` of all lookups, one after another as :attr:`keys`.

        Their memory may be overwritten.
        """
        if self._routing.cut:
            gradients = gradients.index_select(0, self._order_of_sending())
        received, self._work = self._all_to_all(gradients, self._sent, self._received)
        self._wait()
        self._train(received, scale / self._routing.world)

    def drain(self) -> None:
        """Wait for the ids and discard them."""
        self._wait_for_ids()

    def _sort(self, ids_by_lookup: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the number of ids to send, ``[owners, lookups]``, and the ids, sorted by owner, then by lookup."""
        routing = self._routing
        if not routing.device_form:
            for table, ids in zip(routing.tables, ids_by_lookup, strict=True):
                check_range(table, ids)
        joined = torch.cat(list(ids_by_lookup))
        if routing.device_form:
            # Before anything that would read or write outside of a table's memory.
            self._check = RangeCheck(joined, self._sizes, routing.tables)
            joined = self._check.inside
        return self._bucketize(joined) if routing.cut else (self._whole_table_counts(), joined)

    def _whole_table_counts(self) -> Tensor:
        """Return the number of ids for each owner and lookup, ``[owners, lookups]``, of table-wise sharded tables.

        It is on the device if it is sent to other ranks, else on the host.
        """
        counts = self._routing.owns * torch.tensor(self._sizes)
        return to_device(counts, self._routing.device) if self._routing.world > 1 else counts

    def _bucketize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Sort row numbers of row-wise sharded tables by owner, as :meth:`_sort` does.

        A row number becomes the number within the owner's shard. ``_sent_place`` keeps the new place of each one.
        """
        routing = self._routing
        if routing.device_form:
            return self._bucketize_on_device(rows)
        counts, rows, _, _, self._sent_place = torch.ops.fbgemm.block_bucketize_sparse_features(
            torch.tensor(self._sizes), rows, False, True, routing.block_rows, routing.world
        )
        return counts.view(routing.world, -1), rows

    def _bucketize_on_device(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Do the same as :meth:`_bucketize`, whose operator takes each lookup with one thread of a GPU.

        ``_sent_order`` keeps the old place of each row number too.
        """
        routing, lookups = self._routing, len(self._sizes)
        blocks = [int(block) for block in routing.block_rows]
        parts = [*zip(range(lookups), rows.split(self._sizes), blocks, strict=True)]
        buckets = torch.cat([part // block * lookups + lookup for lookup, part, block in parts])
        self._sent_order = buckets.argsort(stable=True)
        self._sent_place = inverse(self._sent_order)
        counts = torch.zeros(routing.world * lookups, dtype=torch.int64, device=rows.device)
        counts.index_add_(0, buckets, torch.ones_like(buckets))
        within = torch.cat([part % block for _, part, block in parts])
        return counts.view(routing.world, lookups), within.index_select(0, self._sent_order)

    def _order_of_sending(self) -> Tensor:
        """Return the place before the sorting by owner of each id that is sent, ``[ids]``."""
        if self._routing.device_form:
            return self._sent_order
        order: Tensor = torch.ops.fbgemm.invert_permute(self._sent_place)
        return order

    def _look_up(self, step: int | None) -> Tensor:
        """Return the rows of the received ids, ``[received, dim]`` float32."""
        kernel = self._routing.kernel
        if not len(self._ids):
            return torch.empty(0, self._routing.dim, device=self._routing.device)
        assert kernel is not None
        numbers = kernel.number_rows(self._ids, self._counts, self.keys)
        if isinstance(kernel, CpuKernel):
            self._numbers = numbers
            return kernel.read(numbers)
        # The rows with their graph: its backward pass is the fused optimizer.
        self._looked_up = kernel(numbers)
        return self._looked_up.detach()

    def _read_copies(self, copies: Copies) -> dict[str, Tensor]:
        """Return the rows of copies of this rank's ids, each read from its table for every place of its id."""
        kernel = self._routing.kernel
        assert isinstance(kernel, CpuKernel)
        self._numbers = kernel.number_rows(self._ids, self._counts, self.keys)
        of_key = dict(zip(self.keys, self._numbers.split(self._sizes), strict=True))
        numbers = [of_key[of].index_select(0, places) for of, places in copies.values()]
        rows = kernel.read(torch.cat(numbers)).split([len(of_lookup) for of_lookup in numbers])
        return dict(zip(copies, rows, strict=True))

    def _train(self, gradients: Tensor, scale: float | Tensor) -> None:
        """Train the rows that were looked up on ``scale`` times their gradients ``[received, dim]``."""
        if not len(self._ids):
            return
        if isinstance(self._routing.kernel, CpuKernel):
            self._routing.kernel.train(self._numbers, gradients, float(scale))
        else:
            self._looked_up.backward(gradients.mul_(scale))

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

    def _wait_for_ids(self) -> None:
        """Wait for the ids on the stream that has sorted them: it may then use the memory of the sent ids again."""
        with on_stream(self._stream):
            self._wait()

    def _wait(self) -> None:
        """Wait for the transfer in progress."""
        if self._work is not None:
            with self._clock.phase("communication"):
                self._work.wait()
