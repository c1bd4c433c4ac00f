"""Gradients of looked-up rows are joined and scaled without a copy that nothing reads."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.sparse.exchange import _scaled


class Operations(TorchDispatchMode):
    """Names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("parts", "operations"), [(1, ["mul"]), (3, ["cat", "mul_"])])
@pytest.mark.parametrize("scale", [0.37, torch.tensor(0.37)])
def test_scaled_rows_have_the_bits_of_the_plain_form_and_their_parts_stay(
    parts: int, operations: list[str], scale: float | torch.Tensor
) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(50, 8, generator=generator) for _ in range(parts)]
    rows[0][3, 2] = float("nan")
    before = [part.clone() for part in rows]
    with Operations() as seen:
        found = _scaled(rows, scale)
    assert seen.names == operations
    assert torch.equal(found.view(torch.int32), (torch.cat(before) * scale).view(torch.int32))
    assert all(
        torch.equal(part.view(torch.int32), old.view(torch.int32)) for part, old in zip(rows, before, strict=True)
    )
