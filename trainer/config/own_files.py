"""Limelight's own job files, DeepSpeed settings and prompt templates: the directory ``configs/``, from anywhere.

A checkout and a wheel both have ``configs/`` beside the package ``trainer``. Defaults such as
``configs/deepspeed/zero1.json`` name files in it, and work in every working directory.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path, PurePath

CONFIGS = "configs"


def configs_directory() -> Path:
    """Return the directory of Limelight's own job files, settings and templates."""
    return Path(str(files("trainer"))).parent / CONFIGS


def find_settings(path: str | Path) -> Path:
    """Return the file that a default or a key of a job file names.

    A path that starts with ``configs/`` and does not exist in the working directory is that of Limelight's own file, if
    there is one. Every other path is returned unchanged.
    """
    named = PurePath(path)
    if named.parts[:1] == (CONFIGS,) and ".." not in named.parts and not os.path.exists(named):
        own = configs_directory().parent / named
        if own.is_file():
            return own
    return Path(path)


def missing_job_advice(path: str | Path) -> str:
    """Return what to type for a job file that does not exist and that Limelight has by this name; else ``""``.

    A job file itself is never read from Limelight's own ones: in a wrong working directory, the job would be another.
    """
    if os.path.exists(path) or not (configs_directory() / PurePath(path).name).is_file():
        return ""
    return f"`limelight configs {CONFIGS}` copies Limelight's own job files"
