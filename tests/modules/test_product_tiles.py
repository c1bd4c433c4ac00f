"""Products of tiles against plain products in float64."""

from __future__ import annotations

import numpy as np
import pytest

from modules import product_tiles
from modules.product_tiles import STEPS, make_product
from modules.vector_code import INSTRUCTIONS, LANES, VECTOR

pytestmark = pytest.mark.skipif(INSTRUCTIONS is None, reason="needs a processor with AVX2 or AVX-512")

add_product = make_product(True, product_tiles.from_zeros, product_tiles.add)
"""``c += a^T b``."""


@pytest.mark.parametrize("vectors", [1, 2, 4, 5, 9])
def test_a_product_is_exact_and_its_bits_do_not_depend_on_the_tiles(vectors: int) -> None:
    rng = np.random.default_rng(vectors)
    # Numbers of rows that fill large tiles, small ones and both.
    for rows in (4, 8, 12, 20, 28):
        steps = STEPS * int(rng.integers(1, 8))
        a, b = (rng.standard_normal((steps, width)).astype(np.float32) for width in (rows, vectors * LANES))
        whole = np.ones((rows, vectors * LANES), np.float32)
        by_vector, stride, first = whole.copy(), vectors * VECTOR, (a.ctypes.data, 4 * rows)
        target = whole.ctypes.data
        add_product(*first, b.ctypes.data, stride, steps, target, stride, rows, vectors, 0, 0, 0, 0, 0)
        target = by_vector.ctypes.data
        for at in range(0, stride, VECTOR):
            add_product(*first, b.ctypes.data + at, stride, steps, target + at, stride, rows, 1, 0, 0, 0, 0, 0)
        np.testing.assert_allclose(whole, 1 + a.astype(np.float64).T @ b, rtol=0, atol=1e-5)
        assert np.array_equal(whole, by_vector)
