"""Fixtures of the tests of commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from launch import local

Started = list[tuple[str, list[str], int]]
"""Module, arguments and number of ranks of each start."""


@pytest.fixture
def recorded_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Started:
    """Record the ranks that a command would start, and work in ``tmp_path``."""
    calls: Started = []

    def start_ranks(module: str, arguments: Sequence[str], ranks: int) -> int:
        calls.append((module, list(arguments), ranks))
        return 0

    monkeypatch.setattr(local, "start_ranks", start_ranks)
    monkeypatch.chdir(tmp_path)
    return calls
