"""Memory and work of fine-tuning, beside what a small model needs on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.planning.answer_batches import answer_batch
from tests.planning.measured_peak import measured_peak
from trainer.config.finetune import LoraConfig
from trainer.llm.finetuning.answer_loss import AnswerModel
from trainer.llm.models.base_model import add_adapter, empty_model, quiet_libraries
from trainer.planning.language_model_cost import (
    ModelShape,
    kept_bytes,
    layer_bytes,
    loss_bytes,
    step_flops,
    working_bytes,
)

SHAPE = ModelShape(64, 256, 3, 32, 500, 10**5, 32_000, 2 * 10**5, 10**4, 112)
COUNTS = st.integers(0, 10**6)


def small_model(shape: ModelShape, dtype: torch.dtype, checkpointing: bool, dropout: float) -> AnswerModel:
    from transformers import Qwen2Config

    quiet_libraries()
    torch.manual_seed(1)
    config = Qwen2Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=False,
        max_position_embeddings=512,
    )
    model = empty_model(config).to(dtype).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    adapted: Any = add_adapter(model, LoraConfig(dropout=dropout), "small").to(dtype)
    if checkpointing:
        adapted.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    return AnswerModel(adapted).train()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("dtype", "vocabulary", "answer", "dropout"),
    [
        (torch.float32, 500, 16, 0.0),
        (torch.float32, 4000, 64, 0.0),
        (torch.bfloat16, 500, 16, 0.0),
        (torch.bfloat16, 500, 16, 0.05),
    ],
)
def test_a_small_model_needs_the_memory_of_the_formulas(
    dtype: torch.dtype, vocabulary: int, answer: int, dropout: float, checkpointing: bool
) -> None:
    rows, length = 4, 128
    network = small_model(SHAPE._replace(vocabulary=vocabulary), dtype, checkpointing, dropout)
    batch = answer_batch(rows, length, answer, vocabulary)
    # Libraries allocate once in the first call.
    network(batch).sum().backward()
    network.zero_grad(set_to_none=True)
    measured = measured_peak(lambda: network(batch).sum().backward())
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    # Six layers of each block read the hidden width, one the inner width.
    dropped = 6 * SHAPE.hidden + SHAPE.intermediate if dropout else 0
    shape = SHAPE._replace(vocabulary=vocabulary, dropped=dropped, mask_bytes=dtype.itemsize)
    planned = kept_bytes(shape, rows * length, dtype.itemsize, checkpointing=checkpointing)
    planned += working_bytes(shape, rows * length, rows * answer, dtype.itemsize, checkpointing=checkpointing)
    # Gradients of weights count elsewhere in a plan, and in this measurement too.
    planned += sum(parameter.nbytes for parameter in trained)
    assert planned == pytest.approx(measured, rel=0.2)


@given(COUNTS, COUNTS, st.booleans(), st.sampled_from([2, 4]))
def test_memory_and_work_are_linear_in_the_sequences(
    tokens: int, answers: int, checkpointing: bool, element: int
) -> None:
    for cost in (
        lambda n: kept_bytes(SHAPE, n * tokens, element, checkpointing=checkpointing),
        lambda n: working_bytes(SHAPE, n * tokens, n * answers, element, checkpointing=checkpointing),
        lambda n: step_flops(SHAPE, n * tokens, 128, n * answers, checkpointing=checkpointing),
    ):
        assert cost(0) == 0 and cost(2) == pytest.approx(2 * cost(1)) and cost(1) >= 0


@given(COUNTS, COUNTS)
def test_recomputing_costs_work_and_saves_memory(tokens: int, answers: int) -> None:
    kept, recomputed = (kept_bytes(SHAPE, tokens, 2, checkpointing=way) for way in (False, True))
    assert recomputed <= kept
    flops, more = (step_flops(SHAPE, tokens, 128, answers, checkpointing=way) for way in (False, True))
    assert flops <= more <= 1.5 * flops
    assert working_bytes(SHAPE, tokens, answers, 2, checkpointing=True) >= loss_bytes(SHAPE, answers)


def test_float32_copies_of_the_norms_do_not_shrink_with_bfloat16() -> None:
    full, half = layer_bytes(SHAPE, 1, 4), layer_bytes(SHAPE, 1, 2)
    assert full / 2 < half < full
