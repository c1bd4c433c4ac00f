"""State of a stream on one rank: open visits, rows to train on, predictions without an outcome, and histories.

Time is the time of the watermark. All state is kept by partition, as plain arrays, so that it can be saved with the
model and divided among any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from trainer.config.stream import LabelConfig
from trainer.data.format.growing_history import VISIT_COLUMNS, GrowingHistories
from trainer.data.format.schema import DOMAINS, KINDS, DatasetSpec, Rows
from trainer.data.format.validation import Columns
from trainer.data.format.visit_events import label_bits
from trainer.stream.labels.assembled_rows import (
    END_OF_TIME,
    REASONS,
    AssembledRows,
    concatenate,
    no_events,
    no_rows,
    select_unused,
)
from trainer.stream.labels.partition_assemblers import PartitionAssemblers
from trainer.stream.labels.policy import Full, event_timeouts, report_policy
from trainer.stream.live.visit_features import VisitFeatureStore
from trainer.stream.sources.source import EventBatch

COUNTS = (
    *("events", "late", "no_open_visit", "requests", "without_features", "unanswered", "before_start"),
    *(f"rows_{kind}" for kind in KINDS),
)
"""Counters: events that arrived, unused events by reason, predicted requests, requests without logged features,
outcomes of requests that were not predicted, events that were skipped because the stream starts after them, and rows to
train on by their kind."""

_ORDER = ("request_ms", "visit_id", "user_id", "emit_ms")
"""Sort keys of rows, in the order of ``np.lexsort``: the last key is the most significant."""

_SLACK = 4096
"""Number of finished visits of a partition whose features may stay in memory before a clean-up."""

_Request = tuple[int, int, int]
"""``user_id, visit_id, request_ms``."""


class PredictedOutcomes(NamedTuple):
    """Outcomes of visits, and the predictions made at their requests.

    Attributes:
        rows: rows of kind ``full``: ``ROW_COLUMNS``.
        logits: ``[n, predicted behaviours]`` float32.
    """

    rows: Rows
    logits: np.ndarray


@dataclass
class _PartitionState:
    """State of one partition: rows to train on, requests to predict, ended visits, and predictions of open visits."""

    store: VisitFeatureStore
    rows: Rows
    requests: Rows
    ended: Rows
    predicted: dict[_Request, np.ndarray] = field(default_factory=dict)


class LiveStream:
    """State of the stream on one rank.

    Args:
        spec: description of the dataset, or of the data in the stream.
        labels: report policy and waiting times.
        partitions: partitions of this rank.
        histories: histories of this rank's users; visits are appended when they end.
        tags: function from item ids ``[n]`` to tags ``[n]`` int32.
        behaviours: number of behaviours that the model predicts.
        keep_arrivals: keep the arrival times of behaviours, for :meth:`arrived_ms`.

    Attributes:
        counts: counters of this rank, see :data:`COUNTS`.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        labels: LabelConfig,
        partitions: Sequence[int],
        histories: GrowingHistories,
        tags: Callable[[np.ndarray], np.ndarray],
        behaviours: int,
        keep_arrivals: bool,
    ) -> None:
        self._spec, self._histories, self._tags, self._behaviours = spec, histories, tags, behaviours
        self._timeouts = event_timeouts(labels)
        self._candidates = [DOMAINS.index(domain) for domain in spec.candidates]
        # Two assemblers: the job's policy makes rows to train on; the full policy makes outcomes and histories.
        self._labels = PartitionAssemblers(spec, report_policy(labels), self._timeouts, partitions)
        self._outcomes = PartitionAssemblers(spec, Full(), self._timeouts, partitions, DOMAINS)
        self._parts = {
            partition: _PartitionState(
                VisitFeatureStore(spec, keep_arrivals), no_rows(spec), no_rows(spec), no_rows(spec)
            )
            for partition in sorted(partitions)
        }
        self.counts = dict.fromkeys(COUNTS, 0)

    def push(self, batch: EventBatch) -> Columns:
        """Add the next events; return the unused ones with the reason, as ``AssembledRows.unused``."""
        unused = []
        for partition, part in batch.by_partition():
            self._parts[partition].store.add(part)
            assembled = self._labels.push(partition, part.events)
            # This assembler takes all domains, so its unused events include those of the other assembler.
            ended = self._outcomes.push(partition, part.events)
            unused.append(ended.unused)
            self._keep(partition, assembled, ended)
        self.counts["events"] += len(batch)
        return self._count_unused(unused)

    def advance(self, until_ms: int = END_OF_TIME) -> Columns:
        """Advance to ``until_ms``, before which all events have arrived; return unused events as :meth:`push` does."""
        # Events may still arrive out of order by this much.
        watermark_ms = END_OF_TIME if until_ms == END_OF_TIME else until_ms - self._timeouts.max_out_of_orderness_ms
        unused = []
        for partition, part in self._parts.items():
            ended = self._outcomes.advance(partition, watermark_ms)
            unused.append(ended.unused)
            self._keep(partition, self._labels.advance(partition, watermark_ms), ended)
            self._drop_finished(partition, part)
        return self._count_unused(unused)

    def trainable(self, before_ms: int) -> int:
        """Return the number of rows whose labels were complete before ``before_ms``."""
        return sum(int(np.searchsorted(part.rows["emit_ms"], before_ms)) for part in self._parts.values())

    @property
    def unpredicted(self) -> int:
        """Number of requests and outcomes that :meth:`take_requests` and :meth:`take_outcomes` would return."""
        return sum(len(part.requests["user_id"]) + len(part.ended["user_id"]) for part in self._parts.values())

    def take_rows(self, before_ms: int) -> Rows:
        """Remove and return the rows whose labels were complete before ``before_ms``, with their features.

        Returns:
            Columns of ``schema.row_columns`` and ``partition``, in the order of ``(emit_ms, user_id, visit_id,
            request_ms)``.
        """
        taken = []
        for partition, part in self._parts.items():
            stop = int(np.searchsorted(part.rows["emit_ms"], before_ms))
            # Rows of a partition are in order of ``emit_ms``, so a prefix is complete.
            rows, part.rows = _cut(part.rows, stop)
            taken.append(_with_partition(partition, rows | part.store.features(rows)[0]))
            for kind, count in zip(KINDS, np.bincount(rows["kind"], minlength=len(KINDS)).tolist(), strict=True):
                self.counts[f"rows_{kind}"] += count
        return _in_order(taken)

    def take_requests(self) -> Rows:
        """Return the requests in candidate domains since the last call, with their features; labels and masks are 0.

        Returns:
            Columns and order as of :meth:`take_rows`.
        """
        taken = []
        for partition, part in self._parts.items():
            requests, part.requests = part.requests, no_rows(self._spec)
            features, missing = part.store.features(requests)
            self.counts["requests"] += len(requests["user_id"])
            self.counts["without_features"] += missing
            taken.append(_with_partition(partition, requests | features))
        return _in_order(taken)

    def add_predictions(self, requests: Rows, logits: np.ndarray) -> None:
        """Keep the predictions of requests until their outcomes are known.

        Args:
            requests: ``n`` requests from :meth:`take_requests`.
            logits: ``[n, behaviours]`` float32.
        """
        for partition, key, logit in zip(requests["partition"].tolist(), _requests(requests), logits, strict=True):
            self._parts[partition].predicted[key] = logit

    def take_outcomes(self) -> PredictedOutcomes:
        """Return the candidate visits that have ended since the last call, with their predictions, in order."""
        rows, logits = [], [np.empty((0, self._behaviours), np.float32)]
        for part in self._parts.values():
            ended, part.ended = part.ended, no_rows(self._spec)
            # An outcome may come without a prediction; such outcomes are counted and left out.
            predictions = [part.predicted.pop(key, None) for key in _requests(ended)]
            known = [place for place, logit in enumerate(predictions) if logit is not None]
            self.counts["unanswered"] += len(predictions) - len(known)
            rows.append({name: column[known] for name, column in ended.items()})
            logits += [logit[None] for logit in predictions if logit is not None]
        joined = concatenate(rows)
        order = np.lexsort([joined[name] for name in _ORDER])
        return PredictedOutcomes(
            {name: column[order] for name, column in joined.items()}, np.concatenate(logits)[order]
        )

    def arrived_ms(self, rows: Rows) -> np.ndarray:
        """Return the arrival times of the behaviours of rows just taken, as ``VisitFeatureStore.arrived_ms``."""
        out = np.empty(rows["label"].shape, np.int64)
        for partition, part in self._parts.items():
            at = np.flatnonzero(rows["partition"] == partition)
            out[at] = part.store.arrived_ms({name: rows[name][at] for name in ("user_id", "visit_id", "label")})
        return out

    def state_dict(self) -> dict[str, Any]:
        """Return the complete state by partition, and the counters of this rank."""
        labels, outcomes, histories = (part.state_dict() for part in (self._labels, self._outcomes, self._histories))
        return {
            "counts": dict(self.counts),
            "partitions": {
                partition: {
                    "labels": labels[partition],
                    "outcomes": outcomes[partition],
                    "history": histories[partition],
                    "facts": part.store.state_dict(),
                    "rows": part.rows,
                    "requests": part.requests,
                    "ended": part.ended,
                    "predicted": {
                        "requests": np.array(list(part.predicted), np.int64).reshape(-1, 3),
                        "logits": np.array(list(part.predicted.values()), np.float32).reshape(-1, self._behaviours),
                    },
                }
                for partition, part in self._parts.items()
            },
        }

    def load_state_dict(self, states: Sequence[Mapping[str, Any]], counted: Sequence[int]) -> None:
        """Load the partitions of this rank from the states of any number of ranks.

        Args:
            states: ``state_dict`` of every rank that saved, in order of rank.
            counted: positions of the states whose counters this rank continues; each state is counted by one rank.

        Raises:
            UserError: the open visits were saved under another policy or other timeouts.
            ValueError: a partition of this rank is in none of the states, or a partition is in two.
        """
        self._labels.load_state_dict(_entries(states, "labels"))
        self._outcomes.load_state_dict(_entries(states, "outcomes"))
        # A duplicate partition was refused by the assemblers above.
        everything = {partition: saved for state in states for partition, saved in state["partitions"].items()}
        self._histories.load_state_dict({partition: saved["history"] for partition, saved in everything.items()})
        for partition, part in self._parts.items():
            saved = everything[partition]
            part.store.load_state_dict(saved["facts"])
            part.rows, part.requests, part.ended = (dict(saved[name]) for name in ("rows", "requests", "ended"))
            keys = (tuple(key) for key in saved["predicted"]["requests"].tolist())
            part.predicted = dict(zip(keys, saved["predicted"]["logits"], strict=True))
        self.counts = {name: sum(states[rank]["counts"].get(name, 0) for rank in counted) for name in COUNTS}

    def _keep(self, partition: int, assembled: AssembledRows, ended: AssembledRows) -> None:
        """Store the output of both assemblers, and append the ended visits to the histories."""
        part = self._parts[partition]
        part.rows = concatenate([part.rows, assembled.rows])
        part.requests = concatenate([part.requests, _request_rows(self._spec, assembled.started)])
        # Visits of other domains enter the histories, but are not predicted.
        in_candidates = np.isin(ended.rows["domain"], self._candidates)
        part.ended = concatenate([part.ended, {name: column[in_candidates] for name, column in ended.rows.items()}])
        visits = self._visits(part.store, ended.rows)
        self._histories.append(partition, visits, self._outcomes[partition].watermark_ms)

    def _visits(self, store: VisitFeatureStore, rows: Rows) -> Columns:
        """Return the ended visits with watch time or a behaviour, in the form of histories."""
        watched_ms = store.watched_ms(rows, self._timeouts.idle_ms)
        bits = label_bits(rows["label"])
        # A visit without watch time and behaviour tells nothing about the user.
        kept = np.flatnonzero((watched_ms > 0) | (bits != 0))
        columns = {
            **{name: rows[name][kept] for name in ("user_id", "domain", "item_id", "author_id", "request_ms")},
            "play_ms": watched_ms[kept],
            "bits": bits[kept],
            "known_ms": rows["emit_ms"][kept],
            "tag": self._tags(rows["item_id"][kept]),
        }
        return {name: columns[name] for name in VISIT_COLUMNS}

    def _drop_finished(self, partition: int, part: _PartitionState) -> None:
        """Drop the features and predictions of visits that can give no more rows."""
        # Listing the unfinished visits takes long, so it waits until the store is clearly too large.
        assemblers = [self._labels[partition], self._outcomes[partition]]
        waiting = [part.rows, part.requests, part.ended]
        needed_visits = sum(assembler.open_visits + assembler.waiting_events for assembler in assemblers) + len(
            part.predicted
        )
        if part.store.visits <= 2 * needed_visits + sum(len(rows["user_id"]) for rows in waiting) + _SLACK:
            return
        unfinished = {key for assembler in assemblers for key in assembler.unfinished()}
        unfinished |= {(user, visit) for rows in waiting for user, visit, _ in _requests(rows)}
        part.store.keep_only(unfinished)
        part.predicted = {key: logit for key, logit in part.predicted.items() if key[:2] in unfinished}

    def _count_unused(self, unused: Sequence[Columns]) -> Columns:
        """Count unused events by reason; return them concatenated."""
        joined = concatenate(list(unused)) if unused else select_unused(no_events(), np.empty(0, np.int64), 0)
        for code, reason in enumerate(REASONS):
            self.counts[reason] += int((joined["reason"] == code).sum())
        return joined


