"""TOML files as typed objects. The message of a mistake has the file, the key, the value and what would be accepted."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from trainer.console.errors import UserError
from trainer.runtime.stored_files import read_settings

Model = TypeVar("Model", bound=BaseModel)

_TOML_TYPES = {
    "tuple_type": 'input should be a list, such as [1, 2] or ["a", "b"]',
    "dict_type": "input should be a table of keys and values",
    "model_type": "input should be a section of keys and values",
}
"""Kind of a mistake -> message in TOML's terms; pydantic names Python's types."""

ANY = "NAME"
"""Part of the dotted name of a key that stands for any free key."""

_MAX_DEPTH = 50
"""Levels of arrays and tables in a TOML file; a job file needs five."""


def read_toml(path: str | Path, what: str) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: the file.
        what: kind of file for the messages, such as ``job file``.

    Raises:
        UserError: missing file, or not TOML.
    """
    file = Path(path)
    try:
        raw = tomllib.loads(read_settings(file))
    except FileNotFoundError:
        raise UserError(f"{file}: no such {what}") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise UserError(f"{file}: not a TOML file") from None
    except RecursionError:
        raise UserError(f"{file}: not a {what}: arrays or tables are nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file}: not valid TOML: {error}") from None
    check_depth(raw, f"{file}: not a {what}")
    return raw


def check_depth(raw: dict[str, Any], what: str) -> None:
    """Check that a value has few levels, so that no later step needs a deep recursion.

    Args:
        raw: the value.
        what: beginning of the message.

    Raises:
        UserError: it has more than 50 levels of arrays and tables.
    """
    level: list[Any] = [raw]
    for _ in range(_MAX_DEPTH):
        containers = (value.values() if isinstance(value, dict) else value for value in level)
        level = [inner for values in containers for inner in values if isinstance(inner, dict | list)]
    if level:
        raise UserError(f"{what}: arrays or tables are nested too deeply")


def validate(model: type[Model], raw: dict[str, Any], origin: str) -> Model:
    """Convert a nested mapping to a typed object.

    Args:
        model: schema of the object.
        raw: the mapping.
        origin: file that the mapping comes from, for the messages.

    Raises:
        UserError: unknown key (the message names the nearest one), wrong type or range.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(error.errors()[0], raw, model)}") from None


def list_mistakes(model: type[BaseModel], raw: dict[str, Any]) -> list[str]:
    """Return every mistake of ``raw`` as one line; :func:`validate` raises the first of them."""
    try:
        model.model_validate(raw)
    except ValidationError as error:
        return [_explain(details, raw, model) for details in error.errors()]
    return []


def count_mistakes(model: type[BaseModel], raw: dict[str, Any]) -> int:
    """Return the number of lines that :func:`list_mistakes` has, without the time to find the words of each."""
    try:
        model.model_validate(raw)
    except ValidationError as error:
        return error.error_count()
    return 0


def validate_stored(model: type[Model], raw: dict[str, Any], origin: str) -> Model:
    """Validate a job that an earlier version may have written.

    Earlier names of keys are accepted. A stored job has all keys of its version, so a key that is missing came later;
    if its field names what the model did before (``json_schema_extra={"before": ...}``), that is its value.

    Raises:
        UserError: the same as :func:`validate`.
    """
    return validate(model, _with_present_keys(model, raw), origin)


def _with_present_keys(model: type[BaseModel], raw: dict[str, Any]) -> dict[str, Any]:
    """Return a stored job with renamed keys under their present names, and values for keys that came later."""
    new_names = {former_name(info): name for name, info in model.model_fields.items() if former_name(info)}
    named = {new_names.get(key, key): value for key, value in raw.items()}
    for name, info in model.model_fields.items():
        if is_section(section := section_of(info.annotation)) and isinstance(named.get(name), dict):
            named[name] = _with_present_keys(section, named[name])
        elif name not in named and isinstance(info.json_schema_extra, dict) and "before" in info.json_schema_extra:
            named[name] = info.json_schema_extra["before"]
    return named


def former_name(info: FieldInfo) -> str | None:
    """Return the earlier name of a renamed key; the field has it as ``json_schema_extra={"formerly": ...}``."""
    extra = info.json_schema_extra
    name = extra.get("formerly") if isinstance(extra, dict) else None
    return name if isinstance(name, str) else None


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted name and the field of every key of a section, depth first; :data:`ANY` stands for a free key."""
    for name, info in model.model_fields.items():
        inner, free = _section_and_keys(info.annotation)
        if inner is not None:
            yield from fields(inner, f"{prefix}{name}.{f'{ANY}.' if free else ''}")
        else:
            yield f"{prefix}{name}", info


def is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    """True if a field's type is a section."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field's type holds, or None."""
    return _section_and_keys(annotation)[0]


def _section_and_keys(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """Return the section that a field's type holds, or None, and True if the section stands under free keys."""
    if is_section(annotation):
        return annotation, False
    free = get_origin(annotation) is dict
    # The values of dict[str, Section], or the one section of Section | None.
    inner = [argument for argument in get_args(annotation) if is_section(argument)]
    return (inner[0] if inner else None), free


def _explain(mistake: Mapping[str, Any], raw: dict[str, Any], model: type[BaseModel]) -> str:
    """Describe a mistake in one line. For an unknown key the line names the nearest known one."""
    key = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        for name, info in fields(model):
            if (former := former_name(info)) and key == ".".join([*name.split(".")[:-1], former]):
                return f"{key} is called {name} now"
        # A key of a section is near to other keys, and a section to sections.
        known = [name for name, _ in fields(model)] if "." in key else list(model.model_fields)
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        return f"unknown key {key}; did you mean {nearest}?"
    if mistake["type"] == "missing":
        return f"{key} is missing"
    message = _TOML_TYPES.get(mistake["type"], mistake["msg"]).removeprefix("Value error, ")
    message = f"{message[0].lower()}{message[1:]}"
    value: Any = raw
    for part in mistake["loc"]:
        value = _item(value, part)
    if isinstance(value, dict) and mistake["type"] == "value_error":
        # A validator of a whole section: its message names the keys, and the section's value would only be noise.
        return f"[{key}]: {message}" if key else message
    return f"{key} = {value!r}: {message}"


def _item(container: Any, key: str | int) -> Any:
    """Return an item of a mapping or list, or None if there is none."""
    try:
        return container[key]
    except (KeyError, IndexError, TypeError):
        return None
