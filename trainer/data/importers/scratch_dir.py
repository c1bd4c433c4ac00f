"""Scratch folder of an import."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.console.errors import UserError


@contextmanager
def scratch_folder(out: str | Path) -> Iterator[Path]:
    """Create a folder beside the dataset ``out``; it is removed at the end of the ``with`` block.

    Raises:
        UserError: an operation within the block failed with an ``OSError``, such as a full disk.
    """
    out = Path(out)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.waiting-") as folder:
            yield Path(folder)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror or error})") from error
