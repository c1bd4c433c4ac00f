"""Types of columns: how each Arrow type is read, and which types a column of a certain meaning may have.

A Parquet column may have any type. :func:`simplify` converts the types that only store values differently
(dictionaries, large text, text as bytes, extension types, ...). :func:`check_type` refuses the types that a parser
would misread, such as a timestamp as an id.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

ColumnMeaning = Literal["id", "number", "time"]

_Test = Callable[[pa.DataType], bool]
_TEXT: tuple[_Test, ...] = (pa.types.is_string, pa.types.is_null)
_NUMBERS: tuple[_Test, ...] = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
_CALENDAR: tuple[_Test, ...] = (pa.types.is_date, pa.types.is_timestamp)
_READ: tuple[_Test, ...] = (*_TEXT, *_NUMBERS, *_CALENDAR, pa.types.is_boolean, pa.types.is_time)
_TEXT_TYPES = (
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.null(),
)
_ACCEPTED: dict[ColumnMeaning, tuple[tuple[_Test, ...], str]] = {
    "id": ((*_NUMBERS, *_TEXT), "integers, floats, decimals and text"),
    "number": ((*_NUMBERS, *_TEXT, pa.types.is_boolean), "integers, floats, decimals, booleans and text"),
    "time": ((*_NUMBERS, *_TEXT, *_CALENDAR), "timestamps, dates, integers, float64, decimals and text"),
}


class WrongType(pa.ArrowInvalid):
    """A column has a type that cannot be read; the message lists the types that can."""


def simplify(values: pa.Array) -> pa.Array:
    """Convert values to one of the types that parsers know: text, booleans, numbers, dates, times or timestamps.

    Raises:
        WrongType: there is no such conversion, as for lists, structs and durations.
        pa.ArrowInvalid: bytes are not UTF-8 text.
    """
    kind = values.type
    if isinstance(kind, pa.BaseExtensionType):
        return simplify(values.storage)
    if pa.types.is_dictionary(kind):
        return simplify(values.dictionary_decode())
    if pa.types.is_run_end_encoded(kind):
        return simplify(pc.run_end_decode(values))
    if pa.types.is_fixed_size_binary(kind):
        return values.cast(pa.binary()).cast(pa.string())
    if kind in _TEXT_TYPES:
        return values.cast(pa.string())
    if not any(read(kind) for read in _READ):
        raise WrongType("text, booleans, integers, floats, decimals, dates, times and timestamps")
    return values


def check_type(values: pa.Array, meaning: ColumnMeaning) -> None:
    """Check that values have a type in which an id, a number or a time can be stored.

    Raises:
        WrongType: they have another one.
    """
    tests, accepted = _ACCEPTED[meaning]
    if not any(fits(values.type) for fits in tests):
        raise WrongType(accepted)
