"""Comparison of the report policies on a log: Table 1 of Moment&Cross, and the number of rows of each policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trainer.console.text_table import text_table
from trainer.stream.labels.assembled_rows import END_OF_TIME
from trainer.stream.labels.batch_assembler import visit_rows
from trainer.stream.labels.event_log import EventLog
from trainer.stream.labels.policy import HOUR_MS, MINUTE_MS, POLICIES, EventTimeouts
from trainer.stream.labels.visit_grouping import GroupedVisits, group_visits

PAPER: dict[str, float] = {
    "click": 0.96,
    "long_view": 1.0,
    "like": 0.79,
    "comment": 0.78,
    "gift": 0.68,
    "gift price": 0.34,
}
"""Share of an hour's positives that is known after 5 minutes: Table 1 of Moment&Cross."""

FAST_MS, SLOW_MS = 5 * MINUTE_MS, HOUR_MS


def consistency(path: str | Path, idle_ms: int, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Compare the report policies on a log; returns values that are ready for JSON.

    Keys: ``path``, ``name``, ``visits``, ``active_visits`` (visits with a behaviour). ``behaviours`` has an entry for
    each behaviour, and for ``gift price`` (the money of all gifts) if there are gifts: the ``positives`` within an hour
    of the request, the number of them within 5 minutes as ``early``, their ``share`` (None without positives) and the
    paper's share as ``paper`` (None if the paper has none). ``rows`` has for each policy, with the paper's windows, the
    number of rows of ``all`` visits and of the ``active`` visits.

    Args:
        path: dataset, a directory or an fsspec URL.
        idle_ms: a visit without an exit ends this long after its last event.
        progress: called with the number of events done and the number of all events.

    Raises:
        UserError: there is no dataset at ``path``, or an event is invalid.
    """
    log = EventLog(path)
    # The whole log is available, so no event is late.
    timeouts = EventTimeouts(idle_ms, max_out_of_orderness_ms=END_OF_TIME)
    names = [*log.spec.behaviours, *(["gift price"] if "gift" in log.spec.behaviours else [])]
    early, within = np.zeros((2, len(names)))
    rows = {name: {"all": 0, "active": 0} for name in POLICIES}
    done = visits = active = 0
    for partition in range(log.spec.partitions):
        events = log.read(partition)
        grouped = group_visits(log.spec, events, timeouts)
        # One grouping of the visits serves all policies.
        visits += len(grouped.end_ms)
        active += len(np.unique(grouped.visit))
        early += _happened_by(grouped, names, FAST_MS)
        within += _happened_by(grouped, names, SLOW_MS)
        _count_rows(grouped, rows)
        done += len(events["time_ms"])
        if progress is not None:
            progress(done, max(log.spec.events, done))
    return {
        "path": str(path),
        "name": log.spec.name,
        "visits": visits,
        "active_visits": active,
        "behaviours": {
            name: {
                "positives": float(all_) if name == "gift price" else int(all_),
                "early": float(seen) if name == "gift price" else int(seen),
                "share": float(seen / all_) if all_ else None,
                "paper": PAPER.get(name),
            }
            for name, seen, all_ in zip(names, early, within, strict=True)
        },
        "rows": rows,
    }


def format_consistency(figures: dict[str, Any]) -> str:
    """Format the figures of ``consistency`` as text tables."""
    table_1 = text_table(
        ["behaviour", "within 1 h", "within 5 min", "share", "paper"],
        [
            [name, f"{b['positives']:,.0f}", f"{b['early']:,.0f}", _percent(b["share"]), _percent(b["paper"])]
            for name, b in figures["behaviours"].items()
        ],
    )
    fast_slow = figures["rows"]["fast_slow"]
    volumes = text_table(
        ["policy", "rows", "to fast_slow", "of active visits", "to fast_slow"],
        [
            [
                name,
                f"{rows['all']:,}",
                _ratio(rows["all"], fast_slow["all"]),
                f"{rows['active']:,}",
                _ratio(rows["active"], fast_slow["active"]),
            ]
            for name, rows in figures["rows"].items()
        ],
    )
    head = f"{figures['path']} ({figures['name']}): {figures['visits']:,} visits, {figures['active_visits']:,} active"
    return "\n\n".join(
        [
            f"{head}\nactive: visits with a behaviour. In the paper, realtime makes about 2 rows per row of fast_slow.",
            f"positives within an hour of the request that are known after 5 minutes\n{table_1}",
            f"rows by policy\n{volumes}",
        ]
    )


def _happened_by(visits: GroupedVisits, names: list[str], window_ms: int) -> np.ndarray:
    """Return positives within a window after the request, and the money of all gifts, ``[names] float64``."""
    totals = (visits.first_ms() <= visits.request_ms[:, None] + window_ms).sum(axis=0).astype(np.float64)
    if "gift price" in names:
        by_then = visits.time_ms <= visits.request_ms[visits.visit] + window_ms
        at = np.flatnonzero(by_then & (visits.behaviour == names.index("gift")))
        # A duplicate event counts once.
        gifts = np.unique(np.stack([visits.visit[at], visits.time_ms[at], visits.value[at].astype(np.float64)]), axis=1)
        totals = np.append(totals, gifts[2].sum())
    return totals


def _count_rows(visits: GroupedVisits, counts: dict[str, dict[str, int]]) -> None:
    """Add the number of rows of each policy to ``counts``."""
    active = np.zeros(len(visits.end_ms), bool)
    active[visits.visit] = True
    for name, policy in POLICIES.items():
        counts[name]["all"] += len(visit_rows(visits, policy())["kind"])
        counts[name]["active"] += len(visit_rows(visits.select(active), policy())["kind"])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _ratio(rows: int, reference_rows: int) -> str:
    return f"{rows / reference_rows:.2f}" if reference_rows else "-"
