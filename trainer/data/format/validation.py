"""Checks of the tables that the dataset builder takes; an error names the table, column, row and value."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from trainer.console.errors import UserError
from trainer.data.format.exact_floats import check_exact
from trainer.data.format.schema import DOMAINS, UNKNOWN, DatasetSpec, SideFeature
from trainer.data.format.times import milliseconds_of

Columns = dict[str, np.ndarray]


def columns_of(table: pa.Table, schema: pa.Schema, what: str, optional: frozenset[str] = frozenset()) -> Columns:
    """Return the columns of ``schema``, cast to its types without loss. Missing optional columns are filled with 0.

    Args:
        table: the table to check.
        schema: columns that it may have.
        what: name of the table, for messages.
        optional: columns that may be missing.

    Raises:
        UserError: a column is missing, unknown or has nulls, or its values do not fit the type.
    """
    for name in table.column_names:
        if name not in schema.names:
            raise UserError(f"{what}: unknown column {name!r}; known columns are {', '.join(schema.names)}")
    columns = {}
    for field in schema:
        if field.name not in table.column_names:
            if field.name not in optional:
                raise UserError(f"{what}: column {field.name!r} is missing")
            columns[field.name] = np.zeros(table.num_rows, field.type.to_pandas_dtype())
            continue
        column = table.column(field.name)
        if column.null_count:
            row = int(np.argmax(column.is_null().to_numpy()))
            raise UserError(f"{what}: column {field.name!r} has no value in row {row}")
        if column.type != field.type:
            # Floats may be rounded to 32 bits; integers and times must not change.
            try:
                if pa.types.is_timestamp(column.type) and field.name.endswith("_ms"):
                    column = milliseconds_of(column)
                elif pa.types.is_floating(column.type) and pa.types.is_int64(field.type):
                    check_exact(column)
                elif pa.types.is_temporal(column.type):
                    raise pa.ArrowInvalid(f"it is {column.type}")
                column = column.cast(field.type, safe=not pa.types.is_floating(field.type))
            except pa.ArrowException as error:
                raise UserError(f"{what}: column {field.name!r} is not {field.type} ({error})") from None
        columns[field.name] = column.to_numpy()
    return columns


def refuse(bad: np.ndarray, columns: Columns, name: str, what: str, accepted: str) -> None:
    """Raise an error for the first row where ``bad`` is set; do nothing if there is none.

    Raises:
        UserError: the message gives column, row and value, and what would be ``accepted``.
    """
    if bad.any():
        row = int(np.argmax(bad))
        raise UserError(f"{what}: column {name!r} is {columns[name][row]} in row {row}; it must be {accepted}")


def check_ids(columns: Columns, names: tuple[str, ...], what: str) -> None:
    """Check that ids and times are not negative.

    Raises:
        UserError: one is negative.
    """
    for name in names:
        refuse(columns[name] < 0, columns, name, what, "0 or more")


def check_side(columns: Columns, side: tuple[SideFeature, ...], what: str) -> None:
    """Check that the values of side features lie in the range of their feature.

    Raises:
        UserError: one is outside.
    """
    for feature in side:
        values = columns[feature.name]
        outside = (values < UNKNOWN) | (values >= feature.rows)
        refuse(outside, columns, feature.name, what, f"in [0, {feature.rows})")


def check_finite(columns: Columns, names: tuple[str, ...], what: str) -> None:
    """Check that dense values are finite.

    Raises:
        UserError: one is NaN or infinite.
    """
    for name in names:
        refuse(~np.isfinite(columns[name]), columns, name, what, "finite")


def context_features(spec: DatasetSpec) -> list[str]:
    """Return the names of the features that are columns of the visits."""
    side = [feature.name for feature in spec.side if feature.of == "context"]
    return side + [feature.name for feature in spec.dense if feature.of == "context"]


def check_visits(spec: DatasetSpec, columns: Columns) -> None:
    """Check the values of visits, which have the columns of ``schema.visit_schema``.

    Raises:
        UserError: an id or time is negative, a visit ends before its request or before its last behaviour, or a
            domain, delay or feature is out of range.
    """
    what = "visits"
    check_ids(columns, ("visit_id", "user_id", "author_id", "item_id", "request_ms", "play_ms"), what)
    domain = columns["domain"]
    refuse((domain < 0) | (domain >= len(DOMAINS)), columns, "domain", what, f"in [0, {len(DOMAINS)})")
    longest = np.zeros(len(domain), np.int32)
    for behaviour in spec.behaviours:
        delay = columns[f"delay_{behaviour}"]
        refuse(delay < -1, columns, f"delay_{behaviour}", what, "-1 (never) or a time in milliseconds")
        np.maximum(longest, delay, out=longest)
    exit_ms, request_ms = columns["exit_ms"], columns["request_ms"]
    refuse(exit_ms < request_ms, columns, "exit_ms", what, "request_ms or later")
    refuse(exit_ms - request_ms < longest, columns, "exit_ms", what, "no earlier than the visit's last behaviour")
    check_side(columns, tuple(side for side in spec.side if side.of == "context"), what)
    floats = tuple(name for name, column in columns.items() if column.dtype.kind == "f")
    check_finite(columns, floats, what)


def check_spec(spec: DatasetSpec, most_behaviours: int) -> None:
    """Check that a dataset can be built from a description.

    Raises:
        UserError: a list is empty or too long, or a name is not defined.
    """
    if not 1 <= spec.partitions <= 1 << 16:
        raise UserError(f"partitions is {spec.partitions}; it must be in [1, 65536]")
    if not 1 <= len(spec.behaviours) <= most_behaviours:
        raise UserError(f"there are {len(spec.behaviours)} behaviours; there must be 1 to {most_behaviours}")
    names = [*spec.behaviours, *(side.name for side in spec.side), *(dense.name for dense in spec.dense)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name!r} is the name of two behaviours or features; names must be unique")
    for behaviour in spec.behaviours:
        if behaviour not in spec.applies:
            raise UserError(f"behaviour {behaviour!r} has no entry in `applies`; list the domains where it can happen")
    for domain in {*spec.candidates, *(domain for domains in spec.applies.values() for domain in domains)}:
        if domain not in DOMAINS:
            raise UserError(f"{domain!r} is not a domain; domains are {', '.join(DOMAINS)}")
    parts = {"user", "author", "item", *(side.name for side in spec.side)}
    for key in spec.statistics:
        if not key or not set(key) <= parts:
            raise UserError(
                f"statistics key {key!r} is not valid; its parts must be user, author, item or names of side features"
            )
    of_items = [side.name for side in spec.side if side.of == "item"]
    if spec.tag and spec.tag not in of_items:
        raise UserError(
            f"tag {spec.tag!r} is not a side feature of items; items have {', '.join(of_items) or 'no side features'}"
        )
