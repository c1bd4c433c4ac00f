"""The canonical data of Limelight: names, codes and layouts, written down once.

A dataset is a directory. Its tables are Parquet, its training rows are WebDataset tars, its histories are
memory-mapped columns, and ``dataset.json`` (written last) says what is in it::

    dataset.json                     DatasetSpec
    users.parquet authors.parquet items.parquet segments.parquet comments.parquet     (those that exist)
    events/part-00003.parquet        EVENT_COLUMNS, in time order
    rows/part-00003-000000.tar       training rows in emission order, one column batch a member (shards.py)
    rows/part-00003.index.json       where each member lies and which times it covers
    history/*.npy                    flat columns plus offsets, partition after partition (history.py)
    texts/*.parquet                  what items and comments say, and staytimes (text_schema.py)
    truth/part-00003.parquet         simulation only: true probabilities, read by nothing that trains

Times are integer milliseconds UTC. Ids are int64. Partition ``p = hash(user_id) mod P`` holds everything of a user.
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

SCHEMA_VERSION = 1

DOMAINS: tuple[str, ...] = ("video", "live")
"""Domain codes are positions in this tuple."""

KINDS: tuple[str, ...] = ("fast", "slow", "report", "exit", "full")
"""Row kinds; codes are positions in this tuple. Batch datasets hold ``full`` rows: one per exposure, when it ended."""

VISIT_EVENTS: tuple[str, ...] = ("exposure", "enter", "exit")
"""Events of every visit. The dataset's behaviours are the other event names."""

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
"""The canonical event log. ``value``: milliseconds watched for ``exit``, price for ``gift``, else 0."""

UNKNOWN = 0
"""Value 0 of a side feature, and row 0 of a table, mean unknown or missing."""

SideOwner = Literal["user", "author", "item", "context"]


@dataclass(frozen=True)
class SideFeature:
    """A categorical feature of a user, an author, an item, or of the request itself (``context``).

    Attributes:
        name: unique in the dataset.
        of: the table it is a column of; ``context`` features are columns of the visits.
        rows: number of values, 0 (unknown) included; every value lies in ``[0, rows)``.
    """

    name: str
    of: SideOwner
    rows: int


@dataclass(frozen=True)
class DenseFeature:
    """A float feature of a user, an author, an item, or of the request (``context``). Missing is 0."""

    name: str
    of: SideOwner


@dataclass(frozen=True)
class IdSpace:
    """How many distinct ids a dataset has of one kind, and the largest; ids are never negative."""

    count: int
    max: int


@dataclass(frozen=True)
class DatasetSpec:
    """The content of ``dataset.json``.

    Attributes:
        name: short name.
        source: where the data comes from, with its citation.
        licence: of the data.
        partitions: P.
        timezone: IANA name in which days are counted.
        behaviours: names of the behaviours, in label order.
        applies: for each behaviour the domains in which it can happen; elsewhere its label is masked.
        candidates: domains whose exposures become training rows.
        side: categorical features, in column order of ``rows.side``.
        dense: float features, in column order of ``rows.dense``.
        statistics: keys of the time-ordered statistics, each one or more of ``user``, ``author``, ``item`` or a
            side feature's name, in order of ``rows.stat`` (statistics.py).
        tag: the side feature of items that histories keep with every visit; empty: they keep none.
        ids: ``user``, ``author`` and ``item`` id spaces. Filled when the dataset is built.
        span_ms: first and last request time. Filled when the dataset is built.
        rows: number of training rows. Filled when the dataset is built.
        exposures: number of exposures. Filled when the dataset is built.
        events: number of events. Filled when the dataset is built.
        extra: facts of the source, such as the seed of a simulation or counts of dropped duplicates.
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
        """``dataset.json`` as text."""
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        if not self.tag:
            # As datasets without tags have always been described: runs know a dataset by this text.
            del content["tag"]
        return json.dumps(content, indent=1)

    @staticmethod
    def load(path: str | Path) -> DatasetSpec:
        """Read ``path/dataset.json``; ``path`` is a local path or an fsspec URL.

        Raises:
            UserError: no dataset there, not JSON, or another schema version.
        """
        file = storage.join(path, "dataset.json")
        try:
            raw = json.loads(storage.read_bytes(file))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path}: no dataset here (dataset.json is missing); `limelight data` makes one") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{file}: not valid JSON ({error})") from None
        version = raw.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise UserError(f"{file}: schema version {version}, this release reads version {SCHEMA_VERSION}")
        try:
            return DatasetSpec(
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
        except (KeyError, TypeError) as error:
            raise UserError(f"{file}: not a dataset description of this release ({error})") from None


def visit_schema(spec: DatasetSpec) -> pa.Schema:
    """Columns of a visit: one line an exposure, with everything that came of it.

    Importers and the simulator produce visits; ``build.py`` derives events, rows and histories from them.
    ``delay_B`` is the time from request to the first B in milliseconds, -1 where B never happened; ``value_gift`` and
    the like are optional float columns with the value of that first event. ``exit_ms`` is the end of the visit and no
    earlier than its last behaviour; ``play_ms`` is the time watched. Side and dense columns are those of ``context``
    features only: the others are joined from their tables.
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
    """Name -> (dtype, trailing shape) of the columns of a training row, as stored in the shards.

    ``stat`` holds, for each key of ``spec.statistics``, the number of earlier rows with the same key and then the
    number of those that carried each behaviour: ``[rows, keys * (1 + behaviours)]``, float32 counts.
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
"""Training rows as columns: every array has the same first dimension; names and dtypes are ``row_columns``."""


def partition_of(user_id: np.ndarray, partitions: int) -> np.ndarray:
    """Partition of each user, ``[n] int64``: a 64-bit mix of the id (splitmix64's finaliser) modulo ``partitions``."""
    mixed = user_id.astype(np.uint64)
    with np.errstate(over="ignore"):
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return (mixed % np.uint64(partitions)).astype(np.int64)
