"""Copies of Limelight's own job files and templates, for a directory outside of a checkout."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path

from trainer.config.own_files import CONFIGS, configs_directory
from trainer.console.errors import UserError, one_line

_CLUSTER = "cluster"


def copy_own_files(directory: str, *, overwrite: bool = False) -> list[Path]:
    """Write Limelight's job files, settings and templates to a directory; their paths are changed to the copies.

    Args:
        directory: directory to write, with ``deepspeed/``, ``templates/`` and ``cluster/`` in it.
        overwrite: replace files that exist with another content.

    Returns:
        The files that were written; files that are there already with the same content are not among them.

    Raises:
        UserError: a file exists with another content and ``overwrite`` is False (nothing is written then), or a file
            cannot be written.
    """
    target = Path(directory)
    # The name as typed, since job files name paths as seen from the working directory.
    copies = {target / name: _with_paths(text, target.as_posix()) for name, text in _own_files().items()}
    try:
        missing = [file for file in copies if not file.exists()]
        changed = [file for file in copies if file not in missing and file.read_bytes() != copies[file].encode()]
        if changed and not overwrite:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise UserError(f"{changed[0]}{more}: exists with another content; --overwrite replaces it")
        for file in missing + changed:
            file.parent.mkdir(parents=True, exist_ok=True)
            tmp_path = file.with_name(f".{file.name}.{os.getpid()}")
            tmp_path.write_text(copies[file], encoding="utf-8")
            tmp_path.replace(file)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({one_line(error)})") from None
    return missing + changed


def _own_files() -> dict[str, str]:
    """Return the text of each file by its path in the copy."""
    configs = configs_directory()
    found = {path.relative_to(configs).as_posix(): path for path in sorted(configs.rglob("*")) if path.is_file()}
    found |= {f"{_CLUSTER}/{file.name}": Path(str(file)) for file in files("launch").joinpath(_CLUSTER).iterdir()}
    return {name: path.read_text(encoding="utf-8") for name, path in found.items()}


def _with_paths(text: str, directory: str) -> str:
    """Return a file's text with the paths of Limelight's own files below ``directory``."""
    return re.sub(rf"\b(?:launch/(?={_CLUSTER}/)|{CONFIGS}/)", lambda found: f"{directory}/", text)
