"""Tests of annotation files: every line is read right, or refused in one line with its number."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trainer.console.errors import UserError
from trainer.llm.instructions.annotations import (
    DESCRIPTION_KEYS,
    MAX_LINE_BYTES,
    MAX_QUESTIONS,
    MAX_TEXT,
    Annotation,
    AnnotationFile,
    parse_annotation,
)

DESCRIPTION = {key: f"the {key}" for key in DESCRIPTION_KEYS}
QUESTIONS = [{"question": "What is sold?", "answer": "A lamp."}]

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
LINES_OF_TEXT = TEXT.map(lambda text: " ".join(text.split()))
FILLED = LINES_OF_TEXT.filter(bool)
ANNOTATIONS = st.builds(
    Annotation,
    st.integers(0, (1 << 47) - 1),
    st.integers(0, (1 << 16) - 1),
    st.lists(st.tuples(FILLED, FILLED), min_size=1, max_size=3).map(tuple),
    st.one_of(
        st.just({}),
        st.fixed_dictionaries({key: FILLED if key == "content" else LINES_OF_TEXT for key in DESCRIPTION_KEYS}),
    ),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["question", "answer", "x"]), inner),
    max_leaves=6,
)
FIELDS = st.dictionaries(st.sampled_from(["item_id", "segment", "questions", "description", "x"]), JSON, max_size=5)


def line_of(**changes: Any) -> bytes:
    return json.dumps({"item_id": 7, "segment": 3, "questions": QUESTIONS, **changes}).encode()


def file_of(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@given(ANNOTATIONS)
def test_what_is_written_is_read(annotation: Annotation) -> None:
    assert annotation.line().count("\n") == 1
    assert parse_annotation(annotation.line().encode(), "f:1") == annotation


@given(st.one_of(st.binary(max_size=60), FIELDS.map(lambda fields: json.dumps(fields).encode())))
@example(b"[" * 100_000)
@example(b'{"item_id": ' + b"1" * 5_000 + b"}")
@example(line_of(questions=[{"question": "\ud800", "answer": "x"}]))
@example(line_of(item_id=True))
@example(line_of(item_id=1e3))
def test_any_line_is_read_or_refused_in_one_line(line: bytes) -> None:
    try:
        annotation = parse_annotation(line, "file.jsonl:4")
    except UserError as error:
        assert str(error).startswith("file.jsonl:4: ") and "\n" not in str(error) and len(str(error)) < 400
    else:
        fields = json.loads(line)
        assert (annotation.item_id, annotation.segment) == (fields["item_id"], fields["segment"])
        assert annotation.questions or annotation.description
        assert parse_annotation(annotation.line().encode(), "") == annotation


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"item_id": -1}, "item_id is -1; it must be a whole number from 0 to"),
        ({"segment": 1 << 16}, "segment is 65536; it must be a whole number from 0 to 65535"),
        ({"segment": None}, "segment is missing"),
        ({"questions": []}, "neither questions nor a description"),
        ({"questions": {"question": "a"}}, "it must be a list of at most 64 objects"),
        ({"questions": QUESTIONS * (MAX_QUESTIONS + 1)}, "it must be a list of at most 64 objects"),
        ({"questions": [*QUESTIONS, {"question": "Why?"}]}, "question 2: answer is missing; it must be a string"),
        ({"questions": [{"question": " ", "answer": "x"}]}, "question 1: question or answer is blank"),
        ({"questions": [{"question": "x" * (MAX_TEXT + 1), "answer": "x"}]}, "at most 4,000 are accepted"),
        ({"description": {**DESCRIPTION, "scene": 3}}, "description: scene is 3; it must be a string"),
        ({"description": {"content": "x"}}, "description: character is missing"),
        ({"description": {**DESCRIPTION, "content": "\n"}}, "description: content is blank"),
        ({"description": "calm"}, "it must be an object with content, character"),
    ],
)
def test_a_mistake_is_named(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    file = file_of(tmp_path / "a.jsonl", line_of(segment=1), b"", line_of(**changes))
    with pytest.raises(UserError) as refused:
        AnnotationFile(file)
    assert str(refused.value).startswith(f"{file}:3: ") and told in str(refused.value)


def test_an_index_finds_every_line_again(tmp_path: Path) -> None:
    lines = [line_of(segment=9, description=DESCRIPTION), b"  ", line_of(segment=2), line_of(item_id=1, segment=5)]
    described = json.dumps({"item_id": 1, "segment": 5, "description": DESCRIPTION}).encode()
    file = AnnotationFile(file_of(tmp_path / "a.jsonl", *lines, described))
    assert file.lines == 4
    questions, descriptions = file.index["questions"], file.index["description"]
    assert [divmod(one, 1 << 16) for one in questions.ids.tolist()] == [(1, 5), (7, 2), (7, 9)]
    assert questions.number.tolist() == [1, 1, 1] and len(descriptions.ids) == 2
    assert [one.id for one in file.read(questions.offset)] == questions.ids.tolist()
    assert [one.description for one in file.read(descriptions.offset)] == [DESCRIPTION, DESCRIPTION]


def test_a_second_answer_of_a_kind_is_refused_with_both_lines(tmp_path: Path) -> None:
    file = file_of(tmp_path / "a.jsonl", line_of(), line_of(segment=4), line_of())
    with pytest.raises(UserError, match=r"a\.jsonl:3: segment 3 of item 7 has a line with questions already, line 1"):
        AnnotationFile(file)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; write annotations to it"):
        AnnotationFile(tmp_path / "none.jsonl")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="not a regular file but a FIFO"):
        AnnotationFile(tmp_path / "fifo")
    with pytest.raises(UserError, match="Is a directory"):
        AnnotationFile(tmp_path)
    (tmp_path / "long").write_bytes(b"x" * MAX_LINE_BYTES)
    with pytest.raises(UserError, match=r"long:1: has 1,048,576 bytes or more"):
        AnnotationFile(tmp_path / "long")
    (tmp_path / "empty").write_bytes(b"")
    assert AnnotationFile(tmp_path / "empty").index["questions"].ids.tolist() == []
    assert list(AnnotationFile(tmp_path / "empty").read(np.empty(0, np.int64))) == []
