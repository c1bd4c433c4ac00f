"""Tokenised samples: border of the answer, truncation and counts; files and memory have the same content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.llm.tiny import samples
from trainer.console.errors import UserError
from trainer.llm.finetuning import token_files
from trainer.llm.finetuning.samples import Sample
from trainer.llm.finetuning.token_files import Tokens, write_tokens
from trainer.llm.models.base_model import BaseModelFiles


def ids_of(tokens: Tokens, number: int) -> list[int]:
    return tokens.ids[tokens.starts[number] : tokens.starts[number + 1]].tolist()


def plain(base: BaseModelFiles, text: str) -> list[int]:
    ids: list[int] = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_a_sample_is_prompt_answer_and_end(base: BaseModelFiles) -> None:
    tokens = Tokens.of([Sample("stone cloud ? ", "yes", "t"), Sample("fire", "no", "t")], base.tokenizer, 64)
    end = base.tokenizer.eos_token_id
    assert ids_of(tokens, 0) == [*plain(base, "stone cloud ? "), *plain(base, "yes"), end]
    assert tokens.answers.tolist() == [len(plain(base, "yes")) + 1, len(plain(base, "no")) + 1]
    assert base.tokenizer.decode(ids_of(tokens, 1)) == "fireno<|endoftext|>"


def test_a_long_prompt_loses_its_beginning_and_a_long_answer_its_sample(base: BaseModelFiles) -> None:
    long = "river stone cloud fire green seven " * 10
    written = [
        Sample(long, "yes", "a"),
        Sample("fire", long, "a"),
        Sample("fire", "yes", "b", ("yes", "no")),
        Sample("fire", "no", "b", ("yes", "no")),
    ]
    tokens = Tokens.of(written, base.tokenizer, 16)
    answer = [*plain(base, "yes"), base.tokenizer.eos_token_id]
    assert ids_of(tokens, 0) == [*plain(base, long)[-(16 - len(answer)) :], *answer]
    counts = tokens.counts
    assert (counts.samples, counts.truncated, counts.left_out) == (3, 1, 1)
    assert counts.tasks == {"a": 1, "b": 2}
    assert counts.answers == {"b": {"yes": 1, "no": 1}}
    assert counts.tokens == len(tokens.ids) == int(tokens.lengths.sum())
    assert counts.answer_tokens == tokens.answers.sum()


def test_files_hold_what_memory_does(base: BaseModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Tokens.of(samples(50), base.tokenizer, 8)
    monkeypatch.setattr(token_files, "_CHUNK", 3)
    counts = write_tokens(samples(50), base.tokenizer, 8, tmp_path / "tokens")
    mapped = Tokens.open(tmp_path / "tokens")
    for name in ("ids", "starts", "answers"):
        np.testing.assert_array_equal(getattr(mapped, name), getattr(memory, name))
    assert mapped.counts == memory.counts == counts
    assert counts.truncated > 0


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("starts", lambda starts: starts[:-1]),
        ("starts", lambda starts: np.append(starts, starts[-1] + 1)),
        ("starts", lambda starts: np.append(1, starts[1:])),
        ("starts", lambda starts: np.append(starts[:-1], starts[-1] + 1)),
        ("answers", lambda answers: answers[1:]),
        ("answers", lambda answers: np.append(answers[:-1], 9)),
    ],
    ids=["a start fewer", "a start more", "another first", "another last", "an answer fewer", "a long answer"],
)
def test_files_that_do_not_belong_together_are_refused(
    base: BaseModelFiles, tmp_path: Path, name: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    directory = tmp_path / "tokens"
    write_tokens(samples(5), base.tokenizer, 8, directory)
    file = directory / f"{name}.npy"
    array = np.load(file)
    Tokens.open(directory)
    np.save(file, change(array).astype(array.dtype))
    with pytest.raises(UserError, match="do not belong together"):
        Tokens.open(directory)


def test_no_samples_are_an_error(base: BaseModelFiles, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no samples to train on; 1 left no room"):
        write_tokens([Sample("p", "fire " * 20, "t")], base.tokenizer, 8, tmp_path / "tokens")
