"""Loads the batches of one rank: plans them, has worker processes make them, and returns them in order.

The plan (batch_plan.py) is the only state, and it stays in this process. A worker receives the slices of blocks that it
must gather. So any number of workers gives the same batches, and batches that are prefetched when a run ends are simply
planned again.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from trainer.console.errors import UserError
from trainer.console.text_table import size_text
from trainer.data.features.device_places import DevicePlaces
from trainer.data.features.history_sequences import Searched
from trainer.data.features.packed_batch import BatchLayout, PackedBatch
from trainer.data.features.search_copy import SearchCopy
from trainer.data.features.search_vectors import SearchSpace
from trainer.data.format.history import Histories
from trainer.data.format.schema import DatasetSpec, Rows
from trainer.data.format.shards import RowStore
from trainer.data.format.statistics import FrozenStatistics
from trainer.data.format.time_selection import Selection
from trainer.data.loading.batch import RankingBatch, ReadPosition, unpack
from trainer.data.loading.batch_plan import BlockSlice, ReadPlan, partitions_of_rank
from trainer.data.loading.block_reader import BlockReader
from trainer.runtime.distributed import local_size
from trainer.runtime.large_pages import without_copies_in_children

_PR_SET_PDEATHSIG = 1
"""Option of Linux's prctl that requests a signal at the death of the parent, from sys/prctl.h."""


FETCHED_AHEAD = 2
"""Number of batches that the engine has fetched beyond the batch of the last step."""

SHARED_MEMORY = "/dev/shm"
"""File system of the shared memory through which workers pass batches; a container has 64 MB of it by default."""

_LOCKS, _LOCKS_PER_WORKER = 8, 4
"""Upper limits of the locks of a DataLoader, each of which takes a page of shared memory."""

DEATH_SECONDS = 1.0
"""Time within which the end of a worker is known after its connection was lost."""


class BatchFeatures(Protocol):
    """Maps rows to model inputs; a :class:`trainer.data.features.feature_map.FeatureMap` does."""

    @property
    def spec(self) -> DatasetSpec: ...
    @property
    def layout(self) -> BatchLayout: ...
    def prepare(self, histories: Histories, space: Searched | None = None) -> None: ...
    def pack(
        self, rows: Rows, histories: Histories, as_of_ms: np.ndarray, space: Searched | None = None
    ) -> PackedBatch: ...


class Loader:
    """Iterable over the batches of one rank, from a position on.

    A rank whose partitions have fewer rows ends earlier than others; it can continue with ``empty_batch``.

    Args:
        store: rows of the dataset.
        histories: histories of the dataset.
        feature_map: maps rows and histories to model inputs.
        rank: rank of this process.
        world: number of ranks; partition p belongs to rank ``p % world``.
        batch_size: rows of a batch; the last one may have fewer.
        seed: seed of the shuffling.
        selection: rows to read; all by default.
        epochs: number of passes over the rows.
        shuffle_ms: rows are shuffled inside windows of this many milliseconds of emission; None keeps the stored order.
        as_of_limit_ms: histories show no visit known at this time or later; None sets no limit besides the request.
        frozen_statistics: statistics to use instead of those stored in the rows.
        workers: number of worker processes; 0 makes the batches in this process.
        prefetch: number of batches that each worker makes ahead.
        pin_memory: return batches in page-locked memory.
        state: position to resume from, over the partitions of all ranks; None starts at the beginning.
        space: search vectors, for features that need them.
        first_step: number of steps done before the step of the first batch, from which the version of the search
            vectors of each batch follows; None uses the newest version for all batches.
        left_to: places of the histories' entries on the device that makes all searches; None if the loader makes them.

    Raises:
        UserError: there are more ranks than partitions, the position does not fit, the index cannot be read, or too
            many batches are made ahead for the two versions of ``space``.
    """

    def __init__(
        self,
        store: RowStore,
        histories: Histories,
        feature_map: BatchFeatures,
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
        left_to: DevicePlaces | None = None,
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
        # Reader and feature map are copied into each worker by the fork; only slices and batches travel later.
        reader = BlockReader(store, feature_map.spec, selection, None if shuffle_ms is None else seed)
        self._maker = _BatchMaker(
            reader,
            histories,
            feature_map,
            as_of_limit_ms,
            frozen_statistics,
            space,
            left_to,
            batches=workers * prefetch + FETCHED_AHEAD,
        )
        self._space, self._first_step = space, first_step
        if space is not None and first_step is not None:
            space.check_prefetch(max(workers * prefetch, 1) + FETCHED_AHEAD)
        self._rank = rank
        self._workers, self._prefetch, self._pin_memory = workers, prefetch, pin_memory

    @property
    def rows_total(self) -> int:
        """Number of rows of this rank over all epochs, from the beginning of the run, with skipped corrupt rows."""
        return self._plan.rows_total

    @property
    def position(self) -> ReadPosition:
        """Position at which reading starts."""
        return self._plan.position

    @property
    def rows_done(self) -> int:
        """Number of rows of :attr:`rows_total` that lie before the first batch."""
        return self._plan.rows_done

    def __iter__(self) -> Iterator[RankingBatch]:
        """Yield the batches; each iteration starts at ``state``.

        Raises:
            UserError: a record is corrupt, a value is not finite, or an id does not fit into its table; the message
                names it. Or a worker process ended; the message gives its process id and the signal or exit status.
        """
        # Workers return batches in the order of the plan, so a queue matches each with its position.
        positions: deque[ReadPosition] = deque()
        self._maker.prepare()

        def plan() -> Iterator[_BatchTask]:
            for number, planned in enumerate(self._plan.batches()):
                positions.append(planned.position)
                yield _BatchTask(planned.slices, self._version(number))

        made = DataLoader(
            self._maker,
            batch_size=None,
            sampler=plan(),
            num_workers=self._workers,
            prefetch_factor=self._prefetch if self._workers else None,
            pin_memory=self._pin_memory,
            collate_fn=_unchanged,
            # Forked workers share the parent's mapped and prepared data, and start without imports.
            multiprocessing_context="fork" if self._workers else None,
            worker_init_fn=_set_up_worker,
            # DataLoader draws from its generator when it starts. With the global generator that would change the model.
            generator=torch.Generator(),
        )
        for packed in self._from_workers(made) if self._workers else made:
            if isinstance(packed, UserError):
                raise packed
            yield unpack(packed, self._layout, positions.popleft())

    def _version(self, number: int) -> int:
        """Return the version of the search vectors for a batch, by its number in this iteration."""
        if self._space is None:
            return 0
        return self._space.newest if self._first_step is None else self._space.version_of(self._first_step + number)

    def _from_workers(self, made: DataLoader) -> Iterator[PackedBatch | UserError]:
        """Yield the batches that the worker processes make; turn the death of a worker into a one-line error."""
        _check_locks(self._workers)
        before = multiprocessing.active_children()
        with (
            _signal_left_alone(signal.SIGCHLD),
            _signal_blocked(signal.SIGTERM),
            _garbage_collection_off(),
            without_copies_in_children(),
        ):
            packed = iter(made)
        workers = [child for child in multiprocessing.active_children() if child not in before]
        while True:
            try:
                yield next(packed)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError):
                # DataLoader checks its workers whenever it waits for a batch. If a worker dies while it sends a batch,
                # the connection breaks a moment before the end of the process is known.
                ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], DEATH_SECONDS)
                for worker in workers:
                    if worker.sentinel in ended:
                        worker.join()
                        raise UserError(_death_message(self._rank, worker.pid, worker.exitcode or 0)) from None
                raise


