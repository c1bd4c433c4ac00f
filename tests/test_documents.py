"""The documents: length of README.md, links, files and messages that exist; tests/test_examples.py has the commands."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.examples import FENCE, PAGES, name_of
from tests.paths import ROOT

LINK = re.compile(r"\]\(([^()\s]+)\)")


def without_code(text: str) -> str:
    return re.sub(r"`[^`]*`", "", FENCE.sub("", text))


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        count = sum(anchor == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", anchor) is not None for anchor in found)
        found.add(f"{slug}-{count}" if count else slug)
    return found


@cache
def messages() -> tuple[str, ...]:
    """Return every string of the product's source; "\\0" stands for a value in an f-string."""
    found = []
    for package in ("trainer", "launch", "modules"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return tuple(found)


def test_the_readme_can_be_read_in_one_sitting() -> None:
    assert 150 <= len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        if not file.exists():
            broken.append(f"{target}: no such file")
        elif anchor and (file.suffix != ".md" or anchor not in anchors(file)):
            broken.append(f"{target}: no such section")
    assert not broken


@cache
def files() -> tuple[str, ...]:
    """Return the files of the repository's folders, from the root."""
    folders = ("benchmarks", "configs", "docs", "launch", "modules", "tests", "trainer")
    return tuple(f"/{name_of(path)}" for folder in folders for path in (ROOT / folder).rglob("*.*"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """A page names a file by its path from the root, or by the end of it."""
    named = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|toml|sh|yaml))`", FENCE.sub("", page.read_text())))
    missing = {name for name in named if not any(file.endswith(f"/{name}") for file in files())}
    assert not missing - {"pyproject.toml", "map.toml", "score_one.py"}


def test_messages_under_trouble_are_what_the_code_says() -> None:
    """The first column of the table: "..." stands for what differs from case to case."""
    _, _, chapter = (ROOT / "docs" / "operations.md").read_text().partition("\n## Trouble\n")
    rows = re.findall(r"^\| `([^`]+)` \|", chapter, re.MULTILINE)
    assert len(rows) >= 20
    for row in rows:
        for part in re.split(r"\.\.\.", row):
            if len(part.strip()) > 3:
                assert any(part.strip() in text for text in messages()), f"no message has {part.strip()!r}"
