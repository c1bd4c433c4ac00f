"""TorchRec side of the engine: all embedding tables of a model, sharded over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from modules.embeddings import Lookup, Table, initial_rows
from modules.table_set import TableSet
from trainer.console.errors import UserError
from trainer.runtime.large_pages import zero_in_large_pages
from trainer.runtime.phase_timer import PhaseClock
from trainer.sparse.dedup_exchange import DeduplicatedExchange
from trainer.sparse.dynamic_exchange import DynamicExchange, DynamicRouting
from trainer.sparse.dynamic_tables import DynamicTables
from trainer.sparse.exchange import Exchange, TorchRecExchange
from trainer.sparse.flat_exchange import FlatExchange, FlatRouting
from trainer.sparse.planner import TableOptimizer, describe_plan, make_plan, make_sharder

_INITIALISE_ELEMENTS = 1 << 24
"""Initial values are made in parts of this many elements, 64 MB, so that a shard is never held twice."""


class Shard(NamedTuple):
    """Shard of a table, or of a state of its optimizer, on this rank.

    Attributes:
        table: name of the table.
        values: live memory, ``[rows, columns]``; ``[rows]`` for a state with one number for each row.
        row, column: first row and first column of the shard.
    """

    table: str
    values: Tensor
    row: int
    column: int


class ShardedTables:
    """Tables of a model, sharded over the ranks of the default process group, with fused optimizers.

    Args:
        tables: declarations of the tables.
        lookups: declarations of the lookups.
        optimizer: optimizer that is fused into the backward pass of every table.
        device: device of this rank.
        local_size: number of ranks on one machine.
        batch_size: rows of one rank in a step, for the planner.
        seed: seed of the initial values, which do not depend on the sharding.
        clock: counts the time of waiting for other ranks as communication.
        control: a gloo group of all ranks.
        deduplicate: send and look up each id of a table once in a step, however many lookups and rows contain it.
        device_form: use the operations that a GPU needs: TorchRec's exchange, and for dynamic tables those of
            :class:`trainer.sparse.device_ids.DeviceIds`. None: on a GPU only; they run on a CPU too, more slowly.

    Attributes:
        plan: see :func:`trainer.sparse.planner.describe_plan`.
        keys: names of the lookups of each collection, in the order of the ids.
        dynamic: the dynamic tables.

    Raises:
        UserError: a sharding is refused, or the tables do not fit into memory.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        lookups: Sequence[Lookup],
        optimizer: TableOptimizer,
        *,
        device: torch.device,
        local_size: int,
        batch_size: int,
        seed: int,
        clock: PhaseClock,
        control: dist.ProcessGroup,
        deduplicate: bool = True,
        device_form: bool | None = None,
    ) -> None:
        self._deduplicate = deduplicate
        self._device_form = device.type == "cuda" if device_form is None else device_form
        self._declared = {table.name: table for table in tables}
        self._clock = clock
        table_set = TableSet(tables, lookups, device="meta")
        self.keys = [[lookup.name for lookup in members] for _, members in table_set.groups]
        # TorchRec's own deduplication has kernels for GPUs only; on a CPU DeduplicatedExchange does it.
        sharder = make_sharder(optimizer, index_dedup=deduplicate and device.type == "cuda")
        plan = make_plan(
            table_set,
            sharder,
            optimizer,
            device=device,
            local_size=local_size,
            batch_size=batch_size,
            control=control,
        )
        self.plan = describe_plan(plan, tables)
        group = dist.group.WORLD
        assert group is not None
        self._sharded = DistributedModelParallel(
            table_set,
            # With DTensors, torch.distributed.checkpoint can also save the tables while training goes on.
            env=ShardingEnv(dist.get_world_size(), dist.get_rank(), group, output_dtensor=True),
            device=device,
            plan=plan,
            sharders=[sharder],
            init_data_parallel=False,
        )
        self._collections: list[ShardedEmbeddingCollection] = list(self._sharded.module.collections)
        if device.type == "cpu":
            self._use_large_pages()
        self._initialise(seed)
        self.dynamic = DynamicTables(tables, self._held(), seed, control, device_form=self._device_form)
        self._routings = [
            _routings(collection, keys, group, self.dynamic, self._device_form, deduplicate)
            for collection, keys in zip(self._collections, self.keys, strict=True)
        ]

    def exchanges(self, ids: Sequence[KeyedJaggedTensor]) -> list[Exchange]:
        """Return the exchanges of a batch, to be started in this order on every rank.

        A UserError for an id outside its table comes from ``start`` of a :class:`FlatExchange` in the form of a CPU. It
        comes from ``send`` of one in the form of a device, and of a :class:`TorchRecExchange` on any device: ``start``
        does not wait for their check. A :class:`DeduplicatedExchange` raises it where the exchange of its unique ids
        does. For a dynamic table every id is valid.

        Args:
            ids: ids of this rank, one ``KeyedJaggedTensor`` for each collection.
        """
        exchanges: list[Exchange] = []
        for collection, routings, keyed in zip(self._collections, self._routings, ids, strict=True):
            if not routings:
                exchanges.append(TorchRecExchange(collection, keyed, self._clock))
            elif self._deduplicate:
                tables = {key: table.name for table in collection._embedding_configs for key in table.feature_names}
                flat = partial(self._flat_exchanges, routings)
                exchanges.append(DeduplicatedExchange(keyed, tables, flat, device_form=self._device_form))
            else:
                exchanges += self._flat_exchanges(routings, keyed)
        return exchanges

    def _flat_exchanges(self, routings: Sequence[FlatRouting], ids: KeyedJaggedTensor) -> list[FlatExchange]:
        """Return one exchange for each routing of a collection."""
        return [
            DynamicExchange(routing, ids, self._clock)
            if isinstance(routing, DynamicRouting)
            else FlatExchange(routing, ids, self._clock)
            for routing in routings
        ]

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of all tables."""
        optimizer = self._sharded.fused_optimizer
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        # The backward pass applies the gradients; this step only passes the learning rate to the kernels.
        optimizer.step()

    def state(self) -> dict[str, Any]:
        """Return the tables, their optimizer's state and the dynamic tables' ids for ``torch.distributed.checkpoint``.

        They are DTensors over the live memory. Collective.
        """
        tables = self._sharded.state_dict()
        state = {"tables": tables, "table_optimizer": self._optimizer_state()}
        if self.dynamic.names:
            state["dynamic"] = self.dynamic.state({path.split(".")[-2]: table for path, table in tables.items()})
        return state

    def loaded(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state` that was filled from a checkpoint."""
        if self.dynamic.names:
            self.dynamic.loaded(state["dynamic"])

    @torch.no_grad()
    def _use_large_pages(self) -> None:
        """Move tables and states of the optimizer, which hold no values yet, to large pages if the system has any."""
        lookups = [lookup for collection in self._collections for lookup in collection._lookups]
        for module in (module for lookup in lookups for module in lookup.modules()):
            if isinstance(module, BatchedFusedEmbedding):
                owner = module.emb_module
                zero_in_large_pages(owner.weights_host)
                if owner.optimizer != EmbOptimType.EXACT_SGD:
                    zero_in_large_pages(owner.momentum1_host)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Fill this rank's shards with the tables' initial values."""
        for name, shard, row, column in self.shards():
            table, (rows, columns) = self._declared[name], shard.shape
            step = max(1, _INITIALISE_ELEMENTS // max(1, columns))
            for start in range(0, rows, step):
                part = shard[start : start + step]
                part.copy_(initial_rows(table, seed, row + start, len(part), column, columns))

    def shards(self) -> Iterator[Shard]:
        """Yield this rank's shards of the tables."""
        for path, tensor in self._sharded.state_dict().items():
            yield from _local_shards(path.split(".")[-2], tensor)

    def optimizer_shards(self) -> Iterator[tuple[str, Shard]]:
        """Yield the name of each optimizer state, such as ``momentum1``, with each of this rank's shards of it."""
        for states in self._optimizer_state().values():
            for name, tensor in states.items():
                table, state = name.split(".")
                yield from ((state, shard) for shard in _local_shards(table, tensor))

    def _optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """Return path of the table's weight -> ``table.state``, such as ``item.momentum1`` -> values."""
        return self._sharded.fused_optimizer.state_dict()["state"]

    def _held(self) -> dict[str, tuple[int, Tensor, list[Tensor]]]:
        """Return table name -> first row, values and states of the optimizer of this rank's shard, live memory."""
        states: dict[str, list[Tensor]] = {}
        for _, state in self.optimizer_shards():
            states.setdefault(state.table, []).append(state.values)
        return {shard.table: (shard.row, shard.values, states.get(shard.table, [])) for shard in self.shards()}


