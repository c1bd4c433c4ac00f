"""Commands that repair the installation, for messages: a checkout has a Makefile, an installed wheel has none."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
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


@dataclass(frozen=True)
class OptionalPackage:
    """A package of an extra of pyproject.toml.

    Attributes:
        module: its name for ``import``.
        name: its name for pip.
        extra: the extra.
    """

    module: str
    name: str
    extra: str

    @property
    def is_installed(self) -> bool:
        """True if the package can be imported; it is not imported."""
        try:
            return find_spec(self.module) is not None
        except ValueError:
            # A module without a spec is in sys.modules, and `import` returns it.
            return True

    @property
    def advice(self) -> str:
        """Message about the package where it is not installed, with the command that installs it."""
        return f"needs the package {self.name}; type: {extra_command(self.name, self.extra)}"


MLFLOW = OptionalPackage("mlflow", "mlflow-skinny", "mlflow")
REDIS = OptionalPackage("redis", "redis", "redis")


def _is_checkout() -> bool:
    return (ROOT / "Makefile").is_file() and (ROOT / "pyproject.toml").is_file()