class _BatchTask(NamedTuple):
    """Task of a worker: the rows of one batch, and the version of the search vectors to use."""

    slices: list[BlockSlice]
    version: int


class _BatchMaker(Dataset):
    """Makes planned batches. Each worker has one; it keeps the decoded blocks that later batches still need."""

    def __init__(
        self,
        reader: BlockReader,
        histories: Histories,
        feature_map: BatchFeatures,
        as_of_limit_ms: int | None,
        frozen_statistics: FrozenStatistics | None,
        space: SearchSpace | None,
        left_to: DevicePlaces | None,
        *,
        batches: int,
    ) -> None:
        self._batches = batches
        self._reader, self._histories, self._feature_map = reader, histories, feature_map
        self._as_of_limit_ms, self._frozen, self._space = as_of_limit_ms, frozen_statistics, space
        self._left_to = left_to
        self._copy: SearchCopy | None = None
        """Copy of the shared vectors that a worker process reads in their place; None before its first batch."""

    def prepare(self) -> None:
        """Do the shared work before the worker processes are forked."""
        self._feature_map.prepare(self._histories, self._vectors(0))

    def __getitem__(self, task: _BatchTask) -> PackedBatch | UserError:
        try:
            packed = self._make(task)
            if get_worker_info() is not None:
                _share(packed, self._batches)
            return packed
        except UserError as error:
            # Returned as a value, because DataLoader adds the worker's traceback to the message of an exception.
            return error

    def _make(self, task: _BatchTask) -> PackedBatch:
        """Return the model inputs of one batch."""
        rows, skipped = self._reader.gather(task.slices)
        as_of = freeze_rows(rows, self._as_of_limit_ms, self._frozen)
        packed = self._feature_map.pack(rows, self._histories, as_of, self._vectors(task.version))
        return replace(packed, skipped_rows=skipped, version=task.version)

    def _vectors(self, version: int) -> Searched | None:
        """Return a version of the search vectors, or what takes their place; None if no feature needs them."""
        if self._left_to is not None:
            return self._left_to
        if self._space is None:
            return None
        worker = get_worker_info()
        if worker is None:
            return self._space.at(version)
        if self._copy is None:
            self._copy = SearchCopy(self._space, worker.num_workers * local_size())
        return self._copy.at(version)


