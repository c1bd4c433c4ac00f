"""Command lines of `make full`, as its recipe would run them."""

from __future__ import annotations

import shlex

from benchmarks.quality.full_tables import command_of, make_full_lines


def commands(*variables: str) -> list[str]:
    """Return the command lines of ``limelight`` in the recipe of ``make full``, in their order.

    Args:
        variables: variables of make, such as ``USERS=100``.
    """
    return [f"limelight {shlex.join(command_of(line))}" for line in make_full_lines(*variables)]
