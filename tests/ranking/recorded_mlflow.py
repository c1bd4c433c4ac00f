"""Stand-in for runs in an MLflow file store: the package takes seconds to import."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.console.setup_advice import OptionalPackage
from trainer.runtime import mlflow_store, scalars
from trainer.runtime.mlflow_store import MlflowTarget


class RecordedRun:
    """Keeps what a job writes to one run of the store."""

    def __init__(self, directory: Path, target: MlflowTarget) -> None:
        self.directory, self.target = directory, target
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Keep a value."""
        assert not self.closed
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Remember the end."""
        self.closed = True

    @staticmethod
    def in_place_of_mlflow(monkeypatch: pytest.MonkeyPatch) -> list[RecordedRun]:
        """Return the list of the runs that are opened from now on."""
        runs: list[RecordedRun] = []

        def opened(directory: Path, target: MlflowTarget) -> RecordedRun:
            runs.append(RecordedRun(directory, target))
            return runs[-1]

        monkeypatch.setattr(OptionalPackage, "is_installed", True)
        for module in (mlflow_store, scalars):
            monkeypatch.setattr(module, "MlflowRun", opened)
        return runs
