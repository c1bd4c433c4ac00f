"""Gradients of the entries of blocks: written once for each entry, and padding into a spare row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import modules.blocks
from modules.blocks import Block, cut_rows
from modules.din import TargetAttention
from modules.esu import SequenceAttention

DIM, LONGEST = 4, 7


def din(query: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
    return TargetAttention(DIM, DIM, (6, 5))(query, keys, lengths, LONGEST)


def esu(query: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
    return SequenceAttention(DIM, [DIM], [LONGEST])(query, [[keys]], [lengths])


class Writes(TorchDispatchMode):
    """Records the operations that write to rows of a tensor by their numbers, and those that add to them."""

    def __init__(self) -> None:
        self.adding: list[str] = []
        self.written: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(("index_add", "scatter_add", "scatter_reduce", "embedding_dense_backward")):
            self.adding.append(name)
        if name.startswith(("index_put", "_index_put_impl")):
            accumulate = args[3] if len(args) > 3 else False
            self.adding += [name] * bool(accumulate)
            # Gradients of entries have one row more than there are entries.
            self.written.append(args[1][0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", [din, esu])
@pytest.mark.parametrize("block_values", [1, 1 << 20])
def test_the_gradient_of_each_entry_is_written_once_and_nothing_is_added_to_a_row(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], block_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules.blocks, "BLOCK_VALUES", block_values)
    torch.manual_seed(3)
    lengths = torch.tensor([3, 0, 7, 1, 6, 2, 5])
    keys = torch.randn(int(lengths.sum()), DIM, requires_grad=True)
    out = attention(torch.randn(len(lengths), DIM), keys, lengths)
    writes = Writes()
    with writes:
        out.backward(torch.randn_like(out))
    assert keys.grad is not None and keys.grad.shape == keys.shape and keys.grad.abs().min() > 0
    assert writes.adding == []
    longer = torch.cat([places for places in writes.written if places.dtype == torch.int64])
    # Writes to rows of the batch have the row numbers of the blocks; those to entries go up to the spare row.
    assert (longer == len(keys)).any() == (block_values > 1), "several rows in a block need padding"
    assert sum(int((longer == entry).sum()) for entry in range(len(lengths), len(keys))) == len(keys) - len(lengths)


def test_targets_are_the_entries_with_the_spare_place_for_padding() -> None:
    lengths = torch.tensor([2, 0, 3])
    (block,) = cut_rows(lengths, 5, 4, 1, 1)
    assert torch.equal(block.targets(5), torch.tensor([2, 3, 4, 5, 0, 1, 5, 5, 5]))
    assert Block(slice(0, 2), slice(0, 6), 3).targets(6) == slice(0, 6)
