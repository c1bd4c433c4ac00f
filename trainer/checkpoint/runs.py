"""Runs below a directory: kind, state, progress and metrics of each, from the files that its job has stored.

Nothing here needs the job, its data or torch, and a file that is damaged or of another version is part of the answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.checkpoint.manifest import list_checkpoints, step_of
from trainer.checkpoint.run_kind import JOBS, RunKind, kind_of_job
from trainer.console.errors import UserError, one_line, printable
from trainer.console.text_table import age_text, duration_text, text_table
from trainer.runtime.run_lock import is_locked, lock_owner
from trainer.runtime.run_status import FAILED, FINISHED, KILLED_REASON, RUNNING, STATUS, STOPPED, RunStatus, read_status
from trainer.runtime.stored_files import read_json_object

DAMAGED = "damaged"
"""State of a run with a file that cannot be read."""

DEPTH = 4
"""Levels of directories in which runs are searched."""

_MARKS = ("lock", "environment.json", STATUS)
"""Files of which every job writes one; an exported model and a model of another program have none."""

_EARLIER = "an earlier version wrote it, which stored no reason"
_SILENT_SECONDS = 600.0
"""Time without a sign of a running job after which its line says so."""

_LOWER_IS_BETTER = frozenset(
    ("logloss", "log_loss", "ne", "nll", "loss", "rmse", "mae", "rmse_opened", "mae_opened", "reaction")
)
_NEAR_ONE = "calibration"
_NEAR_ZERO = "bias"

_SECTIONS: dict[RunKind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ranker": (("behaviours", "stream.progressive"), ("auc",)),
    "align": (("retrieval",), ("all.recall@10", "all.mrr")),
    "finetune": (("evaluation",), ("model.accuracy",)),
    "foresight": (("evaluation.quality",), ("all.model.top_1", "all.model.top_10")),
    "staytime": (("all",), ("rmse", "gauc", "xauc")),
}
"""Kind -> sections of ``metrics.json`` with its metrics, of which the first one that is not empty counts, and the ends
of the names of those that a table shows."""

_SHOWN = 3
"""Metrics of a run in a table."""

_LISTED = 12
"""Names of metrics that a message lists."""


@dataclass(frozen=True)
class RunSummary:
    """A run as it stands in its directory.

    Attributes:
        directory: of the run.
        job: words of the command after ``limelight``; empty if they are not known.
        kind: kind of its settings; None if there are none.
        state: running, stopped, finished, failed or damaged.
        reason: of a stop, a failure or the damage, in one line.
        owner: ``host``, ``process`` and ``since`` of the job that runs.
        work: the latest piece of work: label, done, total, unit, per_second, seconds_left.
        steps: optimizer steps; None if there are none.
        rows_per_second: of the training; None if it is not known.
        started: ISO time of the first start; empty if it is not known.
        updated: ISO time of the last sign of the job; empty if it is not known.
        metrics: name -> value of all metrics, the most telling ones first.
        shown: names of the metrics for a table.
    """

    directory: str
    job: str = ""
    kind: RunKind | None = None
    state: str = STOPPED
    reason: str = ""
    owner: dict[str, Any] = field(default_factory=dict)
    work: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    rows_per_second: float | None = None
    started: str = ""
    updated: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    shown: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """Return the summary for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "shown"}


def list_runs(root: Path, sort: str = "") -> list[RunSummary]:
    """Return the runs in a directory and below it, by name.

    Args:
        root: the directory.
        sort: metric, such as ``click.auc`` or ``auc``, or ``steps``, ``rows_per_second`` or ``started``: the best, the
            most or the latest comes first, and runs without it last.

    Raises:
        UserError: there is no such directory, or no run has such a metric.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such directory")
    runs = [summarize(directory) for directory in find_runs(root)]
    if not sort or not runs:
        return runs
    keys = [sort_key(run, sort) for run in runs]
    if not any(keys):
        names = list(dict.fromkeys(name for run in runs for name in run.metrics))
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        known = ", ".join(("steps", "rows_per_second", "started", *names[:_LISTED])) + more
        raise UserError(f"--sort {sort}: no run here has such a metric; there are {known}")
    order = sorted(range(len(runs)), key=lambda place: (not keys[place], keys[place] or ("", 0.0)))
    return [runs[place] for place in order]


def find_runs(root: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Yield the runs in a directory and below it, by name. Of what a run holds, only direct entries are searched."""
    found = is_run(root)
    if found:
        yield root
    if not depth:
        return
    try:
        entries = sorted(
            entry.name for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False) and entry.name[0] != "."
        )
    except OSError:
        return
    for name in entries:
        yield from find_runs(root / name, 0 if found else depth - 1)


