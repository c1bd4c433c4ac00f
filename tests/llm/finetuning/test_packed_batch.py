"""Packed samples do not attend to each other: losses and gradients are the same as for single samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.llm.tiny import CPU, adapted, samples
from trainer.config.finetune import AnswerWeight
from trainer.llm.finetuning.answer_loss import AnswerModel, likelihood_of_samples
from trainer.llm.finetuning.packed_batch import IGNORED, PADDING, TokenBatch, answer_weights
from trainer.llm.finetuning.packing import epoch_packs
from trainer.llm.finetuning.token_files import Tokens
from trainer.llm.models.base_model import BaseModelFiles


@pytest.mark.parametrize("seed", range(3))
def test_packed_losses_and_gradients_are_those_of_single_samples(base: BaseModelFiles, seed: int) -> None:
    tokens = Tokens.of(samples(30, seed), base.tokenizer, 64)
    packs = epoch_packs(tokens.lengths, 64, seed=seed, epoch=0, packing=True)
    assert max(map(len, packs)) > 3
    network = AnswerModel(adapted(base))
    trained = [value for value in network.parameters() if value.requires_grad]

    batch = TokenBatch.of(packs, tokens, CPU)
    losses = network(batch)
    packed_gradients = torch.autograd.grad(losses.sum(), trained)

    alone = [network(TokenBatch.of([np.array([sample])], tokens, CPU, multiple=1)) for sample in batch.samples]
    gradients = torch.autograd.grad(torch.cat(alone).sum(), trained)

    torch.testing.assert_close(losses, torch.cat(alone), atol=2e-5, rtol=0)
    torch.testing.assert_close(packed_gradients, gradients, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(
        likelihood_of_samples(losses.detach(), batch),
        -torch.stack([of_sample.detach().sum() for of_sample in alone]),
        atol=5e-5,
        rtol=0,
    )
    # Check that the comparison detects samples that attend to earlier ones.
    mixed = TokenBatch(**{**vars(batch), "segments": torch.zeros_like(batch.segments)})
    assert (network(mixed) - losses).abs().max() > 1e-3


def test_the_loss_is_that_of_transformers(base: BaseModelFiles) -> None:
    tokens = Tokens.of(samples(5), base.tokenizer, 64)
    model = base.load(bf16=False)
    for sample in range(5):
        batch = TokenBatch.of([np.array([sample])], tokens, CPU)
        length = int(tokens.lengths[sample])
        ids = batch.ids[:, :length]
        labels = ids.clone()
        labels[:, : length - int(tokens.answers[sample])] = IGNORED
        torch.testing.assert_close(AnswerModel(model)(batch).mean(), model(input_ids=ids, labels=labels).loss)


def test_a_batch_in_full(base: BaseModelFiles) -> None:
    tokens = Tokens(
        ids=np.array([10, 11, 12, 20, 21, 30, 31, 32, 33], dtype=np.int32),
        starts=np.array([0, 3, 5, 9]),
        answers=np.array([1, 1, 2], dtype=np.int32),
        counts=Tokens.of([], base.tokenizer, 8).counts,
    )
    batch = TokenBatch.of([np.array([1, 0]), np.array([2])], tokens, CPU, multiple=3)
    assert batch.ids.tolist() == [[20, 21, 10, 11, 12, 0], [30, 31, 32, 33, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 1, PADDING], [2, 2, 2, 2, PADDING, PADDING]]
    ignored = IGNORED
    assert batch.labels.tolist() == [
        [21, ignored, ignored, 12, ignored, ignored],
        [ignored, 32, 33, ignored, ignored, ignored],
    ]
    assert batch.answered.tolist() == [0, 3, 7, 8]
    assert (batch.samples.tolist(), batch.tokens, batch.padding, batch.packed) == ([1, 0, 2], 9, 3, True)
    assert batch.mask is not None
    assert batch.mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_an_answer_counts_for_its_tokens_their_root_or_one(base: BaseModelFiles) -> None:
    counts = Tokens.of([], base.tokenizer, 8).counts
    tokens = Tokens(np.arange(16, dtype=np.int32), np.array([0, 3, 16]), np.array([1, 9], dtype=np.int32), counts)
    expected: dict[AnswerWeight, list[float]] = {"tokens": [1, 1], "root": [1, 3 / 9], "one": [1, 1 / 9]}
    for weight, of_a_token in expected.items():
        batch = TokenBatch.of([np.array([0, 1])], tokens, CPU, weight=weight)
        torch.testing.assert_close(batch.weights, torch.tensor(of_a_token, dtype=torch.float32))
        assert answer_weights(tokens.answers, weight).tolist() == pytest.approx([1, 9 * of_a_token[1]])


def test_nothing_to_do_is_a_row_of_padding_without_a_loss(base: BaseModelFiles) -> None:
    tokens = Tokens.of(samples(2), base.tokenizer, 64)
    batch = TokenBatch.of([], tokens, CPU)
    assert (batch.tokens, len(batch.samples), batch.mask) == (0, 0, None)
    network = AnswerModel(adapted(base))
    losses = network(batch)
    assert losses.shape == (0,)
    losses.sum().backward()
    gradients = [value.grad for value in network.parameters() if value.requires_grad]
    assert all(gradient is None or not gradient.any() for gradient in gradients)
