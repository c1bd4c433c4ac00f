"""Result of one check of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: part that was checked.
        status: ``fail`` if training cannot work, ``warn`` if it may be slow or fail later.
        message: finding.
        fix: command or setting that helps; empty if nothing is wrong.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    message: str
    fix: str = ""
