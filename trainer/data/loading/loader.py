"""Batches of one rank: planned here, made by worker processes, handed out in order with their position.

The plan (plan.py) is the only state and never leaves this process. A worker is told which pieces of which blocks to
gather, so any number of workers gives the same batches, and what they have prefetched when a run ends is simply
planned again.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from trainer.console.errors import UserError
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.history_sequences import Space
from trainer.data.features.packed_batch import PackedBatch
from trainer.data.features.search_vectors import SearchSpace
from trainer.data.format.history import Histories
from trainer.data.format.shards import RowStore
from trainer.data.format.statistics import FrozenStatistics
from trainer.data.format.time_selection import Selection
from trainer.data.loading.batch import RankingBatch, ReadPosition, unpack
from trainer.data.loading.batch_plan import BlockSlice, ReadPlan, partitions_of_rank
from trainer.data.loading.block_reader import BlockReader

_PR_SET_PDEATHSIG = 1
"""Linux's request for a signal at the parent's death, from its sys/prctl.h."""


FETCHED_AHEAD = 2
"""Batches that the engine has fetched besides that of the step which it has done last."""

DEATH_SECONDS = 1.0
"""Within so long of the loss of a worker's connection its end is known, if it has ended."""


class Loader:
    """The batches of one rank, from a position on.

    A rank whose partitions have fewer rows ends earlier than others, and can go on with ``empty_batch`` of the layout.

    Args:
        store: rows of the dataset.
        histories: of the dataset.
        feature_map: makes the batches.
        rank: of this process.
        world: number of ranks; partition p belongs to rank ``p % world``.
        batch_size: rows of a batch; the last one may have fewer.
        seed: of the shuffling.
        selection: rows to read; all by default.
        epochs: passes over them.
        shuffle_ms: rows are shuffled inside windows of so many milliseconds of emission; None keeps the stored order.
        as_of_limit_ms: histories show nothing known at this time or later; None means up to the request of each row.
        frozen_statistics: take the statistics from here and not from the rows.
        workers: processes; 0 makes the batches in this one.
        prefetch: batches that each worker makes ahead.
        pin_memory: hand out batches in page-locked memory.
        state: position to go on from, over the partitions of all ranks; None starts at the beginning.
        space: vectors to search histories with, for features that need them.
        first_step: steps done before that of the first batch; it says which version of the vectors a batch is made
            with. None takes the newest for all.

    Raises:
        UserError: more ranks than partitions, a position that does not fit, an unreadable index, or more batches made
            ahead than ``space`` has versions for.
    """

    def __init__(
        self,
        store: RowStore,
        histories: Histories,
        feature_map: FeatureMap,
        *,
        rank: int,
        world: int,
        batch_size: int,
        seed: int,
        selection: Selection | None = None,
        epochs: int = 1,
        shuffle_ms: int | None = None,
        as_of_limit_ms: int | None = None,
        frozen_statistics: FrozenStatistics | None = None,
        workers: int = 0,
        prefetch: int = 4,
        pin_memory: bool = False,
        state: Mapping[int, Sequence[int]] | None = None,
        space: SearchSpace | None = None,
        first_step: int | None = None,
    ) -> None:
        selection = selection or Selection()
        self._plan = ReadPlan(
            store,
            partitions_of_rank(store.partitions, rank, world),
            selection,
            batch_size=batch_size,
            seed=seed,
            epochs=epochs,
            shuffle_ms=shuffle_ms,
            state=state,
        )
        self._layout = feature_map.layout
        reader = BlockReader(store, feature_map.spec, selection, None if shuffle_ms is None else seed)
        self._maker = _BatchMaker(reader, histories, feature_map, as_of_limit_ms, frozen_statistics, space)
        self._space, self._first_step = space, first_step
        if space is not None and first_step is not None:
            space.check_prefetch(max(workers * prefetch, 1) + FETCHED_AHEAD)
        self._rank = rank
        self._workers, self._prefetch, self._pin_memory = workers, prefetch, pin_memory

    @property
    def rows_total(self) -> int:
        """Rows of this rank over all epochs, from the very beginning; corrupt records that are skipped count."""
        return self._plan.rows_total

    @property
    def position(self) -> ReadPosition:
        """Where reading starts."""
        return self._plan.position

    @property
    def rows_done(self) -> int:
        """Rows of :attr:`rows_total` that lie before the first batch."""
        return self._plan.rows_done

    def __iter__(self) -> Iterator[RankingBatch]:
        """The batches, from ``state`` on each time.

        Raises:
            UserError: a corrupt record, a value that is not finite, or an id beyond its table; named. A worker process
                that was killed; with its number and the signal.
        """
        positions: deque[ReadPosition] = deque()
        self._maker.prepare()

        def plan() -> Iterator[_Order]:
            for number, planned in enumerate(self._plan.batches()):
                positions.append(planned.position)
                yield _Order(planned.pieces, self._version(number))

        made = DataLoader(
            self._maker,
            batch_size=None,
            sampler=plan(),
            num_workers=self._workers,
            prefetch_factor=self._prefetch if self._workers else None,
            pin_memory=self._pin_memory,
            collate_fn=_unchanged,
            # Forked workers share what the parent has mapped and looked up, and start without importing anything.
            multiprocessing_context="fork" if self._workers else None,
            worker_init_fn=_end_with_the_rank,
            # DataLoader draws from its generator when it starts; the global one belongs to the model.
            generator=torch.Generator(),
        )
        for packed in self._from_workers(made) if self._workers else made:
            if isinstance(packed, UserError):
                raise packed
            yield unpack(packed, self._layout, positions.popleft())

    def _version(self, number: int) -> int:
        """Of the search vectors, for the batch of this number."""
        if self._space is None:
            return 0
        return self._space.newest if self._first_step is None else self._space.version_of(self._first_step + number)

    def _from_workers(self, made: DataLoader) -> Iterator[PackedBatch | UserError]:
        """What the worker processes make; that one of them has died is an error of a line."""
        before = multiprocessing.active_children()
        with _signal_left_alone(signal.SIGCHLD):
            packed = iter(made)
        workers = [child for child in multiprocessing.active_children() if child not in before]
        while True:
            try:
                yield next(packed)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError):
                # DataLoader looks after its workers whenever it waits for them. One that dies while it hands a batch
                # over is first known by its connection, a moment before its end is.
                ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], DEATH_SECONDS)
                for worker in workers:
                    if worker.sentinel in ended:
                        worker.join()
                        raise UserError(_death(self._rank, worker.pid, worker.exitcode or 0)) from None
                raise


