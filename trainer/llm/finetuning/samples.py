"""Instruction samples: JSON Lines files with one sample per line::

    {"task": "staytime", "prompt": "... Answer: ", "answer": "B", "options": ["A", "B", "C"], "popularity": [3, 9, 1]}

``options`` are the possible answers; only evaluation needs them. ``popularity`` has a figure for each option, by which
the popularity baseline chooses. ``bare_prompt`` is the prompt without what is known of the user; the score of an option
after it corrects its score after the prompt (``option_calibration.py``). Other keys are ignored.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trainer.console.errors import UserError, one_line
from trainer.runtime.stored_files import open_regular

_MAX_LINE = 1 << 24
"""Characters of a line that no sample has: a file without line ends is not read whole."""


@dataclass(frozen=True)
class Sample:
    """A prompt and its answer.

    Attributes:
        prompt: input of the model, without a loss.
        answer: text that the model learns; one of the ``options`` if there are any.
        task: name of the task.
        options: all possible answers, without duplicates.
        popularity: a figure for each option; empty if unknown.
        bare_prompt: the prompt without what is known of the user; empty if there is none.
    """

    prompt: str
    answer: str
    task: str
    options: tuple[str, ...] = ()
    popularity: tuple[float, ...] = ()
    bare_prompt: str = ""


@dataclass
class ReadCounts:
    """Counts of the lines read.

    Attributes:
        samples: number of samples.
        empty: number of lines that were skipped because prompt or answer is blank.
    """

    samples: int = 0
    empty: int = 0


def read_samples(paths: Sequence[str], counts: ReadCounts) -> Iterator[Sample]:
    """Read the samples of files in order, and update ``counts``.

    Raises:
        UserError: a file is missing or not UTF-8, or a line is not a sample; the message has its number.
    """
    for path in paths:
        try:
            with io.TextIOWrapper(open_regular(Path(path)), encoding="utf-8") as file:
                for number, line in enumerate(iter(partial(file.readline, _MAX_LINE), ""), 1):
                    if len(line) == _MAX_LINE:
                        raise UserError(
                            f"{path}:{number}: has {_MAX_LINE:,} characters or more; every line is one sample"
                        )
                    if line.isspace():
                        continue
                    sample = _parse(line, f"{path}:{number}")
                    if not sample.prompt.strip() or not sample.answer.strip():
                        counts.empty += 1
                        continue
                    counts.samples += 1
                    yield sample
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text; use a JSON Lines file of samples") from None
        except OSError as error:
            raise UserError(f"{path}: cannot read samples ({error.strerror})") from None


def _parse(line: str, place: str) -> Sample:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
        raise UserError(f"{place}: not JSON ({reason}); every line is one sample") from None
    if not isinstance(fields, dict):
        raise UserError(f'{place}: not a sample; write {{"task": "...", "prompt": "...", "answer": "..."}}')
    for key in ("task", "prompt", "answer"):
        if not isinstance(fields.get(key), str):
            raise UserError(f"{place}: {key} = {json.dumps(fields.get(key))}: use a string")
    bare = fields.get("bare_prompt", "")
    if not isinstance(bare, str):
        raise UserError(f"{place}: bare_prompt = {json.dumps(bare)}: use a string")
    options, popularity = _list(fields, "options", str, place), _list(fields, "popularity", (int, float), place)
    if options:
        if len(set(options)) < len(options) or not all(option.strip() for option in options):
            raise UserError(
                f"{place}: options = {json.dumps(options)}: use strings that are not blank, without duplicates"
            )
        if fields["answer"] not in options:
            raise UserError(
                f"{place}: answer = {json.dumps(fields['answer'])} is not among the options {json.dumps(options)}"
            )
    if popularity and len(popularity) != len(options):
        raise UserError(
            f"{place}: {len(popularity)} popularity figures for {len(options)} options; use one for each option"
        )
    return Sample(fields["prompt"], fields["answer"], fields["task"], tuple(options), tuple(popularity), bare)


def _list(fields: dict[str, Any], key: str, kind: type | tuple[type, ...], place: str) -> list[Any]:
    values = fields.get(key) or []
    # isinstance(True, int) is true, but true is not a number of JSON.
    if not isinstance(values, list) or not all(
        isinstance(value, kind) and not isinstance(value, bool) for value in values
    ):
        expected = "strings" if kind is str else "numbers"
        raise UserError(f"{place}: {key} = {json.dumps(values)}: use a list of {expected}")
    if any(isinstance(value, float) and not math.isfinite(value) for value in values):
        raise UserError(f"{place}: {key} = {json.dumps(values)}: use finite numbers")
    return values