def is_run(directory: Path) -> bool:
    """True if a job has written a directory."""
    return any(os.path.lexists(directory / name) for name in _MARKS)


def no_run(directory: Path) -> str:
    """Return the beginning of a message about a path that is no run: what is there instead."""
    if not directory.exists():
        return f"{directory}: no run here, there is no such directory"
    if not directory.is_dir():
        return f"{directory}: no run here, but a file; name the directory of a run"
    if not any(directory.iterdir()):
        return f"{directory}: no run here, the directory is empty"
    return f"{directory}: no run here"


def summarize(directory: Path) -> RunSummary:
    """Return a run as its files describe it; damage is its state."""
    try:
        return _summarize(directory)
    except (OSError, UserError) as error:
        return RunSummary(str(directory), state=DAMAGED, reason=one_line(error))


def metric_of(run: RunSummary, name: str) -> tuple[str, float] | None:
    """Return the first metric of a run that has a name, or that ends with it after a dot."""
    found = (known for known in run.metrics if known == name or known.endswith(f".{name}"))
    known = next(found, None)
    return None if known is None else (known, run.metrics[known])


def sort_key(run: RunSummary, name: str) -> tuple[str, float] | None:
    """Return a key that is smaller for a better run; None for a run without the metric."""
    if name in ("steps", "rows_per_second"):
        value = getattr(run, name)
        return None if value is None else ("", -value)
    if name == "started":
        return ("", -datetime.fromisoformat(run.started).timestamp()) if run.started else None
    metric = metric_of(run, name)
    return None if metric is None else ("", -goodness(*metric))


def goodness(name: str, value: float) -> float:
    """Return a number that is larger for a better value of a metric."""
    last = name.rpartition(".")[2]
    if last == _NEAR_ONE:
        return -abs(value - 1)
    if last == _NEAR_ZERO:
        return -abs(value)
    return -value if last in _LOWER_IS_BETTER else value


def format_runs(runs: Sequence[RunSummary], sort: str = "") -> str:
    """Format runs as a table, and below it a line for each reason."""
    lines = []
    for run in runs:
        shown = [(name, run.metrics[name]) for name in run.shown]
        if (first := metric_of(run, sort) if sort else None) is not None:
            shown = [first, *(metric for metric in shown if metric != first)]
        lines.append(
            [
                printable(run.directory),
                printable(run.job) or "-",
                run.state,
                printable("  ".join(f"{name} {value:.4f}" for name, value in shown[:_SHOWN])) or "-",
                "-" if run.steps is None else f"{run.steps:,}",
                "-" if run.rows_per_second is None else f"{run.rows_per_second:,.0f}",
            ]
        )
    table = text_table(("run", "kind", "state", "metrics", "steps", "rows/s"), lines, texts=4)
    notes = [f"{run.directory}: {note}" for run in runs if (note := describe_state(run)) != run.state]
    return "\n".join([table, *([""] if notes else []), *map(printable, notes)])


def describe_state(run: RunSummary, now: datetime | None = None) -> str:
    """Return the state of a run in words: its reason, or its process, progress and ETA.

    Args:
        run: the run.
        now: the present time, by default the clock's.
    """
    if run.state != RUNNING:
        return f"{run.state}: {run.reason}" if run.reason else run.state
    parts = []
    if run.owner.get("process"):
        parts.append(f"process {run.owner['process']} on {run.owner.get('host')}")
    if run.work:
        done, total, left = run.work["done"], run.work["total"], run.work["seconds_left"]
        share = f" {100 * done / total:.0f} %" if total else f" {done:,} {run.work['unit']}"
        parts.append(f"{run.work['label']}{share}" + ("" if left is None else f", ETA {duration_text(left)}"))
    if run.updated:
        silent = ((now or datetime.now(UTC)) - datetime.fromisoformat(run.updated)).total_seconds()
        if silent > _SILENT_SECONDS:
            parts.append(f"no sign for {age_text(round(1000 * silent))}")
    return ", ".join([run.state, *parts])


