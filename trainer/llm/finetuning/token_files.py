"""Samples as tokens, once in a run, in files that all ranks map into memory.

A sample is the tokens of its prompt, those of its answer, and the end of the text; prompt and answer are tokenised
apart, so that the border between them does not depend on either. One that is longer than a sequence loses the beginning
of its prompt: answers stay whole, and the latest of a history stands last. A sample without room for any of its prompt
is left out. Both are counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trainer.console.errors import UserError
from trainer.llm.finetuning.samples import Sample
from trainer.runtime.files import write_json

_CHUNK = 4096
"""Samples that are tokenised together."""


@dataclass
class TokenCounts:
    """What became of the samples.

    Attributes:
        samples: that are trained on.
        tokens: of all of them.
        answer_tokens: of these, the ones whose loss counts.
        truncated: samples that lost the beginning of their prompt.
        left_out: samples whose answer leaves no room for a prompt.
        tasks: task -> samples that are trained on.
        answers: task -> answer -> samples that have it, of samples with options.
    """

    samples: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    truncated: int = 0
    left_out: int = 0
    tasks: dict[str, int] = field(default_factory=dict)
    answers: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, sample: Sample, tokens: int, answer_tokens: int) -> None:
        """Count a sample that is trained on."""
        self.samples += 1
        self.tokens += tokens
        self.answer_tokens += answer_tokens
        self.tasks[sample.task] = self.tasks.get(sample.task, 0) + 1
        if sample.options:
            of_task = self.answers.setdefault(sample.task, {})
            of_task[sample.answer] = of_task.get(sample.answer, 0) + 1


@dataclass(frozen=True)
class Tokens:
    """Tokenised samples.

    Attributes:
        ids: ``[tokens]`` int32, one sample after another.
        starts: ``[samples + 1]`` int64, where each begins in ``ids``.
        answers: ``[samples]`` int32, tokens at the end of each whose loss counts.
        counts: of them.
    """

    ids: np.ndarray
    starts: np.ndarray
    answers: np.ndarray
    counts: TokenCounts

    @property
    def lengths(self) -> np.ndarray:
        """``[samples]`` int64, tokens of each."""
        return np.diff(self.starts)

    @staticmethod
    def of(samples: Iterable[Sample], tokenizer: Any, length: int) -> Tokens:
        """Tokenise into memory; arguments as of :func:`write_tokens`."""
        counts = TokenCounts()
        pieces = list(_tokenise(samples, tokenizer, length, counts))
        ids = [np.array(tokens, dtype=np.int32) for tokens, _ in pieces]
        starts = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        answers = np.array([answer for _, answer in pieces], dtype=np.int32)
        return Tokens(np.concatenate([*ids, np.empty(0, np.int32)]), starts, answers, counts)

    @staticmethod
    def open(directory: Path) -> Tokens:
        """Map what :func:`write_tokens` has written."""
        starts = np.load(directory / "starts.npy")
        # A file of no bytes cannot be mapped.
        ids = np.memmap(directory / "ids.int32", np.int32, "r") if starts[-1] else np.empty(0, np.int32)
        counts = TokenCounts(**json.loads((directory / "counts.json").read_text()))
        return Tokens(ids, starts, np.load(directory / "answers.npy"), counts)


def write_tokens(samples: Iterable[Sample], tokenizer: Any, length: int, directory: Path) -> TokenCounts:
    """Tokenise samples into files of a new directory.

    Args:
        samples: in any number; no more than a few thousand are in memory at a time.
        tokenizer: of transformers, with an end-of-text token.
        length: most tokens of a sample.
        directory: to make.

    Raises:
        UserError: there is not one sample to train on.
    """
    directory.mkdir(parents=True)
    counts = TokenCounts()
    starts, answers = [0], []
    with (directory / "ids.int32").open("wb") as file:
        for tokens, answer in _tokenise(samples, tokenizer, length, counts):
            np.array(tokens, dtype=np.int32).tofile(file)
            starts.append(starts[-1] + len(tokens))
            answers.append(answer)
    if not counts.samples:
        raise UserError(
            f"data.train: no samples to train on; {counts.left_out:,} left no room for a prompt in {length} tokens"
        )
    np.save(directory / "starts.npy", np.array(starts, dtype=np.int64))
    np.save(directory / "answers.npy", np.array(answers, dtype=np.int32))
    write_json(directory / "counts.json", asdict(counts))
    return counts


def _tokenise(
    samples: Iterable[Sample], tokenizer: Any, length: int, counts: TokenCounts
) -> Iterator[tuple[list[int], int]]:
    """Tokens of each sample, and how many of them are the answer's; the end of the text is one of those."""
    remaining = iter(samples)
    while chunk := list(islice(remaining, _CHUNK)):
        prompts = _ids(tokenizer, [sample.prompt for sample in chunk])
        answers = _ids(tokenizer, [sample.answer for sample in chunk])
        for sample, prompt, answer in zip(chunk, prompts, answers, strict=True):
            answer = [*answer, tokenizer.eos_token_id]
            room = length - len(answer)
            if room < 1 or not prompt:
                counts.left_out += 1
                continue
            counts.truncated += len(prompt) > room
            tokens = prompt[-room:] + answer
            counts.add(sample, len(tokens), len(answer))
            yield tokens, len(answer)


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    # Quiet: a text longer than the tokenizer thinks the model can take is ours to truncate.
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids
