"""Limit of whole numbers in columns of floats: from there on, a float stands for several numbers."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

EXACT_BITS = {pa.float16(): 11, pa.float32(): 24, pa.float64(): 53}
"""Bits of a float: from 2^bits on, it does not tell neighbouring whole numbers apart."""


def check_exact(floats: pa.Array | pa.ChunkedArray) -> None:
    """Check that each value can stand for one whole number only; null passes.

    Raises:
        pa.ArrowInvalid: a value is too large, NaN or infinite.
    """
    limit = 2.0 ** EXACT_BITS[floats.type]
    if not pc.all(pc.less(pc.abs(floats.cast(pa.float64())), limit), min_count=0).as_py():
        raise pa.ArrowInvalid("float does not hold the id exactly")
