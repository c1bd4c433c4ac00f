"""Prompt templates: text files with placeholders in braces, which a user can edit.

A template file has sections. A line ``[name]`` starts a section, and text before the first section is a comment. The
templates that come with Limelight are in ``configs/templates``. Outputs made with a template store its hash.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.config.own_files import find_settings
from trainer.console.errors import UserError, one_line
from trainer.runtime.stored_files import read_settings

_SECTION = re.compile(r"\[([a-z_]+)\]\s*")


@dataclass(frozen=True)
class Template:
    """A template file.

    Attributes:
        file: path of the file.
        hash: hash of its content.
        sections: section name -> text, without line breaks at its end.
    """

    file: Path
    hash: str
    sections: dict[str, str]

    @staticmethod
    def read(file: str | Path, places: Mapping[str, frozenset[str]]) -> Template:
        """Read a template file.

        Args:
            file: path of the file. One in ``configs/`` that the working directory does not have is Limelight's own.
            places: section name -> allowed placeholder names. The file must have exactly these sections.

        Raises:
            UserError: the file does not exist, a section is missing or unknown, or a placeholder is unknown.
        """
        path = Path(file)
        try:
            content = read_settings(find_settings(path))
        except FileNotFoundError:
            raise UserError(f"{path}: no such template; Limelight's own are in configs/templates") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a readable UTF-8 text file ({one_line(error)})") from None
        sections = _sections(path, content)
        for name in sections:
            if name not in places:
                raise UserError(f"{path}: unknown section [{name}]; known are {_listed(places)}")
        for name, known in places.items():
            if name not in sections:
                raise UserError(f"{path}: section [{name}] is missing; add it")
            _check(path, name, sections[name], known)
        return Template(path, hashlib.blake2b(content.encode(), digest_size=8).hexdigest(), sections)

    def fill(self, section: str, **values: object) -> str:
        """Return a section's text with its placeholders replaced by ``values``."""
        return self.sections[section].format(**values)


def _sections(path: Path, content: str) -> dict[str, str]:
    lines: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in content.splitlines():
        if match := _SECTION.fullmatch(line):
            if match[1] in lines:
                raise UserError(f"{path}: section [{match[1]}] is defined twice; remove one of them")
            current = lines[match[1]] = []
        elif current is not None:
            current.append(line)
    return {name: "\n".join(text).rstrip() for name, text in lines.items()}


def _check(path: Path, section: str, text: str, known: frozenset[str]) -> None:
    try:
        places = [place[1:] for place in string.Formatter().parse(text) if place[1] is not None]
    except ValueError as error:
        raise UserError(f"{path}: section [{section}]: {error}; write {{{{ and }}}} for braces") from None
    for name, format_spec, conversion in places:
        if name not in known:
            raise UserError(f"{path}: section [{section}]: unknown {{{name}}}; known are {_listed(known)}")
        # A format may hold places of its own, with attributes of the values.
        if format_spec or conversion:
            raise UserError(f"{path}: section [{section}]: write {{{name}}} without a format")
    if not text.strip():
        raise UserError(f"{path}: section [{section}] is empty; write a template")


def _listed(names: Mapping[str, object] | frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "none"
