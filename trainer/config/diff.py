"""Compares two resolved jobs key by key, and lists the keys that may differ when a run is resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from trainer.config.toml import section_of


def changeable_keys(job: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """List the keys and sections of a job marked with ``trainer.config.sections.MAY_CHANGE``, as dotted names."""
    for name, info in job.model_fields.items():
        extra, section = info.json_schema_extra, section_of(info.annotation)
        if isinstance(extra, dict) and extra.get("may_change_on_resume"):
            yield prefix + name
        elif section is not None:
            yield from changeable_keys(section, f"{prefix}{name}.")


def differences(then: dict[str, Any], now: dict[str, Any], but: tuple[str, ...]) -> list[str]:
    """Settings of :func:`flat_settings` that are not the same, a line each; those below the keys ``but`` are free."""
    return [
        f"{key} = {_shown(then, key)} then, {_shown(now, key)} now"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and not any(f"{key}.".startswith(f"{free}.") for free in but)
    ]


def _shown(settings: dict[str, Any], key: str) -> str:
    return json.dumps(settings[key]) if key in settings else "unset"


def flat_settings(section: Mapping[str, Any]) -> dict[str, Any]:
    """``section.key`` -> value, over all depths."""
    return dict(_walk(section, ""))


def _walk(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
