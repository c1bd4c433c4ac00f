"""Instruction samples: files of JSON lines, one sample a line::

    {"task": "staytime", "prompt": "... Answer: ", "answer": "B", "options": ["A", "B", "C"], "popularity": [3, 9, 1]}

``options`` are the possible answers, needed for evaluation only; ``popularity`` gives each of them a figure by which
the popularity baseline chooses. Other keys are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.console.errors import UserError


@dataclass(frozen=True)
class Sample:
    """A prompt and its answer.

    Attributes:
        prompt: read by the model, not learnt.
        answer: learnt; one of the ``options`` where there are any.
        task: that it belongs to.
        options: all possible answers, none twice.
        popularity: a figure for each option; empty where nothing is known.
    """

    prompt: str
    answer: str
    task: str
    options: tuple[str, ...] = ()
    popularity: tuple[float, ...] = ()


@dataclass
class ReadCounts:
    """What was read.

    Attributes:
        samples: that were taken.
        empty: lines whose prompt or answer has no text, which were left out.
    """

    samples: int = 0
    empty: int = 0


def read_samples(paths: Sequence[str], counts: ReadCounts) -> Iterator[Sample]:
    """Samples of files, in their order; ``counts`` is advanced.

    Raises:
        UserError: a file that is missing or not UTF-8, or a line that is no sample, with its number.
    """
    for path in paths:
        try:
            with Path(path).open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.isspace():
                        continue
                    sample = _parse(line, f"{path}:{number}")
                    if not sample.prompt.strip() or not sample.answer.strip():
                        counts.empty += 1
                        continue
                    counts.samples += 1
                    yield sample
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text; samples are JSON lines") from None
        except OSError as error:
            raise UserError(f"{path}: no samples can be read there ({error.strerror})") from None


def _parse(line: str, place: str) -> Sample:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error.msg}); every line is one sample") from None
    if not isinstance(fields, dict):
        raise UserError(f'{place}: not a sample; write {{"task": "...", "prompt": "...", "answer": "..."}}')
    for key in ("task", "prompt", "answer"):
        if not isinstance(fields.get(key), str):
            raise UserError(f"{place}: {key} = {json.dumps(fields.get(key))}: a sample has a text there")
    options, popularity = _list(fields, "options", str, place), _list(fields, "popularity", (int, float), place)
    if options:
        if len(set(options)) < len(options) or not all(option.strip() for option in options):
            raise UserError(
                f"{place}: options = {json.dumps(options)}: each must have a text, and none may stand twice"
            )
        if fields["answer"] not in options:
            raise UserError(f"{place}: answer = {json.dumps(fields['answer'])} is not among the options")
    if popularity and len(popularity) != len(options):
        raise UserError(f"{place}: {len(popularity)} popularity figures for {len(options)} options")
    return Sample(fields["prompt"], fields["answer"], fields["task"], tuple(options), tuple(popularity))


def _list(fields: dict[str, Any], key: str, kind: type | tuple[type, ...], place: str) -> list[Any]:
    values = fields.get(key) or []
    if not isinstance(values, list) or not all(
        isinstance(value, kind) and not isinstance(value, bool) for value in values
    ):
        what = "texts" if kind is str else "numbers"
        raise UserError(f"{place}: {key} = {json.dumps(values)}: a list of {what} is expected")
    return values
