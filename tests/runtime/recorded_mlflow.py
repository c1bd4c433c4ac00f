"""Stand-in for runs in an MLflow file store: the package takes seconds to import."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.console.setup_advice import OptionalPackage
from trainer.runtime import tracking
from trainer.runtime.mlflow_store import MlflowTarget


class RecordedRun:
    """Keeps what a job writes to one run of the store.

    Attributes:
        directory: of the model's files.
        target: place of the model.
        run_id: of the run.
        scalars: name, value and step.
        ends: state and reason of each end; one of a job that is right.
    """

    def __init__(self, directory: Path, target: MlflowTarget) -> None:
        self.directory, self.target, self.run_id = directory, target, "0"
        self.scalars: list[tuple[str, float, int]] = []
        self.ends: list[tuple[str, str]] = []

    @property
    def names(self) -> set[str]:
        """Names of the scalars."""
        return {name for name, _, _ in self.scalars}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Keep a value."""
        assert not self.ends
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def end(self, state: str, reason: str = "") -> None:
        """Keep the end."""
        self.ends.append((state, reason))

    @staticmethod
    def in_place_of_mlflow(monkeypatch: pytest.MonkeyPatch) -> list[RecordedRun]:
        """Return the list of the runs that are opened from now on; no process waits for their ends."""
        runs: list[RecordedRun] = []

        def opened(directory: Path, target: MlflowTarget) -> RecordedRun:
            runs.append(RecordedRun(directory, target))
            return runs[-1]

        monkeypatch.setattr(OptionalPackage, "is_installed", True)
        monkeypatch.setattr(tracking, "MlflowRun", opened)
        monkeypatch.setattr(tracking, "_start_keeper", lambda directory, target, run: None)
        monkeypatch.setattr(tracking, "_dismiss", lambda keeper: None)
        return runs
