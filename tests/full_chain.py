"""Command lines of `make full`, as its recipe would run them."""

from __future__ import annotations

import os
import re
import subprocess

from tests.paths import ROOT


def commands(*variables: str) -> list[str]:
    """Return the command lines of ``limelight`` in the recipe of ``make full``, in their order.

    Args:
        variables: variables of make, such as ``USERS=100``.
    """
    # Variables of a `make test` that runs this test would be those of the nested make, too.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-n", "full", *variables]
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return re.findall(r"\.venv/bin/(limelight [^;\n]+)", printed.stdout)
