"""Vectors of segments: the same bits in every batch, and those of a table of vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.llm.embedding.test_embed import TEMPLATE, TOLERANCE, WORDS
from trainer.llm.embedding.segment_encoder import SHORTEST, TextSegmentEncoder, padded_length
from trainer.llm.embedding.text_encoder import Encoder
from trainer.llm.models.base_model import BaseModelFiles
from trainer.llm.models.prompt_templates import Template

LENGTH = 64
TEMPLATES = Template.read(TEMPLATE, dict.fromkeys(("items", "comments", "segments", "authors"), frozenset({"text"})))


@pytest.fixture(scope="module")
def plain(base: BaseModelFiles) -> Encoder:
    return Encoder(base.load(bf16=False), base.tokenizer, torch.device("cpu"), length=LENGTH, tokens=256)


def encoder_of(plain: Encoder, rows: int = 8) -> TextSegmentEncoder:
    return TextSegmentEncoder(plain, TEMPLATES, rows=rows, length=LENGTH, tokens=256)


def encode(encoder: TextSegmentEncoder, texts: list[str]) -> np.ndarray:
    vectors, reasons = encoder.encode(texts, [()] * len(texts))
    assert reasons == [""] * len(texts)
    return vectors


@settings(max_examples=25)
@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join), min_size=1, max_size=20), st.data())
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_vector_has_the_same_bits_in_every_batch(
    plain: Encoder, pooling: str, texts: list[str], data: st.DataObject
) -> None:
    plain.pool_with(pooling)  # type: ignore[arg-type]
    encoder = encoder_of(plain)
    together = encode(encoder, texts)
    order = data.draw(st.permutations(range(len(texts))))
    cut = data.draw(st.integers(0, len(texts)))
    for part in (order[:cut], order[cut:]):
        if part:
            np.testing.assert_array_equal(encode(encoder, [texts[at] for at in part]), together[part])
    filled = [TEMPLATES.fill("segments", text=text) for text in texts]
    np.testing.assert_allclose(together, plain.vectors(filled), **TOLERANCE)


def test_the_shape_of_a_batch_follows_from_the_text_alone(plain: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    states = Encoder.states

    def noted(self: Encoder, ids: list[list[int]], width: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        shapes.append((len(ids), width))
        return states(self, ids, width)

    monkeypatch.setattr(Encoder, "states", noted)
    encode(encoder_of(plain), ["red", "red " * 100, "blue", *(["cat"] * 9)])
    assert set(shapes) <= {(8, width) for width in (8, 16, 32)} | {(4, 64)}
    assert len(shapes) == 3


@pytest.mark.parametrize(
    ("tokens", "longest", "expected"),
    [(1, 64, SHORTEST), (8, 64, 8), (9, 64, 16), (33, 64, 64), (60, 60, 60), (3, 4, 4)],
)
def test_texts_are_padded_to_powers_of_two(tokens: int, longest: int, expected: int) -> None:
    assert padded_length(tokens, longest) == expected
