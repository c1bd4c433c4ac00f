"""Instruction samples: what is read, and the message for a line that is not a sample."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.console.errors import UserError
from trainer.llm.finetuning.samples import ReadCounts, Sample, read_samples


def write(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_samples_are_read_in_order_and_empty_ones_counted(tmp_path: Path) -> None:
    first = write(
        tmp_path / "a.jsonl",
        {"task": "t", "prompt": "Q: ", "answer": "A", "options": ["A", "B"], "popularity": [1, 2.5], "id": 7},
        "",
        {"task": "t", "prompt": " \n", "answer": "A"},
        {"task": "t", "prompt": "Q", "answer": ""},
    )
    second = write(tmp_path / "b.jsonl", {"task": "u", "prompt": "ü", "answer": "é"})
    counts = ReadCounts()
    assert list(read_samples([first, second], counts)) == [
        Sample("Q: ", "A", "t", ("A", "B"), (1, 2.5)),
        Sample("ü", "é", "u"),
    ]
    assert counts == ReadCounts(samples=2, empty=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a.jsonl:2: not JSON"),
        ("[1]", "a.jsonl:2: not a sample"),
        ({"task": "t", "prompt": "p"}, "a.jsonl:2: answer = null: use a string"),
        ({"task": 1, "prompt": "p", "answer": "a"}, "a.jsonl:2: task = 1"),
        ({"task": "t", "prompt": "p", "answer": "a", "options": "ab"}, 'options = "ab": use a list of strings'),
        ({"task": "t", "prompt": "p", "answer": "a", "options": ["b", "c"]}, 'answer = "a" is not among'),
        ({"task": "t", "prompt": "p", "answer": "a", "options": ["a", "a"]}, "without duplicates"),
        ({"task": "t", "prompt": "p", "answer": "a", "options": ["a", " "]}, "strings that are not blank"),
        ({"task": "t", "prompt": "p", "answer": "a", "options": ["a"], "popularity": [1, 2]}, "2 popularity figures"),
        ({"task": "t", "prompt": "p", "answer": "a", "options": ["a"], "popularity": [True]}, "use a list of numbers"),
        ({"task": "t", "prompt": "p", "answer": "a", "bare_prompt": ["p"]}, 'bare_prompt = ["p"]: use a string'),
    ],
)
def test_a_line_that_is_no_sample_is_named(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "a.jsonl", {"task": "t", "prompt": "p", "answer": "a"}, line)
    with pytest.raises(UserError) as error:
        list(read_samples([path], ReadCounts()))
    assert message in str(error.value)


def test_a_file_without_line_ends_is_not_read_whole(tmp_path: Path) -> None:
    sample = {"task": "t", "prompt": "p", "answer": "a"}
    most = (1 << 24) - 1 - len(json.dumps(sample))
    (read,) = read_samples([write(tmp_path / "a.jsonl", sample | {"prompt": "p" * most})], ReadCounts())
    assert len(read.prompt) == most
    path = write(tmp_path / "a.jsonl", sample | {"prompt": "p" * (most + 1)})
    with pytest.raises(UserError, match=r"a\.jsonl:1: has 16,777,216 characters or more"):
        list(read_samples([path], ReadCounts()))


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.*No such file"):
        list(read_samples([str(tmp_path / "nowhere")], ReadCounts()))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_samples([str(tmp_path / "binary")], ReadCounts()))
