"""Directories of the checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def files_of_their_owner_alone(directory: Path) -> list[Path]:
    """Return the files below a directory that others may not read, although the umask lets them."""
    probe = directory / "probe"
    probe.touch()
    usual = probe.stat().st_mode & 0o444
    probe.unlink()
    return [path for path in directory.rglob("*") if path.is_file() and path.stat().st_mode & 0o444 != usual]
