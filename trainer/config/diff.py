"""Comparison of two resolved jobs key by key, and the keys that may differ when a run is resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, get_origin

from pydantic import BaseModel

from trainer.config.toml import ANY, section_of


def changeable_keys(job: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of keys and sections that are marked with ``trainer.config.sections.MAY_CHANGE``.

    :data:`trainer.config.toml.ANY` stands for a free key.
    """
    for name, info in job.model_fields.items():
        extra, section = info.json_schema_extra, section_of(info.annotation)
        if isinstance(extra, dict) and extra.get("may_change_on_resume"):
            yield prefix + name
        elif section is not None:
            free = f"{ANY}." if get_origin(info.annotation) is dict else ""
            yield from changeable_keys(section, f"{prefix}{name}.{free}")


def differences(then: dict[str, Any], now: dict[str, Any], ignored: tuple[str, ...]) -> list[str]:
    """Describe the settings that differ, one line each.

    Args:
        then: earlier settings, from :func:`flat_settings`.
        now: present settings, from :func:`flat_settings`.
        ignored: keys and sections that may differ; :data:`trainer.config.toml.ANY` stands for any free key.
    """
    return [
        f"{key} = {_shown(then, key)} then, {_shown(now, key)} now"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and not any(_is_inside(key, free) for free in ignored)
    ]


def _is_inside(key: str, section: str) -> bool:
    """True if a dotted key is that of a section, or inside of it."""
    parts, wanted = key.split("."), section.split(".")
    return len(parts) >= len(wanted) and all(
        part == name or name == ANY for part, name in zip(parts, wanted, strict=False)
    )


def _shown(settings: dict[str, Any], key: str) -> str:
    """Format one setting for a message."""
    return json.dumps(settings[key]) if key in settings else "unset"


def flat_settings(section: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested settings to ``section.key`` -> value."""
    return dict(_walk(section, ""))


def _walk(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of a section, depth first."""
    for key, value in section.items():
        # An empty table stays a value; it would vanish from the comparison as a section without keys.
        if isinstance(value, Mapping) and value:
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
