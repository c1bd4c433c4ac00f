"""Tests do not wait for the disk: what a sync is for, only a loss of power would show."""

from __future__ import annotations

import os


def leave_out_syncs() -> None:
    """Let syncs of this process, and of processes that are forked from it, return at once, if the file is open."""
    os.fsync = os.fdatasync = _check


def _check(descriptor: int) -> None:
    """Raise the error of a descriptor that is none."""
    os.fstat(descriptor)
