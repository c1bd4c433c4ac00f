"""Import rules that import-linter has no contract for: the outside packages that each of our packages may import."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions

import pytest

from tests.paths import ROOT
from tests.syntax import statements

OWN = {"modules", "trainer", "launch", "benchmarks", "tests"}
MAY_IMPORT = {
    "modules": {"modules"},
    "trainer": {"trainer", "modules"},
    "launch": {"launch", "trainer"},
    "benchmarks": OWN - {"tests"},
    "tests": OWN,
}


@cache
def imports(package: str) -> list[tuple[str, str]]:
    """Return file and top-level name of every absolute import, also of imports inside functions."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        place = str(path.relative_to(ROOT))
        for node in statements(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found += [(place, alias.name.split(".")[0]) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{place}: relative import"
                found.append((place, (node.module or "").split(".")[0]))
    return found


@cache
def installed() -> Mapping[str, list[str]]:
    """Return top-level name -> installed distributions that provide it, which takes a second to find."""
    return packages_distributions()


def declared(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + [
        item for extra in extras for item in project["optional-dependencies"][extra]
    ]
    return {normal(requirement.split("==")[0]) for requirement in requirements}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


PEERS = {
    "benchmarks/speed/peers/easyrec.py": ("google", "torchrec", "tzrec"),
    "benchmarks/speed/peers/fuxi.py": ("fuxictr",),
    "benchmarks/speed/peers/rechub.py": ("torch_rechub",),
}
"""Program of a benchmark -> packages of the Python that a user names for it, which is not Limelight's."""


@pytest.mark.parametrize("package", sorted(OWN))
def test_only_packages_below_are_imported(package: str) -> None:
    wrong = [(place, name) for place, name in imports(package) if name in OWN - MAY_IMPORT[package]]
    assert not wrong


@pytest.mark.parametrize("package", sorted(OWN))
def test_every_outside_import_is_a_declared_dependency(package: str) -> None:
    providers = installed()
    extras = ["cpu", "llm", "kafka", "s3", "redis", "mlflow"] + (["dev"] if package in ("benchmarks", "tests") else [])
    # Triton is installed with the CUDA build of PyTorch.
    allowed = declared(*extras) | {"fbgemm-gpu", "triton"}
    outside = [(place, name) for place, name in imports(package) if name not in OWN | set(sys.stdlib_module_names)]
    wrong = [
        (place, name)
        for place, name in outside
        if not allowed & {normal(distribution) for distribution in providers.get(name, [name])}
        and name not in PEERS.get(place, ())
    ]
    assert not wrong


def test_modules_import_only_tensors_arrays_and_compilers() -> None:
    outside = {name for _, name in imports("modules") if name not in {"modules"} | set(sys.stdlib_module_names)}
    assert outside <= {"torch", "torchrec", "numpy", "numba", "llvmlite", "triton"}


def test_the_rules_see_imports_inside_functions() -> None:
    assert ("launch/cli/main.py", "trainer") in imports("launch")
    assert any(place == "launch/doctor/probe.py" and name == "torch" for place, name in imports("launch"))
