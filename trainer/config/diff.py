"""Compares two resolved jobs key by key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


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
