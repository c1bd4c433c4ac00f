"""Integer codes of categories: 1 + the position in a sorted vocabulary; 0 is unknown."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_MISSING = ("", "UNKNOWN")


def distinct_values(arrays: Iterable[pa.Array], missing: tuple[str, ...] = _MISSING) -> set[str]:
    """Return the distinct values as text, without those that mean missing. ``1`` and ``1.0`` are one value."""
    values: set[str] = set()
    for array in arrays:
        values.update(pc.unique(_as_text(array)).to_pylist())
    return {value for value in values if value is not None and value not in missing}


def vocabulary(values: Iterable[str]) -> tuple[str, ...]:
    """Return the values in a fixed order: by number if all are integers, else by text."""
    try:
        return tuple(sorted(values, key=int))
    except ValueError:
        return tuple(sorted(values))


def encode(array: pa.Array, known: tuple[str, ...]) -> np.ndarray:
    """Return codes ``[n] int32`` in ``[0, len(known)]``; null and values that are not in ``known`` become 0."""
    position = pc.index_in(_as_text(array), value_set=pa.array(known, pa.string()))
    return pc.fill_null(position, -1).to_numpy(zero_copy_only=False).astype(np.int32) + 1


def _as_text(array: pa.Array) -> pa.Array:
    return array if pa.types.is_string(array.type) else pc.cast(array, pa.string())
