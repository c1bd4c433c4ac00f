"""Kinds of runs, told apart by the sections of their job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from trainer.runtime.stored_files import read_json_object

RunKind = Literal["align", "export", "finetune", "foresight", "ranker", "staytime"]
"""Job that wrote a directory, or ``export``."""

_SECTIONS: dict[str, RunKind] = {
    "lcu": "staytime",
    "lora": "finetune",
    "towers": "align",
    # An alignment has this section, too, and comes before.
    "evaluate": "foresight",
}
"""Section of a job file -> the job that has it; a ranker has none of them."""

JOBS: dict[RunKind, str] = {
    "align": "align",
    "finetune": "finetune",
    "foresight": "foresight",
    "ranker": "train",
    "staytime": "staytime",
}
"""Kind of a run -> words of the command after ``limelight``."""


def kind_of_job(config: Mapping[str, Any]) -> RunKind:
    """Return the kind of a run from its ``config.json``."""
    return next((kind for section, kind in _SECTIONS.items() if section in config), "ranker")


def run_kind(directory: str | Path) -> RunKind | None:
    """Return the job that wrote a run, or ``export``; None if the directory is neither a run nor an exported model.

    Raises:
        UserError: the run's settings are not JSON.
    """
    if (Path(directory) / "export.json").is_file():
        return "export"
    try:
        return kind_of_job(read_json_object(Path(directory) / "config.json"))
    except (FileNotFoundError, NotADirectoryError):
        return None