def _summarize(directory: Path) -> RunSummary:
    config = _read(directory / "config.json")
    kind = None if config is None else kind_of_job(config)
    status = read_status(directory)
    starts = (_read(directory / "environment.json") or {}).get("starts")
    first = starts[0].get("started", "") if isinstance(starts, list) and starts and isinstance(starts[0], dict) else ""
    metrics = _read(directory / "metrics.json") or {}
    training = metrics.get("training") if isinstance(metrics.get("training"), dict) else {}
    assert isinstance(training, dict)
    state, reason = _state(directory, config or {}, status)
    running = state == RUNNING and status is not None
    found = _metrics(kind, metrics)
    ends = _SECTIONS[kind][1] if kind in _SECTIONS else ()
    rate = status.work.get("per_second") if running and status and status.work.get("unit") == "rows" else None
    return RunSummary(
        str(directory),
        job=status.job if status is not None else JOBS.get(kind, "") if kind else "",
        kind=kind,
        state=state,
        reason=reason,
        owner=lock_owner(directory) if state == RUNNING else {},
        work=status.work if running and status else {},
        steps=_steps(directory, status if running else None, training),
        rows_per_second=_number(rate if rate is not None else training.get("rows_per_second")),
        started=_iso(first) or (status.started if status else ""),
        updated=status.updated if status else "",
        metrics=found,
        shown=tuple(name for name in found if any(f".{name}".endswith(f".{end}") for end in ends))[:_SHOWN],
    )


def _state(directory: Path, config: Mapping[str, Any], status: RunStatus | None) -> tuple[str, str]:
    """Return the state and its reason, from the lock, the metrics and the status."""
    if is_locked(directory):
        return RUNNING, ""
    train = config.get("train")
    baselines = train.get("baselines") if isinstance(train, dict) else None
    kinds = [kind for kind in baselines if isinstance(kind, str)] if isinstance(baselines, list) else []
    model = config.get("model")
    own = model.get("kind") if isinstance(model, dict) else None
    models = [directory, *(directory / "baselines" / kind for kind in kinds if kind != own)]
    if all((place / "metrics.json").exists() for place in models):
        return FINISHED, ""
    if status is None:
        return STOPPED, _EARLIER if config else f"{_EARLIER} and no config.json"
    if status.state == RUNNING:
        return FAILED, KILLED_REASON
    return status.state, status.reason


def _steps(directory: Path, status: RunStatus | None, training: Mapping[str, Any]) -> int | None:
    """Return the number of optimizer steps: of a running job, or of what is stored."""
    if status is not None and status.step:
        return status.step
    if checkpoints := list_checkpoints(directory / "checkpoints"):
        return step_of(checkpoints[-1])
    steps = training.get("steps")
    return steps if isinstance(steps, int) else None


def _metrics(kind: RunKind | None, document: Mapping[str, Any]) -> dict[str, float]:
    """Return name -> value of the metrics of a run; undefined ones are left out."""
    for section in _SECTIONS[kind][0] if kind in _SECTIONS else ():
        found: Any = document
        for part in section.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if isinstance(found, dict) and found:
            return dict(_numbers(found, ""))
    return {}


def _numbers(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """Yield the dotted names and values of the numbers of a section, depth first."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, value


def _read(file: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file; None if there is no such file."""
    try:
        return read_json_object(file)
    except FileNotFoundError:
        return None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _iso(text: object) -> str:
    """Return a stored time in ISO's notation; empty if it is none."""
    try:
        return datetime.strptime(str(text), "%Y-%m-%dT%H:%M:%S%z").isoformat()
    except ValueError:
        return ""
