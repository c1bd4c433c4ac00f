"""Runs side by side: metrics with paired intervals over users, and the settings that differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.checkpoint.runs import RunSummary, is_run, no_run, summarize
from trainer.config.diff import flat_settings
from trainer.console.errors import UserError, one_line, printable
from trainer.console.text_table import text_table
from trainer.metrics.user_bootstrap import interval
from trainer.report.held_out import DRAWS, HeldOutRows, UserDraws
from trainer.report.job_text import OWN_KEYS
from trainer.runtime.stored_files import read_json_object

_UNSET = "unset"
_LONGEST = 40


@dataclass(frozen=True)
class Difference:
    """A metric of a run minus that of the first run, on the same rows.

    Attributes:
        value: the difference; None if it is undefined.
        low, high: 95 % interval over users; None if it is undefined.
    """

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class MetricLine:
    """A metric of all runs.

    Attributes:
        name: such as ``click.auc``.
        values: of each run; None if it is undefined or not stored.
        differences: of each run but the first one; empty if the predictions are not stored.
    """

    name: str
    values: list[float | None]
    differences: list[Difference]


@dataclass(frozen=True)
class RunComparison:
    """A comparison of runs.

    Attributes:
        runs: the runs, as they stand in their directories.
        notes: sentences on what is compared, and what is not.
        metrics: the metrics; with differences if the runs have kept predictions of the same rows.
        settings: key -> value of each run, of the keys that differ; absent keys are ``unset``.
    """

    runs: list[RunSummary]
    notes: list[str]
    metrics: list[MetricLine]
    settings: dict[str, list[Any]]

    def document(self) -> dict[str, Any]:
        """Return the comparison for JSON."""
        return {
            "runs": [run.document() for run in self.runs],
            "notes": self.notes,
            "metrics": [
                {
                    "name": line.name,
                    "values": line.values,
                    "differences": [vars(difference) for difference in line.differences],
                }
                for line in self.metrics
            ],
            "settings": self.settings,
        }


def compare_runs(directories: Sequence[str]) -> RunComparison:
    """Compare runs with the first one of them.

    Raises:
        UserError: a directory is no run, or fewer than two are named.
    """
    if len(directories) < 2:
        raise UserError("a comparison needs two runs or more: limelight runs compare RUN RUN")
    paths = [Path(directory) for directory in directories]
    for path in paths:
        # A baseline's directory has metrics, and the files of a run are those of the run around it.
        if not is_run(path) and not (path / "metrics.json").exists():
            raise UserError(no_run(path))
    runs = [summarize(path) for path in paths]
    notes = [f"{run.directory}: {run.state}: {run.reason}" for run in runs if run.reason]
    notes += [f"{run.directory}: {run.state}, and has no metrics yet" for run in runs if not run.metrics]
    kept: list[HeldOutRows] = []
    for path in paths:
        try:
            kept.append(HeldOutRows.read(path))
        except FileNotFoundError:
            notes.append(f"{path}: has kept no predictions of held-out rows")
        except UserError as error:
            notes.append(str(error))
    lines: list[MetricLine] = []
    if len(kept) == len(paths):
        lines = _paired(kept, directories, notes)
    if not lines:
        notes.append("metrics as each run has stored them, without intervals; their rows may differ")
        names = list(dict.fromkeys(name for run in runs for name in run.metrics))
        lines = [MetricLine(name, [run.metrics.get(name) for run in runs], []) for name in names]
    return RunComparison(runs, notes, lines, _settings(paths, notes))


def _paired(kept: Sequence[HeldOutRows], names: Sequence[str], notes: list[str]) -> list[MetricLine]:
    """Return AUC and GAUC on the rows that all runs have; none if there are no such rows."""
    common = kept[0].visit_id
    for other in kept[1:]:
        common = np.intersect1d(common, other.visit_id)
    behaviours = [name for name in kept[0].behaviours if all(name in other.behaviours for other in kept[1:])]
    sizes = ", ".join(f"{len(rows.visit_id):,} of {name}" for rows, name in zip(kept, names, strict=True))
    if not len(common) or not behaviours:
        notes.append(f"the runs have no common {'row' if not len(common) else 'behaviour'} ({sizes})")
        return []
    if all(len(rows.visit_id) == len(common) for rows in kept):
        notes.append(f"on the {len(common):,} held-out rows that every run has kept")
    else:
        notes.append(f"on the {len(common):,} rows that are in all of them ({sizes})")
    # np.intersect1d sorts; a visit stands once in a held-out range.
    aligned = [rows.take(np.argsort(rows.visit_id, kind="stable")) for rows in kept]
    aligned = [rows.take(np.flatnonzero(np.isin(rows.visit_id, common))) for rows in aligned]
    if any(len(rows.visit_id) != len(common) for rows in aligned):
        notes.append("a run has a visit twice, so that its rows cannot be paired")
        return []
    first = aligned[0]
    draws = UserDraws(first, DRAWS)
    lines = []
    for name in behaviours:
        places = [rows.behaviours.index(name) for rows in aligned]
        same = all(
            np.array_equal(rows.label[:, k], first.label[:, places[0]])
            and np.array_equal(rows.mask[:, k], first.mask[:, places[0]])
            for rows, k in zip(aligned, places, strict=True)
        )
        if not same:
            notes.append(f"{name}: the runs have other labels for the same rows (another label policy?)")
            continue
        for metric in ("auc", "gauc"):
            # Every run is measured on the same draws of users.
            found = [
                getattr(draws, metric)(places[0], rows.probability[:, k])
                for rows, k in zip(aligned, places, strict=True)
            ]
            lines.append(
                MetricLine(
                    f"{name}.{metric}",
                    [_number(one.value) for one in found],
                    [
                        Difference(
                            _number(one.value - found[0].value),
                            *map(_number, interval(one.draws - found[0].draws)),
                        )
                        for one in found[1:]
                    ],
                )
            )
    return lines


def _settings(paths: Sequence[Path], notes: list[str]) -> dict[str, list[Any]]:
    """Return the settings that differ."""
    settings = []
    for path in paths:
        try:
            settings.append(flat_settings(job_of(path)))
        except (OSError, UserError) as error:
            notes.append(f"settings are not compared: {one_line(error)}")
            return {}
    keys = sorted({key for one in settings for key in one} - set(OWN_KEYS))
    found = {key: [one.get(key, _UNSET) for one in settings] for key in keys}
    differing = {key: values for key, values in found.items() if any(value != values[0] for value in values[1:])}
    if not differing:
        notes.append("no setting differs")
    return differing


def job_of(path: Path) -> dict[str, Any]:
    """Read the job of a run, or of a baseline inside of a run.

    Raises:
        OSError: there is none.
        UserError: it is damaged.
    """
    if (path / "config.json").exists() or path.resolve().parent.name != "baselines":
        return read_json_object(path / "config.json")
    config = read_json_object(path.resolve().parents[1] / "config.json")
    if isinstance(config.get("model"), dict):
        config["model"]["kind"] = path.resolve().name
    return config


def format_comparison(comparison: RunComparison) -> str:
    """Format a comparison as text: a table of metrics, the notes, and the settings that differ.

    The runs are called A, B, ... in the tables.
    """
    names = [chr(ord("A") + place) if place < 26 else f"run {place}" for place in range(len(comparison.runs))]
    paired = any(line.differences for line in comparison.metrics)
    header = ["metric", *names, *(f"{name} - {names[0]}" for name in names[1:] if paired)]
    lines = [
        [printable(line.name), *map(_cell, line.values), *map(_difference, line.differences)]
        for line in comparison.metrics
    ]
    runs = zip(names, comparison.runs, strict=True)
    parts = ["\n".join(f"{name}: {printable(run.directory)}" for name, run in runs)]
    if lines:
        parts.append(text_table(header, lines))
    if paired:
        parts.append(f"brackets: 95 % intervals over users, {DRAWS} paired draws; * the interval is without 0")
    parts.append("\n".join(map(printable, comparison.notes)))
    if comparison.settings:
        rows = [
            [printable(key), *(printable(shown_setting(value)) for value in values)]
            for key, values in comparison.settings.items()
        ]
        parts.append(text_table(["setting", *names], rows, texts=1 + len(names)))
    return "\n\n".join(parts)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _difference(difference: Difference) -> str:
    if difference.value is None or difference.low is None or difference.high is None:
        return "-"
    clear = "*" if difference.low > 0 or difference.high < 0 else " "
    return f"{difference.value:+.4f} ({difference.low:+.4f}, {difference.high:+.4f}){clear}"


def shown_setting(value: Any) -> str:
    """Format a value of a setting, cut if it is long."""
    text = value if value == _UNSET else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
