"""A run as a report reads it: everything that is there, and a note for each thing that is missing or damaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from trainer.checkpoint.manifest import JOB, list_checkpoints
from trainer.checkpoint.runs import DAMAGED, RunSummary, is_run, no_run, summarize
from trainer.console.errors import UserError, one_line
from trainer.ranking.attention_examples import ATTENTION_EXAMPLES
from trainer.ranking.held_out_rows import HELD_OUT
from trainer.report.held_out import HeldOutRows
from trainer.runtime.run_status import FINISHED, RUNNING, RunStatus, read_status
from trainer.runtime.stored_files import parse_json_object, read_json_object, read_limited

T = TypeVar("T")

CODEBOOK = "codebook.json"
"""Manifest of a codebook version."""

QUANTIZE = "quantize"
TABLE_JOBS = ("embed", QUANTIZE)
"""Commands whose directory holds their output alone."""

Entry = Mapping[str, Any]
"""An entry of the metric history."""


@dataclass(frozen=True)
class ReportedModel:
    """One model of a run: its own, or a baseline.

    Attributes:
        name: kind of the network, or of the run.
        document: content of ``metrics.json``; empty before the end.
        history: metrics of the training steps, up to the newest checkpoint.
        plan: placement of the tables.
        held_out: rows that it has kept; None if there are none.
    """

    name: str
    document: Mapping[str, Any]
    history: list[Entry]
    plan: list[Entry]
    held_out: HeldOutRows | None

    @property
    def behaviours(self) -> dict[str, Mapping[str, Any]]:
        """Metrics of the held-out range by behaviour."""
        found = self.document.get("behaviours")
        entries = found.items() if isinstance(found, dict) else ()
        return {name: values for name, values in entries if isinstance(values, dict)}


@dataclass(frozen=True)
class StoredRun:
    """Files of a run.

    Attributes:
        directory: of the run.
        summary: state, steps and metrics.
        status: as the job has stored it; None for an earlier version.
        config: the resolved job; empty if it is not there.
        starts: the starts of the job, with versions and machine.
        models: the run's own model first, then the baselines.
        attention: attention to the histories of a few rows, trainer/ranking/attention_examples.py; empty without.
        notes: sentences on what is missing or damaged.
    """

    directory: Path
    summary: RunSummary
    status: RunStatus | None
    config: Mapping[str, Any]
    starts: list[Entry]
    models: list[ReportedModel]
    attention: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @staticmethod
    def read(directory: Path) -> StoredRun:
        """Read a run.

        Raises:
            UserError: there is no run.
        """
        codebook = (directory / CODEBOOK).is_file()
        if not is_run(directory) and not codebook:
            raise UserError(f"{no_run(directory)}, and no codebook")
        reader = _Reader()
        empty: dict[str, Any] = {}
        if codebook:
            return _codebook(directory, reader)
        summary = summarize(directory)
        # Jobs that write tables have no settings and no metrics in their directory.
        trains = not summary.job.startswith(TABLE_JOBS)
        missing = f"{directory}: no config.json" if trains else ""
        config = reader.read(lambda: read_json_object(directory / "config.json"), empty, missing)
        environment = reader.read(lambda: read_json_object(directory / "environment.json"), empty, "")
        starts = environment.get("starts", [environment] if environment else [])
        own = _section(config, "model").get("kind")
        kinds = _section(config, "train").get("baselines")
        kinds = [kind for kind in kinds if isinstance(kind, str) and kind != own] if isinstance(kinds, list) else []
        models = [reader.model(directory, own if isinstance(own, str) else summary.kind or summary.job)]
        models += [
            reader.model(directory / "baselines" / kind, kind)
            for kind in kinds
            if "/" not in kind and (directory / "baselines" / kind).is_dir()
        ]
        if summary.state == RUNNING:
            reader.notes.append("The job runs: curves reach to the newest checkpoint, and metrics come at the end.")
        elif trains and not (directory / "metrics.json").exists():
            reader.notes.append("metrics.json is not there: the run has not finished.")
        if models[0].behaviours and not (directory / HELD_OUT).exists():
            reader.notes.append(
                "The run has kept no predictions (an earlier version wrote it): there are no intervals and no parts."
            )
        missing = ""
        if models[0].behaviours and own != "logistic" and _section(_section(config, "features"), "history"):
            missing = (
                "The run has kept no examples of its attention (an earlier version wrote it); limelight explain shows "
                "the attention for a user and a candidate."
            )
        attention = reader.read(lambda: read_json_object(directory / ATTENTION_EXAMPLES), empty, missing)
        return StoredRun(
            directory,
            summary,
            reader.read(lambda: read_status(directory), None, ""),
            config,
            [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else [],
            models,
            attention,
            reader.notes,
        )


def read_model(directory: Path) -> ReportedModel:
    """Read the own model of a run, or a baseline by its directory inside of a run.

    Raises:
        UserError: there is neither.
    """
    if is_run(directory) or not (directory / "metrics.json").exists():
        return StoredRun.read(directory).models[0]
    return _Reader().model(directory, directory.name)


def _codebook(directory: Path, reader: _Reader) -> StoredRun:
    """Return a codebook version, which is whole or not there: its manifest as settings, its report as metrics."""
    empty: dict[str, Any] = {}
    manifest = reader.read(lambda: read_json_object(directory / CODEBOOK), empty, "")
    document = reader.read(
        lambda: read_json_object(directory / "report.json"),
        empty,
        "report.json is not there: no segments were held out.",
    )
    model = ReportedModel("codebook", document, [], [], None)
    summary = RunSummary(str(directory), job=QUANTIZE, state=FINISHED if manifest else DAMAGED)
    return StoredRun(directory, summary, None, manifest, [], [model], notes=reader.notes)


class _Reader:
    """Reads files, and notes what is damaged."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def read(self, read: Callable[[], T], otherwise: T, missing: str) -> T:
        """Return what ``read`` returns, or ``otherwise`` with a note."""
        try:
            return read()
        except FileNotFoundError:
            if missing:
                self.notes.append(missing)
        except (OSError, UserError) as error:
            self.notes.append(one_line(error))
        return otherwise

    def model(self, directory: Path, name: str) -> ReportedModel:
        """Return a model of the run."""
        return ReportedModel(
            name,
            self.read(lambda: read_json_object(directory / "metrics.json"), {}, ""),
            self.history(directory),
            self.read(lambda: _read_list(directory / "plan.json"), [], ""),
            # The rows of an alignment have other columns.
            self.read(lambda: HeldOutRows.read(directory), None, "") if name not in ("align", "finetune") else None,
        )

    def history(self, directory: Path) -> list[Entry]:
        """Return the metric history of the newest checkpoint that can be read."""
        for checkpoint in reversed(list_checkpoints(directory / "checkpoints")):
            try:
                entries = read_json_object(checkpoint / JOB).get("trace")
            except (OSError, UserError) as error:
                self.notes.append(one_line(error))
                continue
            if isinstance(entries, list):
                return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("step"), int)]
        return []


def _read_list(file: Path) -> list[Entry]:
    """Read a JSON file with a list of objects."""
    # The reader of objects refuses a list, so the list is made the value of a key.
    entries = parse_json_object(b'{"list":' + read_limited(file) + b"}", file)["list"]
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}
