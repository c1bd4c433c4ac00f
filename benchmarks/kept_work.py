"""The directory in which a benchmark keeps its parts: it belongs to one set of settings.

Parts that exist are not made again, so a directory that was begun with other settings would give the old parts under
the new settings. It is refused instead.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trainer.console.errors import UserError
from trainer.data.format.dataset import fingerprint
from trainer.data.format.schema import DatasetSpec
from trainer.runtime.files import write_json

SETTINGS_FILE = "settings.json"
OVERRIDES = "overrides"
"""Name of the arguments ``KEY=VALUE`` that follow the options."""
_ANOTHER = "name another --work"


def begin_work(
    benchmark: str,
    options: argparse.Namespace,
    free: Collection[str] = (),
    contents: Mapping[str, str | Path | None] | None = None,
) -> None:
    """Store the settings of a benchmark in its new ``options.work``; refuse one that was begun with others.

    Args:
        benchmark: name, such as ``quality.larm``.
        options: of the command line; all of them but ``out``, ``work`` and ``free`` must stay the same.
        free: names of the options on which no kept part depends, or whose values are in the names of the parts.
        contents: option or file -> path whose content must stay the same, see :func:`content_of`; None for an option
            without a value.

    Raises:
        SystemExit: the directory was begun with other settings, or a path of ``contents`` cannot be read. The message
            is one line.
    """
    if unknown := {*free} - {*vars(options)}:
        raise ValueError(f"{benchmark} has no options {sorted(unknown)}")
    work: Path = options.work
    fixed = {name: value for name, value in vars(options).items() if name not in {"out", "work", *free}}
    try:
        found = {name: path and content_of(path) for name, path in (contents or {}).items()}
    except (OSError, UserError) as error:
        sys.exit(f"limelight: error: {error}")
    document = {"benchmark": benchmark, "options": fixed, "contents": found}
    # As they are read again: tuples are lists, and paths are texts.
    wanted: dict[str, Any] = json.loads(json.dumps(document, default=str))
    file = work / SETTINGS_FILE
    if file.exists():
        begun = _differences(json.loads(file.read_text()), wanted)
    elif work.exists() and any(work.iterdir()):
        sys.exit(f"limelight: error: {work}: has files, but no {SETTINGS_FILE} that says of which settings; {_ANOTHER}")
    else:
        work.mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)
        return
    if begun:
        sys.exit(f"limelight: error: {work}: was begun {', '.join(begun)}; repeat that, or {_ANOTHER}")


def content_of(path: str | Path) -> str:
    """Return a hash of a dataset, of a file, or of all files of another directory.

    Raises:
        OSError, UserError: it cannot be read.
    """
    place = Path(path)
    if (place / "dataset.json").exists():
        return fingerprint(str(path), DatasetSpec.load(path))
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(one for one in place.rglob("*") if one.is_file()) if place.is_dir() else [place]:
        digest.update(f"{file.relative_to(place)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as source:
            digest.update(hashlib.file_digest(source, "blake2b").digest())
    return digest.hexdigest()


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return how a directory was begun, where that is not as wanted."""
    if stored["benchmark"] != wanted["benchmark"]:
        return [f"by benchmarks.{stored['benchmark']}"]
    found = []
    for name in dict.fromkeys([*wanted["options"], *stored["options"]]):
        value = stored["options"].get(name)
        if value != wanted["options"].get(name):
            found.append(_shown(name, value))
    for name in dict.fromkeys([*wanted["contents"], *stored["contents"]]):
        content = stored["contents"].get(name)
        if content != wanted["contents"].get(name):
            found.append(f"without {name}" if content is None else f"with another content of {name}")
    return found


def _shown(name: str, value: Any) -> str:
    option = "KEY=VALUE" if name == OVERRIDES else f"--{name.replace('_', '-')}"
    if value is None or value is False or value == []:
        return f"without {option}"
    text = " ".join(map(str, value)) if isinstance(value, list) else "" if value is True else str(value)
    return f"with {text if name == OVERRIDES else f'{option} {text}'.rstrip()}"
