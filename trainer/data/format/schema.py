"""Canonical schema of a Limelight dataset: names, codes and layouts, defined in this one place.

A dataset is a directory. Its tables are Parquet files, its training rows are WebDataset tars, its histories are
memory-mapped columns. ``dataset.json`` describes the dataset and is written last::

    dataset.json                     DatasetSpec
    users.parquet authors.parquet items.parquet segments.parquet comments.parquet     (each is optional)
    events/part-00003.parquet        EVENT_COLUMNS, in time order
    rows/part-00003-000000.tar       training rows in emission order, one batch of columns per member (shards.py)
    rows/part-00003.index.json       place and time range of each member
    history/*.npy                    flat columns plus offsets, partition after partition (history.py)
    texts/*.parquet                  texts of items and comments, and staytimes (text_schema.py)
    truth/part-00003.parquet         simulation only: true probabilities; training never reads them
    truth/factors-00003.parquet      simulation only: true factors of these; training never reads them

Times are integer milliseconds UTC. Ids are int64. Partition ``p = hash(user_id) mod P`` holds all data of a user.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from trainer.console.errors import UserError
from trainer.data.format import storage
from trainer.data.format.dataset_files import DatasetFiles
from trainer.runtime.stored_files import MAX_JSON_BYTES, parse_json_object

SCHEMA_VERSION = 1

DOMAINS: tuple[str, ...] = ("video", "live")
"""Domains; the code of a domain is its position in this tuple."""

KINDS: tuple[str, ...] = ("fast", "slow", "report", "exit", "full")
"""Kinds of training rows; the code of a kind is its position in this tuple.

Datasets on disk hold ``full`` rows: one row per exposure, emitted when the visit ends.
"""

VISIT_EVENTS: tuple[str, ...] = ("exposure", "enter", "exit")
"""Events that any visit can have. The other event names are the behaviours of the dataset."""

EVENT_COLUMNS = pa.schema(
    [
        ("user_id", pa.int64()),
        ("author_id", pa.int64()),
        ("item_id", pa.int64()),
        ("domain", pa.int8()),
        ("visit_id", pa.int64()),
        ("event", pa.dictionary(pa.int8(), pa.string())),
        ("time_ms", pa.int64()),
        ("value", pa.float32()),
    ]
)
"""Canonical event log. ``value`` holds milliseconds watched for ``exit``, the price for ``gift``, and 0 otherwise."""

UNKNOWN = 0
"""Value of a side feature, and row of a table, that stands for an unknown or missing value."""

SideOwner = Literal["user", "author", "item", "context"]


@dataclass(frozen=True)
class SideFeature:
    """Categorical feature of a user, an author, an item, or of the request itself (``context``).

    Attributes:
        name: name of the feature, unique in the dataset.
        of: table that has the feature as a column; ``context`` features are columns of the visits.
        rows: number of values, including 0 (unknown); every value lies in ``[0, rows)``.
    """

    name: str
    of: SideOwner
    rows: int


@dataclass(frozen=True)
class DenseFeature:
    """Float feature of a user, an author, an item, or of the request (``context``). A missing value is 0."""

    name: str
    of: SideOwner


@dataclass(frozen=True)
class IdSpace:
    """Number of distinct ids of one kind in a dataset, and the largest id. Ids are never negative."""

    count: int
    max: int


@dataclass(frozen=True)
class DatasetSpec:
    """Content of ``dataset.json``.

    Attributes:
        name: short name of the dataset.
        source: origin of the data, with its citation.
        licence: licence of the data.
        partitions: number of partitions, P.
        timezone: IANA name of the time zone in which days are counted.
        behaviours: names of the behaviours, in label order.
        applies: for each behaviour, the domains in which it can happen; in other domains its label is masked.
        candidates: domains whose exposures become training rows.
        side: categorical features, in the order of the columns of ``rows.side``.
        dense: float features, in the order of the columns of ``rows.dense``.
        statistics: keys of the time-ordered statistics, in the order of ``rows.stat`` (statistics.py). A key is one or
            more of ``user``, ``author``, ``item`` and names of side features.
        tag: side feature of items that histories store with every visit; empty if they store none.
        ids: id spaces of ``user``, ``author`` and ``item``. Filled in when the dataset is built.
        span_ms: first and last request time. Filled in when the dataset is built.
        rows: number of training rows. Filled in when the dataset is built.
        exposures: number of exposures. Filled in when the dataset is built.
        events: number of events. Filled in when the dataset is built.
        extra: facts about the source, such as the seed of a simulation or the number of dropped duplicates.
    """

    name: str
    source: str
    licence: str
    partitions: int
    timezone: str
    behaviours: tuple[str, ...]
    applies: dict[str, tuple[str, ...]]
    candidates: tuple[str, ...]
    side: tuple[SideFeature, ...] = ()
    dense: tuple[DenseFeature, ...] = ()
    statistics: tuple[tuple[str, ...], ...] = ()
    tag: str = ""
    ids: dict[str, IdSpace] = field(default_factory=dict)
    span_ms: tuple[int, int] = (0, 0)
    rows: int = 0
    exposures: int = 0
    events: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the text of ``dataset.json``."""
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        if not self.tag:
            # Runs identify a dataset by this text, and datasets from before tags existed have no such key.
            del content["tag"]
        return json.dumps(content, indent=1)

    @staticmethod
    def load(path: str | Path) -> DatasetSpec:
        """Read ``path/dataset.json``; ``path`` is a local path or an fsspec URL.

        Raises:
            UserError: there is no dataset, the file is not valid JSON, has another checksum than was recorded, or has
                another schema version.
        """
        file = storage.join(path, "dataset.json")
        try:
            raw = parse_json_object(DatasetFiles(path).read("dataset.json", MAX_JSON_BYTES), file)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{path}: no dataset here (dataset.json is missing); `limelight data` creates one"
            ) from None
        version = raw.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise UserError(f"{file}: schema version is {version}; this release reads version {SCHEMA_VERSION}")
        try:
            spec = DatasetSpec(
                **{
                    **raw,
                    "behaviours": tuple(raw["behaviours"]),
                    "applies": {name: tuple(domains) for name, domains in raw["applies"].items()},
                    "candidates": tuple(raw["candidates"]),
                    "side": tuple(SideFeature(**side) for side in raw["side"]),
                    "dense": tuple(DenseFeature(**dense) for dense in raw["dense"]),
                    "statistics": tuple(tuple(key) for key in raw["statistics"]),
                    "ids": {name: IdSpace(**space) for name, space in raw["ids"].items()},
                    "span_ms": tuple(raw["span_ms"]),
                }
            )
            _check_types(spec)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{file}: not a dataset description of this release ({error})") from None
        return spec


