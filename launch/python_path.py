"""Environment of the Python processes that Limelight starts: they import Limelight and its libraries, nothing else.

``python -m`` puts the working directory before all other places of modules. In a directory with a ``trainer/`` or a
``random.py`` of its own, a process would import these. Standard library only, since the launcher loads little.
"""

from __future__ import annotations

import os
import site
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""Directory of Limelight's packages: a checkout, or a directory of installed packages."""


def safe_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which ``python -m MODULE`` imports the Limelight of this process.

    PYTHONSAFEPATH keeps the working directory out of the search for modules, in the process and in those that it starts
    in turn. The directories of PYTHONPATH are kept in their order, but not an empty entry, which means the working
    directory; ``export PYTHONPATH=/mine:$PYTHONPATH`` makes one. A checkout comes first, because the working directory
    may be the only reason why this process has found it.
    """
    directories = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    # Every process finds the installed packages. Named in PYTHONPATH they would come before the standard library.
    installed = {Path(entry).resolve() for entry in [*site.getsitepackages(), site.getusersitepackages()]}
    if ROOT not in installed and ROOT not in {Path(entry).resolve() for entry in directories}:
        directories.insert(0, str(ROOT))
    safe = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    return {**safe, "PYTHONSAFEPATH": "1", **({"PYTHONPATH": os.pathsep.join(directories)} if directories else {})}
