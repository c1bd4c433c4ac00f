"""Reading of job files: overrides from the command line are applied, and the result is validated."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from trainer.config.iso_time import ISO_FORMS, read_iso
from trainer.config.own_files import find_settings, missing_job_advice
from trainer.config.paths import check_outputs
from trainer.config.toml import Model, check_depth, read_toml, validate
from trainer.console.errors import UserError
from trainer.runtime.stored_files import MAX_SETTINGS_BYTES, read_json_object


def load_job(model: type[Model], path: str | Path, overrides: Sequence[str] = ()) -> Model:
    """Read a job file, apply ``section.key=value`` overrides, and validate the result.

    Args:
        model: schema of the job.
        path: the job file.
        overrides: words of the command line. A value is TOML; a bare word is a string.

    Raises:
        UserError: missing file, not TOML, unknown key (the message names the nearest one), wrong type or range, or an
            output that must be local is a URL.
    """
    job = validate(model, read_job(path, overrides), str(path))
    check_outputs(job)
    return job


def read_job(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a job file and apply overrides, without validating keys and values.

    Raises:
        UserError: missing file, not TOML, or an override without a key.
    """
    if advice := missing_job_advice(path):
        raise UserError(f"{path}: no such job file; {advice}")
    raw = read_toml(path, "job file")
    for override in overrides:
        _apply_override(raw, override)
        check_depth(raw, f"override {override[:100]!r}")
    raw = _times_as_text(raw)
    return raw


def load_deepspeed(path: str) -> dict[str, Any]:
    """Read DeepSpeed's JSON settings. The engine adds the batch sizes later.

    A file of ``configs/deepspeed/`` that the working directory does not have is Limelight's own.

    Raises:
        UserError: missing file, or not a JSON object.
    """
    try:
        return read_json_object(find_settings(path), MAX_SETTINGS_BYTES)
    except FileNotFoundError:
        raise UserError(f"train.deepspeed = {path!r}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"train.deepspeed = {path!r}: a directory; name a file with DeepSpeed's settings") from None


def parse_time(text: str, timezone: str, key: str) -> int:
    """Convert an ISO date or time to milliseconds UTC. A time without an offset is in ``timezone``.

    Args:
        text: the date or time.
        timezone: IANA name of a time zone.
        key: key or option that the time belongs to, for the message.

    Raises:
        UserError: not an ISO date or time.
    """
    milliseconds = read_iso(text, timezone)
    if milliseconds is not None:
        return milliseconds
    try:
        # Stored jobs may have a form that only Python reads, such as 20220504.
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{key} = {text!r}: not a time; write {ISO_FORMS}") from None
    return round((moment if moment.tzinfo else moment.replace(tzinfo=ZoneInfo(timezone))).timestamp() * 1000)


def _times_as_text(value: Any) -> Any:
    """Convert TOML's dates and times to the ISO strings of the config, so that 2022-05-04 needs no quotes."""
    if isinstance(value, dict):
        return {key: _times_as_text(inner) for key, inner in value.items()}
    return value.isoformat() if isinstance(value, date) else value


def _override_example(raw: dict[str, Any]) -> str:
    """Return an example for the message about a wrong override: a key that the job file has, with its value."""
    for section, keys in raw.items():
        for key, value in keys.items() if isinstance(keys, dict) else ():
            if isinstance(value, str | int | float) and not re.search(r"\s|^$", str(value)):
                return f", such as {section}.{key}={str(value).lower() if isinstance(value, bool) else value}"
    return ""


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one ``section.key=value`` in a nested mapping; missing sections are created."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: write section.key=value{_override_example(raw)}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except RecursionError:
        raise UserError(f"override {key}: arrays or tables are nested too deeply") from None
    except tomllib.TOMLDecodeError:
        # A bare word such as `mmoe` is not TOML: strings need no quotes on the command line.
        value = text
    *sections, last = key.split(".")
    node = raw
    for depth, section in enumerate(sections, 1):
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {'.'.join(sections[:depth])} is a value, not a section")
    node[last] = value
