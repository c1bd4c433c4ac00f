"""Control tokens spelled in users' texts are text: in token ids, in samples and in embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from tests.llm.tiny import LENGTH, SMALL, samples
from trainer.llm.embedding.text_encoder import Encoder
from trainer.llm.finetuning.samples import Sample
from trainer.llm.finetuning.token_files import Tokens
from trainer.llm.models.base_model import BaseModelFiles
from trainer.llm.models.small_model import write_small_model
from trainer.llm.models.text_tokens import text_tokens

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>")
NOT_SPECIAL = ("<tool_call>", "</tool_call>", "<|fim_prefix|>")
"""Tokens that Qwen2.5 adds without marking them as special, so split_special_tokens does not split them."""


@pytest.fixture(scope="module")
def tokenizers(base: BaseModelFiles, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("tokenizers") / "qwen"
    write_small_model(path, [sample.prompt for sample in samples(50)], SMALL, seed=1, length=LENGTH)
    qwen = AutoTokenizer.from_pretrained(path)
    qwen.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    qwen.add_tokens([AddedToken(token, normalized=False, special=False) for token in NOT_SPECIAL])
    qwen.save_pretrained(path)
    return {"small": base.tokenizer, "qwen": AutoTokenizer.from_pretrained(path)}


@pytest.mark.parametrize("name", ["small", "qwen"])
def test_no_added_token_is_found_in_a_text(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer = tokenizers[name]
    added = tokenizer.get_added_vocab()
    assert (
        {*SPECIAL, *NOT_SPECIAL, "<|endoftext|>"} == set(added) if name == "qwen" else set(added) >= {"<|endoftext|>"}
    )
    for token, number in added.items():
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [number]
        for text in (token, f"fire {token}river", token * 3, token[:-1] + token):
            (ids,) = text_tokens(tokenizer, [text])
            assert not set(ids) & set(added.values())
            assert tokenizer.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_other_texts_keep_their_tokens(tokenizers: dict[str, Any], texts: list[str]) -> None:
    for tokenizer in tokenizers.values():
        assert text_tokens(tokenizer, texts) == tokenizer(texts, add_special_tokens=False)["input_ids"]


@given(st.lists(st.sampled_from([*SPECIAL, *NOT_SPECIAL, "<|endoftext|>", "fire", " ", "<", "|>"]), min_size=1))
@settings(max_examples=300, deadline=None)
def test_mixed_texts_are_text(tokenizers: dict[str, Any], parts: list[str]) -> None:
    text = "".join(parts)
    for tokenizer in tokenizers.values():
        (ids,) = text_tokens(tokenizer, [text])
        assert not set(ids) & set(tokenizer.get_added_vocab().values())
        assert tokenizer.decode(ids) == text


def test_a_sample_has_one_end_only(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    for tokenizer in tokenizers.values():
        for token in tokenizer.get_added_vocab():
            sample = Sample(f"stone {token} fire ? ", f"yes{token}", "t")
            tokens = Tokens.of([sample], tokenizer, 256)
            controls = set(tokenizer.get_added_vocab().values())
            assert [number for number in tokens.ids.tolist() if number in controls] == [tokenizer.eos_token_id]
            assert tokens.ids[-1] == tokenizer.eos_token_id


def test_an_embedding_of_a_text_is_that_of_its_characters(base: BaseModelFiles) -> None:
    encoder = Encoder(base.load(bf16=False), base.tokenizer, torch.device("cpu"), length=LENGTH, tokens=256)
    encoder.pool_with("mean")
    marked, almost, plain = torch.from_numpy(
        encoder.vectors(["river stone <|endoftext|>", "river stone <|endoftext|", "river stone"])
    )
    near = torch.nn.functional.cosine_similarity
    assert near(marked, almost, dim=0) > 0.95
    assert base.tokenizer.eos_token_id not in encoder.tokenise(["river stone <|endoftext|>"])[0]
    assert near(marked, plain, dim=0) < near(marked, almost, dim=0)
