"""Read plan against its definition: each selected row once, in windows, from any position."""

from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.console.errors import UserError
from trainer.data.format.shards import RecordIndex
from trainer.data.format.time_selection import Selection
from trainer.data.loading import batch_plan as plan_module
from trainer.data.loading.batch import ReadPosition
from trainer.data.loading.batch_plan import BlockSlice, PlannedBatch, ReadPlan, partitions_of_rank

Row = tuple[int, int, int, int]
"""Epoch, partition, record, and row of the record."""


class MemoryStore:
    """The part of ``RowStore`` that a plan uses, with only the two time columns."""

    def __init__(self, partitions: list[list[dict[str, np.ndarray]]]) -> None:
        self.partitions = len(partitions)
        self.contents = partitions
        self.reads: list[tuple[int, int]] = []

    def records(self, partition: int) -> RecordIndex:
        records = self.contents[partition]
        request, emit = ([rows[name] for rows in records] for name in ("request_ms", "emit_ms"))
        return RecordIndex(
            np.array([len(times) for times in emit], np.int64),
            *(
                np.array([extreme(times) for times in column], np.int64)
                for column in (request, emit)
                for extreme in (np.min, np.max)
            ),
        )

    def read(self, partition: int, record: int, columns: object = None) -> dict[str, np.ndarray]:
        self.reads.append((partition, record))
        return self.contents[partition][record]


