"""The kernel of a CPU reads and trains rows as fbgemm's own kernel for pooled rows does, in every bit."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from trainer.sparse.cpu_kernel import CpuKernel
from trainer.sparse.planner import OPTIMIZERS
from trainer.sparse.row_loops import adagrad, rowwise_adagrad, sgd

HEIGHTS = (40, 300)
EPS = 3e-3
"""Float32 and float64 have other values of it, and it is not small beside the roots of the states."""


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def fbgemm(optimizer: EmbOptimType, heights: tuple[int, ...], dim: int, seed: int) -> Any:
    """Return fbgemm's kernel with random rows and states."""
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in heights],
        optimizer=optimizer,
        eps=EPS,
        learning_rate=0.07,
        pooling_mode=PoolingMode.SUM,
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(seed)
    kernel.weights_host.data.normal_(generator=generator)
    if optimizer != EmbOptimType.EXACT_SGD:
        state = kernel.momentum1_host.data
        state.copy_(torch.exp(8 * torch.randn(state.shape, generator=generator) - 12))
    return kernel


def ours(optimizer: EmbOptimType, dim: int, seed: int, *, unique: bool = False) -> tuple[CpuKernel, Any]:
    """Return our kernel over two tables, the second of which has two lookups; and fbgemm's, which owns the memory."""
    owner = fbgemm(optimizer, HEIGHTS, dim, seed)
    owner.feature_table_map = [0, 1, 1]
    config = SimpleNamespace(feature_names=lambda: ["user", "item", "seen"])
    return CpuKernel(cast(Any, SimpleNamespace(emb_module=owner, config=config)), unique=unique), owner


def bits(kernel: Any) -> tuple[bytes, bytes]:
    """Return the bits of rows and states."""
    return kernel.weights_host.detach().numpy().tobytes(), kernel.momentum1_host.detach().numpy().tobytes()


def gradients_of(found: Tensor, seed: int) -> Tensor:
    """Return gradients of all sizes, some of which are +0 and -0."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(found.shape, generator=generator)
    gradients *= torch.exp(3 * torch.randn(len(found), 1, generator=generator) - 3)
    zeros = torch.rand(found.shape, generator=generator)
    return torch.where(zeros < 0.1, 0.0, torch.where(zeros < 0.2, -0.0, gradients))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="fbgemm's rounding on other processors was never compared")
@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rows_and_states_have_the_bits_of_fbgemm(optimizer: str, unique: bool, threads: int) -> None:
    kind, height = OPTIMIZERS[optimizer], sum(HEIGHTS)
    for seed, dim in enumerate((4, 12, 16, 20, 64)):
        kernel, owner = ours(kind, dim, seed, unique=unique)
        reference = fbgemm(kind, (height,), dim, seed)
        rng = np.random.default_rng(seed)
        for step, (rate, scale) in enumerate(((0.07, 1.0), (0.07, 0.37), (0.013, 1.3))):
            owner.set_learning_rate(rate)
            reference.set_learning_rate(rate)
            # Few rows, each many times, or each of them once.
            drawn = rng.permutation(height)[:200] if unique else rng.integers(0, height, 700) // 3
            rows = torch.from_numpy(drawn.astype(np.int64))
            found, expected = kernel.read(rows), reference(rows, torch.arange(len(rows) + 1))
            assert torch.equal(found, expected)
            gradients = gradients_of(found, step)
            kernel.train(rows, gradients, scale)
            expected.backward(gradients * scale)
            assert bits(owner) == bits(reference), (seed, step)
        assert bits(owner) != bits(fbgemm(kind, HEIGHTS, dim, seed))


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_rows_and_gradients_of_zero_change_nothing(optimizer: str, unique: bool, threads: int) -> None:
    kernel, owner = ours(OPTIMIZERS[optimizer], 8, 1, unique=unique)
    before = bits(owner)
    for rows in (torch.arange(0), torch.arange(9)):
        found = kernel(rows)
        assert found.shape == (len(rows), 8)
        found.backward(torch.zeros_like(found))
    assert bits(owner) == before


def test_a_backward_pass_trains_the_rows() -> None:
    rows, states = torch.arange(5), []
    for by_autograd in (True, False):
        kernel, owner = ours(EmbOptimType.EXACT_ADAGRAD, 8, 1)
        found = kernel(rows)
        gradients = gradients_of(found, 3)
        if by_autograd:
            found.backward(gradients)
        else:
            kernel.train(rows, gradients)
        states.append(bits(owner))
    assert states[0] == states[1] != bits(fbgemm(EmbOptimType.EXACT_ADAGRAD, HEIGHTS, 8, 1))


def test_rows_outside_of_autograd_are_not_trained() -> None:
    kernel, _ = ours(EmbOptimType.EXACT_SGD, 8, 1)
    with torch.no_grad():
        assert not kernel(torch.arange(3)).requires_grad


def test_row_numbers_of_a_kernel_count_the_tables_before() -> None:
    kernel, _ = ours(EmbOptimType.EXACT_SGD, 8, 1)
    assert kernel.first_row == {"user": 0, "item": 40, "seen": 40}
    counts = torch.tensor([[2, 0, 1], [0, 2, 0]])
    numbers = kernel.number_rows(torch.tensor([3, 4, 5, 6, 7]), counts, ["user", "item", "seen"])
    assert numbers.tolist() == [3, 4, 45, 46, 47]


@pytest.mark.parametrize("loop", [sgd, adagrad, rowwise_adagrad])
def test_loops_need_no_stack_for_each_row(loop: Callable[..., None]) -> None:
    # 16 bytes of stack for each row would be twice the 8 MiB that a thread has.
    n = 1 << 20
    values, states, gradients = (np.ones((n, 4), np.float32) for _ in range(3))
    loop(0, n, np.arange(n), gradients, values, states, 0.5, 0.0, 1.0)
    assert (values == values[0]).all()
    assert (values < 1).all()
