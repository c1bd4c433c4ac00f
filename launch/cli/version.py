"""``limelight --version``: versions of Limelight and of the libraries that do the work."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import click

LIBRARIES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "deepspeed", "transformers", "peft")
"""Packages whose versions are printed. Only one of fbgemm's builds is installed; the last two are an extra."""


def print_versions(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    """Print one line for each package and end the command. Nothing is imported for it."""
    if not wanted or context.resilient_parsing:
        return
    versions = {name: _version(name) for name in ("limelight", *LIBRARIES)}
    builds = [name for name in ("fbgemm-gpu", "fbgemm-gpu-cpu") if versions[name]]
    for name, found in versions.items():
        # The line of the build that is not there says nothing, unless there is none.
        if found or (name != "fbgemm-gpu-cpu" and not (name == "fbgemm-gpu" and builds)):
            print(f"{name} {found or 'is not installed'}")
    print(f"python {platform.python_version()}")
    context.exit()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        # A checkout on PYTHONPATH has no metadata.
        return "of a checkout that is not installed" if package == "limelight" else None
