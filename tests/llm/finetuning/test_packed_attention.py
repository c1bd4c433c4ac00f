"""Every attention keeps packed samples apart, and computes as many pairs of tokens as are counted.

Flex and flash attention have no backward pass on a CPU. Here flex attention runs in PyTorch's plain form of it, with
its gradients, on the same block masks. Flash attention is a loop over the sequences that it is given.
"""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention as flex
import transformers.integrations.flex_attention as transformers_flex
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from tests.llm.tiny import CPU, adapted, samples
from trainer.config.finetune import AttentionKind
from trainer.llm.finetuning.answer_loss import AnswerModel
from trainer.llm.finetuning.packed_attention import (
    BLOCK,
    IMPLEMENTATIONS,
    block_mask,
    count_pairs,
    describe_attention,
    row_multiple,
)
from trainer.llm.finetuning.packed_batch import PADDING, TokenBatch
from trainer.llm.finetuning.packing import epoch_packs
from trainer.llm.finetuning.token_files import Tokens
from trainer.llm.models.base_model import BaseModelFiles

KINDS: tuple[AttentionKind, ...] = ("sdpa", "eager", "flex", "flash")


@pytest.fixture
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run flex and flash attention on a CPU, with gradients."""
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_validate_device", lambda query, key, value: None)

    def not_compiled(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **options: Any) -> Any:
        return flex.flex_attention(query, key, value, **options)

    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", not_compiled)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", by_sequences)


def by_sequences(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **options: Any
) -> tuple[Tensor, None]:
    """Compute what flash attention does with lengths of sequences: each one alone, as if rows were one long row."""
    assert attention_mask is None and torch.equal(options["cu_seq_lens_q"], options["cu_seq_lens_k"])
    starts = options["cu_seq_lens_q"]
    assert starts.dtype == torch.int32 and options["max_length_q"] == options["max_length_k"] == int(
        starts.diff().max()
    )
    groups = query.shape[1] // key.shape[1]
    flat = [
        tensor.transpose(0, 1).flatten(1, 2)
        for tensor in (query, *(t.repeat_interleave(groups, 1) for t in (key, value)))
    ]
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(t[:, start:end] for t in flat), is_causal=True, scale=scaling
        )
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    ]
    out = torch.cat(parts, 1).unflatten(1, (len(query), -1)).permute(1, 2, 0, 3)
    return out.contiguous(), None


def test_packed_logits_and_gradients_are_those_of_single_samples(base: BaseModelFiles, plain_kernels: None) -> None:
    tokens = Tokens.of(samples(12, 3), base.tokenizer, 64)
    packs = epoch_packs(tokens.lengths, 64, seed=3, epoch=0, packing=True)
    assert max(map(len, packs)) > 3
    network = AnswerModel(adapted(base))
    trained = [value for value in network.parameters() if value.requires_grad]
    logits: list[Tensor] = []
    network.causal.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output))

    def learn(batch: TokenBatch) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        logits.clear()
        losses = network(batch)
        return losses.detach(), logits[0].detach(), torch.autograd.grad(losses.sum(), trained)

    order = TokenBatch.of(packs, tokens, CPU).samples
    alone = [learn(TokenBatch.of([np.array([sample])], tokens, CPU, multiple=1)) for sample in order]
    expected = [torch.cat([of_sample[part] for of_sample in alone]) for part in (0, 1)]
    gradients = [torch.stack(of_weight).sum(0) for of_weight in zip(*(g for _, _, g in alone), strict=True)]
    for kind in KINDS:
        implementation = network.causal.config._attn_implementation = IMPLEMENTATIONS[kind]
        batch = TokenBatch.of(packs, tokens, CPU, multiple=row_multiple(implementation))
        assert batch.ids.shape[1] == (BLOCK if kind == "flex" else 64)
        losses, found, of_packs = learn(batch)
        torch.testing.assert_close(losses, expected[0], atol=2e-5, rtol=0)
        torch.testing.assert_close(found, expected[1], atol=5e-5, rtol=1e-5)
        torch.testing.assert_close(list(of_packs), gradients, atol=2e-4, rtol=1e-4)
        # Check that the comparison detects samples that attend to earlier ones.
        rows, width = batch.ids.shape
        one = torch.arange(0, rows * width + 1, width, dtype=torch.int32)
        mixed = {"segments": torch.zeros_like(batch.segments), "run_starts": one, "longest_run": width}
        assert (learn(TokenBatch(**{**vars(batch), **mixed}))[0] - losses).abs().max() > 1e-3


def test_one_sample_in_a_row_sees_nothing_behind_it(base: BaseModelFiles, plain_kernels: None) -> None:
    tokens = Tokens.of(samples(3), base.tokenizer, 64)
    network = AnswerModel(adapted(base))
    batch = TokenBatch.of([np.array([sample]) for sample in range(3)], tokens, CPU)
    assert not batch.packed
    with torch.no_grad():
        expected = network(batch)
        for kind in KINDS:
            network.causal.config._attn_implementation = IMPLEMENTATIONS[kind]
            torch.testing.assert_close(network(batch), expected, atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_flex_attention_computes_the_same_losses(base: BaseModelFiles) -> None:
    tokens = Tokens.of(samples(24), base.tokenizer, 64)
    batch = TokenBatch.of(epoch_packs(tokens.lengths, 64, seed=0, epoch=0, packing=True), tokens, CPU, multiple=BLOCK)
    network = AnswerModel(adapted(base)).eval()
    with torch.no_grad():
        expected = network(batch)
        network.causal.config._attn_implementation = IMPLEMENTATIONS["flex"]
        torch.testing.assert_close(network(batch), expected, atol=2e-5, rtol=0)


@pytest.mark.gpu
def test_compiled_attention_on_a_gpu_learns_as_the_dense_mask(base: BaseModelFiles) -> None:
    tokens = Tokens.of(samples(24), base.tokenizer, 64)
    packs = epoch_packs(tokens.lengths, 64, seed=0, epoch=0, packing=True)
    device = torch.device("cuda")
    network = AnswerModel(adapted(base, bf16=True)).to(device)
    trained = [value for value in network.parameters() if value.requires_grad]
    found = {}
    for kind in KINDS if is_flash_attn_2_available() else ("sdpa", "flex"):
        implementation = network.causal.config._attn_implementation = IMPLEMENTATIONS[kind]
        losses = network(TokenBatch.of(packs, tokens, device, multiple=row_multiple(implementation)))
        of_weights = torch.autograd.grad(losses.sum(), trained)
        found[kind] = (losses.detach(), torch.cat([gradient.float().flatten() for gradient in of_weights]))
    expected, gradients = found.pop("sdpa")
    for others in found.values():
        # bfloat16 has three digits, and losses are near 6.
        torch.testing.assert_close(others[0], expected, atol=0.1, rtol=0)
        assert float((others[1] - gradients).norm() / gradients.norm()) < 0.05


def test_pairs_of_flex_attention_are_those_of_the_blocks_in_its_mask() -> None:
    generator = np.random.default_rng(0)
    rows = [generator.integers(1, 300, generator.integers(0, 7)).tolist() for _ in range(16)]
    width = -(-max(map(sum, rows)) // BLOCK) * BLOCK
    segments = torch.full((len(rows), width), PADDING)
    for row, of_row in enumerate(rows):
        ends = np.cumsum(of_row)
        for number, end in enumerate(ends):
            segments[row, end - of_row[number] : end] = number
    mask = block_mask(segments)
    pairs = count_pairs(rows, "flex")
    blocks = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    same = (segments[:, :, None] == segments[:, None]) & torch.ones(width, width, dtype=torch.bool).tril()
    counted = same & (segments != PADDING)[:, :, None]
    assert pairs == (int(counted.sum()), BLOCK**2 * blocks)
    # Flash attention needs no whole blocks, so its rows are shorter.
    shorter = -(-max(map(sum, rows)) // 8) * 8
    assert count_pairs(rows, "flash") == (pairs.needed, int(same[:, :shorter, :shorter].sum()))


def test_pairs_of_a_dense_mask_are_all_of_a_row() -> None:
    # Rows of 2,048 tokens with samples of 100.
    rows = [[100] * 20 + [48]] * 4
    needed = 4 * (20 * 100 * 101 // 2 + 48 * 49 // 2)
    assert count_pairs(rows, "sdpa") == count_pairs(rows, "eager") == (needed, 4 * 2048**2)
    assert count_pairs([[5], [8]], "sdpa") == (15 + 36, 2 * 36)
    assert count_pairs([[5], [8]], "eager") == (15 + 36, 2 * 64)
    line = describe_attention("flex", [np.arange(21)] * 4, np.array([*[100] * 20, 48]))
    found = count_pairs(rows, "flex").computed / needed
    assert 1 < found < 7
    assert line == (
        f"attention flex: masks of 128 x 128 tokens; {found:.1f} times the pairs of tokens that count, in the first 4 "
        "sequences"
    )
    assert "a dense mask; 41.0 times" in describe_attention("sdpa", [np.arange(21)] * 4, np.array([*[100] * 20, 48]))
