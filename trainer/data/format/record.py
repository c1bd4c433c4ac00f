"""One record of a shard: a batch of rows as a safetensors file, one tensor a column.

The format is safetensors' own and any of its readers can read it. Columns lie in decreasing order of item size, so each
is aligned, and reading a record is a few pointers into its bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from trainer.data.format.schema import Rows

SUFFIX = "safetensors"

_TYPE_NAMES = {"u1": "U8", "i4": "I32", "i8": "I64", "f4": "F32"}
_DTYPES = {name: np.dtype(f"<{code}") for code, name in _TYPE_NAMES.items()}


def encode(rows: Rows) -> bytes:
    """Rows as the bytes of a safetensors file. Columns have dtype uint8, int32, int64 or float32."""
    names = sorted(rows, key=lambda name: -rows[name].dtype.itemsize)
    header = _header(tuple((name, rows[name].dtype.str[1:], rows[name].shape) for name in names))
    return b"".join([header, *(np.ascontiguousarray(rows[name]).reshape(-1).view(np.uint8).data for name in names)])


def decode(data: bytes, columns: Sequence[str] | None = None) -> Rows:
    """Columns (all by default) of a record, as read-only views of ``data``.

    Raises:
        ValueError: ``data`` is not a safetensors file of such columns.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    layout = _layout(data[8:start])
    wanted = layout if columns is None else columns
    rows = {}
    for name in wanted:
        dtype, shape, offset, count = layout[name]
        rows[name] = np.frombuffer(data, dtype, count, start + offset).reshape(shape)
    return rows


# Records of one dataset have few distinct sizes, so few distinct headers.
@lru_cache(maxsize=256)
def _header(columns: tuple[tuple[str, str, tuple[int, ...]], ...]) -> bytes:
    tensors, offset = {}, 0
    for name, code, shape in columns:
        end = offset + int(np.prod(shape)) * int(code[1:])
        tensors[name] = {"dtype": _TYPE_NAMES[code], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@lru_cache(maxsize=256)
def _layout(header: bytes) -> dict[str, tuple[np.dtype, tuple[int, ...], int, int]]:
    tensors = json.loads(header)
    return {
        name: (
            _DTYPES[tensor["dtype"]],
            tuple(tensor["shape"]),
            tensor["data_offsets"][0],
            int(np.prod(tensor["shape"])),
        )
        for name, tensor in tensors.items()
        if name != "__metadata__"
    }
