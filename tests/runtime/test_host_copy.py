"""Copies to the host: read one behind the work that is queued."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from trainer.runtime.host_copy import HostCopy, one_behind


@pytest.mark.parametrize("number", range(4))
def test_copies_are_read_when_the_next_one_is_queued(number: int) -> None:
    log: list[str] = []

    def copies() -> Iterator[tuple[int, HostCopy]]:
        for place in range(number):
            log.append(f"queue {place}")
            yield place, HostCopy([torch.full((2,), place), torch.tensor(place)])

    for key, tensors in one_behind(copies()):
        log.append(f"read {key}")
        assert [tensor.tolist() for tensor in tensors] == [[key, key], key]
    expected = [
        [],
        ["queue 0", "read 0"],
        ["queue 0", "queue 1", "read 0", "read 1"],
        ["queue 0", "queue 1", "read 0", "queue 2", "read 1", "read 2"],
    ]
    assert log == expected[number]
