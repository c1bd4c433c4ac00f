"""Annotations of segments: JSON Lines files that a larger model or a person writes.

A line has the questions of a segment with their answers, its structured description, or both::

    {"item_id": 7, "segment": 3,
     "questions": [{"question": "What is sold?", "answer": "A lamp."}],
     "description": {"content": "A host holds a lamp up.", "character": "the host", "scene": "a desk",
                     "event": "a sale", "atmosphere": "calm", "highlights": "", "target_user_group": "buyers of lamps"}}

A description has all keys of LARM's structured description, as strings; all but ``content`` may be empty. Other keys of
a line or a description are ignored. A line that is not like this is refused with its number. So is a second line with
questions for the same segment, or with a description. Lines about segments that the dataset does not have are counted.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trainer.console.errors import UserError, failure_reason, one_line
from trainer.data.format.text_schema import SEGMENTS_PER_ITEM
from trainer.runtime.stored_files import open_regular

DESCRIPTION_KEYS: tuple[str, ...] = (
    "content",
    "character",
    "scene",
    "event",
    "atmosphere",
    "highlights",
    "target_user_group",
)
"""Keys of a description, in the order of the answer."""

KINDS: tuple[str, ...] = ("questions", "description")
"""Parts of an annotation."""

MAX_ITEM = 1 << 47
MAX_LINE_BYTES = 1 << 20
"""Longest line of a file. A file without line ends is not read whole."""
MAX_TEXT = 4_000
"""Most characters of a question, an answer, or an entry of a description."""
MAX_QUESTIONS = 64
"""Most questions in one line."""

Question = tuple[str, str]
"""Question and its answer."""


@dataclass(frozen=True)
class Annotation:
    """Annotation of a segment.

    Attributes:
        item_id: room.
        segment: number of the segment in the room, from 0.
        questions: questions with their answers; empty if the line has none.
        description: key -> text, with all ``DESCRIPTION_KEYS``; empty if the line has none.
    """

    item_id: int
    segment: int
    questions: tuple[Question, ...] = ()
    description: dict[str, str] = field(default_factory=dict)

    @property
    def id(self) -> int:
        """Id of the segment, as in ``text_schema.segment_ids``."""
        return self.item_id * SEGMENTS_PER_ITEM + self.segment

    def line(self) -> str:
        """Return the annotation as a line of a file."""
        fields: dict[str, Any] = {"item_id": self.item_id, "segment": self.segment}
        if self.questions:
            fields["questions"] = [{"question": question, "answer": answer} for question, answer in self.questions]
        if self.description:
            fields["description"] = self.description
        return json.dumps(fields, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class AnnotationIndex:
    """Places of the annotations of one kind in a file, by segment.

    Attributes:
        ids: ``[n] int64``, increasing, without duplicates.
        offset: ``[n] int64``, first byte of the line.
        number: ``[n] int64``, questions in the line; 1 for a description.
    """

    ids: np.ndarray
    offset: np.ndarray
    number: np.ndarray


class AnnotationFile:
    """Annotation file, validated line by line; lines are read again by their place, so memory does not hold them.

    Args:
        path: path of the file.

    Attributes:
        lines: number of lines that are not blank.
        index: index by kind.

    Raises:
        UserError: the file cannot be read, a line is not an annotation, or a segment has two of one kind; the message
            has the number of the line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lines = 0
        columns: dict[str, list[array[int]]] = {kind: [array("q") for _ in range(4)] for kind in KINDS}
        for number, offset, line in annotation_lines(self.path):
            found = parse_annotation(line, f"{path}:{number}")
            self.lines += 1
            for kind, size in (("questions", len(found.questions)), ("description", int(bool(found.description)))):
                if size:
                    for column, value in zip(columns[kind], (found.id, offset, size, number), strict=True):
                        column.append(value)
        self.index = {kind: _index(f"{path}", kind, columns[kind]) for kind in KINDS}

    def read(self, offsets: np.ndarray) -> Iterator[Annotation]:
        """Yield the annotations at the given offsets, in that order."""
        try:
            with open_regular(self.path) as file:
                for offset in offsets.tolist():
                    file.seek(offset)
                    yield parse_annotation(file.readline(MAX_LINE_BYTES), f"{self.path}: byte {offset}")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({failure_reason(error)})") from None


