"""A place on disk for what waits while a dataset is made."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.console.errors import UserError


@contextmanager
def scratch_folder(out: str | Path) -> Iterator[Path]:
    """A folder beside the dataset ``out``, removed at the end.

    Raises:
        UserError: the file system refuses something that is done in the meantime.
    """
    out = Path(out)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.waiting-") as folder:
            yield Path(folder)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror or error})") from error
