"""Dynamic ids on a device: the same results and the same memory as the map of a CPU, whose test has the rules.

Where there is no GPU, the tensors are those of a CPU, and ids are admitted in rounds. ``make test-triton`` runs the
same tests with the Triton kernel, in its interpreter.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.embeddings import Dynamic, Table
from tests.device_waits import HOST_ONLY, Waits
from tests.kernel_compilation import compiled_kernels
from trainer.data.features.id_map import hash_rows, hash_salt
from trainer.sparse import device_ids, dynamic_ids
from trainer.sparse.device_ids import DeviceIds, hash_tensor, write_where
from trainer.sparse.dynamic_ids import ID_BYTES, DynamicIds

CPU = torch.device("cpu")
GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
DEVICE = torch.device("cuda" if GPU and not INTERPRETED else "cpu")
POLICIES = ("recency", "frequency", "both")
IDS = st.one_of(st.integers(-3, 12), st.integers(-(2**63), 2**63 - 1))

pytestmark = [pytest.mark.gpu] if GPU else []


class BothMaps:
    """The map of a CPU, and the one of a device; everything must be equal."""

    def __init__(self, table: Table, first_row: int, rows: int) -> None:
        self.cpu = DynamicIds(table, first_row, rows)
        self.device = DeviceIds(table, first_row, rows, DEVICE, kernel=INTERPRETED or None)

    def learn(self, ids: torch.Tensor, step: int) -> None:
        rows, admitted = self.cpu.learn(ids, step)
        device_rows, new = (found.cpu() for found in self.device.learn(ids.to(DEVICE), step))
        assert torch.equal(device_rows, rows)
        assert torch.equal(self.device.find(ids.to(DEVICE)).cpu(), self.cpu.find(ids))
        assert sorted(new[new >= 0].tolist()) == sorted(admitted.tolist())
        assert self.device.counts == self.cpu.counts
        assert sum(column[:1].nbytes for column in self.cpu.columns.values()) in (0, ID_BYTES)
        for name, column in self.cpu.columns.items():
            assert torch.equal(self.device.columns[name].cpu(), column), name
            assert not self.device._flat(name)[len(column) :].any(), "places outside of the table stay free"


def tensor(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)


@settings(max_examples=30, deadline=None)
@given(
    stream=st.lists(st.tuples(st.integers(1, 4), st.lists(IDS, max_size=15)), max_size=10),
    rows=st.integers(2, 14),
    admit_after=st.integers(1, 3),
    evict=st.sampled_from(POLICIES),
    bucket_rows=st.sampled_from((1, 2, 3, 64)),
    cut=st.integers(0, 4),
)
def test_results_and_memory_are_those_of_a_cpu(
    stream: list[tuple[int, list[int]]], rows: int, admit_after: int, evict: Any, bucket_rows: int, cut: int
) -> None:
    """One map has the whole table, or each of two maps has a part of it, where ``cut`` is within it."""
    edge = min(bucket_rows * cut, rows)
    with patch.object(dynamic_ids, "BUCKET_ROWS", bucket_rows):
        table = Table("author", rows, 4, dynamic=Dynamic(admit_after, evict))
        maps = [BothMaps(table, 0, edge), BothMaps(table, edge, rows - edge)]
        step = 0
        for gap, of_step in stream:
            step += gap
            ids = tensor(of_step)
            hashed = hash_tensor(ids, hash_salt("author"), rows)
            for both, inside in zip(maps, (hashed < edge, hashed >= edge), strict=True):
                both.learn(ids[inside], step)


@pytest.mark.parametrize("evict", POLICIES)
def test_many_new_ids_of_full_buckets(evict: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_ids, "_IDS_AT_A_TIME", 64)
    random = np.random.default_rng(5)
    # The interpreter takes milliseconds for each id.
    buckets, per_step = (1, 80) if INTERPRETED else (4, 600)
    both = BothMaps(Table("author", 64 * buckets - 20, 4, dynamic=Dynamic(2, evict)), 0, 64 * buckets - 20)
    for step in range(1, 13):
        both.learn(torch.from_numpy(random.zipf(1.2, per_step) % (170 * buckets) + 3 * buckets * step), step)
    assert both.cpu.counts.evicted > 10


@given(st.lists(IDS, max_size=20), st.integers(2, 2**32))
def test_the_hash_is_that_of_arrays(ids: list[int], rows: int) -> None:
    expected = np.empty(len(ids), np.int64)
    hash_rows(tensor(ids).numpy(), hash_salt("item"), rows, expected)
    assert hash_tensor(tensor(ids), hash_salt("item"), rows).tolist() == expected.tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_writing_where_a_mask_is_true(mask: list[bool], random: Any) -> None:
    """Other entries may name any row, as also -1, and change none."""
    rows = random.sample(range(8), len(mask))
    places = [row if here else random.randrange(-1, 8) for row, here in zip(rows, mask, strict=True)]
    target = torch.arange(16.0).view(8, 2)
    values = torch.tensor([[-1.0 - row] * 2 for row in rows])
    expected = target.clone()
    for row, value, here in zip(rows, values, mask, strict=True):
        expected[row] = value if here else expected[row]
    write_where(target, tensor(places), values, torch.tensor(mask))
    assert torch.equal(target, expected)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter computes with NumPy")
def test_the_host_waits_for_the_rounds_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel stands for no result here: without the rounds nothing is read."""
    monkeypatch.setattr("tests.device_waits.HOST_ONLY", HOST_ONLY - {("trainer/sparse/", "")})
    ids = DeviceIds(Table("author", 640, 4, dynamic=Dynamic(1, "recency")), 0, 640, CPU)
    with Waits() as waits:
        ids.learn(torch.arange(100), 1)
        ids.find(torch.arange(100))
    assert waits.calls == ["bincount in device_ids.py:_admit_in_rounds", "tolist in device_ids.py:_admit_in_rounds"]
    monkeypatch.setattr(ids, "_admit_in_rounds", lambda ids, buckets, step: (torch.full_like(ids, -1), ids.sum() * 0))
    with Waits() as waits:
        ids.learn(torch.arange(100), 2)
    assert waits.calls == []


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton: run `make test-triton`")
def test_the_admission_compiles_for_ampere_and_hopper(tmp_path: Path) -> None:
    kernels = compiled_kernels("tests.sparse.admission_compilation", tmp_path)
    assert [(kernel["capability"], kernel["POLICY"]) for kernel in kernels] == [
        (capability, policy) for capability in (80, 90) for policy in range(3)
    ]
    assert all(kernel["cubin"] > 0 for kernel in kernels)
