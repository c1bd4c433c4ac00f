"""Time of a step's parts on described accelerators."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.planning.plans import even_plan
from trainer.planning.accelerators import Cluster, describe_cluster
from trainer.planning.exchange_traffic import RankTraffic, TableIds, rank_traffic
from trainer.planning.network_cost import NetworkCost
from trainer.planning.step_time import StepTime, network_seconds, reduce_seconds, step_time, transfer_seconds

COST = NetworkCost(1e12, 500, 1e10, 1e9)


def one_step(cluster: Cluster, ids: float, overlap: bool = True, cost: NetworkCost = COST) -> StepTime:
    plan = even_plan([(10**6, 16)], cluster.gpus, "row_wise")
    traffic = rank_traffic(plan, {"t0": TableIds(ids, ids / 4)}, cluster.gpus)[0]
    options: Any = {"state_share": 1 / 16, "reduced_bytes": 4e6, "bf16": False, "mfu": 0.3, "overlap": overlap}
    return step_time(traffic, 1, cost, cluster, **options)


def test_transfers_inside_a_host_use_its_links_and_others_the_network() -> None:
    # 450 GB/s to the others of a host, 50 GB/s between hosts.
    assert transfer_seconds(45e9, describe_cluster("h200", 8, 1)) == pytest.approx(0.1)
    assert transfer_seconds(63e9, describe_cluster("h200", 64, 8)) == pytest.approx(56 / 50)
    assert transfer_seconds(1e9, describe_cluster("h200", 1, 1)) == 0


def test_an_all_reduce_is_two_rings() -> None:
    assert reduce_seconds(1e9, describe_cluster("h200", 1, 1)) == 0
    assert reduce_seconds(450e9, describe_cluster("h200", 8, 1)) == pytest.approx(2 * 7 / 8)
    both = reduce_seconds(450e9, describe_cluster("h200", 16, 2))
    assert both == pytest.approx(2 * 7 / 8 + 2 * 450 / 8 / 2 / 50)


def test_the_network_takes_as_long_as_its_slowest_resource() -> None:
    cluster = describe_cluster("h200", 8, 1)
    assert network_seconds(NetworkCost(67e12, 1, 1, 1), cluster, bf16=False, mfu=0.5) == pytest.approx(2)
    assert network_seconds(NetworkCost(989.5e12, 1, 1, 1), cluster, bf16=True, mfu=0.5) == pytest.approx(2)
    assert network_seconds(NetworkCost(1, 1, 4.8e12, 1), cluster, bf16=False, mfu=0.5) == pytest.approx(1 / 0.6)
    assert network_seconds(NetworkCost(1, 10**6, 1, 1), cluster, bf16=False, mfu=0.5) == pytest.approx(8)


def test_ids_travel_while_the_network_computes() -> None:
    cluster = describe_cluster("h200", 64, 8)
    together, after = one_step(cluster, 1e6), one_step(cluster, 1e6, overlap=False)
    assert together.parts["ids"] == 0 and together.hidden == after.parts["ids"] > 0
    assert after.seconds == pytest.approx(together.seconds + together.hidden)
    quick = one_step(cluster, 1e6, cost=NetworkCost(1, 1, 1, 1))
    assert quick.hidden == pytest.approx(quick.parts["dense"]) and quick.parts["ids"] > 0


@given(st.floats(0, 1e8), st.sampled_from([(1, 1), (8, 1), (64, 8), (8, 8)]), st.booleans())
def test_a_step_is_the_sum_of_its_parts_and_grows_with_the_ids(
    ids: float, shape: tuple[int, int], overlap: bool
) -> None:
    cluster = describe_cluster("a100-80", *shape)
    few, many = one_step(cluster, ids, overlap), one_step(cluster, 2 * ids, overlap)
    assert few.seconds == pytest.approx(sum(few.parts.values())) and min(few.parts.values()) >= 0
    assert many.seconds >= few.seconds
    assert few.parts[few.bottleneck] == max(few.parts.values())


def test_rows_in_host_memory_pass_the_link() -> None:
    cluster = describe_cluster("h200", 8, 1)
    options: Any = {"state_share": 0.0, "reduced_bytes": 0.0, "bf16": False, "mfu": 0.3, "overlap": True}
    plain = RankTraffic(*([0.0] * 9), 1e9, 0.0, 0.0)
    hosted = plain._replace(uncached_bytes=1e9)
    slower = (
        step_time(hosted, 1, COST, cluster, **options).seconds - step_time(plain, 1, COST, cluster, **options).seconds
    )
    assert slower == pytest.approx(2 * 0.8 * 1e9 / 64e9)
