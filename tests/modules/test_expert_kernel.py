"""The compiled layers of experts and towers against the plain operations of ``modules/multitask.py``, in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modules import din_loops, expert_kernel, vector_code
from modules.expert_kernel import CompiledExperts, compile_loops
from modules.multitask import PLE, BatchedMLP, SharedBottom, Towers
from tests.paths import ROOT

pytestmark = pytest.mark.skipif(vector_code.INSTRUCTIONS is None, reason="needs a processor with AVX2 or AVX-512")

TOLERANCE = 5e-6
"""Largest error as a share of the largest value; that of the plain operations in float32 is 2e-6 on these shapes."""


def upstream(out: Tensor) -> Tensor:
    """Return a gradient of the result, of which each value has its own."""
    return torch.cos(out.detach().double() * 3 + 1).to(out.dtype)


def of(layers: BatchedMLP, x: Tensor, reads: Tensor | None, gradient: Tensor | None = None) -> list[Tensor]:
    """Return the result, and the gradients of the input and of all parameters."""
    leaf = x.clone().requires_grad_()
    out = layers(leaf, reads)
    return [out.detach(), *torch.autograd.grad(out, [leaf, *layers.parameters()], gradient)]


def assert_equal_layers(layers: BatchedMLP, x: Tensor, reads: Tensor | None) -> None:
    """Compare values and gradients of the loops with those of the plain operations in float64."""
    layers.compiled = True
    gradient = upstream(layers(x, reads))
    results = of(layers, x, reads, gradient)
    assert all(result.dtype == torch.float32 for result in results)
    references = of(layers.double(), x.double(), reads, gradient.double())
    layers.float()
    for result, reference in zip(results, references, strict=True):
        assert result.shape == reference.shape
        largest = float(reference.abs().max()) if reference.numel() else 0.0
        torch.testing.assert_close(result.double(), reference, rtol=0, atol=TOLERANCE * largest)


SHAPES = [
    # Widths and batches that fill vectors, tiles and blocks or not, one to three layers, inputs that are shared or not.
    (1, 1, 1, (1,), 1),
    (3, 1, 20, (17, 5), 7),
    (8, 1, 136, (64, 32), 130),
    (5, 3, 16, (32, 16), 64),
    (4, 4, 33, (48, 16, 80), 99),
    (2, 1, 8, (8,), 0),
]


@pytest.mark.parametrize("block_rows", [4, 64])
@pytest.mark.parametrize(("networks", "inputs", "width", "widths", "batch"), SHAPES)
def test_the_compiled_layers_equal_the_plain_ones(
    networks: int,
    inputs: int,
    width: int,
    widths: tuple[int, ...],
    batch: int,
    block_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(expert_kernel, "BLOCK_ROWS", block_rows)
    monkeypatch.setattr(expert_kernel, "PART_ROWS", 2 * block_rows)
    torch.manual_seed(networks)
    layers = BatchedMLP(networks, width, widths)
    reads = torch.arange(networks).flip(0) % inputs
    assert_equal_layers(layers, torch.randn(inputs, batch, width), None if inputs in (1, networks) else reads)


@pytest.mark.parametrize("seed", range(20))
def test_random_shapes_equal_the_plain_layers(seed: int) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    networks, inputs, width = [*rng.integers(1, 9, 2).tolist(), int(rng.integers(1, 90))]
    layers = BatchedMLP(networks, width, rng.integers(1, 90, rng.integers(1, 4)).tolist())
    reads = torch.from_numpy(rng.integers(0, inputs, networks))
    assert_equal_layers(layers, torch.randn(inputs, int(rng.integers(0, 200)), width), reads)


def test_gradients_and_inputs_of_any_strides_give_the_same_bits() -> None:
    torch.manual_seed(0)
    layers = BatchedMLP(3, 16, (32, 16))
    layers.compiled = True
    x, gradient = torch.randn(3, 24, 16), torch.randn(3, 24, 16)
    plain = of(layers, x, None, gradient)

    def strided(values: Tensor, order: tuple[int, int, int]) -> Tensor:
        back = [order.index(axis) for axis in range(3)]
        return values.permute(order).contiguous().permute(back)

    for order in ((1, 0, 2), (2, 1, 0), (0, 2, 1)):
        other = of(layers, strided(x, order), None, strided(gradient, order))
        assert all(torch.equal(one, two) for one, two in zip(plain, other, strict=True))
    ones = of(layers, x, None, torch.ones(3, 24, 16))
    expanded = of(layers, x, None, torch.ones(()).expand(3, 24, 16))
    assert all(torch.equal(one, two) for one, two in zip(ones, expanded, strict=True))


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads after a test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_bits_do_not_depend_on_the_number_of_threads(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_kernel, "PART_ROWS", 64)
    torch.manual_seed(0)
    layers = BatchedMLP(4, 20, (24, 8))
    x, reads = torch.randn(3, 500, 20), torch.tensor([2, 0, 2, 1])
    results: list[Sequence[Tensor]] = []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        assert_equal_layers(layers, x, reads)
        results += [of(layers, x, reads, torch.ones(4, 500, 8)) for _ in range(2)]
    for others in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], others, strict=True))


def test_a_thread_has_memory_for_one_network_whatever_their_number(
    threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories: list[Tensor] = []
    in_turns = expert_kernel.in_turns

    def watched(compute: Any, add: Any, pieces: int, make: Any) -> None:
        in_turns(compute, add, pieces, lambda: (memories.append(make()), memories[-1])[1])

    monkeypatch.setattr(expert_kernel, "in_turns", watched)
    torch.set_num_threads(3)
    sizes = []
    for networks in (3, 12):
        memories.clear()
        layers = BatchedMLP(networks, 16, (32,))
        layers.compiled = True
        layers(torch.randn(1, 300, 16)).sum().backward()
        assert 1 <= len(memories) <= 3
        sizes += [len(memory) for memory in memories]
    padded = 16 * 32 + 32 + max(expert_kernel.PART_ROWS, 64) * 16 + 2 * 64 * 32
    assert set(sizes) == {padded}


def test_the_bits_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    torch.manual_seed(0)
    layers = BatchedMLP(3, 20, (24, 8))
    layers.compiled = True
    x, kept = torch.randn(3, 150, 20), torch.arange(148, 3, -3)
    gradient = torch.randn(3, 150, 8)
    together = of(layers, x, None, gradient)
    alone = of(layers, x[:, kept], None, gradient[:, kept])
    assert torch.equal(together[0][:, kept], alone[0]) and torch.equal(together[1][:, kept], alone[1])


def test_a_row_with_a_value_that_is_not_finite_does_not_change_the_others() -> None:
    torch.manual_seed(0)
    layers = BatchedMLP(2, 16, (16, 16))
    layers.compiled = True
    x = torch.randn(1, 9, 16)
    expected = layers(x)
    for value in (float("nan"), float("inf")):
        x[0, 4, 7] = value
        out = layers(x)
        assert torch.isnan(out[:, 4]).any() or torch.isinf(out[:, 4]).any()
        others = [row for row in range(9) if row != 4]
        assert torch.equal(out[:, others], expected[:, others])


@pytest.mark.parametrize("reads", [torch.tensor([0, 2]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])])
def test_numbers_of_inputs_that_are_not_there_are_refused(reads: Tensor) -> None:
    layers = BatchedMLP(2, 4, (3,))
    with pytest.raises(ValueError, match="2 networks read inputs of 2, but not by their numbers"):
        CompiledExperts.apply(torch.randn(2, 5, 4), reads, *layers.parameters())


def test_inputs_that_do_not_fit_the_networks_are_refused() -> None:
    layers = BatchedMLP(4, 4, (3,))
    layers.compiled = True
    for width in (3, 20):
        with pytest.raises(ValueError, match=f"of width 4, but the inputs are torch.float32 and of width {width}"):
            layers(torch.randn(4, 5, width))
    for compiled in (True, False):
        layers.compiled = compiled
        with pytest.raises(RuntimeError, match="expand"):
            layers(torch.randn(2, 5, 4))
    with pytest.raises(ValueError, match=r"networks with torch\.bfloat16 weights"):
        CompiledExperts.apply(torch.randn(4, 5, 4), torch.arange(4), *layers.bfloat16().parameters())


def test_a_second_backward_pass_gives_the_same_and_a_changed_weight_is_refused() -> None:
    torch.manual_seed(0)
    layers = BatchedMLP(2, 16, (16, 16))
    layers.compiled = True
    out = layers(torch.randn(1, 8, 16)).sum()
    first, second = (torch.autograd.grad(out, list(layers.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    with torch.no_grad():
        layers.weights[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_only_what_the_loops_can_compute_is_computed_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    apply = CompiledExperts.apply
    monkeypatch.setattr(CompiledExperts, "apply", lambda *values: (calls.append(1), apply(*values))[1])
    layers = BatchedMLP(2, 4, (3,), dropout=0.5)
    layers.compiled = True
    layers(torch.randn(1, 5, 4))
    layers.to(torch.bfloat16).eval()(torch.randn(1, 5, 4, dtype=torch.bfloat16))
    layers.double()(torch.randn(1, 5, 4, dtype=torch.float64))
    nothing = BatchedMLP(2, 4, ())
    nothing.compiled = True
    assert torch.equal(nothing(torch.ones(1, 5, 4)), torch.ones(2, 5, 4)) and not calls
    layers.float()(torch.randn(1, 5, 4))
    assert calls == [1]


@pytest.mark.parametrize("kind", ["ple", "mmoe", "shared_bottom"])
def test_whole_networks_equal_the_plain_ones(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "shared_bottom":
        body: nn.Module = SharedBottom(20, 3, (24, 12))
    else:
        own, shared, layers = (2, 2, ((24, 12), (12, 10))) if kind == "ple" else (0, 4, ((24, 12),))
        body = PLE(20, 3, own, shared, layers)
    network = nn.Sequential(body, Towers(10 if kind == "ple" else 12, 3, (16, 8)))
    x = torch.randn(70, 20, requires_grad=True)
    found = []
    for compiled in (True, False):
        for module in network.modules():
            if isinstance(module, BatchedMLP):
                module.compiled = compiled
        out = network(x)
        found.append([out, *torch.autograd.grad(out, [x, *network.parameters()], upstream(out))])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


LOOPS = (expert_kernel.forward_blocks, expert_kernel.backward_part, expert_kernel.add_part)


def test_the_loops_are_compiled_once() -> None:
    compile_loops()
    counts = [len(loop.signatures) for loop in LOOPS]
    torch.manual_seed(0)
    assert_equal_layers(BatchedMLP(2, 5, (4, 3)), torch.randn(1, 6, 5), None)
    assert [len(loop.signatures) for loop in LOOPS] == counts


def test_products_with_other_code_have_other_names() -> None:
    # numba's cache would mix up functions of one name that were compiled in two processes.
    kernels = (din_loops, expert_kernel)
    products = {(kernel.__name__, name): value for kernel in kernels for name, value in vars(kernel).items()}
    names = {key: value.py_func.__qualname__ for key, value in products.items() if is_product(value)}
    alike = {("modules.expert_kernel", name) for name in ("layer_forward", "layer_backward", "weight_backward")}
    assert len(names) == 9 and {place for place, _ in names} == {"modules.din_loops", "modules.expert_kernel"}
    assert len({name for key, name in names.items() if key not in alike}) == 6
    for place, name in alike:
        assert names[place, name] == names["modules.din_loops", name]


def is_product(value: Any) -> bool:
    return getattr(getattr(value, "py_func", None), "__name__", "") == "product"


@pytest.mark.slow
def test_loops_that_were_compiled_in_two_processes_work_together(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    tests = (
        "test_expert_kernel.test_random_shapes_equal_the_plain_layers(3)",
        ("test_din_kernel.test_random_shapes_equal_the_plain_attention(3)"),
    )
    for program in (*tests, "; ".join(tests)):
        program = f"from tests.modules import test_din_kernel, test_expert_kernel; {program}"
        subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env=environment)
