"""Commands that repair the installation, for messages: a checkout has a Makefile, an installed wheel has none."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Directory of Limelight's packages: a checkout, or a directory of installed packages."""


def setup_command(variables: str = "", clean: bool = False) -> str:
    """Return the command that installs Limelight's packages.

    Args:
        variables: settings of make, such as ``DEVICE=cuda``.
        clean: True if the environment is removed first.
    """
    command = " ".join(["make", *(["clean"] if clean else []), "setup", *variables.split()])
    if _is_checkout():
        return command
    return f"{command} in a checkout of Limelight, then install the wheel there again"


def extra_command(package: str, extra: str) -> str:
    """Return the command that installs a package of an extra of pyproject.toml.

    For a wheel it is the package alone at its pinned version. ``pip install 'limelight[EXTRA]'`` would also install
    fbgemm-gpu, which torchrec requires, and overwrite the files of fbgemm-gpu-cpu.
    """
    if _is_checkout():
        return f"make setup EXTRAS=llm,dev,{extra}"
    try:
        requirements = requires("limelight") or []
    except PackageNotFoundError:
        requirements = []
    pins = (re.match(rf"{re.escape(package)}==[^;\s]+", requirement) for requirement in requirements)
    return f"pip install {next((pin[0] for pin in pins if pin), package)}"


def _is_checkout() -> bool:
    return (ROOT / "Makefile").is_file() and (ROOT / "pyproject.toml").is_file()
