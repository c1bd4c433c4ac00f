"""Memory of a network under ZeRO."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.planning.dense_memory import DenseMemory, ZeroSettings, dense_memory

COUNTS = st.integers(1, 10**9)


def test_the_bytes_of_a_parameter_are_those_of_the_zero_paper() -> None:
    """Rajbhandari et al. (2020): 2 + 2 + 12 bytes a parameter in half precision, before it is partitioned."""
    p, world = 10**6, 64
    plain = dense_memory(p, p, 1, ZeroSettings(1, bf16=True))
    # DeepSpeed's bucket is in the gradients' 4.
    assert (plain.weights, plain.gradients, plain.optimizer) == (2 * p, 4 * p, 12 * p)
    stages = [dense_memory(p, p, world, ZeroSettings(stage, bf16=True)) for stage in (1, 2, 3)]
    assert [of.optimizer for of in stages] == [12 * p // world] * 3
    assert [of.gradients for of in stages] == [4 * p, 2 * p + 2 * p // world, 2 * p + 2 * p // world]
    assert [of.weights for of in stages] == [2 * p, 2 * p, 2 * p // world]


def test_float32_without_zero_is_the_plain_optimizer() -> None:
    assert dense_memory(100, 100, 8, ZeroSettings(0)) == DenseMemory(400, 0, 400, 800, 0)


@given(COUNTS, COUNTS, st.integers(1, 1000), st.integers(0, 3), st.booleans())
def test_no_stage_and_no_further_rank_needs_more_memory(
    first: int, second: int, world: int, stage: int, bf16: bool
) -> None:
    p, t = max(first, second), min(first, second)
    here = dense_memory(p, t, world, ZeroSettings(stage, bf16))
    assert dense_memory(p, t, world + 1, ZeroSettings(stage, bf16)).device <= here.device
    assert here.device == here.weights + here.gathered + here.gradients + here.optimizer
    if 1 <= stage < 3:
        # Rounding up gives each rank at most one element more.
        assert dense_memory(p, t, world, ZeroSettings(stage + 1, bf16)).device <= here.device


@given(COUNTS, st.integers(1, 64), st.booleans())
def test_offloading_moves_bytes_to_the_host_and_makes_none(p: int, world: int, bf16: bool) -> None:
    here = dense_memory(p, p, world, ZeroSettings(3, bf16))
    optimizer = dense_memory(p, p, world, ZeroSettings(3, bf16, offload_optimizer=True))
    both = dense_memory(p, p, world, ZeroSettings(3, bf16, offload_optimizer=True, offload_parameters=True))
    assert here.device == optimizer.device + optimizer.host == both.device + both.host
    assert both.weights == both.optimizer == 0 and both.gradients == here.gradients


@pytest.mark.parametrize("stage", [1, 2])
def test_weights_are_offloaded_at_stage_3_only(stage: int) -> None:
    assert dense_memory(100, 100, 2, ZeroSettings(stage, offload_parameters=True)).host == 0