def _check_types(spec: DatasetSpec) -> None:
    """Check the types of the values of a description that was read from a file.

    Raises:
        TypeError: a value has another type.
    """
    whole = {name: getattr(spec, name) for name in ("partitions", "rows", "exposures", "events")}
    whole |= {f"span_ms[{at}]": time for at, time in enumerate(spec.span_ms)}
    whole |= {f"side {side.name}": side.rows for side in spec.side}
    whole |= {f"ids.{name}.{part}": number for name, ids in spec.ids.items() for part, number in asdict(ids).items()}
    for name, number in whole.items():
        if type(number) is not int or (number < 0 and not name.startswith("span_ms")):
            raise TypeError(f"{name} is {number!r}, not a whole number")
    if len(spec.span_ms) != 2 or spec.partitions < 1:
        raise TypeError("span_ms needs two times, and partitions must be 1 or more")
    texts = [spec.name, spec.source, spec.licence, spec.timezone, spec.tag, *spec.behaviours, *spec.candidates]
    texts += [text for side in spec.side for text in (side.name, side.of)]
    texts += [text for dense in spec.dense for text in (dense.name, dense.of)]
    texts += [text for key in (*spec.statistics, *spec.applies.values()) for text in key]
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is not a text")
    if not isinstance(spec.extra, dict):
        raise TypeError("extra is not an object")


def visit_schema(spec: DatasetSpec) -> pa.Schema:
    """Return the columns of a visit: one line per exposure, with all its outcomes.

    Importers and the simulator produce visits; ``trainer/data/writing/builder.py`` derives events, rows and histories
    from them. ``delay_B`` is the time from the request to the first behaviour B in milliseconds, or -1 if B never
    happened. ``value_gift`` is an optional float column with the value of the first gift. ``exit_ms`` is the end of the
    visit and not earlier than its last behaviour; ``play_ms`` is the time watched. Only ``context`` features have side
    and dense columns here: the others are joined from their tables.
    """
    return pa.schema(
        [
            ("visit_id", pa.int64()),
            ("user_id", pa.int64()),
            ("author_id", pa.int64()),
            ("item_id", pa.int64()),
            ("domain", pa.int8()),
            ("request_ms", pa.int64()),
            ("exit_ms", pa.int64()),
            ("play_ms", pa.int64()),
            *((f"delay_{behaviour}", pa.int32()) for behaviour in spec.behaviours),
            *((f"value_{behaviour}", pa.float32()) for behaviour in spec.behaviours if behaviour == "gift"),
            *((side.name, pa.int32()) for side in spec.side if side.of == "context"),
            *((dense.name, pa.float32()) for dense in spec.dense if dense.of == "context"),
        ]
    )


def row_columns(spec: DatasetSpec) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Return name -> (dtype, trailing shape) of the columns of a training row, as stored in the shards.

    ``stat`` holds, for each key of ``spec.statistics``, the number of earlier rows with the same key, and then for each
    behaviour how many of these rows had it: ``[rows, keys * (1 + behaviours)]``, counts in float32.
    """
    i64, u8, f32 = np.dtype(np.int64), np.dtype(np.uint8), np.dtype(np.float32)
    behaviours = len(spec.behaviours)
    return {
        "visit_id": (i64, ()),
        "user_id": (i64, ()),
        "author_id": (i64, ()),
        "item_id": (i64, ()),
        "domain": (u8, ()),
        "kind": (u8, ()),
        "request_ms": (i64, ()),
        "emit_ms": (i64, ()),
        "side": (np.dtype(np.int32), (len(spec.side),)),
        "dense": (f32, (len(spec.dense),)),
        "stat": (f32, (len(spec.statistics) * (1 + behaviours),)),
        "label": (u8, (behaviours,)),
        "mask": (u8, (behaviours,)),
    }


Rows = dict[str, np.ndarray]
"""Training rows as columns: all arrays have the same first dimension; ``row_columns`` gives names and dtypes."""


def partition_of(user_id: np.ndarray, partitions: int) -> np.ndarray:
    """Return the partition of each user, ``[n] int64``: the splitmix64 finaliser of the id, modulo ``partitions``."""
    mixed = user_id.astype(np.uint64)
    with np.errstate(over="ignore"):
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return (mixed % np.uint64(partitions)).astype(np.int64)
