"""Config reference: every key of a job file as Markdown tables."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config.toml import fields, section_of


def _type_name(annotation: Any) -> str:
    """Format a field's type for the reference."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " \\| ".join(json.dumps(choice) for choice in arguments)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is tuple:
        inner = [argument for argument in arguments if argument is not Ellipsis]
        return f"list of {_type_name(inner[0])}"
    if origin is dict:
        return f"table of {_type_name(arguments[1])}"
    if arguments:
        return " or ".join(_type_name(argument) for argument in arguments if argument is not type(None))
    names = {str: "string", int: "integer", float: "number", bool: "true \\| false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(info: FieldInfo) -> str:
    """Format a field's default for the reference."""
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    return "unset" if value is None else f"`{json.dumps(value)}`"


def reference(job: type[BaseModel]) -> str:
    """Return every key of a job with type, default and meaning, as Markdown tables: the content of docs/config.md."""
    lines: list[str] = []
    for section, info in job.model_fields.items():
        model = section_of(info.annotation)
        assert model is not None
        summary = (model.__doc__ or "").strip().split("\n")[0]
        lines += [f"**`[{section}]`** {summary}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        # Sections of the same type share their fields, so that one line of the table describes all of them.
        shared: dict[int, tuple[list[str], FieldInfo]] = {}
        for name, field in fields(model):
            shared.setdefault(id(field), ([], field))[0].append(f"`{name}`")
        lines += [
            f"| {', '.join(names)} | {_type_name(field.annotation)} | {_default(field)} | {field.description} |"
            for names, field in shared.values()
        ]
        lines.append("")
    return "\n".join(lines).rstrip()
