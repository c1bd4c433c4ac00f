"""Scalars of a run, for TensorBoard, and for MLflow where the job asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from trainer.console.errors import UserError
from trainer.runtime.tracking import tracked_run


class ScalarWriter(Protocol):
    """Writer of scalars, as TensorBoard's ``SummaryWriter``."""

    def add_scalar(self, name: str, value: float, step: int) -> object:
        """Write a value of a step."""

    def flush(self) -> None:
        """Write all values to disk."""

    def close(self) -> None:
        """Write all values to disk, and end."""


class _SeveralWriters:
    """Writes scalars to several writers."""

    def __init__(self, writers: list[ScalarWriter]) -> None:
        self._writers = writers

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Write a value of a step."""
        for writer in self._writers:
            writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write all values to disk."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Write all values to disk, and end."""
        for writer in self._writers:
            writer.close()


def open_scalars(directory: Path, step: int) -> ScalarWriter:
    """Return a writer of scalars after a step, to TensorBoard and to the tracked run of the model, if it has one.

    TensorBoard hides those of later steps.

    Args:
        directory: of TensorBoard's files.
        step: last step so far.

    Raises:
        UserError: the directory cannot be written.
    """
    # The first rank alone writes scalars, and the import loads clients of object stores: a twelfth of a rank's start.
    from torch.utils.tensorboard import SummaryWriter

    try:
        board: ScalarWriter = SummaryWriter(str(directory), purge_step=step + 1)
    except OSError as error:
        # TensorBoard writes in a thread of its own, whose error has no name of a file.
        raise UserError(f"{directory}: cannot be written ({error.strerror})") from None
    run = tracked_run()
    return board if run is None else _SeveralWriters([board, run])
