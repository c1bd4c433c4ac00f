"""A forked process that lives as long as a test needs it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def forked() -> Iterator[int]:
    """Fork a process that lives inside the ``with`` statement; yield its process id."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    try:
        yield child
    finally:
        os.close(writing)
        os.close(reading)
        assert os.waitpid(child, 0)[1] == 0
