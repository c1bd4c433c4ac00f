"""What training knows beside the model: how far it is, and what it has seen so far."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from trainer.data.features.search_vectors import SearchSpace
from trainer.data.loading.batch import ReadPosition
from trainer.engine.hybrid_engine import StepResult
from trainer.metrics.behaviour_metrics import ProgressiveMetrics, Report
from trainer.runtime.phase_timer import PHASES
from trainer.sparse.dynamic_ids import IdCounts

Trace = list[dict[str, Any]]
"""Metrics and rates of training, an entry every ``train.log_every`` steps; see ``trainer.ranking.report``."""


class StreamState(Protocol):
    """What a stream of training must keep beside its position: ``trainer.ranking.training_stream.TrainingStream``."""

    def state_dict(self) -> dict[str, Any]:
        """Of this rank, as tensors, numbers and strings."""

    def load_state_dicts(self, states: Sequence[dict[str, Any]], counted: Sequence[int]) -> None:
        """Go on from what all ranks have saved; the counts of the ranks ``counted`` are this rank's."""


class Window:
    """Sums over the steps since the last entry of the trace."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._loss, self._alignment, self._rows, self._skipped = 0.0, 0.0, 0, 0
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @property
    def rows(self) -> int:
        """Rows of the steps so far."""
        return self._rows

    def add(self, result: StepResult) -> None:
        """Count a step."""
        self._loss += float(result.loss) * result.rows_global
        self._alignment += float(result.alignment) * result.rows_global
        self._rows += result.rows_global
        self._skipped += result.batch.skipped_rows
        for phase in PHASES:
            self._seconds[phase] += result.seconds[phase]

    def entry(self, step: int, metrics: Report, ids: Mapping[str, IdCounts]) -> dict[str, Any]:
        """An entry of the trace; ``ids`` are the counts of dynamic tables since the first step."""
        return {
            "step": step,
            "loss": self._loss / max(self._rows, 1),
            "alignment": self._alignment / max(self._rows, 1),
            "rows": self._rows,
            "skipped_rows": self._skipped,
            "rows_per_second": self._rows / (time.perf_counter() - self._started),
            "auc": {name: values["auc"] for name, values in metrics.items()},
            "gauc": {name: values["gauc"] for name, values in metrics.items()},
            "ids": {table: asdict(counts) for table, counts in ids.items()},
            **self._seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """The sums, and the seconds that they took."""
        return {
            "loss": self._loss,
            "alignment": self._alignment,
            "rows": self._rows,
            "skipped": self._skipped,
            "seconds": dict(self._seconds),
            "elapsed": time.perf_counter() - self._started,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._loss, self._rows, self._skipped = state["loss"], state["rows"], state["skipped"]
        # Checkpoints of before there was an alignment do not have it.
        self._alignment = state.get("alignment", 0.0)
        self._seconds = dict(state["seconds"])
        self._started = time.perf_counter() - state["elapsed"]


@dataclass
class TrainingState:
    """How far the training of a model is.

    Attributes:
        progressive: metrics of this rank's rows, each predicted before it was learnt.
        rows_total: rows of all ranks over all epochs; 0 of a stream.
        step: optimizer steps done.
        rows_done: rows of all ranks trained on.
        position: where this rank's reading stands.
        trace: entries so far; the same on all ranks but for the seconds.
        window: towards the next entry.
        finished: all rows are trained on.
        stream: where the stream stands that is trained on; None of stored rows.
        space: vectors that histories are searched with; None if there are no such histories.
    """

    progressive: ProgressiveMetrics
    rows_total: int = 0
    step: int = 0
    rows_done: int = 0
    position: ReadPosition = field(default_factory=dict)
    trace: Trace = field(default_factory=list)
    window: Window = field(default_factory=Window)
    finished: bool = False
    stream: StreamState | None = None

    space: SearchSpace | None = None

    @staticmethod
    def at_start(
        behaviours: Sequence[str], stream: StreamState | None = None, space: SearchSpace | None = None
    ) -> TrainingState:
        """Of a model that has not been trained."""
        return TrainingState(ProgressiveMetrics(behaviours), stream=stream, space=space)

    def advance(self, result: StepResult) -> None:
        """Count a step."""
        self.step += 1
        self.rows_done += result.rows_global
        self.position = result.batch.position or self.position
        self.window.add(result)
