"""Admission and eviction of ids, against the same rules in plain Python."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.embeddings import Dynamic, Table
from tests.sparse.dynamic_reference import ReferenceIds
from trainer.sparse import dynamic_ids
from trainer.sparse.dynamic_ids import BUCKET_ROWS, DynamicIds

POLICIES = ("recency", "frequency", "both")
FEW = st.integers(-3, 12)
"""Ids: few enough to repeat, and enough to fill a bucket."""
STREAMS = st.lists(st.lists(st.one_of(FEW, st.integers(-(2**63), 2**63 - 1)), max_size=15), max_size=25)


def whole_table(rows: int, admit_after: int, evict: Any, name: str = "author") -> Table:
    return Table(name, rows, 4, dynamic=Dynamic(admit_after, evict))


def tensor(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)


@settings(max_examples=300, deadline=None)
@given(
    stream=STREAMS,
    rows=st.integers(2, 14),
    admit_after=st.integers(1, 3),
    evict=st.sampled_from(POLICIES),
    bucket_rows=st.sampled_from((1, 2, 3, 64)),
    gaps=st.lists(st.integers(1, 4), min_size=25, max_size=25),
)
def test_rows_and_counts_are_those_of_the_reference(
    stream: list[list[int]], rows: int, admit_after: int, evict: str, bucket_rows: int, gaps: list[int]
) -> None:
    with patch.object(dynamic_ids, "BUCKET_ROWS", bucket_rows):
        ids = DynamicIds(whole_table(rows, admit_after, evict), 0, rows)
        reference = ReferenceIds("author", rows, admit_after, evict, bucket_rows)
        step = 0
        for of_step, gap in zip(stream, gaps, strict=False):
            step += gap
            found, admitted = ids.learn(tensor(of_step), step)
            assert set(admitted.tolist()) == reference.learn(of_step, step)
            assert len(admitted) == len(set(admitted.tolist()))
            assert found.tolist() == [reference.find(value) for value in of_step]
            assert asdict(ids.counts) == reference.counts
            everything = sorted({value for earlier in stream for value in earlier})
            assert ids.find(tensor(everything)).tolist() == [reference.find(value) for value in everything]
        for row, slot in ((row, slot) for bucket in reference.buckets.values() for row, slot in bucket.served.items()):
            assert [int(ids.columns[name][row]) for name in ("id", "seen", "sightings")] == list(vars(slot).values())


@pytest.mark.parametrize("evict", POLICIES)
@pytest.mark.parametrize("rows", [64, 65, 1000, 1025])
def test_many_ids_in_buckets_as_they_are(rows: int, evict: str) -> None:
    random = np.random.default_rng(rows)
    ids = DynamicIds(whole_table(rows, 2, evict), 0, rows)
    reference = ReferenceIds("author", rows, 2, evict, BUCKET_ROWS)
    for step in range(1, 31):
        of_step = random.zipf(1.2, 600) % (3 * rows) + 5 * step
        found, _ = ids.learn(torch.from_numpy(of_step), step)
        reference.learn(of_step.tolist(), step)
        assert found.tolist() == [reference.find(value) for value in of_step.tolist()]
    assert asdict(ids.counts) == reference.counts
    assert ids.counts.evicted > 0
    held = ids.columns["id"][ids.columns["seen"] > 0].tolist()
    assert len(held) == len(set(held)) == ids.counts.admitted - ids.counts.evicted
    assert int(ids.columns["seen"][0]) == 0


@settings(max_examples=100, deadline=None)
@given(stream=STREAMS, evict=st.sampled_from(POLICIES), cut=st.integers(0, 3))
def test_parts_of_a_table_are_the_whole_one(stream: list[list[int]], evict: str, cut: int) -> None:
    """The shards of a row-wise sharded table together equal one whole table."""
    rows, bucket_rows = 11, 3
    with patch.object(dynamic_ids, "BUCKET_ROWS", bucket_rows):
        table = whole_table(rows, 1, evict)
        whole = DynamicIds(table, 0, rows)
        edge = bucket_rows * cut
        parts = [DynamicIds(table, 0, edge), DynamicIds(table, edge, rows - edge)]
        for step, of_step in enumerate(stream, 1):
            whole.learn(tensor(of_step), step)
            of_part = np.empty(len(of_step), np.int64)
            dynamic_ids.hash_rows(tensor(of_step).numpy(), dynamic_ids.hash_salt("author"), rows, of_part)
            for part, in_part in zip(parts, (of_part < edge, of_part >= edge), strict=True):
                part.learn(tensor(of_step)[torch.from_numpy(in_part)], step)
        for name, column in whole.columns.items():
            assert torch.equal(torch.cat([part.columns[name] for part in parts]), column)


def test_repetitions_order_and_finding_change_nothing() -> None:
    table = whole_table(70, 2, "both")
    once, often = DynamicIds(table, 0, 70), DynamicIds(table, 0, 70)
    random = np.random.default_rng(3)
    for step in range(1, 20):
        of_step = np.unique(random.integers(0, 200, 80))
        once.learn(torch.from_numpy(of_step), step)
        repeated = random.permutation(np.repeat(of_step, 3))
        often.learn(torch.from_numpy(repeated), step)
        often.find(torch.arange(300))
    assert once.counts == often.counts
    assert all(torch.equal(column, often.columns[name]) for name, column in once.columns.items())


def test_candidates_are_bounded() -> None:
    """Ids that occur once never get a row, and do not keep an id that occurs again from getting one."""
    ids = DynamicIds(whole_table(33, 2, "recency"), 0, 33)
    for step in range(1, 200):
        passing = torch.arange(20) + 1000 * step
        ids.learn(torch.cat([passing, torch.tensor([7])]) if step in (100, 101) else passing, step)
    assert ids.counts.admitted == 1 and int(ids.find(torch.tensor([7]))) > 0
    assert {len(column) for column in ids.columns.values()} == {33}