def freeze_rows(rows: Rows, as_of_limit_ms: int | None, frozen: FrozenStatistics | None) -> np.ndarray:
    """Give rows the frozen statistics, if there are some, and return the times as of which their histories are read.

    Args:
        rows: the rows; ``stat`` is replaced.
        as_of_limit_ms: in an evaluation with frozen features, the end of training, where the histories end too.
        frozen: statistics at that time.
    """
    if frozen is not None:
        rows["stat"] = frozen.lookup(rows)
    return rows["request_ms"] if as_of_limit_ms is None else np.minimum(rows["request_ms"], as_of_limit_ms)


def _unchanged(made: Any) -> Any:
    """Return the batch as it is; used in place of DataLoader's collation of samples."""
    return made


def _share(packed: PackedBatch, batches: int) -> None:
    """Move a batch into shared memory, as DataLoader would when it sends the batch.

    DataLoader sends in a thread of the worker. An error there loses the batch, and the rank would wait for it forever.

    Args:
        packed: batch of a worker; its tensors are moved.
        batches: number of batches of this rank that are in shared memory at a time.

    Raises:
        UserError: shared memory is full, or the process has too many open files.
    """
    tensors = packed.buffers
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except (RuntimeError, OSError) as error:
        # torch has no type for it: the operating system's reason is in the message.
        if os.strerror(errno.EMFILE) in str(error):
            raise UserError("a loader worker has too many open files; raise the limit: ulimit -n 65536") from None
        if os.strerror(errno.ENOSPC) not in str(error) and os.strerror(errno.ENOMEM) not in str(error):
            raise
        size = sum(tensor.nbytes for tensor in tensors)
        need = f"a batch has {size_text(size)}, and a rank keeps up to {batches} of them, {size_text(size * batches)}"
        raise UserError(_full_message(need)) from None


def _check_locks(workers: int) -> None:
    """Check that shared memory has room for the locks of DataLoader's queues.

    DataLoader would fail half-way, and print a traceback of its clean-up in addition.

    Raises:
        UserError: shared memory is full.
    """
    locks = _LOCKS + _LOCKS_PER_WORKER * workers
    try:
        [multiprocessing.get_context("fork").Lock() for _ in range(locks)]
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        need = f"the locks of {workers} loader workers need {size_text(locks * mmap.PAGESIZE)}"
        raise UserError(_full_message(need)) from None


def _full_message(need: str) -> str:
    """Return the message for full shared memory; ``need`` says how much is needed."""
    disk = shutil.disk_usage(SHARED_MEMORY)
    return (
        f"shared memory is full: {SHARED_MEMORY} has {size_text(disk.free)} free of {size_text(disk.total)}; {need}; "
        "give it more (docker run --shm-size=8g, mount -o remount,size=8g /dev/shm), lower data.workers or "
        "data.prefetch, or set data.workers=0"
    )


def _set_up_worker(worker: int) -> None:
    """Set up a worker process, which starts with garbage collection off and SIGTERM blocked."""
    # Never collected here: the destructor of a process group that the rank has dropped waits for threads, and a fork
    # does not have them. The worker would hang, and the rank would wait for its batch forever.
    gc.freeze()
    gc.enable()
    _live_as_long_as_the_rank()


def _live_as_long_as_the_rank() -> None:
    """Let a worker process end when its rank ends, and not before.

    Pre-emption can send SIGTERM to all processes of a job, but the rank needs batches until it has saved its state, so
    a worker ignores SIGTERM unless it comes from its rank. A worker that outlived its rank would keep copies of the
    rank's connections open, and the other ranks would not notice that the rank is gone.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE):
        # Torch's handlers would print a fragment of a message; the rank reports the signal in a full one.
        signal.signal(number, signal.SIG_DFL)
    # SIGTERM is blocked since before the fork. A blocked signal can be received with sigwaitinfo, which returns the
    # sender; a Python handler does not get it.

    def wait_for_the_rank() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            continue
        os._exit(0)

    threading.Thread(target=wait_for_the_rank, daemon=True).start()


@contextmanager
def _signal_left_alone(number: int) -> Iterator[None]:
    """Restore the handler of a signal if the body of the ``with`` statement replaces it.

    DataLoader's handler of SIGCHLD raises an exception in the main thread when a worker dies, at any point, such as in
    a collective or a backward pass. The loader reports the death when the next batch is due, which is soon enough.
    """
    previous = signal.getsignal(number)
    try:
        yield
    finally:
        if signal.getsignal(number) is not previous:
            signal.signal(number, previous)


@contextmanager
def _signal_blocked(number: int) -> Iterator[None]:
    """Block a signal inside the ``with`` statement, and for good in the processes that are forked there.

    A pre-emption in the moment after the fork would end a worker that has not set itself up yet, and with it the rank.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    """Switch garbage collection off inside the ``with`` statement, and in the processes that are forked there."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _death_message(rank: int, pid: int | None, status: int) -> str:
    """Return the message for a worker that ended with a status as ``multiprocessing`` gives it."""
    ended = f"exited with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"
    why = {
        -signal.SIGKILL: " (out of memory?); lower data.workers or data.prefetch to need less memory",
        -signal.SIGBUS: " (is /dev/shm full, or was a file of the dataset's histories cut short?)",
    }.get(status, "")
    return f"rank {rank}: loader worker, process {pid}, {ended}{why}"
