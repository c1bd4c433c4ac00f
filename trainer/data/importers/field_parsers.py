"""Parsers of parts of columns to canonical values; a parser raises ``pa.ArrowInvalid`` if any value is bad.

``table_files.convert`` turns that error into one that names file, row, column and value.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.format.column_types import check_type
from trainer.data.format.exact_floats import EXACT_BITS, check_exact
from trainer.data.format.id_index import IdIndex
from trainer.data.importers.category_codes import category_text
from trainer.data.importers.null_markers import ID_NULLS, VALUE_NULLS, without_markers

_WHOLE = r"^(-?[0-9]+)\.0*$"


def accepted_ids(kind: pa.DataType, hash_column: str = "") -> str:
    """Return a description of the ids that are read, for the message about a value of type ``kind``.

    Args:
        kind: type of the column.
        hash_column: canonical name of the column if ``hash_ids`` of a mapping may name it.
    """
    if kind in EXACT_BITS:
        return (
            f"a whole number from 0 to 2^{EXACT_BITS[kind]} - 1, because a {kind} column does not tell larger ids "
            "apart; write the ids as int64 or as text"
        )
    hint = f' (ids that are text: hash_ids = ["{hash_column}"] in the mapping)' if hash_column else ""
    return f"a whole number, 0 or more{hint}"


def integer_ids(values: pa.Array) -> pa.Array:
    """Parse ids that are whole numbers of 0 or more, as numbers or as text; int64. ``7`` and ``7.0`` are one id."""
    check_type(_plain(values), "id")
    ids = _cast(_one_spelling(_present(without_markers(_plain(values), ()))), pa.int64())
    if len(ids) and pc.min(ids).as_py() < 0:
        raise pa.ArrowInvalid("negative id")
    return ids


def whole_numbers(values: pa.Array) -> pa.Array:
    """Return a column as int64, null where it is null; a float that does not hold the number exactly raises."""
    return _cast(_one_spelling(values) if values.type in EXACT_BITS else values, pa.int64())


def _one_spelling(values: pa.Array) -> pa.Array:
    """Return ids without the point that a detour over floats leaves: floats as int64, and the text ``7.0`` as ``7``.

    Other values are returned unchanged. A float that may stand for several ids raises ``pa.ArrowInvalid``.
    """
    if values.type in EXACT_BITS:
        check_exact(values)
        return values.cast(pa.float64()).cast(pa.int64())
    if pa.types.is_string(values.type):
        pointed = pc.match_substring_regex(values, _WHOLE)
        if pc.any(pointed).as_py():
            whole = pc.replace_substring_regex(values, _WHOLE, r"\1")
            # Text with a point was a float64 once.
            check_exact(_cast(whole.filter(pointed), pa.float64()))
            return whole
    return values


def text_hashes(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the BLAKE2b hashes of the distinct texts of a column, and the position of each value's hash among them.

    Args:
        values: text without nulls.

    Returns:
        Hashes ``[distinct, 2] uint64``, and positions ``[n] int32``.
    """
    coded = pc.dictionary_encode(values)
    digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in coded.dictionary.to_pylist()]
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2), coded.indices.to_numpy()


class IdHash:
    """Ids of texts: 63 bits of a text's BLAKE2b hash, the same on every machine.

    The next 64 bits of the hash detect two texts with the same id: ``collisions``. Among n ids that happens with
    probability n^2 / 2^64. An id takes 32 to 56 bytes of memory.
    """

    def __init__(self) -> None:
        self._collided: set[int] = set()
        self._known = IdIndex()
        self._checks = np.zeros(1024, np.uint64)

    @property
    def collisions(self) -> int:
        """Number of texts whose id already belonged to another text."""
        return len(self._collided)

    def ids(self, values: pa.Array, nulls: tuple[str, ...] = ID_NULLS) -> pa.Array:
        """Return the ids of a part of a column; spaces around a text do not count.

        Raises:
            pa.ArrowInvalid: a text is empty or a null marker of ``nulls``.
        """
        check_type(_plain(values), "id")
        texts = _present(without_markers(_plain(values), nulls))
        halves, which = text_hashes(_cast(_one_spelling(texts), pa.string()))
        ids = (halves[:, 0] >> np.uint64(1)).astype(np.int64)
        self._compare(ids, halves[:, 1])
        return pa.array(ids[which])

    def _compare(self, ids: np.ndarray, checks: np.ndarray) -> None:
        """Record the check bits of new ids, and the texts whose check bits differ from those of their id."""
        before = len(self._known)
        number = self._known.add(ids)
        if len(self._known) > len(self._checks):
            self._checks = np.resize(self._checks, 2 * len(self._known))
        new = np.flatnonzero(number >= before)[::-1]
        # reversed, so that of two new texts with the same id the first one is recorded
        self._checks[number[new]] = checks[new]
        self._collided.update(checks[self._checks[number] != checks].tolist())


def numbers(values: pa.Array, nulls: tuple[str, ...] = VALUE_NULLS) -> pa.Array:
    """Parse numbers, text, or true and false to float64; a missing value becomes 0, infinity raises.

    Null, NaN, an empty text and the null markers ``nulls`` are missing values.
    """
    values = _plain(values)
    check_type(values, "number")
    if pa.types.is_string(values.type):
        values = without_markers(values, nulls)
        # Value by value: a column may have both 1 and true.
        values = pc.if_else(pc.is_in(values, value_set=_TRUE), "1", values)
        values = pc.if_else(pc.is_in(values, value_set=_FALSE), "0", values)
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    floats = pc.fill_null(_cast(values, pa.float64()), 0.0)
    # Programs write a missing number as null or as NaN, and do not tell them apart.
    floats = pc.if_else(pc.is_nan(floats), 0.0, floats)
    if not pc.all(pc.is_finite(floats)).as_py():
        raise pa.ArrowInvalid("not finite")
    return floats


def codes(values: pa.Array, names: list[str]) -> pa.Array:
    """Return the position of each value, as text, in ``names``; other values raise.

    Values and names are compared as categories are, so ``1`` and ``1.0`` are one name; a missing value is the name "".
    """
    known = [name or "" for name in category_text(pa.array(names, pa.string())).to_pylist()]
    position = pc.index_in(pc.fill_null(category_text(values), ""), value_set=pa.array(known, pa.string()))
    if position.null_count:
        raise pa.ArrowInvalid("unknown name")
    return position


# Postgres writes t and f.
_TRUE = pa.array(["true", "True", "TRUE", "t"])
_FALSE = pa.array(["false", "False", "FALSE", "f"])


def _present(values: pa.Array) -> pa.Array:
    """Return ``values``; null raises."""
    if values.null_count:
        raise pa.ArrowInvalid("no value")
    return values


def _plain(values: pa.Array) -> pa.Array:
    """Return dictionary-encoded and large text as plain strings; other values as they are."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return values.cast(pa.string()) if pa.types.is_large_string(values.type) else values


def _cast(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Cast values; a cast that Arrow does not have raises ``pa.ArrowInvalid`` like a bad value."""
    try:
        return _plain(values).cast(kind)
    except pa.ArrowNotImplementedError as error:
        raise pa.ArrowInvalid(str(error)) from None
