"""Loader over real shards: a rank gets the same batches for any number of workers and from any position."""

from __future__ import annotations

import gc
import json
import multiprocessing
import multiprocessing.util
import os
import random
import signal
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import torch

from tests.memory_flags import kilobytes, memory_flags, own_memory
from trainer.config.features import FeatureConfig, HistoryConfig
from trainer.console.errors import UserError
from trainer.data.features import search_copy
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import fit_features
from trainer.data.features.search_vectors import SearchSpace, SpaceTable
from trainer.data.format.dataset import Dataset, freeze_statistics
from trainer.data.format.history import Histories
from trainer.data.format.schema import Rows
from trainer.data.format.shards import RowStore, index_name
from trainer.data.format.time_selection import Selection
from trainer.data.loading import loader
from trainer.data.loading.batch import RankingBatch, ReadPosition, unpack
from trainer.data.loading.loader import FETCHED_AHEAD, Loader
from trainer.runtime.large_pages import zero_in_large_pages

HOUR_MS = 3_600_000
CONFIG = FeatureConfig(
    history={"short": HistoryConfig(domain="video", length=6), "live": HistoryConfig(domain="live", length=4)}
)


class Ranks:
    """Makes loaders of one dataset with different settings."""

    def __init__(self, dataset, on_corrupt: str = "error", path: str | None = None) -> None:
        self.dataset = dataset
        self.store = RowStore(path or dataset.path, dataset.spec, on_corrupt)
        self.histories = Histories(path or dataset.path, dataset.spec)
        fitted = fit_features(
            dataset.spec, RowStore(dataset.path, dataset.spec, "skip"), self.histories, CONFIG, Selection()
        )
        self.features = FeatureMap(dataset.spec, CONFIG, fitted)

    def loader(self, **options) -> Loader:
        defaults = {"rank": 0, "world": 1, "batch_size": 100, "seed": 5, "shuffle_ms": 6 * HOUR_MS, "prefetch": 2}
        return Loader(self.store, self.histories, self.features, **{**defaults, **options})

    def batch(self, rows: Rows, as_of_ms: np.ndarray) -> RankingBatch:
        return unpack(self.features.pack(rows, self.histories, as_of_ms), self.features.layout, {})


def content(batch: RankingBatch) -> tuple:
    """Return the content of a batch in a form that can be compared."""
    tensors = [
        *(part for keyed in batch.ids for part in (keyed.values(), keyed.lengths())),
        *(batch.dense, batch.label, batch.mask, batch.user_id, batch.visit_id, batch.request_ms),
    ]
    return ([tensor.tolist() for tensor in tensors], batch.rows, batch.position, batch.skipped_rows)


def visits(batches) -> list[int]:
    return [visit for batch in batches for visit in batch.visit_id.tolist()]


def inside(dataset, selection: Selection) -> Counter[int]:
    return Counter(dataset.rows["visit_id"][selection.mask(dataset.rows)].tolist())


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_makes_the_same_batches(write_dataset, workers):
    ranks = Ranks(write_dataset(rows=1500))
    alone = [content(batch) for batch in ranks.loader(epochs=2)]
    assert len(alone) == 30
    assert [content(batch) for batch in ranks.loader(epochs=2, workers=workers)] == alone


def test_tables_keep_their_large_pages_beside_workers(write_dataset):
    ranks = Ranks(write_dataset(rows=700))
    alone = [content(batch) for batch in ranks.loader()]
    table = own_memory(9)
    zero_in_large_pages(table)
    if not (large := kilobytes(table, "AnonHugePages")):
        pytest.skip("this system has no large pages, or none that are free")
    batches = iter(ranks.loader(workers=1))
    first = next(batches)
    assert kilobytes(table, "Shared_Dirty") == 0 and "dc" not in memory_flags(table)
    table.fill_(1)
    assert kilobytes(table, "AnonHugePages") >= large
    assert [content(first), *(content(batch) for batch in batches)] == alone


