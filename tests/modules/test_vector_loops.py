"""Loops over vectors against NumPy and PyTorch."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch

from modules.vector_code import INSTRUCTIONS, LANES
from modules.vector_loops import dot, dots, exponential, narrow, widen

pytestmark = pytest.mark.skipif(INSTRUCTIONS is None, reason="needs a processor with AVX2 or AVX-512")


@numba.njit
def exponentials(values: int, vectors: int, largest: float) -> float:
    return exponential(values, 0, 0, 0, vectors, largest)


@numba.njit
def dot_product(one: int, other: int, vectors: int) -> float:
    return dot(one, other, 0, 0, vectors, np.float32(0))


@numba.njit
def dot_products(target: int, rows: int, stride: int, values: int, vectors: int) -> None:
    dots(target, rows, stride, values, vectors)


@numba.njit
def round_and_widen(values: int, halves: int, vectors: int) -> None:
    narrow(halves, values, vectors)
    widen(values, halves, vectors)


def test_exponentials_are_within_two_units_in_the_last_place() -> None:
    largest = np.float32(3.25)
    values = np.linspace(largest - 87, largest, 64 * LANES, dtype=np.float32)
    expected = np.exp((values - largest).astype(np.float64))
    total = exponentials(values.ctypes.data, 64, largest)
    assert np.max(np.abs(values - expected) / np.spacing(expected.astype(np.float32))) <= 2
    assert total == pytest.approx(expected.sum(), rel=1e-6)


def test_exponentials_of_very_small_values_are_zero_and_nan_stays() -> None:
    values = np.full(LANES, np.nan, np.float32)
    values[:3] = -np.inf, -88, 0
    assert np.isnan(exponentials(values.ctypes.data, 1, np.float32(0)))
    assert values[:3].tolist() == [0, 0, 1] and np.isnan(values[3:]).all()


def test_a_dot_product_sums_all_lanes() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((2, 5 * LANES)).astype(np.float32)
    found = dot_product(one.ctypes.data, other.ctypes.data, 5)
    assert found == pytest.approx(np.dot(one.astype(np.float64), other), rel=1e-5)


@pytest.mark.parametrize("vectors", [1, 3])
def test_dot_products_of_many_rows_have_the_bits_of_single_ones(vectors: int) -> None:
    rng = np.random.default_rng(vectors)
    width, stride = vectors * LANES, (vectors + 1) * LANES
    rows, values = (rng.standard_normal(shape).astype(np.float32) for shape in ((LANES, stride), width))
    found = np.empty(LANES, np.float32)
    dot_products(found.ctypes.data, rows.ctypes.data, 4 * stride, values.ctypes.data, vectors)
    single = [dot_product(row.ctypes.data, values.ctypes.data, vectors) for row in rows]
    assert found.tolist() == single


def test_values_are_rounded_to_bfloat16_as_pytorch_rounds_them() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 64 * LANES, dtype=np.uint32)
    # Ties to even and infinity, and numbers that round up to it.
    values[:6] = 0x3F808000, 0x3F818000, 0xBF808001, 0x7F800000, 0x7F7FFFFF, 0xFFFFFFFF
    floats = values.view(np.float32)
    expected = torch.from_numpy(floats.copy()).bfloat16()
    halves = torch.empty(len(floats), dtype=torch.bfloat16)
    round_and_widen(floats.ctypes.data, halves.data_ptr(), 64)
    assert torch.equal(torch.isnan(halves), torch.isnan(expected))
    assert torch.equal(halves.nan_to_num(), expected.nan_to_num())
    torch.testing.assert_close(torch.from_numpy(floats), halves.float(), rtol=0, atol=0, equal_nan=True)
