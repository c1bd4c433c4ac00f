"""One step of the engine as one of many ranks on a fake process group: prints counted and planned bytes as JSON.

torch's fake process group has any number of ranks in one process and sends nothing. Here every other rank is taken to
send what this rank sends to itself, so that ids and numbers of ids are valid; rows and gradients that arrive are zeros.

    python -m tests.planning.dry_run 64 row_wise
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tests.planning.exchange_ranks import DIM, LOOKUPS, ROWS, draw_ids, keyed, planned_ids, tables
from trainer.data.loading.batch import RankingBatch
from trainer.engine import hybrid_engine
from trainer.engine.hybrid_engine import DenseOptimizer, HybridEngine, TableOptimizer
from trainer.engine.step_loss import BehaviourLoss
from trainer.planning.exchange_traffic import ID, rank_traffic

BEHAVIOURS, N_DENSE = 2, 3


class Network(nn.Module):
    """One linear layer over the sums of all rows that a lookup reads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM * len(LOOKUPS) + N_DENSE, BEHAVIOURS)

    def forward(self, embedded: dict[str, Tensor], lengths: dict[str, Tensor], dense: Tensor) -> Tensor:
        rows = [embedded[lookup.name].view(len(dense), lookup.most_ids, DIM).sum(1) for lookup in LOOKUPS]
        return self.linear(torch.cat([*rows, dense], 1))


class Collectives(TorchDispatchMode):
    """Records the collectives of the process group, and fills what an all-to-all receives.

    Attributes:
        sent: (operation, bytes that this rank sends to others), in order.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name != "alltoall_base_":
            tensors = [tensor for tensor in torch.utils._pytree.tree_leaves(args) if isinstance(tensor, Tensor)]
            self.sent.append((name, sum(tensor.nbytes for tensor in tensors)))
            return func(*args, **(kwargs or {}))
        incoming, outgoing, _, received, sent = args[:5]
        own = outgoing.split(sent)[self.rank]
        self.sent.append((name, outgoing.nbytes - own.nbytes))
        done = func(*args, **(kwargs or {}))
        incoming.zero_()
        if not outgoing.is_floating_point():
            for part in incoming.split(received):
                part.copy_(own)
        return done


def main() -> None:
    """Run one step and print what was counted and what was planned."""
    world, sharding = int(sys.argv[1]), sys.argv[2]
    rank = 0
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    # A gloo group of 64 ranks would wait for the other 63.
    hybrid_engine.control_group = lambda: dist.group.WORLD  # type: ignore[assignment, return-value]
    network = Network()
    engine = HybridEngine(
        tables(sharding),
        LOOKUPS,
        network,
        table_optimizer=TableOptimizer("rowwise_adagrad", 0.1),
        dense_optimizer=DenseOptimizer(0.01),
        deepspeed={"zero_optimization": {"stage": 1}},
        loss=BehaviourLoss(torch.ones(BEHAVIOURS)),
        batch_size=ROWS,
        device=torch.device("cpu"),
        seed=1,
        overlap=False,
    )
    index = torch.arange(ROWS)
    label = torch.zeros(ROWS, BEHAVIOURS)
    batch = RankingBatch(
        [keyed(draw_ids(rank))], torch.zeros(ROWS, N_DENSE), label, label + 1, index, index, index, ROWS, {}
    )
    with Collectives(rank) as counted:
        for _ in engine.steps(iter([batch])):
            break
    traffic = rank_traffic(engine.plan, planned_ids(True), world)[rank]
    of_tables = [size for name, size in counted.sent if name == "alltoall_base_"]
    numbers, ids, rows, gradients = of_tables[:4]
    print(
        json.dumps(
            {
                "plan": engine.plan,
                "collectives": counted.sent,
                "all_to_all": len(of_tables),
                "numbers": [numbers, ID * len(LOOKUPS) * (world - 1)],
                "ids_out": [ids, traffic.ids_out],
                "rows_out": [rows, traffic.rows_out],
                "gradients_out": [gradients, traffic.rows_in],
                "parameters": sum(parameter.numel() for parameter in network.parameters()),
            }
        )
    )


if __name__ == "__main__":
    main()
