"""The job of a run as TOML, with what differs from the defaults."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, TypeAdapter

from trainer.checkpoint.run_kind import RunKind
from trainer.config.align import AlignConfig
from trainer.config.finetune import FinetuneConfig
from trainer.config.foresight import ForesightConfig
from trainer.config.ranker import JobConfig
from trainer.config.staytime import StaytimeConfig
from trainer.config.toml import ANY, fields

MODELS: dict[RunKind, type[BaseModel]] = {
    "align": AlignConfig,
    "finetune": FinetuneConfig,
    "foresight": ForesightConfig,
    "ranker": JobConfig,
    "staytime": StaytimeConfig,
}
"""Kind of a run -> the schema of its job."""

OWN_KEYS = ("run.directory", "run.name")
"""Settings that every run has to itself."""

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_REQUIRED = object()


@dataclass(frozen=True)
class JobLine:
    """A line of a job file.

    Attributes:
        text: TOML, with the default, and the value of the other run, in a comment if they are other ones.
        changed: True if the value is not the default.
        differs: True if the value is not that of the other run.
    """

    text: str
    changed: bool
    differs: bool = False


def job_lines(
    config: Mapping[str, Any], kind: RunKind | None, against: Mapping[str, Any] | None = None
) -> list[JobLine]:
    """Return a job as the lines of a TOML file.

    Args:
        config: content of ``config.json``.
        kind: of the run; None knows no defaults.
        against: content of ``config.json`` of another run; None for no comparison. Keys that only the other run has
            are comments.
    """
    defaults = _defaults(MODELS[kind]) if kind in MODELS else {}
    return list(_section(config, (), defaults, against))


def _section(
    section: Mapping[str, Any], path: tuple[str, ...], defaults: Mapping[str, Any], against: Mapping[str, Any] | None
) -> Iterator[JobLine]:
    """Yield the keys of a section, then the sections in it."""
    # TOML has no null: a key without a value is absent.
    inner = {key: value for key, value in section.items() if isinstance(value, Mapping) and value}
    own = {key: value for key, value in section.items() if key not in inner and value is not None}
    other = {} if against is None else {key: value for key, value in against.items() if value not in (None, {})}
    gone = [key for key in other if key not in own and key not in inner]
    if (own or gone) and path:
        yield JobLine(f"[{'.'.join(map(_key, path))}]", False)
    for key, value in own.items():
        name = ".".join((*path, key))
        default = _default_of(name, defaults)
        text, comments = f"{_key(key)} = {_toml(value)}", []
        # A table of free keys without any is what it is by default.
        usual = not defaults or default is _REQUIRED or default == value or (default is None and value == {})
        if not usual:
            comments.append(f"default: {'unset' if default is None else _toml(default)}")
        differs = against is not None and name not in OWN_KEYS and _emptied(value) != other.get(key)
        if differs:
            comments.append(f"other run: {_toml(other[key]) if key in other else 'unset'}")
        changed = not usual or (default is _REQUIRED and bool(defaults))
        yield JobLine(text + (f"  # {', '.join(comments)}" if comments else ""), changed, differs)
    for key in gone:
        yield JobLine(f"# {_key(key)} = {_toml(other[key])}  # in the other run only", False, True)
    if own or gone:
        yield JobLine("", False)
    for key, value in inner.items():
        beside = other.get(key, {})
        yield from _section(
            value, (*path, key), defaults, None if against is None else beside if isinstance(beside, Mapping) else {}
        )


def _emptied(value: Any) -> Any:
    """Return None for a table without keys, which is the same as none."""
    return None if value == {} else value


def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    """Return the default of every key as JSON, by its dotted name."""
    json_of = TypeAdapter(Any).dump_python
    return {
        name: _REQUIRED if info.is_required() else json_of(info.get_default(call_default_factory=True), mode="json")
        for name, info in fields(model)
    }


def _default_of(key: str, defaults: Mapping[str, Any]) -> Any:
    """Return the default of a key; that of a free key is unset."""
    if key in defaults:
        return defaults[key]
    parts = key.split(".")
    for name, default in defaults.items():
        pattern = name.split(".")
        if len(pattern) == len(parts) and all(
            part == wanted or wanted == ANY for part, wanted in zip(parts, pattern, strict=True)
        ):
            return default
    return None


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else json.dumps(key)


def _toml(value: Any) -> str:
    """Format a value of a JSON file as TOML on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(str(key))} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
