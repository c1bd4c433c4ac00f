"""Names of metrics and settings in an MLflow file store, which keeps each one as a file of that name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

_REFUSED = re.compile(r"[^\w\-. :/]")
"""Characters that MLflow refuses; letters of any language are accepted."""

_LONGEST_NAME = 180
"""Bytes of a name in UTF-8, without marks; MLflow accepts 250 characters, and Linux 255 bytes as a file's name."""


class StoreNames:
    """Makes names that a run of the store accepts; distinct names stay distinct.

    A name that must be changed gets a mark that depends on the whole name, so a job that is continued finds its curves
    again. ``a`` and ``a/b`` cannot both be files: the later of them is changed.

    Args:
        stored: names that the run has.
    """

    def __init__(self, stored: Iterable[str] = ()) -> None:
        self._made: dict[str, str] = {}
        self._files: set[str] = set()
        self._directories: set[str] = set()
        for name in stored:
            self._keep(name)

    def of(self, name: str) -> str:
        """Return the name in the store."""
        if name not in self._made:
            self._made[name] = self._fitting(_accepted(name), name)
            self._keep(self._made[name])
        return self._made[name]

    def _fitting(self, accepted: str, name: str) -> str:
        """Return an accepted name, changed where a file stands in the place of a directory, or the other way round."""
        at = ""
        *directories, file = accepted.split("/")
        for part in directories:
            is_file = at + part in self._files
            at += (_marked(part, f"{at}{part}/") if is_file else part) + "/"
        return at + (_marked(file, name) if at + file in self._directories else file)

    def _keep(self, name: str) -> None:
        self._files.add(name)
        parts = name.split("/")
        self._directories.update("/".join(parts[:count]) for count in range(1, len(parts)))


def _accepted(name: str) -> str:
    """Return a name of characters, parts and length that MLflow accepts."""
    parts = _REFUSED.sub("_", name).split("/")
    accepted = "/".join("_" if part in ("", ".", "..") else part for part in parts)
    if len(encoded := accepted.encode()) > _LONGEST_NAME:
        accepted = encoded[:_LONGEST_NAME].decode(errors="ignore")
    return accepted if accepted == name else _marked(accepted, name)


def _marked(text: str, name: str) -> str:
    return f"{text}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"
