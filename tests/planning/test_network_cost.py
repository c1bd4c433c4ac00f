"""Cost of a network that is counted on the meta device, beside what torch's profiler sees on a CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from modules import blocks
from modules.embeddings import Lookup
from modules.ranker import Ranker
from tests.planning.measured_peak import measured_peak
from trainer.planning.network_cost import count_step

ROWS, LENGTH, DIM = 64, 10, 16
LOOKUPS = (
    Lookup("item", "item", 1),
    Lookup("side", "side", 4),
    Lookup("seen_item", "item", None, max_length=LENGTH),
    Lookup("seen_context", "side", None, ids_per_entry=2, max_length=2 * LENGTH),
)


class Seen(NamedTuple):
    name: str = "seen"
    keys: tuple[str, ...] = ("seen_item", "seen_context")
    query: tuple[str, ...] = ("item",)
    max_length: int = LENGTH
    alike: tuple[tuple[str, int, str, int], ...] = ()


def network(device: str, attention: Any) -> Ranker:
    torch.manual_seed(1)
    options: Any = {"expert_layers": ((64, 32), (32, 16)), "attention": (32,), "attention_kind": attention}
    # The meta device counts PyTorch's operations, as on a GPU.
    options |= {"compiled_attention": False, "compiled_experts": False}
    return Ranker(4, LOOKUPS, {"item": DIM, "side": DIM}, 7, (Seen(),), "ple", **options).to(device)


def inputs(device: str, rows: int = ROWS) -> tuple[Any, ...]:
    embedded = {
        lookup.name: torch.zeros(rows * lookup.most_ids, DIM, device=device, requires_grad=True) for lookup in LOOKUPS
    }
    lengths = {
        lookup.name: torch.full((rows,), lookup.most_ids, device=device) for lookup in LOOKUPS if not lookup.length
    }
    return embedded, lengths, torch.zeros(rows, 7, device=device)


@pytest.mark.parametrize("attention", ["din", "multi_head"])
def test_the_peak_on_the_meta_device_is_that_of_the_allocator(monkeypatch: pytest.MonkeyPatch, attention: str) -> None:
    # As on a GPU, a batch is one block.
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 1 << 30)
    counted = count_step(network("meta", attention), inputs("meta"))
    model, arguments = network("cpu", attention), inputs("cpu")
    # Libraries allocate once in the first call.
    model(*arguments).sum().backward()
    model.zero_grad(set_to_none=True)
    for leaf in arguments[0].values():
        leaf.grad = None
    measured = measured_peak(lambda: model(*arguments).sum().backward())
    assert counted.peak_bytes == pytest.approx(measured, rel=0.2)


def test_the_cost_of_one_layer_is_counted_by_hand() -> None:
    layer = nn.Linear(8, 3, bias=False, device="meta")
    x = torch.zeros(5, 8, device="meta", requires_grad=True)
    cost = count_step(layer, (x,))
    # The output, and the gradients of input and weight: 2 m n k each.
    assert cost.flops == 3 * 2 * 5 * 8 * 3
    # At the end: the gradients of the input (160), of the weight (96) and of the output.
    assert 160 + 96 <= cost.peak_bytes <= 160 + 2 * 96 + 2 * 60 + 4
    assert layer.weight.grad is None


def test_work_and_memory_grow_with_the_rows_and_operations_do_not() -> None:
    few, many = (count_step(network("meta", "multi_head"), inputs("meta", rows)) for rows in (ROWS, 4 * ROWS))
    assert many.operations == few.operations
    assert 3.5 * few.flops < many.flops <= 4 * few.flops
    assert few.peak_bytes < many.peak_bytes < 4 * few.peak_bytes and few.traffic_bytes < many.traffic_bytes
    twice = few.times(2)
    assert twice.flops == 2 * few.flops and twice.peak_bytes == few.peak_bytes
