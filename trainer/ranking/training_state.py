"""State of the training of a ranker beside its weights: progress, metrics, read position."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.data.features.search_vectors import SearchSpace
from trainer.data.loading.batch import ReadPosition
from trainer.engine.hybrid_engine import HybridEngine, StepResult
from trainer.metrics.behaviour_metrics import ProgressiveMetrics, Report
from trainer.runtime.background_calls import BackgroundCalls
from trainer.runtime.distributed import World
from trainer.runtime.phase_timer import PHASES
from trainer.sparse.dynamic_ids import IdCounts

MetricHistory = list[dict[str, Any]]
"""Metrics and rates of training, an entry every ``train.log_every`` steps; see :meth:`MetricWindow.entry`."""


class StreamState(Protocol):
    """State of a training stream beside its position; ``trainer.ranking.training_stream`` implements it."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank, as tensors, numbers and strings."""

    def load_state_dicts(self, states: Sequence[dict[str, Any]], counted: Sequence[int]) -> None:
        """Load the states of all ranks; this rank takes over the counts of the stored ranks ``counted``."""


class MetricWindow:
    """Sums over the steps since the last entry of the metric history."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._ended: float | None = None
        self._loss, self._alignment, self._rows, self._skipped = 0.0, 0.0, 0, 0
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @property
    def rows(self) -> int:
        """Return the number of rows of the steps so far."""
        return self._rows

    def add(self, result: StepResult) -> None:
        """Add a step; on a GPU this waits for it."""
        self._loss += result.values.loss * result.rows_global
        self._alignment += result.values.alignment * result.rows_global
        self._rows += result.rows_global
        self._skipped += result.batch.skipped_rows
        for phase in PHASES:
            self._seconds[phase] += result.seconds[phase]

    def end(self) -> None:
        """Stop the clock: the rate is that until now, whenever the entry is made."""
        self._ended = time.perf_counter()

    @property
    def _elapsed(self) -> float:
        return (time.perf_counter() if self._ended is None else self._ended) - self._started

    def entry(self, step: int, metrics: Report, ids: Mapping[str, IdCounts]) -> dict[str, Any]:
        """Return an entry of the metric history; ``ids`` are the counts of dynamic tables since the first step."""
        return {
            "step": step,
            "loss": self._loss / max(self._rows, 1),
            "alignment": self._alignment / max(self._rows, 1),
            "rows": self._rows,
            "skipped_rows": self._skipped,
            "rows_per_second": self._rows / self._elapsed,
            "auc": {name: values["auc"] for name, values in metrics.items()},
            "gauc": {name: values["gauc"] for name, values in metrics.items()},
            "ids": {table: asdict(counts) for table, counts in ids.items()},
            **self._seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, and the seconds since the window began."""
        return {
            "loss": self._loss,
            "alignment": self._alignment,
            "rows": self._rows,
            "skipped": self._skipped,
            "seconds": dict(self._seconds),
            "elapsed": self._elapsed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`."""
        self._loss, self._rows, self._skipped = state["loss"], state["rows"], state["skipped"]
        # Checkpoints of versions without an alignment loss do not have it.
        self._alignment = state.get("alignment", 0.0)
        self._seconds = dict(state["seconds"])
        self._started = time.perf_counter() - state["elapsed"]


@dataclass
class TrainingState:
    """Progress of the training of a model.

    Attributes:
        progressive: metrics of this rank's rows, each predicted before it was trained on.
        rows_total: rows of all ranks over all epochs; 0 for a stream.
        step: number of optimizer steps.
        rows_done: rows trained on by all ranks, with those that were read and left out.
        position: read position of this rank's partitions.
        metric_history: entries so far; equal on all ranks except for the seconds.
        window: sums for the next entry.
        finished: True if all rows are trained on.
        stream: state of the stream; ``None`` for stored rows.
        space: search vectors of the histories; ``None`` if no history needs them.

    The values of a step are read when the next step has been queued, so that the host does not wait for the device:
    ``window`` lacks the last step until :meth:`settle`. ``progressive`` and ``metric_history`` lack the last steps
    until then, since inside of :meth:`recording` a thread may update them.
    """

    progressive: ProgressiveMetrics
    rows_total: int = 0
    step: int = 0
    rows_done: int = 0
    position: ReadPosition = field(default_factory=dict)
    metric_history: MetricHistory = field(default_factory=list)
    window: MetricWindow = field(default_factory=MetricWindow)
    finished: bool = False
    stream: StreamState | None = None
    space: SearchSpace | None = None
    _unread: list[Callable[[], None]] = field(default_factory=list)
    _calls: BackgroundCalls = field(default_factory=BackgroundCalls)
    _group: dist.ProcessGroup | None = None

    @staticmethod
    def at_start(
        behaviours: Sequence[str], stream: StreamState | None = None, space: SearchSpace | None = None
    ) -> TrainingState:
        """Return the state of a new model."""
        return TrainingState(ProgressiveMetrics(behaviours), stream=stream, space=space)

    @contextmanager
    def recording(self, engine: HybridEngine, world: World) -> Iterator[None]:
        """Record metrics in a thread while this context is open, if the engine reads the losses later. Collective.

        Their results, and all that a checkpoint holds, do not depend on it.
        """
        threaded = engine.reads_later
        # The thread's collectives have a group of their own, since those of the training go on meanwhile.
        self._group = dist.new_group(backend="gloo") if threaded else world.control
        with BackgroundCalls(threaded) as self._calls:
            yield
        if threaded:
            # A rank that leaves early would close connections that slower ranks still read from.
            world.barrier()
            dist.destroy_process_group(self._group)
        self._calls, self._group = BackgroundCalls(), None

    def predicted(self, user_id: Tensor, logits: Tensor, label: Tensor, mask: Tensor) -> None:
        """Add rows to the progressive metrics, in host memory: ``[n]``, and ``[n, behaviours]`` each.

        Raises:
            UserError: see :meth:`record_entry`.
        """
        if self.progressive.behaviours:
            self._calls.call(lambda: self.progressive.update(user_id, torch.sigmoid(logits), label, mask))

    def record_entry(
        self, step: int, ids: Mapping[str, IdCounts], more: Mapping[str, Any], write: Callable[[dict[str, Any]], None]
    ) -> None:
        """Add an entry to the metric history, and begin a new window. Collective.

        Args:
            step: number of the last step of the window.
            ids: counts of dynamic tables after this step.
            more: further values of the entry.
            write: called with the entry.

        Raises:
            UserError: a prediction of this entry is NaN or infinite, or, with a thread, one of the entry before; raised
                on every rank.
        """
        group, window = self._group, self.window
        self.window = MetricWindow()
        window.end()

        def record() -> None:
            entry = {**window.entry(step, self.progressive.compute(group), ids), **more}
            self.metric_history.append(entry)
            write(entry)

        self._calls.call(record)

    def advance(self, result: StepResult) -> None:
        """Count a completed step, and read the values of the one before."""
        self.read()
        self.step += 1
        self.rows_done += result.rows_read
        self.position = result.batch.position or self.position
        self._unread = [lambda: self.window.add(result)]

    def when_read(self, record: Callable[[], None]) -> None:
        """Call ``record`` after the values of the last step are in the window; on all ranks if it is collective."""
        self._unread.append(record)

    def settle(self) -> None:
        """Read the last step, and wait until all metrics are recorded.

        Raises:
            UserError: see :meth:`record_entry`.
        """
        self.read()
        self._calls.settle()

    def read(self) -> None:
        """Read the values of the last step, if that is still to be done; on a GPU this waits for it."""
        unread, self._unread = self._unread, []
        for record in unread:
            record()