def _request_rows(spec: DatasetSpec, started: Rows) -> Rows:
    """Return started visits as rows without labels."""
    rows = no_rows(spec)
    n = len(started["user_id"])
    blank = {name: np.zeros((n, *column.shape[1:]), column.dtype) for name, column in rows.items()}
    return blank | started | {"emit_ms": started["request_ms"]}


def _requests(rows: Mapping[str, np.ndarray]) -> list[_Request]:
    """Return the key of the request of each row."""
    return list(zip(*(rows[name].tolist() for name in ("user_id", "visit_id", "request_ms")), strict=True))


def _with_partition(partition: int, rows: Rows) -> Rows:
    """Return rows with a column ``partition``."""
    return rows | {"partition": np.full(len(rows["user_id"]), partition, np.int64)}


def _cut(rows: Rows, at: int) -> tuple[Rows, Rows]:
    """Return the rows before position ``at`` and the rows from it on."""
    return {name: column[:at] for name, column in rows.items()}, {name: column[at:] for name, column in rows.items()}


def _in_order(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all parts, sorted by ``_ORDER``."""
    joined = concatenate(parts)
    order = np.lexsort([joined[name] for name in _ORDER])
    return {name: column[order] for name, column in joined.items()}


def _entries(states: Sequence[Mapping[str, Any]], name: str) -> Iterable[dict[int, Any]]:
    """Return the entry ``name`` of every partition of every state."""
    return [{partition: saved[name] for partition, saved in state["partitions"].items()} for state in states]
