"""TensorBoard scalars of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.console.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def open_scalars(directory: Path, step: int) -> SummaryWriter:
    """Return a writer of TensorBoard scalars after a step; those of later steps are hidden.

    Raises:
        UserError: the directory cannot be written.
    """
    # The first rank alone writes scalars, and the import loads clients of object stores: a twelfth of a rank's start.
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(str(directory), purge_step=step + 1)
    except OSError as error:
        # TensorBoard writes in a thread of its own, whose error has no name of a file.
        raise UserError(f"{directory}: cannot be written ({error.strerror})") from None
