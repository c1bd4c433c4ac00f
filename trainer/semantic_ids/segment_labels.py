"""Topics and texts of some segments of a dataset, for a reader."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import read_table
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.segments import SEGMENTS
from trainer.data.format.text_schema import SEGMENTS_PER_ITEM, has_texts, read_texts


class SegmentLabel(TypedDict):
    """Label of a segment.

    Attributes:
        topic: name of its topic; None where the dataset has none.
        text: speech of the room in it; None where the dataset has none.
    """

    topic: str | None
    text: str | None


def label_segments(dataset: str, ids: np.ndarray, embedded: bool, as_of_ms: int) -> list[SegmentLabel]:
    """Return the label of each segment as of a time: a text that is known later is left out.

    Args:
        dataset: path or URL of the dataset.
        ids: ``[n]`` int64, ids of segments that the dataset has.
        embedded: see :meth:`trainer.data.format.segments.DatasetSegments.read`.
        as_of_ms: the time.

    Raises:
        UserError: a table is damaged.
    """
    files = DatasetFiles(dataset)
    if embedded:
        keys: list[tuple[int, int] | None] = [divmod(segment, SEGMENTS_PER_ITEM) for segment in ids.tolist()]
        topics: list[str | None] = [None] * len(ids)
    else:
        keys, topics = _rows(files, ids)
    texts = _texts(dataset, {key for key in keys if key is not None}, as_of_ms)
    return [
        SegmentLabel(topic=topic, text=texts.get(key) or None if key else None)
        for key, topic in zip(keys, topics, strict=True)
    ]


def read_topics(dataset: str, ids: np.ndarray, embedded: bool) -> tuple[list[str], np.ndarray] | None:
    """Return the names of topics, and the position among them of each segment's topic, ``[n]`` int64, -1 for none.

    The arguments are those of :func:`label_segments`.

    Returns:
        None if the dataset has no topics of its segments.

    Raises:
        UserError: a table is damaged.
    """
    if embedded:
        return None
    names = DatasetSpec.load(dataset).extra.get("topics")
    table = read_table(DatasetFiles(dataset), SEGMENTS, ["item_id"], ["topic"])
    if not isinstance(names, list) or "topic" not in table.column_names:
        return None
    if not pa.types.is_integer(table["topic"].type):
        return None
    topic = table["topic"].fill_null(-1).to_numpy().astype(np.int64)[ids]
    return list(map(str, names)), np.where((topic >= 0) & (topic < len(names)), topic, -1)


def _rows(files: DatasetFiles, ids: np.ndarray) -> tuple[list[tuple[int, int] | None], list[str | None]]:
    """Return room and number of segments by their rows in ``segments.parquet``, and the names of their topics."""
    table = read_table(files, SEGMENTS, ["item_id"], ["segment", "topic"]).take(ids)
    whole = {field.name for field in table.schema if pa.types.is_integer(field.type)}
    keys: list[tuple[int, int] | None] = [None] * len(ids)
    if {"item_id", "segment"} <= whole:
        numbers = zip(table["item_id"].to_pylist(), table["segment"].to_pylist(), strict=True)
        keys = [key if None not in key else None for key in numbers]
    names = DatasetSpec.load(files.path).extra.get("topics")
    if "topic" not in whole or not isinstance(names, list):
        return keys, [None] * len(ids)
    named = dict(enumerate(map(str, names)))
    return keys, [named.get(topic) for topic in table["topic"].to_pylist()]


def _texts(dataset: str, wanted: set[tuple[int, int]], as_of_ms: int) -> dict[tuple[int, int], str]:
    """Return (room, number of the segment) -> text, of wanted segments; empty if the dataset has no texts of rooms."""
    if not wanted or not has_texts(dataset, "segments"):
        return {}
    table = read_texts(dataset, "segments", ["item_id", "segment", "known_ms", "text"])
    rooms = pa.array(sorted({room for room, _ in wanted}), pa.int64())
    table = table.filter(pc.and_(pc.is_in(table["item_id"], rooms), pc.less_equal(table["known_ms"], as_of_ms)))
    columns = (table[name].to_pylist() for name in ("item_id", "segment", "text"))
    return {(room, number): text for room, number, text in zip(*columns, strict=True) if (room, number) in wanted}
