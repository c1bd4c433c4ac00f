"""Rules of the layout that no linter checks: jobs, layers, names and first lines of docstrings."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

from tests.paths import ROOT
from tests.syntax import statements

PACKAGES = ("trainer", "modules", "launch", "benchmarks")
LONGEST_JOB = 120
RIDDLE = re.compile(r"(What|Which|How|Where|When|Who|Whether|Of|That|Those|Their|Its)\b")
"""First words that make a docstring a question or half a sentence."""

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@cache
def definitions(package: str) -> list[tuple[str, str, str]]:
    """Return file, name if it is a class of a module, and first line of the docstring, for every definition."""
    return [
        (
            str(path.relative_to(ROOT)),
            node.name if isinstance(node, ast.ClassDef) and not node.col_offset else "",
            (ast.get_docstring(node) or "").partition("\n")[0],
        )
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in statements(ast.parse(path.read_text()))
        if isinstance(node, Documented)
    ]


def test_the_root_of_trainer_holds_jobs_only_and_each_is_a_story() -> None:
    for path in (ROOT / "trainer").glob("*.py"):
        if path.name == "__init__.py":
            continue
        lines = path.read_text().splitlines()
        assert len(lines) <= LONGEST_JOB, f"{path.name} has {len(lines)} lines"
        assert 'if __name__ == "__main__":' in lines or path.name == "staytime.py", f"{path.name} is no job"


def test_every_package_and_job_has_a_layer() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    named = {name for layer in layers for name in layer.split(" | ")}
    found = {f"trainer.{path.stem}" for path in (ROOT / "trainer").glob("*.py")} - {"trainer.__init__"}
    found |= {f"trainer.{path.parent.name}" for path in (ROOT / "trainer").glob("*/__init__.py")}
    assert found == {name for name in named if name.startswith("trainer.")}


def test_tests_mirror_the_tree() -> None:
    own = {"distributed", "faults", "ecosystem"}
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(ROOT / "tests")
        if folder == Path() or folder.parts[0] in own:
            continue
        places = [ROOT / "trainer" / folder, ROOT / folder]
        assert any((place / "__init__.py").exists() for place in places), f"tests/{folder} mirrors no package"


def test_class_names_stand_once() -> None:
    names = Counter(name for package in PACKAGES for _, name, _ in definitions(package) if name)
    assert [name for name, count in names.items() if count > 1] == []


def test_the_first_line_of_a_docstring_is_a_sentence_or_a_noun() -> None:
    riddles = [
        f"{file}: {line}"
        for package in (*PACKAGES, "tests")
        for file, _, line in definitions(package)
        if RIDDLE.match(line)
    ]
    assert riddles == []