class _Order(NamedTuple):
    """What a worker is told of a batch: where its rows are, and the version of the search vectors."""

    pieces: list[BlockSlice]
    version: int


class _BatchMaker(Dataset):
    """Makes one planned batch; lives in each worker and keeps the decoded blocks that it is in the middle of."""

    def __init__(
        self,
        reader: BlockReader,
        histories: Histories,
        feature_map: FeatureMap,
        as_of_limit_ms: int | None,
        frozen_statistics: FrozenStatistics | None,
        space: SearchSpace | None,
    ) -> None:
        self._reader, self._histories, self._feature_map = reader, histories, feature_map
        self._as_of_limit_ms, self._frozen, self._space = as_of_limit_ms, frozen_statistics, space

    def prepare(self) -> None:
        """Before processes are forked."""
        self._feature_map.prepare(self._histories, self._vectors(0))

    def __getitem__(self, order: _Order) -> PackedBatch | UserError:
        try:
            return self._make(order)
        except UserError as error:
            # Handed over as a value: DataLoader would put a worker's traceback into the message of an exception.
            return error

    def _make(self, order: _Order) -> PackedBatch:
        rows, skipped = self._reader.gather(order.pieces)
        as_of = rows["request_ms"]
        if self._as_of_limit_ms is not None:
            as_of = np.minimum(as_of, self._as_of_limit_ms)
        if self._frozen is not None:
            rows["stat"] = self._frozen.lookup(rows)
        packed = self._feature_map.pack(rows, self._histories, as_of, self._vectors(order.version))
        return replace(packed, skipped_rows=skipped)

    def _vectors(self, version: int) -> Space | None:
        return None if self._space is None else self._space.at(version)


def _unchanged(made: Any) -> Any:
    return made


def _end_with_the_rank(worker: int) -> None:
    """In a worker: it ends when its rank does, and not before.

    Pre-emption may send SIGTERM to all processes of a job, and the rank needs batches until it has saved its state. A
    worker that outlives its rank keeps copies of the rank's connections open, and the other ranks notice nothing.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE):
        # The rank tells which it was; torch's handlers tell it too, in half a line.
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def obey() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            continue
        os._exit(0)

    threading.Thread(target=obey, daemon=True).start()


@contextmanager
def _signal_left_alone(number: int) -> Iterator[None]:
    """Undo what is done inside to the handler of a signal.

    DataLoader's handler of SIGCHLD raises an exception in whatever the main thread is at when a worker dies, a
    collective or a backward pass; it is told soon enough when the next batch is due.
    """
    previous = signal.getsignal(number)
    try:
        yield
    finally:
        if signal.getsignal(number) is not previous:
            signal.signal(number, previous)


def _death(rank: int, pid: int | None, status: int) -> str:
    ended = f"exited with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"
    why = {
        -signal.SIGKILL: " (out of memory?); fewer data.workers or a smaller data.prefetch need less",
        -signal.SIGBUS: " (is /dev/shm full, or was a file of the dataset's histories cut short?)",
    }.get(status, "")
    return f"rank {rank}: loader worker, process {pid}, {ended}{why}"
