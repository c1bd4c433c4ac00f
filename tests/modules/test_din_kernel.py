"""The compiled target attention against the plain operations of ``modules/din.py``, in float64."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modules import din_kernel, vector_code
from modules.din import PlainAttention
from modules.din_kernel import CompiledAttention
from tests.paths import ROOT

pytestmark = pytest.mark.skipif(vector_code.INSTRUCTIONS is None, reason="needs a processor with AVX2 or AVX-512")

NAMES = ("query", "keys", "bias", "of_key", "of_product", "score")
TOLERANCE = 5e-6
"""Largest error as a share of the largest value; that of the plain operations in float32 is 2e-6 on these shapes."""
PER_ROW = 3
"""Inputs whose gradients belong to a row alone: the first ones."""


def make_inputs(
    lengths: Sequence[int], dim: int, hidden: Sequence[int], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return query, keys, bias, ``of_key``, ``of_product``, the score, and weight and bias of each further layer."""
    batch, scale = len(lengths), dim**-0.5
    values = [torch.randn(batch, dim), torch.randn(sum(lengths), dim), torch.randn(batch, hidden[0])]
    values += [scale * torch.randn(dim, hidden[0]), scale * torch.randn(dim, hidden[0]), torch.randn(hidden[-1])]
    for before, after in itertools.pairwise(hidden):
        values += [before**-0.5 * torch.randn(before, after), torch.randn(after)]
    return [value.to(dtype) for value in values]


def upstream(out: Tensor) -> Tensor:
    """Return a gradient of the result, of which each row has its own."""
    return torch.cos(out.detach().double() * 3 + 1).to(out.dtype)