def random_store(rng: np.random.Generator, partitions: int, most_records: int = 12, span: int = 1000) -> MemoryStore:
    """Make partitions of unequal size, also empty ones, with records of unequal size in emission order."""
    contents = []
    for _ in range(partitions):
        sizes = rng.integers(1, 20, rng.integers(0, most_records + 1))
        emit = np.sort(rng.integers(0, span, sizes.sum()))
        request = np.maximum(emit - rng.integers(0, span // 5, len(emit)), 0)
        edges = np.cumsum([0, *sizes])
        contents.append([{"request_ms": request[a:b], "emit_ms": emit[a:b]} for a, b in itertools.pairwise(edges)])
    return MemoryStore(contents)


def rows_of(store: MemoryStore, selection: Selection, pieces: list[BlockSlice]) -> Iterator[Row]:
    """Yield the rows of slices; each block has one fixed random order."""
    for piece in pieces:
        rows = [
            (piece.key.epoch, piece.key.partition, record, row)
            for record in piece.records.tolist()
            for row in np.flatnonzero(selection.mask(store.contents[piece.key.partition][record])).tolist()
        ]
        assert len(rows) == piece.rows.sum()
        order = np.random.default_rng(list(piece.key)).permutation(len(rows))
        yield from (rows[place] for place in order[piece.start : piece.stop])


def selected_rows(store: MemoryStore, selection: Selection, epochs: int) -> Counter[Row]:
    return Counter(
        (epoch, partition, record, row)
        for epoch in range(epochs)
        for partition, records in enumerate(store.contents)
        for record, rows in enumerate(records)
        for row in np.flatnonzero(selection.mask(rows)).tolist()
    )


def make_plan(
    store: MemoryStore,
    rank: int,
    world: int,
    selection: Selection,
    state: ReadPosition | None = None,
    **settings: object,
) -> ReadPlan:
    options = {"batch_size": 7, "seed": 3, "epochs": 2, "shuffle_ms": 100, **settings}
    return ReadPlan(store, partitions_of_rank(store.partitions, rank, world), selection, state=state, **options)


def run_ranks(
    store: MemoryStore,
    world: int,
    selection: Selection,
    state: ReadPosition | None,
    batches: list[int | None],
    **settings,
) -> tuple[list[Row], ReadPosition]:
    """Return the rows that the ranks consume in ``batches`` batches each (None: all), and the job's position after."""
    rows: list[Row] = []
    position: ReadPosition = {}
    for rank in range(world):
        plan = make_plan(store, rank, world, selection, state, **settings)
        position.update(
            {p: [0, 0, 0] if state is None else list(state[p]) for p in range(rank, store.partitions, world)}
        )
        for number, planned in enumerate(plan.batches()):
            if batches[rank] is not None and number >= batches[rank]:
                break
            rows += rows_of(store, selection, planned.slices)
            position.update(planned.position)
    return rows, position


SELECTIONS = st.builds(
    lambda a, b, c, d: Selection(min(a, b), max(a, b), min(c, d), max(c, d)),
    *(st.one_of(st.integers(0, 1000), st.sampled_from([0, 2000])) for _ in range(4)),
)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    partitions=st.integers(1, 6),
    selection=st.one_of(st.just(Selection()), SELECTIONS),
    shuffle_ms=st.sampled_from([None, 1, 100, 5000]),
    worlds=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    data=st.data(),
)
def test_every_selected_row_once_over_changing_numbers_of_ranks(seed, partitions, selection, shuffle_ms, worlds, data):
    store = random_store(np.random.default_rng(seed), partitions)
    state, seen = None, []
    for world in [min(world, partitions) for world in worlds]:
        stops = [data.draw(st.integers(0, 8), label="batches") for _ in range(world)]
        rows, state = run_ranks(store, world, selection, state, stops, shuffle_ms=shuffle_ms)
        seen += rows
    rows, _ = run_ranks(store, 1, selection, state, [None], shuffle_ms=shuffle_ms)
    assert Counter(seen + rows) == selected_rows(store, selection, epochs=2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shuffle_ms", [None, 100])
def test_the_same_ranks_go_on_with_identical_batches(seed, shuffle_ms):
    store = random_store(np.random.default_rng(seed), 5, most_records=30)
    selection = Selection(emit_from=150, emit_until=900)

    def content(planned: PlannedBatch) -> tuple[list[Row], ReadPosition]:
        return list(rows_of(store, selection, planned.slices)), planned.position

    whole = [content(planned) for planned in make_plan(store, 1, 2, selection, shuffle_ms=shuffle_ms).batches()]
    assert len(whole) > 5
    assert all(len(rows) == 7 for rows, _ in whole[:-1])
    for number, (_, position) in enumerate(whole):
        rest = make_plan(store, 1, 2, selection, position, shuffle_ms=shuffle_ms)
        assert [content(planned) for planned in rest.batches()] == whole[number + 1 :]
        consumed = sum(len(rows) for rows, _ in whole[: number + 1])
        assert (rest.rows_done, rest.rows_total) == (consumed, sum(len(rows) for rows, _ in whole))


@pytest.mark.parametrize("merge_rows", [1, 10, 1 << 20])
@pytest.mark.parametrize("seed", range(3))
def test_slices_of_a_long_window_go_on_identically(monkeypatch, merge_rows, seed):
    monkeypatch.setattr(plan_module, "_MERGE_ROWS", merge_rows)
    store = random_store(np.random.default_rng(seed), 4)
    whole, _ = run_ranks(store, 1, Selection(), None, [None], shuffle_ms=5000)
    first, state = run_ranks(store, 1, Selection(), None, [5], shuffle_ms=5000)
    rest, _ = run_ranks(store, 1, Selection(), state, [None], shuffle_ms=5000)
    assert first + rest == whole
    assert Counter(whole) == selected_rows(store, Selection(), epochs=2)


@pytest.mark.parametrize("seed", range(5))
def test_windows_follow_each_other_in_time(seed):
    rng = np.random.default_rng(seed)
    store = random_store(rng, 4)
    plan = make_plan(store, 0, 1, Selection(), batch_size=5)
    order = [
        (epoch, int(store.contents[partition][record]["emit_ms"].min()) // 100)
        for planned in plan.batches()
        for epoch, partition, record, _ in rows_of(store, Selection(), planned.slices)
    ]
    assert order == sorted(order)
    assert len(set(order)) > 10


def test_order_of_records_without_shuffling():
    store = random_store(np.random.default_rng(4), 3)
    plan = make_plan(store, 0, 1, Selection(), shuffle_ms=None, epochs=1)
    runs: dict[int, list[tuple[np.ndarray, int, int]]] = {}
    for planned in plan.batches():
        for piece in planned.slices:
            runs.setdefault(piece.key.partition, []).append((piece.records, piece.start, piece.stop))
    for partition, pieces in runs.items():
        assert all(records.tolist() == list(range(len(store.contents[partition]))) for records, _, _ in pieces)
        assert all(before[2] == after[1] for before, after in itertools.pairwise(pieces))


@pytest.mark.parametrize("seed", range(3))
def test_partitions_advance_side_by_side(seed):
    store = random_store(np.random.default_rng(seed), 6, most_records=40)
    sizes = np.array([sum(len(rows["emit_ms"]) for rows in records) for records in store.contents])
    done = np.zeros(6, np.int64)
    for planned in make_plan(store, 0, 1, Selection(), shuffle_ms=5000, epochs=1).batches():
        for piece in planned.slices:
            done[piece.key.partition] += piece.stop - piece.start
        # Half a row from each partition's own rounding, and as much from each of the others, in proportion.
        assert (np.abs(done - sizes * done.sum() / sizes.sum()) <= 0.5 + 3 * sizes / sizes.sum()).all()


def test_a_window_larger_than_the_pool_is_shuffled_in_blocks(monkeypatch):
    monkeypatch.setattr(plan_module, "SHUFFLE_POOL", 120)
    monkeypatch.setattr(plan_module, "_MIN_BLOCK_ROWS", 1)
    store = random_store(np.random.default_rng(0), 2, most_records=60)
    plan = make_plan(store, 0, 1, Selection(), shuffle_ms=5000)
    blocks: dict[tuple[int, ...], BlockSlice] = {}
    order: dict[int, list[tuple[int, ...]]] = {}
    rows: list[Row] = []
    for planned in plan.batches():
        rows += rows_of(store, Selection(), planned.slices)
        for piece in planned.slices:
            blocks[piece.key] = piece
            order.setdefault(piece.key.partition, []).append(piece.key)
    assert Counter(rows) == selected_rows(store, Selection(), epochs=2)
    # 60 rows a block and up to 19 more, since a record is not cut; several blocks, each visited once.
    assert max(piece.rows.sum() for piece in blocks.values()) <= 60 + 19
    for keys in order.values():
        assert len(set(keys)) > 6
        assert keys == sorted(keys)
    in_epoch = {
        epoch: np.concatenate([blocks[key].records for key in sorted(blocks) if key[:2] == (0, epoch)]).tolist()
        for epoch in (0, 1)
    }
    assert sorted(in_epoch[0]) == sorted(in_epoch[1]) == list(range(len(store.contents[0])))
    assert in_epoch[0] != in_epoch[1] and in_epoch[0] != sorted(in_epoch[0])


def test_only_records_across_an_edge_are_read():
    store = random_store(np.random.default_rng(2), 3, most_records=50, span=100_000)
    make_plan(store, 0, 1, Selection(emit_from=20_000, emit_until=70_000))
    assert 0 < len(store.reads) <= 6


def test_a_hundred_million_rows_are_planned_without_holding_them():
    records, rows = 12_500, 1000
    emit = np.arange(records, dtype=np.int64) * 60_000
    index = RecordIndex(np.full(records, rows), emit, emit + 59_999, emit, emit + 59_999)
    store = MemoryStore([[] for _ in range(8)])
    store.records = lambda partition: index
    tracemalloc.start()
    plan = make_plan(store, 0, 1, Selection(), shuffle_ms=3_600_000, batch_size=2048, epochs=1)
    planned = 0
    for batch, _ in zip(plan.batches(), range(1000), strict=False):
        planned += sum(piece.stop - piece.start for piece in batch.slices)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.rows_total == 100_000_000
    assert planned == 1000 * 2048
    assert peak < 64 << 20  # one byte for each row would be 95 MiB


def test_a_rank_without_rows_has_no_batches():
    store = random_store(np.random.default_rng(1), 4)
    assert list(make_plan(store, 0, 4, Selection(emit_from=5000)).batches()) == []


def test_more_ranks_than_partitions_are_refused():
    with pytest.raises(UserError, match="5 ranks, but the dataset has 4 partitions"):
        partitions_of_rank(4, 0, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(2), "has no partition 2"),
        (lambda state: state.update({1: [0, state[1][1], 10_000]}), "partition 1 is row 10000 of window"),
        (lambda state: state.update({1: [0, 123_456, 1]}), "partition 1 is row 1 of window 123456, which has 0 rows"),
    ],
)
def test_a_position_that_does_not_fit_is_refused(change, message):
    store = random_store(np.random.default_rng(0), 4)
    _, state = run_ranks(store, 1, Selection(), None, [4])
    change(state)
    with pytest.raises(UserError, match=message):
        make_plan(store, 0, 1, Selection(), state)
