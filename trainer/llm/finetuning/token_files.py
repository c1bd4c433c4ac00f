"""Tokenised samples, written once per run into files that all ranks memory-map.

A sample is stored as the tokens of its prompt, the tokens of its answer, and the end-of-text token. Prompt and answer
are tokenised separately, so that the border between them does not depend on their texts. A sample longer than a
sequence loses the beginning of its prompt: the answer stays complete, and a prompt has the latest events of a history
at its end. A sample without room for any prompt token is left out. Both cases are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trainer.console.errors import UserError, one_line
from trainer.llm.finetuning.samples import Sample
from trainer.llm.models.text_tokens import text_tokens
from trainer.runtime.files import write_json
from trainer.runtime.stored_files import load_array, open_regular, read_json_object

_CHUNK = 4096
"""Number of samples that are tokenised together."""


@dataclass
class TokenCounts:
    """Counts of the tokenised samples.

    Attributes:
        samples: number of samples to train on.
        tokens: number of their tokens.
        answer_tokens: number of their tokens that have a loss.
        truncated: number of samples that lost the beginning of their prompt.
        left_out: number of samples that were left out because the answer leaves no room for a prompt.
        tasks: task -> number of samples to train on.
        answers: task -> answer -> number of samples with that answer; samples with options only.
    """

    samples: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    truncated: int = 0
    left_out: int = 0
    tasks: dict[str, int] = field(default_factory=dict)
    answers: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, sample: Sample, tokens: int, answer_tokens: int) -> None:
        """Count a sample to train on."""
        self.samples += 1
        self.tokens += tokens
        self.answer_tokens += answer_tokens
        self.tasks[sample.task] = self.tasks.get(sample.task, 0) + 1
        if sample.options:
            counts = self.answers.setdefault(sample.task, {})
            counts[sample.answer] = counts.get(sample.answer, 0) + 1


@dataclass(frozen=True)
class Tokens:
    """Tokenised samples.

    Attributes:
        ids: ``[tokens]`` int32 token ids, one sample after another.
        starts: ``[samples + 1]`` int64, start of each sample in ``ids``.
        answers: ``[samples]`` int32, number of answer tokens at the end of each sample.
        counts: counts of the samples.
    """

    ids: np.ndarray
    starts: np.ndarray
    answers: np.ndarray
    counts: TokenCounts

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each sample, ``[samples]`` int64."""
        return np.diff(self.starts)

    @staticmethod
    def of(samples: Iterable[Sample], tokenizer: Any, length: int) -> Tokens:
        """Tokenise samples in memory; arguments as of :func:`write_tokens`."""
        counts = TokenCounts()
        pieces = list(_tokenise(samples, tokenizer, length, counts))
        ids = [np.array(tokens, dtype=np.int32) for tokens, _ in pieces]
        starts = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        answers = np.array([answer for _, answer in pieces], dtype=np.int32)
        return Tokens(np.concatenate([*ids, np.empty(0, np.int32)]), starts, answers, counts)

    @staticmethod
    def open(directory: Path) -> Tokens:
        """Memory-map the files of :func:`write_tokens`.

        Raises:
            UserError: a file is missing or damaged, or the files do not belong together.
        """
        try:
            starts, answers = (load_array(directory / f"{name}.npy", 1) for name in ("starts", "answers"))
            counts = TokenCounts(**read_json_object(directory / "counts.json"))
            open_regular(directory / "ids.int32").close()
            # An empty file cannot be memory-mapped.
            empty = not (directory / "ids.int32").stat().st_size
            ids = np.empty(0, np.int32) if empty else np.memmap(directory / "ids.int32", np.int32, "r")
        except (OSError, TypeError, ValueError) as error:
            raise UserError(
                f"{directory}: the tokens cannot be read ({one_line(error)}); remove it to write it again"
            ) from None
        lengths = np.diff(starts)
        if len(starts) != len(answers) + 1 or starts[0] or starts[-1] != len(ids) or (lengths < answers).any():
            raise UserError(f"{directory}: the files of the tokens do not belong together; remove it to write it again")
        return Tokens(ids, starts, answers, counts)


def write_tokens(samples: Iterable[Sample], tokenizer: Any, length: int, directory: Path) -> TokenCounts:
    """Tokenise samples into files of a new directory.

    Args:
        samples: any number of samples; only a few thousand are in memory at a time.
        tokenizer: transformers tokenizer with an end-of-text token.
        length: maximum tokens of a sample.
        directory: directory to create.

    Raises:
        UserError: there is no sample to train on.
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
    """Yield the tokens of each sample and the number of its answer tokens, which includes the end-of-text token."""
    remaining = iter(samples)
    while chunk := list(islice(remaining, _CHUNK)):
        prompts = text_tokens(tokenizer, [sample.prompt for sample in chunk])
        answers = text_tokens(tokenizer, [sample.answer for sample in chunk])
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