def compiled(inputs: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """Return the result and the gradients of all inputs."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    out = CompiledAttention.apply(*leaves[:6], torch.tensor(lengths, dtype=torch.int64), *leaves[6:])
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream(out))]


def plain(inputs: Sequence[Tensor], lengths: Sequence[int], gradient: Tensor) -> list[Tensor]:
    """Return the same in float64, by the plain operations."""
    leaves = [value.double().requires_grad_() for value in inputs]
    counts = torch.tensor(lengths, dtype=torch.int64)
    out = PlainAttention.apply(*leaves[:6], counts, max(lengths, default=0), *leaves[6:])
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient.double())]


def assert_near(results: Sequence[Tensor], references: Sequence[Tensor], tolerance: float) -> None:
    """Compare results by the largest value of each reference; results in bfloat16 may be rounded once, too."""
    for name, result, reference in zip(
        ["result", *NAMES, *["layer"] * len(results)], results, references, strict=False
    ):
        assert result.shape == reference.shape, name
        rounding = 2**-8 if result.dtype == torch.bfloat16 else 0
        largest = float(reference.abs().max()) if reference.numel() else 0.0
        torch.testing.assert_close(result.double(), reference, rtol=rounding, atol=tolerance * largest, msg=name)


def some_lengths(kind: str, batch: int, longest: int) -> list[int]:
    return {
        "full": [longest] * batch,
        "mixed": torch.randint(0, longest + 1, (batch,)).tolist(),
        "short": torch.randint(0, 2, (batch,)).tolist(),
        "none": [0] * batch,
        "no rows": [],
    }[kind]


SHAPES = [
    # Widths that fill vectors and tiles or not, one to three layers, from one entry to 200.
    (1, (1,), 1),
    (4, (6, 5, 3), 7),
    (16, (64, 16), 50),
    (20, (100, 36, 20), 33),
    (32, (32,), 200),
    (48, (80, 64), 21),
    (96, (48, 16), 12),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["full", "mixed", "short", "none", "no rows"])
@pytest.mark.parametrize(("dim", "hidden", "longest"), SHAPES)
@pytest.mark.parametrize("part_rows", [3, 64])
def test_the_compiled_attention_equals_the_plain_one(
    part_rows: int,
    dim: int,
    hidden: tuple[int, ...],
    longest: int,
    kind: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(din_kernel, "PART_ROWS", part_rows)
    torch.manual_seed(dim + len(kind))
    lengths = some_lengths(kind, 11, longest)
    inputs = make_inputs(lengths, dim, hidden, dtype)
    results = compiled(inputs, lengths)
    assert all(result.dtype == dtype for result in results)
    assert_near(results, plain(inputs, lengths, upstream(results[0])), TOLERANCE)


@pytest.mark.parametrize("seed", range(20))
def test_random_shapes_equal_the_plain_attention(seed: int) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    hidden = rng.integers(1, 90, rng.integers(1, 4)).tolist()
    lengths = rng.integers(0, rng.integers(1, 201), rng.integers(1, 20)).tolist()
    inputs = make_inputs(lengths, int(rng.integers(1, 90)), hidden)
    results = compiled(inputs, lengths)
    assert_near(results, plain(inputs, lengths, upstream(results[0])), 2 * TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [20, 32])
def test_matrices_in_any_order_of_memory_give_the_same_bits(dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    lengths = [3, 0, 9, 1]
    inputs = make_inputs(lengths, dim, (20, 8), dtype)

    def transposed(value: Tensor) -> Tensor:
        return value.t().contiguous().t() if value.dim() == 2 else value

    results = []
    for values in (inputs, [transposed(value) for value in inputs]):
        leaves = [value.detach().requires_grad_() for value in values]  # Unlike a clone, these keep their strides.
        out = CompiledAttention.apply(*leaves[:6], torch.tensor(lengths), *leaves[6:])
        results.append([out, *torch.autograd.grad(out, leaves, transposed(upstream(out)))])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads after a test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dim", [16, 20])
def test_the_bits_do_not_depend_on_the_number_of_threads(dim: int, threads: None) -> None:
    torch.manual_seed(0)
    lengths = some_lengths("mixed", 300, 9)
    inputs = make_inputs(lengths, dim, (20, 8))
    results = []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        results.append(compiled(inputs, lengths))
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@pytest.mark.parametrize("dim", [16, 20])
def test_the_bits_of_a_row_do_not_depend_on_the_rows_beside_it(dim: int) -> None:
    torch.manual_seed(0)
    lengths = some_lengths("mixed", 90, 30)
    inputs = make_inputs(lengths, dim, (20, 8))
    together = compiled(inputs, lengths)
    kept = [*range(88, 3, -3)]
    parts = torch.split(torch.arange(sum(lengths)), lengths)
    rows, entries = torch.tensor(kept), torch.cat([parts[row] for row in kept])
    select = [rows, entries, rows]
    alone = compiled(
        [*(value[which] for value, which in zip(inputs, select, strict=False)), *inputs[PER_ROW:]],
        [lengths[row] for row in kept],
    )
    for which, one, other in zip([rows, *select], together, alone, strict=False):
        assert torch.equal(one[which], other)


def test_a_row_with_a_value_that_is_not_finite_is_nan_and_the_others_are_not() -> None:
    torch.manual_seed(0)
    lengths = [3, 5, 2]
    inputs = make_inputs(lengths, 16, (16,))
    expected = compiled(inputs, lengths)
    for value in (float("nan"), float("inf")):
        # The tiles of the first row, which has three entries, read this one too.
        inputs[1][3, 7] = value
        out, grad_query, grad_keys, *_ = compiled(inputs, lengths)
        assert torch.isnan(out[1]).any() and torch.isnan(grad_query[1]).any()
        assert torch.equal(out[::2], expected[0][::2]) and torch.equal(grad_query[::2], expected[1][::2])
        assert torch.equal(grad_keys[8:], expected[2][8:])


def test_large_scores_leave_all_weight_to_one_entry() -> None:
    torch.manual_seed(0)
    inputs = make_inputs([40], 16, (16,))
    inputs[5] *= 1e6
    results = compiled(inputs, [40])
    assert_near(results, plain(inputs, [40], upstream(results[0])), 1e-5)
    assert torch.equal(results[0][0], inputs[1][(inputs[1] == results[0]).all(1)][0])


@pytest.mark.parametrize("lengths", [[2, 4], [2], [2, 2, 1], [6, -1]])
def test_lengths_that_are_not_those_of_the_entries_are_refused(lengths: list[int]) -> None:
    inputs = make_inputs([2, 3], 4, (3,))
    with pytest.raises(ValueError, match="attention over 5 entries in 2 rows, but"):
        CompiledAttention.apply(*inputs[:6], torch.tensor(lengths))


def test_widths_that_are_not_those_of_the_network_are_refused() -> None:
    query, keys, *others = make_inputs([2, 3], 4, (3,))[:6]
    for wrong in ((query, keys[:, :3]), (query[:, :3], keys), (query, keys.repeat(1, 2))):
        with pytest.raises(ValueError, match="attention of width 4, but queries of"):
            CompiledAttention.apply(*wrong, *others, torch.tensor([2, 3]))


def test_a_tensor_that_is_changed_between_the_passes_is_refused() -> None:
    inputs = [value.requires_grad_() for value in make_inputs([2, 3], 16, (16,))]
    out = CompiledAttention.apply(*inputs, torch.tensor([2, 3]))
    with torch.no_grad():
        inputs[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for a processor with AVX2")
def test_a_processor_with_short_registers_computes_the_same(tmp_path: Any) -> None:
    program = """if True:
        from modules import vector_code
        from tests.modules import test_din_kernel, test_expert_kernel

        assert vector_code.INSTRUCTIONS == "AVX2" and vector_code.LANES == 8
        for seed in range(5):
            test_din_kernel.test_random_shapes_equal_the_plain_attention(seed)
            test_expert_kernel.test_random_shapes_equal_the_plain_layers(seed)
    """
    older = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+bmi,+bmi2,+sse4.2,+popcnt"}
    environment = {**os.environ, **older, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env=environment)