def _local_shards(table: str, tensor: Tensor) -> Iterator[Shard]:
    """Yield this rank's shards of a DTensor."""
    assert isinstance(tensor, DTensor), table
    held: Any = tensor.to_local()
    # A rank without a shard of this table still has an offset, so the lengths differ.
    for shard, offset in zip(held.local_shards(), held.local_offsets(), strict=False):
        yield Shard(table, shard, offset[0], offset[1] if len(offset) > 1 else 0)


def _routings(
    collection: ShardedEmbeddingCollection,
    keys: Sequence[str],
    group: dist.ProcessGroup,
    dynamic: DynamicTables,
    device_form: bool,
    deduplicate: bool,
) -> list[FlatRouting]:
    """Return the routings of a collection for :class:`FlatExchange`; none if it needs :class:`TorchRecExchange`.

    Raises:
        UserError: a dynamic table would need :class:`TorchRecExchange`.
    """
    tables = {key: table.name for table in collection._embedding_configs for key in table.feature_names}
    dynamic_keys = frozenset(key for key in keys if tables[key] in dynamic.names)
    shardings = {parameter.sharding_type for parameter in collection.module_sharding_plan.values()}
    if device_form and not dynamic_keys:
        return []
    if not shardings <= {"table_wise", "row_wise"}:
        if dynamic_keys:
            raise UserError(
                f"table {tables[min(dynamic_keys)]!r}: dynamic ids need all tables of the same width to be table_wise "
                "or row_wise; set features.*.sharding = 'auto'"
            )
        return []
    routings: list[FlatRouting] = []
    for sharding in sorted(shardings):
        of_sharding = {key for key in keys if collection.module_sharding_plan[tables[key]].sharding_type == sharding}
        if served := frozenset(of_sharding - dynamic_keys):
            routings.append(FlatRouting(collection, sharding, keys, group, served, device_form, deduplicate))
        if served := frozenset(of_sharding & dynamic_keys):
            routings.append(DynamicRouting(collection, sharding, keys, group, served, device_form, dynamic.rows))
    return routings
