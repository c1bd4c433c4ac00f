"""Warnings about a run: what a reader should know before the figures."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from trainer.checkpoint.runs import describe_state
from trainer.metrics.user_bootstrap import interval
from trainer.report.held_out import PART_DRAWS, UserDraws
from trainer.report.metric_history import training_seconds
from trainer.report.stored_run import ReportedModel, StoredRun
from trainer.report.stored_values import mapping, number

FEW_POSITIVES = 100
"""Positives of a behaviour below which its metrics are mostly chance."""

CALIBRATED = (0.8, 1.25)
"""Range of a calibration without a warning."""

_WAITING = 0.3
"""Share of the time spent on waiting for data above which there is a warning."""

_STALLED = 0.1
_SKIPPED = 0.001
_UNSERVED = 0.5


def run_warnings(run: StoredRun) -> list[str]:
    """Return what a reader should know before the figures."""
    found = []
    summary, own = run.summary, run.models[0]
    if summary.state in ("failed", "damaged"):
        found.append(f"The run {'has' if summary.state == 'failed' else 'is'} {describe_state(summary)}.")
    for name, values in own.behaviours.items():
        positives, calibration = number(values.get("positives")), number(values.get("calibration"))
        if positives is not None and positives < FEW_POSITIVES:
            found.append(f"{name} has {positives:,.0f} positives in the held-out range: its metrics are mostly chance.")
        elif calibration is not None and not CALIBRATED[0] <= calibration <= CALIBRATED[1]:
            found.append(f"{name} is predicted {calibration:.2f} times as often as it happens.")
        for other in run.models[1:]:
            better, mine = number(other.behaviours.get(name, {}).get("auc")), number(values.get("auc"))
            if better is not None and mine is not None and better > mine and _is_clear(own, other, name):
                found.append(f"The baseline {other.name} has a higher AUC of {name}: {better:.4f}, {mine:.4f} here.")
    for model in run.models:
        found += _training_warnings(model, f"{model.name}: " if len(run.models) > 1 else "")
    if own.held_out is not None and own.held_out.sampled:
        found.append(
            f"Intervals and parts are of a sample of the users ({len(own.held_out.visit_id):,} rows); metrics are of "
            "all rows."
        )
    return found


def _is_clear(own: ReportedModel, other: ReportedModel, behaviour: str) -> bool:
    """True if the AUC of another model is higher beyond its interval; also if the rows are not kept."""
    ours, theirs = own.held_out, other.held_out
    if ours is None or theirs is None or not np.array_equal(ours.visit_id, theirs.visit_id):
        return True
    if behaviour not in ours.behaviours or behaviour not in theirs.behaviours:
        return True
    k, draws = ours.behaviours.index(behaviour), UserDraws(ours, PART_DRAWS)
    higher = draws.auc(k, theirs.probability[:, theirs.behaviours.index(behaviour)]).draws
    return interval(higher - draws.auc(k, ours.probability[:, k]).draws)[0] > 0


def _training_warnings(model: ReportedModel, prefix: str) -> Iterable[str]:
    training = mapping(model.document.get("training"))
    rows, skipped = number(training.get("rows")), number(training.get("skipped_rows")) or 0
    if rows == 0:
        yield f"{prefix}The model was trained on 0 rows."
    rows = rows or 0
    if skipped > _SKIPPED * (rows + skipped):
        yield f"{prefix}{100 * skipped / (rows + skipped):.1f} % of the rows were skipped, because they are corrupt."
    waiting = number(mapping(training.get("share_of_time")).get("data")) or 0
    if waiting > _WAITING:
        yield f"{prefix}Training waited for data in {100 * waiting:.0f} % of the time: more data.workers help."
    stalls, seconds = training.get("checkpoint_stalls_seconds"), training_seconds(model.history)
    stalled = sum(number(stall) or 0 for stall in stalls) if isinstance(stalls, list) else 0
    if seconds and stalled > _STALLED * seconds:
        yield f"{prefix}Checkpoints stopped the training for {100 * stalled / seconds:.0f} % of the time."
    for table, counts in mapping(model.history[-1].get("ids") if model.history else None).items():
        looked_up, unserved = number(mapping(counts).get("looked_up")), number(mapping(counts).get("unserved"))
        if looked_up and unserved and unserved > _UNSERVED * looked_up:
            yield f"{prefix}{100 * unserved / looked_up:.0f} % of the look-ups in the table {table} found no row."
