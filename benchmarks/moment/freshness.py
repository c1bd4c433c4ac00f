"""Delays from behaviours to labels and to updated parameters, for :mod:`benchmarks.moment`."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.moment.run import train_on
from benchmarks.moment.world import BEHAVIOURS
from trainer.config.load import parse_time
from trainer.config.ranker import JobConfig
from trainer.data.format.schema import Rows
from trainer.data.format.validation import Columns
from trainer.ranking.training_stream import TrainingStream
from trainer.runtime.distributed import World
from trainer.stream.labels.assembled_rows import END_OF_TIME, FIRST_BEHAVIOUR, concatenate
from trainer.stream.labels.batch_assembler import assemble_batch
from trainer.stream.labels.event_log import EventLog
from trainer.stream.labels.policy import event_timeouts, report_policy
from trainer.stream.live.freshness import Freshness
from trainer.stream.live.visit_features import NEVER

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


def quantiles(seconds: np.ndarray) -> dict[str, float | int | None]:
    """Return the ``count`` of delays and their quantiles ``p10``, ``p25`` and so on, None without any delay."""
    values = np.quantile(seconds, QUANTILES).round(1).tolist() if len(seconds) else [None] * len(QUANTILES)
    names = [f"p{round(100 * quantile)}" for quantile in QUANTILES]
    return {"count": len(seconds), **dict(zip(names, values, strict=True))}


def label_delays(config: JobConfig) -> dict[str, Any]:
    """Return the delays from behaviours to the rows with their labels, over a log from the beginning of its stream.

    They follow from the rules of the policy alone, so no machine can be faster.

    Returns:
        ``rows`` of the policy, and per behaviour: ``yes``, :func:`quantiles` from its first occurrence to the first
        row with that label; ``untold``, the share that no row ever has; and ``no``, quantiles from the request to the
        last row with a negative label, of visits without the behaviour.
    """
    log = EventLog(config.data.path)
    begin_ms = parse_time(config.data.train_until, log.spec.timezone, "data.train_until")
    rows, events = [], []
    for partition in range(log.spec.partitions):
        part = log.read(partition)
        inside = part["time_ms"] >= begin_ms
        part = {name: column[inside] for name, column in part.items()}
        rows.append(assemble_batch(log.spec, report_policy(config.labels), event_timeouts(config.labels), part).rows)
        events.append(part)
    joined, happened = concatenate(rows), concatenate(events)
    of_behaviours = {name: _delays(joined, happened, k) for k, name in enumerate(log.spec.behaviours)}
    return {"rows": len(joined["visit_id"]), **of_behaviours}


def _delays(rows: Rows, events: Columns, behaviour: int) -> dict[str, Any]:
    visits = int(max(rows["visit_id"].max(), events["visit_id"].max())) + 1
    shown = np.zeros(visits, bool)
    shown[rows["visit_id"]] = True
    first_ms, yes_ms = np.full(visits, END_OF_TIME), np.full(visits, END_OF_TIME)
    no_ms, request_ms = np.zeros(visits, np.int64), np.zeros(visits, np.int64)
    happened = events["event"] == FIRST_BEHAVIOUR + behaviour
    np.minimum.at(first_ms, events["visit_id"][happened], events["time_ms"][happened])
    labelled = rows["mask"][:, behaviour] > 0
    yes = labelled & (rows["label"][:, behaviour] > 0)
    np.minimum.at(yes_ms, rows["visit_id"][yes], rows["emit_ms"][yes])
    np.maximum.at(no_ms, rows["visit_id"][labelled & ~yes], rows["emit_ms"][labelled & ~yes])
    request_ms[rows["visit_id"]] = rows["request_ms"]
    positive = shown & (first_ms != END_OF_TIME)
    known = positive & (yes_ms != END_OF_TIME)
    negative = shown & (first_ms == END_OF_TIME) & (no_ms > 0)
    return {
        "yes": quantiles((yes_ms[known] - first_ms[known]) / 1000),
        "untold": float(1 - known.sum() / max(positive.sum(), 1)),
        "no": quantiles((no_ms[negative] - request_ms[negative]) / 1000),
    }


def play(config: JobConfig, world: World) -> dict[str, Any]:
    """Play a stream in real time; return the delays from behaviours to the training steps that learn them.

    Rows that are learnt only because the stream has ended do not count: they would have come later.

    Returns:
        Behaviour -> :func:`quantiles`; and ``least`` and ``most``, the seconds that the settings allow from a complete
        row to the step that learns it: rows wait for ``max_out_of_orderness_seconds`` twice, for the end of their
        slice, and for the next of the steps that are made every ``flush_seconds``.
    """
    delays = _Delays()
    train_on(config, world, delays.listen_to)
    settings = config.stream
    assert settings is not None
    waits = 2 * config.labels.max_out_of_orderness_seconds
    return {
        "least": waits,
        "most": waits + settings.slice_seconds + settings.flush_seconds,
        **delays.by_behaviour(BEHAVIOURS),
    }


class _Delays(Freshness):
    """Every delay of a stream."""

    def __init__(self) -> None:
        super().__init__()
        self._stream: TrainingStream | None = None
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []

    def listen_to(self, stream: TrainingStream) -> None:
        """Replace the stream's own freshness."""
        self._stream, stream.freshness = stream, self

    def add(self, arrived_ms: np.ndarray, counts: np.ndarray, now_ms: int) -> None:
        """Keep the delays of rows that were learnt while the stream was open; arguments as `Freshness.add`."""
        assert self._stream is not None
        if self._stream.seen_until_ms != END_OF_TIME:
            row, behaviour = np.nonzero(counts & (arrived_ms != NEVER))
            self._kept.append((behaviour, (now_ms - arrived_ms[row, behaviour]) / 1000))

    def by_behaviour(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Return the quantiles of each behaviour on this rank."""
        behaviour, seconds = (np.concatenate(column) for column in zip(*self._kept, strict=True))
        return {name: quantiles(seconds[behaviour == k]) for k, name in enumerate(names)}
