"""Loops compiled by numba, whose machine code is kept on disk where there is a place for it."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import numba

Loop = TypeVar("Loop", bound=Callable[..., object])


def compiled(*parts: ModuleType, nogil: bool = False) -> Callable[[Loop], Loop]:
    """Return a decorator that compiles a function at its first call, with numba's cache on disk if possible.

    numba looks for a place beside the source file and in the user's home directory. A container that runs as another
    user, with a read-only home, has neither: the function is then compiled again in every process, in a few seconds.
    The environment variable NUMBA_CACHE_DIR names another place.

    Args:
        parts: other modules whose functions are compiled into this one. numba compares the file of the function itself
            only, and would use old machine code after a change of these.
        nogil: release the interpreter's lock.
    """

    def compile_(function: Loop) -> Loop:
        if parts:
            sources = "".join(inspect.getsource(module) for module in parts)
            # The cache's files have the name of the function.
            function.__qualname__ += "_" + hashlib.sha256(sources.encode()).hexdigest()[:16]
        try:
            loop: Loop = numba.njit(cache=True, nogil=nogil)(function)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            loop = numba.njit(nogil=nogil)(function)
        return loop

    return compile_
