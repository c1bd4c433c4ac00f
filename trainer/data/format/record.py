"""One record of a shard: a batch of rows as a safetensors file with one tensor for each column.

Any safetensors reader can read a record. Columns lie in decreasing order of item size, so each one is aligned, and
reading a record makes views of its bytes without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import numpy as np

from trainer.data.format.safetensors_header import decode_header, encode_header, header_bytes
from trainer.data.format.schema import Rows

SUFFIX = "safetensors"

_TYPE_NAMES = {"u1": "U8", "i4": "I32", "i8": "I64", "f4": "F32"}
_DTYPES = {name: np.dtype(f"<{code}") for code, name in _TYPE_NAMES.items()}


def encode(rows: Rows) -> bytes:
    """Return rows as the bytes of a safetensors file. Columns have dtype uint8, int32, int64 or float32."""
    names = sorted(rows, key=lambda name: -rows[name].dtype.itemsize)
    header = _header(tuple((name, _TYPE_NAMES[rows[name].dtype.str[1:]], rows[name].shape) for name in names))
    return b"".join([header, *(np.ascontiguousarray(rows[name]).reshape(-1).view(np.uint8).data for name in names)])


def decode(data: bytes, columns: Sequence[str] | None = None) -> Rows:
    """Return columns of a record (all by default) as read-only views of ``data``.

    Raises:
        ValueError: ``data`` is not a safetensors file of such columns.
    """
    start = header_bytes(data)
    layout = _layout(data[:start])
    wanted = layout if columns is None else columns
    rows = {}
    for name in wanted:
        if name not in layout:
            raise ValueError(f"it has no column {name!r}")
        dtype, shape, offset, count = layout[name]
        rows[name] = np.frombuffer(data, dtype, count, start + offset).reshape(shape)
    return rows


# Records of one dataset have few distinct sizes, so few distinct headers: parsing JSON for each would cost more than
# the rest of a read.
@lru_cache(maxsize=256)
def _header(columns: tuple[tuple[str, str, tuple[int, ...]], ...]) -> bytes:
    """Return the header for columns of the given names, types and shapes."""
    return encode_header(columns)[0]


@lru_cache(maxsize=256)
def _layout(header: bytes) -> dict[str, tuple[np.dtype, tuple[int, ...], int, int]]:
    """Return the dtype, shape, first byte and number of elements of each column."""
    layout = {}
    for name, tensor in decode_header(header).items():
        sizes = (*tensor.shape, tensor.start)
        if tensor.dtype not in _DTYPES or any(type(size) is not int or size < 0 for size in sizes):
            raise ValueError(f"column {name!r} has no type, shape and place that a record can have")
        layout[name] = (_DTYPES[tensor.dtype], tensor.shape, tensor.start, prod(tensor.shape))
    return layout
