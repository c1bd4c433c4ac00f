"""Check of ids against the rows of their tables: on the host, and in the form of a device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingConfig

from tests.device_waits import HOST_ONLY, Waits
from trainer.console.errors import UserError
from trainer.sparse.range_check import RangeCheck, check_range


def error_of(parts: list[torch.Tensor], tables: list[EmbeddingConfig]) -> str | None:
    """Return the error of the check on the host."""
    try:
        for table, ids in zip(tables, parts, strict=True):
            check_range(table, ids)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("seed", range(20))
def test_a_device_finds_what_the_host_finds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.device_waits.HOST_ONLY", HOST_ONLY - {("trainer/sparse/", "")})
    generator = np.random.default_rng(seed)
    heights = generator.integers(1, 50, 4)
    tables = [
        EmbeddingConfig(name=f"t{place}", num_embeddings=int(rows), embedding_dim=4)
        for place, rows in enumerate(heights)
    ]
    parts = [torch.from_numpy(generator.integers(0, rows, generator.integers(0, 9))) for rows in heights]
    parts[seed % 4] = parts[seed % 4][:0]
    filled = [place for place, part in enumerate(parts) if len(part)]
    if seed % 3 and filled:
        wrong = int(generator.choice(filled))
        far = [-1, int(heights[wrong]), -(2**63), 2**63 - 1][seed % 4]
        parts[wrong][generator.integers(len(parts[wrong]))] = far
    expected = error_of(parts, tables)
    with Waits() as waits:
        check = RangeCheck(torch.cat(parts), [len(part) for part in parts], tables)
    assert not waits.calls
    if expected is None:
        check.raise_if_outside()
        assert torch.equal(check.inside, torch.cat(parts))
        return
    with pytest.raises(UserError) as raised:
        check.raise_if_outside()
    assert str(raised.value) == expected
    limits = np.repeat(heights, [len(part) for part in parts])
    ids = torch.cat(parts).numpy()
    assert check.inside.tolist() == np.where((ids >= 0) & (ids < limits), ids, 0).tolist()
