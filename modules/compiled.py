"""Loops compiled by numba, whose machine code is kept on disk where there is a place for it."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

import numba
from numba.core.event import Event, Listener, install_listener

from modules.loop_cache import LoopCache

logger = logging.getLogger(__name__)

Loop = TypeVar("Loop", bound=Callable[..., object])


def compiled(*parts: ModuleType, nogil: bool = False) -> Callable[[Loop], Loop]:
    """Return a decorator that compiles a function at its first call, and keeps it on disk if possible.

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
        loop: Any = numba.njit(nogil=nogil)(function)
        try:
            loop._cache = LoopCache(loop.py_func)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
        return loop

    return compile_


def compile_now(what: str, calls: Sequence[tuple[Callable[..., None], Sequence[Any]]]) -> None:
    """Compile loops in this process, or load them from numba's cache; log it if they are compiled.

    Args:
        what: the work of the loops, for the messages.
        calls: each loop, with arguments for which it does nothing.
    """
    with install_listener("numba:compile", CompilationNotice(what)):
        for loop, arguments in calls:
            loop(*arguments)


class CompilationNotice(Listener):
    """Listener to numba that logs the first compilation.

    Args:
        what: the work of the loops.
    """

    def __init__(self, what: str) -> None:
        self.what, self.logged = what, False

    def on_start(self, event: Event) -> None:
        """Log the start of a compilation."""
        if not self.logged:
            logger.info(f"compiling {self.what} for this processor, which takes some seconds")
        self.logged = True

    def on_end(self, event: Event) -> None:
        """Ignore the end."""
