"""What a rank knows of a stream: open visits, rows not yet trained on, predictions not yet answered, histories.

Time is the watermark's. Everything a partition tells is kept by partition, as plain arrays, so that it can be saved
with the model and dealt out to any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from trainer.config.stream import LabelConfig
from trainer.data.format.growing_history import VISIT_COLUMNS, GrowingHistories
from trainer.data.format.schema import DOMAINS, DatasetSpec, Rows
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

COUNTS = ("events", "late", "no_open_visit", "requests", "without_features", "unanswered")
"""What is counted: events that arrived, those unused by reason, requests predicted, those whose features were not
logged, and requests whose outcome came without a prediction to compare it with."""

_ORDER = ("request_ms", "visit_id", "user_id", "emit_ms")
"""Keys of the order of rows, the last one first."""

_SLACK = 4096
"""Visits of a partition that facts may be kept of beyond those that need them, before they are looked for."""

_Request = tuple[int, int, int]
"""``user_id, visit_id, request_ms``."""


class PredictedOutcomes(NamedTuple):
    """Outcomes of visits beside what was predicted when they were requested.

    Attributes:
        rows: of kind ``full``: ``ROW_COLUMNS``.
        logits: ``[n, predicted behaviours]`` float32.
    """

    rows: Rows
    logits: np.ndarray


@dataclass
class _PartitionState:
    """Of one partition: rows to train on, requests to predict, ended visits, and what was predicted of open ones."""

    facts: VisitFeatureStore
    rows: Rows
    requests: Rows
    ended: Rows
    predicted: dict[_Request, np.ndarray] = field(default_factory=dict)


class LiveStream:
    """The stream as a rank has it.

    Args:
        spec: of the dataset, or of what the stream carries.
        labels: report policy and timeouts.
        partitions: those of this rank.
        histories: of this rank's users; visits are added as they end.
        tags: item ids ``[n]`` -> their tags ``[n]`` int32.
        behaviours: number that the model predicts.
        keep_arrivals: remember when behaviours arrived, for :meth:`arrived_ms`.

    Attributes:
        counts: of this rank, see :data:`COUNTS`.
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
        """Take the next events; gives those that changed no row, with the reason (``AssembledRows.unused``)."""
        unused = []
        for partition, part in batch.by_partition():
            self._parts[partition].facts.add(part)
            assembled = self._labels.push(partition, part.events)
            # Of both domains, and so all that the other one sets unused.
            ended = self._outcomes.push(partition, part.events)
            unused.append(ended.unused)
            self._keep(partition, assembled, ended)
        self.counts["events"] += len(batch)
        return self._counted(unused)

    def advance(self, until_ms: int = END_OF_TIME) -> Columns:
        """Take it that all events before ``until_ms`` have come; histories grow. Gives what :meth:`push` does."""
        watermark_ms = END_OF_TIME if until_ms == END_OF_TIME else until_ms - self._timeouts.max_out_of_orderness_ms
        unused = []
        for partition, part in self._parts.items():
            ended = self._outcomes.advance(partition, watermark_ms)
            unused.append(ended.unused)
            self._keep(partition, self._labels.advance(partition, watermark_ms), ended)
            self._let_go(partition, part)
        return self._counted(unused)

    def trainable(self, before_ms: int) -> int:
        """Rows whose labels were complete before a time."""
        return sum(int(np.searchsorted(part.rows["emit_ms"], before_ms)) for part in self._parts.values())

    @property
    def unpredicted(self) -> int:
        """Requests and outcomes that :meth:`take_requests` and :meth:`take_outcomes` would give."""
        return sum(len(part.requests["user_id"]) + len(part.ended["user_id"]) for part in self._parts.values())

    def take_rows(self, before_ms: int) -> Rows:
        """The rows of all partitions whose labels were complete before a time, with their features, in order.

        Returns:
            Columns of ``schema.row_columns`` and ``partition``, in the order of ``(emit_ms, user_id, visit_id,
            request_ms)``.
        """
        taken = []
        for partition, part in self._parts.items():
            stop = int(np.searchsorted(part.rows["emit_ms"], before_ms))
            rows, part.rows = _cut(part.rows, stop)
            taken.append(_of(partition, rows | part.facts.features(rows)[0]))
        return _in_order(taken)

    def take_requests(self) -> Rows:
        """The requests of candidates since the last call, with their features; labels and masks are 0.

        Returns:
            As of :meth:`take_rows`.
        """
        taken = []
        for partition, part in self._parts.items():
            requests, part.requests = part.requests, no_rows(self._spec)
            features, missing = part.facts.features(requests)
            self.counts["requests"] += len(requests["user_id"])
            self.counts["without_features"] += missing
            taken.append(_of(partition, requests | features))
        return _in_order(taken)

    def predicted(self, requests: Rows, logits: np.ndarray) -> None:
        """Keep what was predicted of requests until their outcome is known.

        Args:
            requests: n of those that :meth:`take_requests` gave.
            logits: ``[n, behaviours]`` float32.
        """
        for partition, key, logit in zip(requests["partition"].tolist(), _requests(requests), logits, strict=True):
            self._parts[partition].predicted[key] = logit

    def take_outcomes(self) -> PredictedOutcomes:
        """The candidates' visits that have ended since the last call, with what was predicted of them, in order."""
        rows, logits = [], [np.empty((0, self._behaviours), np.float32)]
        for part in self._parts.values():
            ended, part.ended = part.ended, no_rows(self._spec)
            found = [part.predicted.pop(key, None) for key in _requests(ended)]
            known = [place for place, logit in enumerate(found) if logit is not None]
            self.counts["unanswered"] += len(found) - len(known)
            rows.append({name: column[known] for name, column in ended.items()})
            logits += [logit[None] for logit in found if logit is not None]
        joined = concatenate(rows)
        order = np.lexsort([joined[name] for name in _ORDER])
        return PredictedOutcomes(
            {name: column[order] for name, column in joined.items()}, np.concatenate(logits)[order]
        )

    def arrived_ms(self, rows: Rows) -> np.ndarray:
        """Arrival time of each behaviour of rows that have just been taken, see ``VisitFeatureStore.arrived_ms``."""
        out = np.empty(rows["label"].shape, np.int64)
        for partition, part in self._parts.items():
            at = np.flatnonzero(rows["partition"] == partition)
            out[at] = part.facts.arrived_ms({name: rows[name][at] for name in ("user_id", "visit_id", "label")})
        return out

    def state_dict(self) -> dict[str, Any]:
        """All that the rows and predictions to come depend on: by partition, and the counts of this rank."""
        labels, outcomes, histories = (part.state_dict() for part in (self._labels, self._outcomes, self._histories))
        return {
            "counts": dict(self.counts),
            "partitions": {
                partition: {
                    "labels": labels[partition],
                    "outcomes": outcomes[partition],
                    "history": histories[partition],
                    "facts": part.facts.state_dict(),
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
        """Go on from what any number of ranks have saved.

        Args:
            states: ``state_dict`` of every rank that saved, in order of rank.
            counted: those of them whose counts this rank goes on with; each of them is some rank's.

        Raises:
            UserError: the open visits were assembled under another policy or timeouts.
            ValueError: a partition of this rank is in none of the states, or in two.
        """
        self._labels.load_state_dict(_named(states, "labels"))
        self._outcomes.load_state_dict(_named(states, "outcomes"))
        everything = {partition: saved for state in states for partition, saved in state["partitions"].items()}
        self._histories.load_state_dict({partition: saved["history"] for partition, saved in everything.items()})
        for partition, part in self._parts.items():
            saved = everything[partition]
            part.facts.load_state_dict(saved["facts"])
            part.rows, part.requests, part.ended = (dict(saved[name]) for name in ("rows", "requests", "ended"))
            keys = (tuple(key) for key in saved["predicted"]["requests"].tolist())
            part.predicted = dict(zip(keys, saved["predicted"]["logits"], strict=True))
        self.counts = {name: sum(states[rank]["counts"][name] for rank in counted) for name in COUNTS}

    def _keep(self, partition: int, assembled: AssembledRows, ended: AssembledRows) -> None:
        part = self._parts[partition]
        part.rows = concatenate([part.rows, assembled.rows])
        part.requests = concatenate([part.requests, _requested(self._spec, assembled.started)])
        of_candidates = np.isin(ended.rows["domain"], self._candidates)
        part.ended = concatenate([part.ended, {name: column[of_candidates] for name, column in ended.rows.items()}])
        visits = self._visits(part.facts, ended.rows)
        self._histories.append(partition, visits, self._outcomes[partition].watermark_ms)

    def _visits(self, facts: VisitFeatureStore, rows: Rows) -> Columns:
        """The visits that ended, were watched or acted upon, as histories take them."""
        watched_ms = facts.watched_ms(rows, self._timeouts.idle_ms)
        bits = label_bits(rows["label"])
        kept = np.flatnonzero((watched_ms > 0) | (bits != 0))
        columns = {
            **{name: rows[name][kept] for name in ("user_id", "domain", "item_id", "author_id", "request_ms")},
            "play_ms": watched_ms[kept],
            "bits": bits[kept],
            "known_ms": rows["emit_ms"][kept],
            "tag": self._tags(rows["item_id"][kept]),
        }
        return {name: columns[name] for name in VISIT_COLUMNS}

    def _let_go(self, partition: int, part: _PartitionState) -> None:
        """Forget the facts of visits that nothing more can come of."""
        needed = [self._labels[partition], self._outcomes[partition]]
        waiting = [part.rows, part.requests, part.ended]
        about = sum(assembler.open_visits + assembler.waiting_events for assembler in needed) + len(part.predicted)
        if part.facts.visits <= 2 * about + sum(len(rows["user_id"]) for rows in waiting) + _SLACK:
            return
        live = {key for assembler in needed for key in assembler.unfinished()}
        live |= {(user, visit) for rows in waiting for user, visit, _ in _requests(rows)}
        part.facts.forget(live)
        part.predicted = {key: logit for key, logit in part.predicted.items() if key[:2] in live}

    def _counted(self, unused: Sequence[Columns]) -> Columns:
        joined = concatenate(list(unused)) if unused else select_unused(no_events(), np.empty(0, np.int64), 0)
        for code, reason in enumerate(REASONS):
            self.counts[reason] += int((joined["reason"] == code).sum())
        return joined


def _requested(spec: DatasetSpec, started: Rows) -> Rows:
    """Visits that began as rows without labels."""
    rows = no_rows(spec)
    n = len(started["user_id"])
    blank = {name: np.zeros((n, *column.shape[1:]), column.dtype) for name, column in rows.items()}
    return blank | started | {"emit_ms": started["request_ms"]}


def _requests(rows: Mapping[str, np.ndarray]) -> list[_Request]:
    return list(zip(*(rows[name].tolist() for name in ("user_id", "visit_id", "request_ms")), strict=True))


def _of(partition: int, rows: Rows) -> Rows:
    return rows | {"partition": np.full(len(rows["user_id"]), partition, np.int64)}


def _cut(rows: Rows, at: int) -> tuple[Rows, Rows]:
    return {name: column[:at] for name, column in rows.items()}, {name: column[at:] for name, column in rows.items()}


def _in_order(parts: Sequence[Rows]) -> Rows:
    joined = concatenate(parts)
    order = np.lexsort([joined[name] for name in _ORDER])
    return {name: column[order] for name, column in joined.items()}


def _named(states: Sequence[Mapping[str, Any]], name: str) -> Iterable[dict[int, Any]]:
    return [{partition: saved[name] for partition, saved in state["partitions"].items()} for state in states]
