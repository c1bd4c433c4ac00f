"""Target attention against the Deep Interest Network written out row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import modules.blocks
from modules import din, vector_code
from modules.din import TargetAttention


def looped(attention: TargetAttention, query: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
    outputs, first = [], 0
    for q, length in zip(attention.project(query), lengths.tolist(), strict=True):
        own = keys[first : first + length]
        first += length
        if length == 0:
            outputs.append(keys.new_zeros(keys.shape[1]))
            continue
        scores = []
        for k in own:
            hidden = torch.relu(attention.first(torch.cat([q, k, q - k, q * k])))
            for layer in attention.rest:
                hidden = torch.relu(layer(hidden))
            scores.append(hidden @ attention.score)
        outputs.append(functional.softmax(torch.stack(scores), dim=0) @ own)
    return torch.stack(outputs)


def some_lengths(kind: str, batch: int, longest: int) -> Tensor:
    return {
        "full": torch.full((batch,), longest),
        "mixed": torch.randint(0, longest + 1, (batch,)),
        "short": torch.randint(0, 2, (batch,)),
        "equal": torch.full((batch,), longest - 1),
        "none": torch.zeros(batch, dtype=torch.int64),
    }[kind]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("hidden", [(6,), (6, 4), (6, 5, 3)])
@pytest.mark.parametrize("kind", ["full", "mixed", "short", "equal", "none"])
@pytest.mark.parametrize("block_values", [1, 700, 1 << 20])
def test_attention_equals_its_loop(
    block_values: int, kind: str, hidden: tuple[int, ...], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules.blocks, "BLOCK_VALUES", block_values)
    torch.manual_seed(seed)
    batch, longest, key_dim = 13, 7, 4
    query_dim = key_dim + seed
    attention = TargetAttention(query_dim, key_dim, hidden).double()
    lengths = some_lengths(kind, batch, longest)
    query = torch.randn(batch, query_dim, dtype=torch.float64)
    keys = torch.randn(int(lengths.sum()), key_dim, dtype=torch.float64)
    upstream = torch.randn(batch, key_dim, dtype=torch.float64)

    results = []
    for function in (lambda q, k: attention(q, k, lengths, longest), lambda q, k: looped(attention, q, k, lengths)):
        attention.zero_grad(set_to_none=False)
        inputs = [query.clone().requires_grad_(), keys.clone().requires_grad_()]
        out = function(*inputs)
        if out.requires_grad:
            out.backward(upstream)
        parameters = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in attention.named_parameters()
        }
        given = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in inputs]
        results.append((out.detach(), given, parameters))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    torch.manual_seed(3)
    attention = TargetAttention(3, 3, (5, 4)).double()
    lengths = some_lengths(kind, 4, 5)
    query = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(int(lengths.sum()), 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: attention(q, k, lengths, 5), (query, keys))


@pytest.mark.parametrize("kind", ["full", "mixed", "none"])
def test_attention_weights_are_the_weights_of_the_sum(kind: str) -> None:
    torch.manual_seed(6)
    attention = TargetAttention(5, 4, (6, 3)).double()
    lengths = some_lengths(kind, 8, 5)
    query, keys = torch.randn(8, 5).double(), torch.randn(int(lengths.sum()), 4).double()
    shares = attention.attention_weights(query, keys, lengths)
    assert shares.shape == (len(keys), 1)
    row = torch.repeat_interleave(lengths)
    summed = torch.zeros(8, 4, dtype=torch.float64).index_add(0, row, shares * keys)
    torch.testing.assert_close(summed, attention(query, keys, lengths, 5))


def test_float32_agrees_with_float64() -> None:
    torch.manual_seed(0)
    attention = TargetAttention(16, 16, (64, 16))
    lengths = some_lengths("mixed", 200, 50)
    query, keys = torch.randn(200, 16), torch.randn(int(lengths.sum()), 16)
    single = attention(query, keys, lengths, 50)
    double = attention.double()(query.double(), keys.double(), lengths, 50)
    torch.testing.assert_close(single, double.float(), rtol=1e-5, atol=1e-6)


def test_bfloat16_runs_and_is_close() -> None:
    torch.manual_seed(0)
    attention = TargetAttention(8, 8, (64, 16))
    lengths = some_lengths("mixed", 50, 9)
    query, keys = torch.randn(50, 8), torch.randn(int(lengths.sum()), 8)
    expected = attention(query, keys, lengths, 9)
    attention.bfloat16()
    out = attention(query.bfloat16(), keys.bfloat16(), lengths, 9)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in attention.parameters())


def test_other_rows_do_not_matter() -> None:
    torch.manual_seed(0)
    attention = TargetAttention(4, 4, (64, 16))
    lengths = torch.tensor([3, 0, 5, 1])
    query, keys = torch.randn(4, 4), torch.randn(9, 4)
    together = attention(query, keys, lengths, 5)
    assert not together[1].any()
    alone = attention(query[2:3], keys[3:8], lengths[2:3], 5)
    torch.testing.assert_close(together[2:3], alone)


@pytest.mark.skipif(vector_code.INSTRUCTIONS is None, reason="needs a processor with AVX2 or AVX-512")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loops_compute_what_the_operations_do(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    attention = TargetAttention(20, 16, (24, 8)).to(dtype)
    lengths = some_lengths("mixed", 30, 12)
    inputs = [torch.randn(30, 20).to(dtype).requires_grad_(), torch.randn(int(lengths.sum()), 16).to(dtype)]
    inputs[1].requires_grad_()
    results = {}
    for way in ("loops", "operations", "definition"):
        attention.compiled = way != "operations"
        if way == "definition":
            attention, inputs = attention.double(), [value.detach().double().requires_grad_() for value in inputs]
        monkeypatch.setattr(din, "PlainAttention" if way == "loops" else "CompiledAttention", None)
        out = attention(*inputs, lengths, 12)
        results[way] = [out, *torch.autograd.grad(out.square().sum(), [*inputs, *attention.parameters()])]
        monkeypatch.undo()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.06, "atol": 0.06}
    for loops, operations, definition in zip(*results.values(), strict=True):
        assert loops.dtype == operations.dtype == dtype
        torch.testing.assert_close(loops.double(), definition, **tolerance)
        torch.testing.assert_close(loops, operations, **tolerance)


def test_a_processor_without_the_instructions_uses_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_code, "INSTRUCTIONS", None)
    monkeypatch.setattr(din, "CompiledAttention", None)
    out = TargetAttention(4, 4, (6,), compiled=True)(torch.randn(2, 4), torch.randn(3, 4), torch.tensor([1, 2]), 2)
    assert out.shape == (2, 4)


def test_only_the_mixture_of_entries_is_learnt_so_equal_entries_come_out_unchanged() -> None:
    torch.manual_seed(0)
    entry = torch.randn(4)
    out = TargetAttention(4, 4, (64, 16))(torch.randn(2, 4), entry.expand(6, 4).contiguous(), torch.tensor([4, 2]), 4)
    torch.testing.assert_close(out, entry.expand(2, 4))


def test_a_batch_of_no_rows_gives_every_parameter_a_gradient_of_zeros() -> None:
    attention = TargetAttention(6, 4, (64, 16))
    attention(torch.zeros(0, 6), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 5).sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["full", "mixed", "none"])
def test_a_gpu_agrees_with_the_cpu(kind: str) -> None:
    torch.manual_seed(0)
    attention = TargetAttention(5, 4, (64, 16)).double()
    lengths = some_lengths(kind, 30, 6)
    query, keys = torch.randn(30, 5).double(), torch.randn(int(lengths.sum()), 4).double()
    results = []
    for device in ("cpu", "cuda"):
        attention.zero_grad()
        attention.to(device)
        given = [query.to(device).requires_grad_(), keys.to(device).requires_grad_()]
        out = attention(*given, lengths.to(device), 6)
        out.square().sum().backward()
        results.append([out, *(t.grad for t in (*given, *attention.parameters()))])
    for mine, reference in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine.cpu(), reference.cpu())
