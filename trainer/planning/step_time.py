"""Time of the parts of a ranker's step on described accelerators: the slower of work and transfer, part by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.planning.accelerators import GIGA, Cluster, peers_of
from trainer.planning.exchange_traffic import RankTraffic
from trainer.planning.network_cost import NetworkCost
from trainer.planning.table_memory import CACHE_SHARE

MEMORY_SHARE = 0.6
"""Share of its peak bandwidth that memory reaches when short rows are read and written. An assumption."""

Part = Literal["ids", "lookup", "rows", "dense", "gradients", "update", "reduce"]

COLLECTIVES: dict[Part, int] = {"ids": 2, "rows": 1, "gradients": 1}
"""Collectives of one exchange in each part: the numbers of ids and the ids, the rows, the gradients."""


@dataclass(frozen=True)
class StepTime:
    """Expected time of one step.

    Attributes:
        parts: part -> seconds that the step waits for it.
        hidden: seconds of the exchange of ids that pass while the network computes.
    """

    parts: dict[Part, float]
    hidden: float

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())

    @property
    def bottleneck(self) -> Part:
        """The part that takes longest."""
        return max(self.parts, key=lambda part: self.parts[part])


def transfer_seconds(bytes_: float, cluster: Cluster) -> float:
    """Return the time in which one rank exchanges bytes with all others, in the busier direction.

    The links inside a host and the network work at the same time, each on its share of the peers.
    """
    peers, figures = peers_of(cluster), cluster.accelerator
    near = peers.near * bytes_ / (GIGA * figures.nvlink_gb_per_s)
    far = peers.far * bytes_ / (GIGA * figures.network_gb_per_s)
    return max(near, far)


def reduce_seconds(bytes_: float, cluster: Cluster) -> float:
    """Return the time of an all-reduce: rings inside each host, then between the hosts, each rank with its part.

    ``2 b (L - 1) / L`` bytes pass the links inside a host of ``L`` ranks, and ``2 b / L (H - 1) / H`` each rank's
    network between ``H`` hosts.
    """
    per_host, hosts, figures = cluster.per_host, cluster.hosts, cluster.accelerator
    near = 2 * bytes_ * (per_host - 1) / per_host / (GIGA * figures.nvlink_gb_per_s)
    far = 2 * bytes_ / per_host * (hosts - 1) / hosts / (GIGA * figures.network_gb_per_s)
    return near + far


def network_seconds(cost: NetworkCost, cluster: Cluster, *, bf16: bool, mfu: float) -> float:
    """Return the time of the network's forward and backward pass: the slowest of products, memory and host.

    Args:
        cost: cost of one step on one rank.
        cluster: the accelerators.
        bf16: products are in bfloat16.
        mfu: share of the peak rate that products reach.
    """
    figures = cluster.accelerator
    products = cost.flops / (mfu * figures.flops_per_s(bf16=bf16))
    memory = cost.traffic_bytes / (MEMORY_SHARE * GIGA * figures.memory_gb_per_s)
    return max(products, memory, cost.operations * figures.launch_us * 1e-6)


def table_seconds(traffic: RankTraffic, state_share: float, cluster: Cluster) -> tuple[float, float]:
    """Return the time to look rows up, and to train them, as bytes that pass the memory.

    Looking up reads and writes each served row and copies it to every place of its id. Training reads the gradients at
    all places, adds them up, and reads each served gradient, reads and writes its row and its optimizer's state. Of a
    table in host memory the share of rows that is not cached passes the link between host and device, once each way.

    Args:
        traffic: exchange of the busiest rank.
        state_share: bytes of the optimizer's state for each byte of a row.
        cluster: the accelerators.
    """
    figures = cluster.accelerator
    memory = MEMORY_SHARE * GIGA * figures.memory_gb_per_s
    link = (1 - CACHE_SHARE) * traffic.uncached_bytes / (GIGA * figures.host_link_gb_per_s)
    lookup = (2 * traffic.served_bytes + traffic.own_bytes + traffic.read_bytes) / memory
    update = (
        traffic.read_bytes + traffic.own_bytes + (3 + 2 * state_share) * traffic.served_bytes + traffic.sorted_bytes
    ) / memory
    return lookup + link, update + link


def step_time(
    traffic: RankTraffic,
    exchanges: int,
    cost: NetworkCost,
    cluster: Cluster,
    *,
    state_share: float,
    reduced_bytes: float,
    bf16: bool,
    mfu: float,
    overlap: bool,
) -> StepTime:
    """Return the expected time of a step, as the engine orders its parts.

    Args:
        traffic: exchange of the busiest rank.
        exchanges: exchanges of a step, one for each width of tables and kind of sharding.
        cost: cost of the network.
        cluster: the accelerators.
        state_share: bytes of the optimizer's state for each byte of a row.
        reduced_bytes: bytes of the network's gradients.
        bf16, mfu: see :func:`network_seconds`.
        overlap: the ids of the next batch travel while the network computes.
    """
    several = cluster.gpus > 1
    latency = cluster.accelerator.collective_us * 1e-6 if several else 0.0

    def exchange(part: Part, outgoing: float, incoming: float) -> float:
        return COLLECTIVES[part] * exchanges * latency + transfer_seconds(max(outgoing, incoming), cluster)

    lookup, update = table_seconds(traffic, state_share, cluster)
    dense = network_seconds(cost, cluster, bf16=bf16, mfu=mfu)
    ids = exchange("ids", traffic.ids_out, traffic.ids_in)
    hidden = min(ids, dense) if overlap else 0.0
    rows = exchange("rows", traffic.rows_out, traffic.rows_in)
    # Three small all-reduces: the totals of the step, its loss, and the norm of the gradient.
    reduce = 4 * latency + reduce_seconds(reduced_bytes, cluster)
    return StepTime(
        {
            "ids": ids - hidden,
            "lookup": lookup,
            "rows": rows,
            "dense": dense,
            "gradients": exchange("gradients", traffic.rows_in, traffic.rows_out),
            "update": update,
            "reduce": reduce,
        },
        hidden,
    )
