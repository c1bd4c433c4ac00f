"""Annotations of a simulated world's segments, from its truth.

The truth of a segment is its topic, its intensity, and the genre and category of its author. The words here are others
than those of the world's speech, so a model has to learn what the speech means.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trainer.console.errors import UserError
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import read_table
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.text_schema import segment_ids
from trainer.data.simulator.population import GENRES_PER_CATEGORY
from trainer.data.simulator.words import TOPIC_WORDS
from trainer.llm.instructions.annotations import Annotation, AnnotationIndex, Question

EVENTS: dict[str, str] = {
    "chat": "a conversation with the audience",
    "dance": "a performance on stage",
    "lobby": "players gather before the round",
    "match": "two teams compete",
    "climax": "the end of the round is near",
    "pitch": "goods are presented",
    "demonstration": "goods are tried out",
    "link": "goods are sold",
}
"""Event of a segment by its topic."""

SCENES: dict[str, str] = {"talent": "studio", "games": "arena", "shopping": "market stall"}
"""Scene by the category of the author."""

ATMOSPHERES: tuple[str, ...] = ("sleepy", "gentle", "lively", "heated", "ecstatic")
"""Atmosphere by intensity, in equal parts of its range from 0 to 1."""

HIGHLIGHTS: tuple[str, ...] = ("none", "none", "a few", "many", "a peak")
"""Highlights by intensity."""


class WorldTruth:
    """Source of annotations of every segment of a simulated world.

    Args:
        dataset: path of the dataset.
        spec: content of its ``dataset.json``.

    Attributes:
        ids: ``[n] int64``, increasing, ids of the segments.

    Raises:
        UserError: the dataset has no truth of segments, or its topics are unknown.
    """

    lines = 0
    """Lines of a file; the truth has none."""

    def __init__(self, dataset: str | Path, spec: DatasetSpec) -> None:
        topics, categories = (_names(spec.extra.get(key)) for key in ("topics", "categories"))
        if spec.name != "simulated" or not topics or not categories:
            raise UserError(
                f"{dataset}: is no simulated world with topics, so its segments have no truth; give --annotations "
                "FILE.jsonl"
            )
        unknown = ({*topics} - {"none", *EVENTS}) | ({*categories} - {*SCENES})
        if unknown:
            raise UserError(f"{dataset}: dataset.json: unknown topics or categories {sorted(unknown)}")
        self._topics, self._categories = topics, categories
        files = DatasetFiles(dataset)
        try:
            segments = read_table(files, "segments.parquet", ["item_id", "segment", "topic", "intensity"])
            items = read_table(files, "items.parquet", ["item_id", "item_genre"])
        except FileNotFoundError:
            raise UserError(
                f"{dataset}: has no segments.parquet or items.parquet; give --annotations FILE.jsonl"
            ) from None
        self._item, self._segment, self._topic, self._intensity = (column.to_numpy() for column in segments.columns)
        ids = segment_ids(self._item, self._segment)
        self._order = np.argsort(ids, kind="stable")
        self.ids = ids[self._order]
        item_id, genre = (column.to_numpy() for column in items.columns)
        order = np.argsort(item_id, kind="stable")
        # genres are stored from 1 on, 0 is the unknown one
        row = np.minimum(np.searchsorted(item_id[order], self._item), max(len(order) - 1, 0))
        self._genre = genre[order][row] - 1
        for name, values, end in (
            ("topic", self._topic, len(topics)),
            ("item_genre", self._genre, min(len(TOPIC_WORDS), GENRES_PER_CATEGORY * len(categories))),
        ):
            if len(values) and not 0 <= values.min() <= values.max() < end:
                raise UserError(f"{dataset}: damaged, segments have a {name} that dataset.json does not name")
        number = np.full(len(ids), len(self._questions(0)) if len(ids) else 0, np.int64)
        place = np.arange(len(ids))
        self.index = {
            "questions": AnnotationIndex(self.ids, place, number),
            "description": AnnotationIndex(self.ids, place, np.ones_like(number)),
        }

    def read(self, places: np.ndarray) -> Iterator[Annotation]:
        """Yield the annotations at the given places of the index, in that order."""
        for row in self._order[places].tolist():
            item, segment = int(self._item[row]), int(self._segment[row])
            yield Annotation(item, segment, self._questions(row), self._description(row))

    def _words(self, row: int) -> dict[str, str]:
        genre = int(self._genre[row])
        band = intensity_band(float(self._intensity[row]))
        category = self._categories[genre // GENRES_PER_CATEGORY]
        return {
            "event": EVENTS[self._topics[self._topic[row]]],
            "atmosphere": ATMOSPHERES[band],
            "highlights": HIGHLIGHTS[band],
            "category": category,
            "scene": SCENES[category],
            "genre": str(TOPIC_WORDS[genre, 0]),
        }

    def _questions(self, row: int) -> tuple[Question, ...]:
        words = self._words(row)
        return (
            ("What happens?", words["event"]),
            ("What is the atmosphere?", words["atmosphere"]),
            ("What is it about?", words["genre"]),
            ("Where does it take place?", words["scene"]),
        )

    def _description(self, row: int) -> dict[str, str]:
        words = self._words(row)
        return {
            "content": f"{words['event']}, about {words['genre']}",
            "character": f"{words['category']} host",
            "scene": words["scene"],
            "event": words["event"],
            "atmosphere": words["atmosphere"],
            "highlights": words["highlights"],
            "target_user_group": f"viewers of {words['genre']}",
        }


def intensity_band(intensity: float) -> int:
    """Return the position of an intensity in ``ATMOSPHERES``."""
    return min(max(int(intensity * len(ATMOSPHERES)), 0), len(ATMOSPHERES) - 1)


def _names(value: object) -> tuple[str, ...]:
    """Return a list of names; empty if the value is none."""
    return tuple(value) if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value) else ()
