"""Encoder of texts: what it counts, against the tokens of each text."""

from __future__ import annotations

import math

import torch

from tests.llm.tiny import CPU
from trainer.llm.embedding.text_encoder import EncodeCounts, Encoder, batches_by_length
from trainer.llm.models.base_model import BaseModelFiles
from trainer.llm.models.text_tokens import text_tokens


def test_texts_tokens_and_places_are_counted(base: BaseModelFiles) -> None:
    encoder = Encoder(base.load(bf16=False), base.tokenizer, CPU, length=6, tokens=14)
    assert encoder.counts == EncodeCounts(texts=0, truncated=0, tokens=0, places=0)
    texts = ["fire", "river stone " * 9, "green", "seven cloud stone", "river stone cloud fire green seven"]
    lengths = [len(one) for one in text_tokens(base.tokenizer, texts)]
    kept = [min(length, 6) for length in lengths]
    truncated = sum(length > 6 for length in lengths)
    assert 0 < truncated < len(texts) and 6 in lengths
    places = sum(
        len(batch) * max(kept[row] for row in batch) for batch in batches_by_length(torch.tensor(kept).numpy(), 14)
    )
    assert places > sum(kept)
    for times in (1, 2):
        encoder.vectors(texts)
        expected = (times * each for each in (len(texts), truncated, sum(kept), places))
        assert encoder.counts == EncodeCounts(*expected)
    assert math.isclose(encoder.counts.places / 2, places)
