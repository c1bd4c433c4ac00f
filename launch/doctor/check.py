"""One answer of the doctor's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """What was looked at and what was found.

    Attributes:
        name: what was looked at.
        status: ``fail`` if training cannot work, ``warn`` if it may be slow or fail later.
        message: what was found.
        fix: what to type; empty when nothing is wrong.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    message: str
    fix: str = ""
