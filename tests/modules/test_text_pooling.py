"""Pooling of token states against loops over texts."""

from __future__ import annotations

import math

import pytest
import torch

from modules.text_pooling import pool


@pytest.mark.parametrize("seed", range(3))
def test_against_a_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (9,), generator=generator)
    lengths[0] = 7
    states = torch.randn(9, 7, 5, generator=generator)
    query = torch.randn(5, generator=generator)
    # The states after the end must not contribute.
    states[torch.arange(7) >= lengths[:, None]] = math.nan
    last, mean, weighted = (pool(states, lengths, how, query) for how in ("last", "mean", "query"))
    for row, length in enumerate(lengths.tolist()):
        text = states[row, :length].double()
        torch.testing.assert_close(last[row].double(), text[-1])
        torch.testing.assert_close(mean[row].double(), text.mean(dim=0), atol=1e-6, rtol=1e-5)
        weights = torch.softmax(text @ query.double() / math.sqrt(5), dim=0)
        torch.testing.assert_close(weighted[row].double(), weights @ text, atol=1e-6, rtol=1e-5)


def test_a_query_of_zeros_is_the_mean() -> None:
    states, lengths = torch.randn(4, 6, 3), torch.tensor([6, 1, 3, 4])
    torch.testing.assert_close(pool(states, lengths, "query", torch.zeros(3)), pool(states, lengths, "mean"))


def test_vectors_are_float32_and_learn() -> None:
    states, lengths = torch.randn(2, 3, 4, dtype=torch.bfloat16), torch.tensor([3, 2])
    assert all(pool(states, lengths, how, torch.zeros(4)).dtype == torch.float32 for how in ("last", "mean", "query"))
    query = torch.zeros(4, requires_grad=True)
    pool(states, lengths, "query", query).square().sum().backward()
    assert query.grad is not None and query.grad.abs().sum() > 0
