"""Integer codes of categories: 1 + the position in a sorted vocabulary; 0 is unknown.

A category is a text with one spelling: :func:`category_text` gives the same text for a number, a date or a truth value
in CSV, and for the integer, float, decimal, date or boolean in Parquet.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.format.column_types import simplify
from trainer.data.format.exact_floats import EXACT_BITS, check_exact
from trainer.data.importers.null_markers import VALUE_NULLS, without_markers

_TRUTHS = pa.array(["True", "TRUE", "False", "FALSE"]), pa.array(["true", "true", "false", "false"])
_WHOLE = r"^(-?[0-9]+)\.0*$"
_EXPONENT = r"^-?[0-9]+(\.[0-9]+)?[eE][-+][0-9]+$"


def accepted_categories(kind: pa.DataType) -> str:
    """Return a description of the categories that are read, for the message about a value of type ``kind``."""
    if kind in EXACT_BITS:
        return (
            f"a number below 2^{EXACT_BITS[kind]}, because a {kind} column does not tell larger ones apart; write the "
            "categories as int64 or as text"
        )
    return "a text, a number, a date, true or false"


def category_text(values: pa.Array) -> pa.Array:
    """Return categories as text, each in one spelling; a missing value, NaN among them, is null.

    * Spaces around a text do not count.
    * ``1``, ``1.`` and ``1.0`` are ``1``, ``1e-07`` is ``1e-7``, and ``1.00000000005e+10`` is ``10000000000.5``,
      because programs write one float in these ways.
      Other zeros stay: ``01`` is a code and not ``1``, and the versions ``8.1`` and ``8.10`` differ.
    * ``True`` and ``TRUE`` are ``true``, likewise ``false``.

    Raises:
        pa.ArrowInvalid: a float is infinite, or so large that it stands for several whole numbers; or the type has no
            such text.
    """
    values = simplify(values)
    kind = values.type
    if kind in EXACT_BITS:
        return _from_floats(pc.if_else(pc.is_nan(values.cast(pa.float64())), pa.scalar(None, kind), values))
    if pa.types.is_string(kind) or pa.types.is_decimal(kind):
        return _from_text(without_markers(values.cast(pa.string()), ()))
    text = values.cast(pa.string())
    # Fractions of a second that are zero are written for some units and not for others.
    return pc.replace_substring_regex(text, r"\.0+$", "") if pa.types.is_temporal(kind) else text


def distinct_values(arrays: Iterable[pa.Array], nulls: tuple[str, ...] = VALUE_NULLS) -> set[str]:
    """Return the distinct categories of columns, without missing values and the null markers ``nulls``.

    Raises:
        pa.ArrowInvalid: see :func:`category_text`.
    """
    values: set[str] = set()
    for array in arrays:
        values.update(category_text(pc.unique(array)).to_pylist())
    return values - {None, "", *nulls, *category_text(pa.array(nulls, pa.string())).to_pylist()}


def vocabulary(values: Iterable[str]) -> tuple[str, ...]:
    """Return the values in a fixed order: by number if all are integers, else by text."""
    values = sorted(values)
    try:
        return tuple(sorted(values, key=int))
    except ValueError:
        return tuple(values)


def encode(array: pa.Array, known: tuple[str, ...]) -> np.ndarray:
    """Return codes ``[n] int32`` in ``[0, len(known)]``; null and values that are not in ``known`` become 0.

    Raises:
        pa.ArrowInvalid: see :func:`category_text`.
    """
    if pa.types.is_string(array.type):
        # Each text is spelled once.
        coded = pc.dictionary_encode(array)
        codes = np.append(_positions(coded.dictionary, known) + 1, np.int32(0))
        return codes[pc.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False)]
    return _positions(array, known) + 1


def _positions(array: pa.Array, known: tuple[str, ...]) -> np.ndarray:
    """Return the position of each category in ``known``, ``[n] int32``; -1 where it is missing or unknown."""
    position = pc.index_in(category_text(array), value_set=pa.array(known, pa.string()))
    return pc.fill_null(position, -1).to_numpy(zero_copy_only=False).astype(np.int32)


def _from_floats(values: pa.Array) -> pa.Array:
    """Return floats as text: whole ones as integers, others with as few digits as tell them apart."""
    check_exact(values)
    # Arrow writes all digits of a float16.
    floats = values.cast(pa.float32()) if pa.types.is_float16(values.type) else values
    whole = pc.equal(pc.floor(floats), floats)
    integers = pc.if_else(whole, floats.cast(pa.float64()), 0.0).cast(pa.int64())
    texts = pc.if_else(whole, integers.cast(pa.string()), floats.cast(pa.string()))
    # Arrow writes an exponent from 1e10 on; other programs write digits as long as a fraction is left.
    long = np.flatnonzero(pc.fill_null(pc.match_substring(texts, "e+"), False).to_numpy(zero_copy_only=False))
    if not len(long):
        return texts
    digits = [np.format_float_positional(value, trim="-") for value in floats.take(pa.array(long)).to_numpy()]
    mask = np.zeros(len(texts), bool)
    mask[long] = True
    return pc.replace_with_mask(texts, pa.array(mask), pa.array(digits, pa.string()))


def _from_text(values: pa.Array) -> pa.Array:
    """Return text with numbers and truth values in one spelling."""
    truth = pc.index_in(values, value_set=_TRUTHS[0])
    if truth.null_count < len(truth):
        values = pc.coalesce(_TRUTHS[1].take(truth), values)
    # This is exact for numbers of any size, which floats are not.
    values = pc.replace_substring_regex(values, _WHOLE, r"\1")
    values = pc.if_else(pc.equal(values, "-0"), "0", values)
    float_text = pc.fill_null(pc.match_substring_regex(values, _EXPONENT), False)
    if not pc.any(float_text).as_py():
        return values
    numbers = pc.if_else(float_text, values, pa.scalar(None, pa.string())).cast(pa.float64())
    exact = pc.less(pc.abs(numbers), 2.0 ** EXACT_BITS[pa.float64()])
    return pc.coalesce(_from_floats(pc.if_else(exact, numbers, pa.scalar(None, pa.float64()))), values)
