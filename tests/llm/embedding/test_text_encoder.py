"""Encoder of texts: what it counts, against the tokens of each text."""

from __future__ import annotations

import math

import pytest
import torch

from modules.choices import TextPooling
from tests.device_waits import Waits
from tests.llm.tiny import CPU
from trainer.llm.embedding import text_encoder
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


TEXTS = ["fire", "river stone " * 9, "green", "seven cloud stone", "river stone cloud fire green seven", "cloud"]


@pytest.mark.parametrize("pooling", ["last", "mean", "query"])
def test_the_host_waits_for_the_vectors_of_a_batch_alone(base: BaseModelFiles, pooling: TextPooling) -> None:
    encoder = Encoder(base.load(bf16=False), base.tokenizer, CPU, length=16, tokens=24)
    encoder.pool_with(pooling, torch.randn(encoder.dim, generator=torch.Generator().manual_seed(1)))
    ids = encoder.tokenise(TEXTS)
    batches = len(batches_by_length(torch.tensor([len(one) for one in ids]).numpy(), 24))
    assert 1 < batches < len(TEXTS)
    with Waits() as waits:
        encoder.vectors(TEXTS)
    # numpy() is called for what is on the host already.
    assert sorted(waits.calls) == sorted(["values of a step", "numpy in text_encoder.py:vectors"] * batches)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("seed", range(3))
def test_ready_masks_give_the_states_of_raw_ones(
    base: BaseModelFiles, seed: int, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with and without padding; the states of a text do not depend on its neighbours either."""
    encoder = Encoder(base.load(bf16=False, attention=attention), base.tokenizer, CPU, length=32, tokens=64)
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (5,), generator=random).tolist()
    for widths in (lengths, [7] * 5, [1], [1, 3]):
        ids = [torch.randint(1, 250, (width,), generator=random).tolist() for width in widths]
        ready, _ = encoder.states(ids)
        with monkeypatch.context() as patch:
            patch.setattr(text_encoder, "ready_mask", lambda config, mask: None)
            raw, _ = encoder.states(ids)
        for row, one in enumerate(ids):
            assert torch.equal(ready[row, : len(one)], raw[row, : len(one)])
            alone, _ = encoder.states([one])
            torch.testing.assert_close(ready[row, : len(one)], alone[0, : len(one)], rtol=1e-4, atol=1e-4)