def annotation_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield number, first byte and content of each line that is not blank.

    Raises:
        UserError: the file cannot be read, or a line is too long.
    """
    try:
        with open_regular(path) as file:
            yield from _lines(file, path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; write annotations to it, or let a model write them by --annotate URL"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({failure_reason(error)})") from None


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, bytes]]:
    number, offset = 0, 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES:
            raise UserError(f"{path}:{number}: has {MAX_LINE_BYTES:,} bytes or more; every line is one annotation")
        if line.strip():
            yield number, offset, line
        offset += len(line)


def parse_annotation(line: bytes, place: str) -> Annotation:
    """Return the annotation of a line.

    Args:
        line: bytes of the line.
        place: file and number of the line, for messages.

    Raises:
        UserError: the line is not an annotation.
    """
    try:
        fields = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
        raise UserError(f"{place}: not JSON ({reason:.120}); every line is one annotation") from None
    if not isinstance(fields, dict):
        raise UserError(f"{place}: is a {type(fields).__name__}; every line is an object with item_id and segment")
    item, segment = (
        _whole(fields.get(key), key, end, place) for key, end in (("item_id", MAX_ITEM), ("segment", SEGMENTS_PER_ITEM))
    )
    try:
        questions = check_questions(fields.get("questions") or [])
        description = check_description(fields["description"]) if fields.get("description") is not None else {}
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None
    if not questions and not description:
        raise UserError(f"{place}: has neither questions nor a description; write one of them or both")
    return Annotation(item, segment, questions, description)


def check_questions(value: Any) -> tuple[Question, ...]:
    """Return the questions of a JSON value, each text on one line.

    Raises:
        ValueError: it is not a list of at most ``MAX_QUESTIONS`` objects with a question and an answer.
    """
    if not isinstance(value, list) or len(value) > MAX_QUESTIONS:
        raise ValueError(f"questions is {_shown(value)}; it must be a list of at most {MAX_QUESTIONS} objects")
    questions = []
    for number, entry in enumerate(value, 1):
        if not isinstance(entry, dict):
            raise ValueError(f"question {number} is {_shown(entry)}; write an object with question and answer")
        pair = [_text(entry, key, f"question {number}") for key in ("question", "answer")]
        if not all(pair):
            raise ValueError(f"question {number}: question or answer is blank; write both")
        questions.append((pair[0], pair[1]))
    return tuple(questions)


def check_description(value: Any) -> dict[str, str]:
    """Return the description of a JSON value with its keys in order, each text on one line.

    Raises:
        ValueError: it is not an object with a string for each of ``DESCRIPTION_KEYS``, or its content is blank.
    """
    if not isinstance(value, dict):
        raise ValueError(f"description is {_shown(value)}; it must be an object with {', '.join(DESCRIPTION_KEYS)}")
    description = {key: _text(value, key, "description") for key in DESCRIPTION_KEYS}
    if not description["content"]:
        raise ValueError("description: content is blank; say what is shown")
    return description


def _index(path: str, kind: str, columns: list[array[int]]) -> AnnotationIndex:
    """Return the index of one kind.

    Raises:
        UserError: a segment comes twice.
    """
    ids, offset, size, number = (np.array(column, np.int64) for column in columns)
    order = np.argsort(ids, kind="stable")
    twice = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if len(twice):
        first, second = number[order[twice[0]]], number[order[twice[0] + 1]]
        item, segment = divmod(int(ids[order[twice[0]]]), SEGMENTS_PER_ITEM)
        raise UserError(
            f"{path}:{second}: segment {segment} of item {item} has a line with {kind} already, line {first}; keep one"
        )
    return AnnotationIndex(ids[order], offset[order], size[order])


def _whole(value: Any, key: str, end: int, place: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < end:
        raise UserError(f"{place}: {key} is {_shown(value)}; it must be a whole number from 0 to {end - 1}")
    return value


def _text(fields: dict[str, Any], key: str, where: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str):
        what = f"{key} is {_shown(value)}" if key in fields else f"{key} is missing"
        raise ValueError(f"{where}: {what}; it must be a string")
    if len(value) > MAX_TEXT:
        raise ValueError(f"{where}: {key} has {len(value):,} characters; at most {MAX_TEXT:,} are accepted")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {key} has half of a surrogate pair; write whole characters") from None
    return " ".join(value.split())


def _shown(value: Any) -> str:
    """Return a JSON value for a message, cut."""
    return "missing" if value is None else f"{value!a:.60}"