def test_batches_hold_the_features_of_their_rows(write_dataset):
    ranks = Ranks(write_dataset(rows=700))
    rows = ranks.dataset.rows
    place = np.argsort(rows["visit_id"])
    for batch in ranks.loader(workers=1):
        own = {name: column[place[batch.visit_id.numpy()]] for name, column in rows.items()}
        expected = ranks.batch(own, own["request_ms"])
        assert content(batch)[0] == content(expected)[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_ranks_go_on_with_identical_batches(write_dataset, workers):
    ranks = Ranks(write_dataset(rows=1200))
    # 100 rows of records of 64: every position lies inside a record.
    whole = [content(batch) for batch in ranks.loader(world=2, rank=1, epochs=2)]
    for stop in (0, 3, len(whole) - 2):
        position = whole[stop][2]
        rest = ranks.loader(world=2, rank=1, epochs=2, state=position, workers=workers)
        assert [content(batch) for batch in rest] == whole[stop + 1 :]
        assert rest.rows_done == sum(rows for _, rows, _, _ in whole[: stop + 1])
        assert rest.rows_total == sum(rows for _, rows, _, _ in whole)


@pytest.mark.parametrize("worlds", [(2, 1), (1, 2), (3, 2), (3, 1, 4)])
def test_another_number_of_ranks_takes_over_each_row_once(write_dataset, worlds):
    dataset = write_dataset(rows=1500, partitions=6)
    ranks = Ranks(dataset)
    seen: list[int] = []
    state: ReadPosition | None = None
    for world, last in zip(worlds, [False] * (len(worlds) - 1) + [True], strict=True):
        reached: ReadPosition = {}
        for rank in range(world):
            # Ranks stop after unequal numbers of batches, and one has not begun.
            loader = ranks.loader(world=world, rank=rank, batch_size=70, epochs=2, state=state)
            own = {p: [0, 0, 0] if state is None else state[p] for p in range(rank, 6, world)}
            for number, batch in enumerate(loader):
                if not last and number >= 2 * rank:
                    break
                seen += visits([batch])
                own = batch.position
            reached.update(own)
        state = reached
    assert Counter(seen) == Counter({visit: 2 for visit in range(1500)})


@pytest.mark.parametrize("seed", range(4))
def test_ranges_with_edges_inside_records_are_exact(write_dataset, seed):
    dataset = write_dataset(seed=seed)
    ranks = Ranks(dataset)
    start = int(dataset.rows["request_ms"].min())
    first, last = sorted(np.random.default_rng(seed).integers(0, 48 * HOUR_MS, 2).tolist())
    training = Selection(emit_from=start + first, emit_until=start + last)
    assert Counter(visits(ranks.loader(selection=training))) == inside(dataset, training)
    held_out = Selection(request_from=start + first, request_until=start + last)
    found = visits(ranks.loader(selection=held_out, shuffle_ms=None))
    assert Counter(found) == inside(dataset, held_out)
    assert found


def test_order_without_shuffling_is_that_of_emission(write_dataset):
    dataset = write_dataset(rows=500, partitions=1)
    order = dataset.rows["visit_id"][np.argsort(dataset.rows["emit_ms"], kind="stable")].tolist()
    ranks = Ranks(dataset)
    assert visits(ranks.loader(shuffle_ms=None)) == order
    shuffled = visits(ranks.loader())
    assert shuffled != order
    assert shuffled != visits(ranks.loader(seed=6))
    first, second = np.split(np.array(visits(ranks.loader(epochs=2))), 2)
    assert first.tolist() == shuffled and second.tolist() != shuffled


def test_a_shuffled_window_is_mixed(write_dataset):
    # One window: the mean displacement of a uniform permutation of n is n / 3.
    ranks = Ranks(write_dataset(rows=2000, partitions=2, hours=2))
    emitted = dict(zip(ranks.dataset.rows["visit_id"].tolist(), ranks.dataset.rows["emit_ms"].tolist(), strict=True))
    found = np.array([emitted[visit] for visit in visits(ranks.loader(shuffle_ms=1 << 50))])
    displacement = np.abs(np.argsort(np.argsort(found)) - np.arange(2000)).mean()
    assert 0.3 < displacement / 2000 < 0.37


def test_ranks_run_out_at_different_times(write_dataset):
    def edit(rows):
        rows["user_id"][:] = np.where(rows["user_id"] % 8, 7, rows["user_id"])

    dataset = write_dataset(rows=600, partitions=3, edit=edit)
    ranks = Ranks(dataset)
    counts = [len(visits(ranks.loader(world=3, rank=rank))) for rank in range(3)]
    assert sum(counts) == 600 and max(counts) > 400
    nothing = Selection(emit_from=1 << 60)
    assert list(ranks.loader(selection=nothing, workers=2)) == []


def test_statistics_and_histories_can_be_frozen(write_dataset):
    dataset = write_dataset(rows=900)
    ranks = Ranks(dataset)
    limit = int(np.median(dataset.rows["request_ms"]))
    frozen = freeze_statistics(Dataset(dataset.spec, dataset.store(), dataset.histories()), limit)
    rows = dataset.rows
    place = np.argsort(rows["visit_id"])
    changed = 0
    for batch in ranks.loader(as_of_limit_ms=limit, frozen_statistics=frozen, workers=1):
        own = {name: column[place[batch.visit_id.numpy()]] for name, column in rows.items()}
        changed += content(batch)[0] != content(ranks.batch(own, own["request_ms"]))[0]
        own["stat"] = frozen.lookup(own)
        expected = ranks.batch(own, np.minimum(own["request_ms"], limit))
        assert content(batch)[0] == content(expected)[0]
    assert changed == 9


def corrupt(path: Path, partition: int, record: int) -> None:
    """Flip one byte in the middle of a record."""
    entry = json.loads((path / "rows" / index_name(partition)).read_text())[record]
    shard = path / "rows" / entry["shard"]
    data = bytearray(shard.read_bytes())
    data[entry["offset"] + entry["size"] // 2] ^= 1
    shard.write_bytes(bytes(data))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_record_is_named_or_skipped_and_counted(write_dataset, workers):
    dataset = write_dataset(rows=1500)
    whole = visits(Ranks(dataset).loader(epochs=2))
    damaged = [(1, 2), (1, 3), (3, 0)]
    lost = [dataset.store().read(*where)["visit_id"].tolist() for where in damaged]
    for partition, record in damaged:
        corrupt(dataset.path, partition, record)
    ranks = Ranks(dataset)
    with pytest.raises(UserError, match=r"part-0000[13]-000000.tar: record \d+ at byte \d+") as caught:
        list(ranks.loader(workers=workers))
    assert "\n" not in str(caught.value)

    batches = list(Ranks(dataset, "skip").loader(epochs=2, workers=workers))
    lost_visits = {visit for visits_lost in lost for visit in visits_lost}
    # Everything else is where it was: a position means the same rows whether a record can be read or not.
    assert visits(batches) == [visit for visit in whole if visit not in lost_visits]
    assert sum(batch.skipped_rows for batch in batches) == 2 * len(lost_visits)
    assert all(batch.rows + batch.skipped_rows == 100 for batch in batches)


def test_a_corrupt_record_at_an_edge_counts_whole(write_dataset):
    dataset = write_dataset(rows=800)
    edge = dataset.store().read(0, 3)
    selection = Selection(emit_from=int(edge["emit_ms"][len(edge["emit_ms"]) // 2]))
    corrupt(dataset.path, 0, 3)
    batches = list(Ranks(dataset, "skip").loader(selection=selection))
    expected = inside(dataset, selection) - Counter(edge["visit_id"].tolist())
    assert Counter(visits(batches)) == expected
    assert sum(batch.skipped_rows for batch in batches) == len(edge["visit_id"])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (signal.SIGKILL, r"was ended by SIGKILL \(out of memory\?\)"),
        (signal.SIGBUS, r"was ended by SIGBUS \(is /dev/shm full"),
    ],
)
def test_a_worker_that_is_killed_is_named_in_one_line(write_dataset, capfd, workers, number, expected):
    ranks = Ranks(write_dataset(rows=1500))
    handler = signal.getsignal(signal.SIGCHLD)
    found = iter(ranks.loader(rank=1, world=2, workers=workers, batch_size=10))
    # A batch from each worker: only then all of them have set their signal handlers.
    for _ in range(workers):
        next(found)
    victim = max(multiprocessing.active_children(), key=lambda child: child.pid)
    os.kill(victim.pid, number)
    victim.join()
    # Nothing is raised but by the loader.
    assert signal.getsignal(signal.SIGCHLD) is handler
    with pytest.raises(UserError, match=rf"^rank 1: loader worker, process {victim.pid}, {expected}[^\n]*$"):
        list(found)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("killed", [True, False])
def test_a_worker_that_dies_while_it_hands_a_batch_over_is_named_too(write_dataset, monkeypatch, killed):
    found = iter(Ranks(write_dataset(rows=1500)).loader(workers=1, batch_size=10))
    next(found)

    def reset(waiting, *arguments, **options):
        if killed:
            os.kill(waiting._workers[0].pid, signal.SIGKILL)
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_try_get_data", reset)
    expected = (UserError, "loader worker, process .* ended by SIGKILL") if killed else (ConnectionResetError, "reset")
    with pytest.raises(expected[0], match=expected[1]):
        list(found)


def test_workers_outlive_a_signal_to_the_whole_job(write_dataset):
    ranks = Ranks(write_dataset(rows=1500))
    alone = [content(batch) for batch in ranks.loader()]
    found = iter(ranks.loader(workers=2))
    first = content(next(found))
    for child in multiprocessing.active_children():
        subprocess.run(["kill", str(child.pid)], check=True)
    assert [first, *map(content, found)] == alone


def test_workers_outlive_a_signal_in_the_moment_after_the_fork(write_dataset, monkeypatch):
    ranks = Ranks(write_dataset(rows=1500))
    alone = [content(batch) for batch in ranks.loader()]
    start = multiprocessing.process.BaseProcess.start

    def start_and_signal(child):
        start(child)
        # By another process: a worker obeys its rank.
        subprocess.run(["kill", str(child.pid)], check=True)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start_and_signal)
    assert [content(batch) for batch in ranks.loader(workers=2)] == alone
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_workers_collect_their_own_garbage_and_not_that_of_the_rank(write_dataset, tmp_path, monkeypatch):
    """A fork lacks the threads of a process group that its rank has dropped, so the destructor would never return."""

    class Garbage:
        def __init__(self, name):
            self.name, self.itself = name, self

        def __del__(self):
            with open(tmp_path / self.name, "a") as file:
                file.write(f"{os.getpid()}\n")

    made = loader._BatchMaker._make

    def collect(maker, task):
        Garbage("of a worker")
        gc.collect()
        return made(maker, task)

    ranks = Ranks(write_dataset(rows=1500))
    monkeypatch.setattr(loader._BatchMaker, "_make", collect)
    # A collection in the moment after the fork is as bad as a later one.
    multiprocessing.util.register_after_fork(ranks, lambda _: gc.isenabled() and gc.collect())
    thresholds = gc.get_threshold()
    gc.set_threshold(0)
    try:
        Garbage("of the rank")
        found = iter(ranks.loader(workers=2))
        next(found)
        workers = {child.pid for child in multiprocessing.active_children()}
        list(found)
    finally:
        gc.set_threshold(*thresholds)
        gc.collect()
    assert (tmp_path / "of the rank").read_text() == f"{os.getpid()}\n"
    assert {int(line) for line in (tmp_path / "of a worker").read_text().split()} == workers


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda shard: shard.unlink(), "the shard is missing"),
        (lambda shard: os.truncate(shard, 1000), "the shard is cut short"),
        (lambda shard: (shard.unlink(), shard.mkdir()), "Is a directory"),
        (lambda shard: shard.write_bytes(bytes(shard.stat().st_size)), "its checksum does not match"),
    ],
)
def test_a_shard_that_breaks_while_it_is_read_is_named_in_one_line(write_dataset, workers, harm, expected):
    dataset = write_dataset(rows=1500)
    found = iter(Ranks(dataset).loader(workers=workers, batch_size=10))
    next(found)
    harm(dataset.path / "rows" / "part-00002-000000.tar")
    with pytest.raises(UserError, match=rf"part-00002-000000.tar: record \d+ [^\n]*{expected}[^\n]*$"):
        list(found)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_value_that_is_not_finite_is_named_in_one_line(write_dataset, workers):
    dataset = write_dataset(rows=600)
    ranks = Ranks(dataset)

    def edit(rows):
        rows["dense"][rows["visit_id"] == 123, 1] = np.inf

    bad = write_dataset(rows=600, name="bad", edit=edit)
    ranks.store = bad.store()
    with pytest.raises(UserError, match=r"^dense feature 'price' is inf in visit 123 [^\n]*$"):
        list(ranks.loader(workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_random_states_are_left_alone(write_dataset, workers):
    ranks = Ranks(write_dataset(rows=300))
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert len(list(ranks.loader(workers=workers))) == 3
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_rows_come_from_any_file_system(write_dataset, monkeypatch, tmp_path):
    dataset = write_dataset(rows=300)
    monkeypatch.setenv("LIMELIGHT_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.put(str(dataset.path), "/loader-test", recursive=True)
    try:
        remote = [content(batch) for batch in Ranks(dataset, path="memory://loader-test").loader(workers=2)]
    finally:
        memory.rm("/loader-test", recursive=True)
    assert remote == [content(batch) for batch in Ranks(dataset).loader()]


def test_a_batch_moves_whole(write_dataset):
    (batch,) = Ranks(write_dataset(rows=80)).loader(selection=Selection())
    moved = batch.to(torch.device("cpu"), non_blocking=True)
    assert content(moved) == content(batch)
    meta = batch.to(torch.device("meta"))
    assert {meta.dense.device.type, meta.visit_id.device.type, meta.ids[0].values().device.type} == {"meta"}


@pytest.mark.parametrize(("workers", "prefetch", "ahead"), [(0, 4, 1), (1, 1, 1), (1, 2, 2), (2, 3, 6)])
def test_the_search_space_is_asked_for_all_batches_that_are_made_ahead(write_dataset, workers, prefetch, ahead):
    asked = []
    space = SimpleNamespace(check_prefetch=asked.append)
    ranks = Ranks(write_dataset(rows=80))
    ranks.loader(workers=workers, prefetch=prefetch, space=space, first_step=0)
    assert asked == [ahead + FETCHED_AHEAD]
    # An evaluation searches in one version only.
    ranks.loader(workers=workers, prefetch=prefetch, space=space)
    assert len(asked) == 1


def test_a_worker_process_reads_its_copy_of_the_search_vectors(write_dataset, monkeypatch):
    asked = []
    monkeypatch.setattr(search_copy, "pays", lambda *sizes: asked.append(sizes) or True)
    monkeypatch.setattr(loader, "local_size", lambda: 3)
    tables = {"item": SpaceTable(5, 16)}
    space = SearchSpace(tables, tables, "int8", refresh_steps=4)
    maker = Ranks(write_dataset(rows=80)).loader(workers=2, space=space)._maker
    for version in (0, 1, 2):
        space.at(version)["item"][:] = version + 1
        # The rank itself, which has no other memory than that of its processes, reads what they share.
        assert np.shares_memory(maker._vectors(version)["item"], space.at(version)["item"])
        with monkeypatch.context() as worker:
            worker.setattr(loader, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
            own = maker._vectors(version)["item"]
        assert (own == version + 1).all() and not np.shares_memory(own, space.at(version)["item"])
    assert asked == [(space.version_bytes, 6)]


def test_every_tensor_of_a_batch_is_kept_for_a_stream(write_dataset, monkeypatch):
    (batch,) = Ranks(write_dataset(rows=80)).loader(selection=Selection())
    batch = replace(batch, slow=torch.ones(batch.rows, 2, dtype=torch.bool))
    kept = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append(tensor.data_ptr()))
    batch.record_stream(torch.Stream())
    tensors = [part for keyed in batch.ids for part in (keyed.values(), keyed.lengths())]
    tensors += [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 2 * len(batch.ids) + 7
    assert {tensor.data_ptr() for tensor in tensors} <= set(kept)


@pytest.mark.gpu
def test_pinned_batches_reach_the_gpu(write_dataset):
    ranks = Ranks(write_dataset(rows=300))
    expected = [content(batch) for batch in ranks.loader()]
    stream = torch.cuda.Stream()
    found = []
    for batch in ranks.loader(workers=2, pin_memory=True):
        assert all(tensor.is_pinned() for tensor in (batch.dense, batch.label, batch.ids[0].values()))
        with torch.cuda.stream(stream):
            moved = batch.to(torch.device("cuda"), non_blocking=True)
        moved.record_stream(stream)
        stream.synchronize()
        assert moved.dense.is_cuda and moved.ids[0].lengths().is_cuda
        found.append(content(moved.to(torch.device("cpu"))))
    assert found == expected
