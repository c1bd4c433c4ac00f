"""Control tokens spelled in users' texts are text: in token ids, in samples and in embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from tests.llm.tiny import LENGTH, SMALL, samples
from trainer.config.finetune import SmallConfig
from trainer.data.simulator.write_dataset import simulate
from trainer.llm.embedding.text_encoder import Encoder
from trainer.llm.finetuning.samples import ReadCounts, Sample, read_samples
from trainer.llm.finetuning.token_files import Tokens
from trainer.llm.instructions.write import InstructionPlan, write_instructions
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


WIDE = SmallConfig(vocabulary=1500, hidden=16, layers=1, heads=2)
"""A vocabulary with tokens of several digits, so that another split of a text gives other ids."""


def with_other_split(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer with the split that byte-level BPE has by default, which keeps digits together."""
    content = json.loads(tokenizer.to_str())
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return Tokenizer.from_str(json.dumps(content))


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> BaseModelFiles:
    """Return a small model whose texts have numbers and punctuation."""
    path = tmp_path_factory.mktemp("counting") / "base"
    texts = [f"{k}. Stay: 7.{k} s, it's {37 * k}! I don't 直播！\n\nAnswer: {k % 7}." for k in range(600)]
    write_small_model(path, texts, WIDE, seed=1, length=256)
    return BaseModelFiles.open(str(path))


@pytest.fixture(scope="module")
def readers(counting: BaseModelFiles) -> tuple[Any, Any]:
    """Return that model's tokenizer as its file has it, and as transformers loads it."""
    from_file = Tokenizer.from_file(str(counting.directory / "tokenizer.json"))
    text = "12. Stay: 7.12 s"
    assert with_other_split(from_file).encode(text).ids != from_file.encode(text).ids
    return from_file, AutoTokenizer.from_pretrained(counting.directory)


MIXED = st.lists(st.sampled_from(["7.", "12", " 3.5", "½", "don't", "'S", "é", "e\u0301", "  ", "\n\n", "！", "直播"]))


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=60), MIXED.map("".join)))
def test_every_reader_of_the_small_model_gets_the_ids_of_its_training(
    counting: BaseModelFiles, readers: tuple[Any, Any], text: str
) -> None:
    from_file, auto = readers
    expected = counting.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert from_file.encode(text, add_special_tokens=False).ids == expected
    assert auto(text, add_special_tokens=False)["input_ids"] == expected
    assert from_file.encode(text).ids == auto(text)["input_ids"]
    if "<|endoftext|>" not in text:
        assert text_tokens(counting.tokenizer, [text]) == [expected]


def test_every_reader_gets_the_ids_of_a_worlds_prompts(tmp_path: Path) -> None:
    simulate(tmp_path / "world", 400, 3, 2, 4, texts=True)
    plan = InstructionPlan("2024-03-06", samples=300, evaluate_samples=100)
    write_instructions(tmp_path / "world", tmp_path / "samples", plan)
    made = list(read_samples([str(file) for file in sorted((tmp_path / "samples").glob("*.jsonl"))], ReadCounts()))
    texts = [sample.prompt + sample.answer for sample in made]
    assert len(texts) >= 300
    write_small_model(tmp_path / "base", texts, WIDE, seed=1, length=256)
    base = BaseModelFiles.open(str(tmp_path / "base"))
    from_file = Tokenizer.from_file(str(tmp_path / "base" / "tokenizer.json"))
    expected = text_tokens(base.tokenizer, texts)
    assert [encoding.ids for encoding in from_file.encode_batch(texts)] == expected
    other = with_other_split(from_file).encode_batch(texts)
    assert [encoding.ids for encoding in other] != expected, "the prompts must show another split"
    assert AutoTokenizer.from_pretrained(tmp_path / "base")(texts)["input_ids"] == expected
    assert base.tokenizer.model_max_length == base.config.max_position_embeddings == 256
