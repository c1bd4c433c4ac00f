"""Loops compiled by numba, whose machine code is kept on disk where there is a place for it."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numba
from numba.core.event import Event, Listener, register

from modules.loop_cache import LoopCache, tell_once

Loop = TypeVar("Loop", bound=Callable[..., object])

_WORK: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""Work of each loop, for the messages."""


def compiled(what: str, *parts: ModuleType, nogil: bool = False, keep: bool = True) -> Callable[[Loop], Loop]:
    """Return a decorator that compiles a function at its first call, and keeps it on disk if possible.

    numba looks for a place beside the source file and in the user's home directory. A container that runs as another
    user, with a read-only home, has neither: the function is then compiled again in every process, in a few seconds.
    The environment variable NUMBA_CACHE_DIR names another place.

    A process logs once for each kind of work that it compiles loops.

    Args:
        what: the work of the loop, for the message.
        parts: other modules whose functions are compiled into this one. numba compares the file of the function itself
            only, and would use old machine code after a change of these.
        nogil: release the interpreter's lock.
        keep: False for a function whose closure has functions: its key would differ from process to process.
    """

    def compile_(function: Loop) -> Loop:
        if parts:
            sources = "".join(inspect.getsource(module) for module in parts)
            # The cache's files have the name of the function.
            function.__qualname__ += "_" + hashlib.sha256(sources.encode()).hexdigest()[:16]
        loop: Any = numba.njit(nogil=nogil)(function)
        _WORK[loop] = what
        if not keep:
            return loop
        try:
            loop._cache = LoopCache(loop.py_func, what)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
        return loop

    return compile_


class _Compilations(Listener):
    """Listener to numba that logs the first compilation for each kind of work."""

    def on_start(self, event: Event) -> None:
        """Log the start of a compilation."""
        what = _WORK.get(event.data["dispatcher"])
        if what is not None:
            tell_once(f"compiling loops of {what} for this processor, which takes some seconds")

    def on_end(self, event: Event) -> None:
        """Let other processes compile a loop that could not be compiled here; it will not be saved."""
        loop = event.data["dispatcher"]
        if loop in _WORK and isinstance(loop._cache, LoopCache) and tuple(event.data["args"]) not in loop.overloads:
            loop._cache.release()


register("numba:compile", _Compilations())
