"""Packing: every sample once, no sequence too full, the same steps for any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.llm.finetuning.packing import Schedule, epoch_packs, pack, share_of_rank

LENGTHS = st.lists(st.integers(1, 50), max_size=120)


@given(LENGTHS)
def test_every_sample_is_in_exactly_one_sequence_that_it_fits(lengths: list[int]) -> None:
    array = np.array(lengths, dtype=np.int64)
    packs = epoch_packs(array, 50, seed=3, epoch=1, packing=True)
    assert sorted(np.concatenate([*packs, np.empty(0, np.int64)]).tolist()) == list(range(len(lengths)))
    assert all(0 < array[samples].sum() <= 50 for samples in packs)


@given(LENGTHS)
def test_a_sample_goes_into_the_fullest_sequence_that_it_fits(lengths: list[int]) -> None:
    array = np.array(lengths, dtype=np.int64)
    order = np.argsort(-array, kind="stable")
    filled: list[int] = []
    expected: list[list[int]] = []
    for sample in order.tolist():
        fitting = [place for place, used in enumerate(filled) if used + lengths[sample] <= 50]
        if fitting:
            place = max(fitting, key=lambda place: (filled[place], -place))
        else:
            place = len(filled)
            filled.append(0)
            expected.append([])
        filled[place] += lengths[sample]
        expected[place].append(sample)
    assert [samples.tolist() for samples in pack(array, 50, order)] == expected


def test_epochs_and_seeds_have_orders_of_their_own_and_the_same_one_again() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 3000)

    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(epoch_packs(lengths, 64, seed=seed, epoch=epoch, packing=True)).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_packing_leaves_little_padding() -> None:
    lengths = np.random.default_rng(1).integers(10, 300, 5000)
    packs = epoch_packs(lengths, 512, seed=1, epoch=0, packing=True)
    assert 1 - lengths.sum() / (512 * len(packs)) < 0.02
    assert len(epoch_packs(lengths, 512, seed=1, epoch=0, packing=False)) == len(lengths)


@pytest.mark.parametrize(("world", "parts"), [(1, 1), (2, 1), (2, 3), (4, 3), (1, 12)])
def test_ranks_and_parts_share_a_step(world: int, parts: int) -> None:
    lengths = np.random.default_rng(2).integers(1, 40, 100)
    schedule = Schedule.of(lengths, 40, seed=1, epochs=2, batch_size=12, packing=False)
    assert schedule.steps == 2 * 9
    seen = []
    for step in range(schedule.steps):
        packs = schedule.step(step)
        shares = [share_of_rank(packs, batch_size=12, rank=rank, world=world, parts=parts) for rank in range(world)]
        assert all(len(share) == parts for share in shares)
        shared = [samples.tolist() for share in shares for part in share for samples in part]
        assert shared == [samples.tolist() for samples in packs]
        seen += shared
    assert sorted(sample for samples in seen for sample in samples) == sorted([*range(100), *range(100)])
    with pytest.raises(IndexError):
        schedule.step(schedule.steps)
