"""The script of ``python -m tests.mutants`` on a small repository: which bugs it makes, finds, and continues with."""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
from pathlib import Path

import pytest

from tests.mutants import __main__ as script
from tests.mutants.operators import Mutant, chosen, has_meaning, mutants
from tests.mutants.targets import EQUAL, TESTS
from tests.paths import ROOT

SOURCE = '''"""Text with 1 < 2."""
from math import floor
LIMIT = 8  # 9 < 10


class Box:
    width: int = 3

    def grow(self, by: int, most: int = 5) -> int:
        """Return 1 + 1."""
        if by < 0 or not self.width:
            raise ValueError(f"{by + 1} is below {0}")
        for each in range(by):
            if each == most:
                break
            self.width += each
        logger.info(1 + 2)
        self.shown = min(self.width, -by) * floor(self.width / 2)
        return find(self.width, most)[1:by] if most else inner(lambda: by + 7)
'''


def of(source: str) -> dict[str, set[tuple[str, str]]]:
    """Return kind -> lines after the bug, without those that say the same."""
    found: dict[str, set[tuple[str, str]]] = {}
    for mutant in mutants("m.py", source.encode()):
        if has_meaning(mutant, {"m.py": source.encode()}):
            found.setdefault(mutant.kind, set()).add((mutant.function, mutant.mutant))
    return found


def test_bugs_are_small_and_of_many_kinds() -> None:
    found = of(SOURCE)
    grow = "Box.grow"
    assert found["comparison"] == {
        (grow, "if by <= 0 or not self.width:"),
        (grow, "if by > 0 or not self.width:"),
        (grow, "if each != most:"),
    }
    assert (grow, "if by < 0 and not self.width:") in found["and and or"]
    assert found["continue and break"] == {(grow, "continue")}
    assert found["opposite function"] == {
        (grow, "self.shown = max(self.width, -by) * floor(self.width / 2)"),
        (grow, "self.shown = min(self.width, -by) * ceil(self.width / 2)"),
    }
    assert found["dropped negation"] == {
        (grow, "if by < 0 or   self.width:"),
        (grow, "self.shown = min(self.width, by) * floor(self.width / 2)"),
    }
    assert {line for _, line in found["dropped statement"]} == {"pass"}
    assert (grow, "return find(self.width, most)[1:] if most else inner(lambda: by + 7)") in found["dropped bound"]
    assert found["negated condition"] == {
        (grow, "return find(self.width, most)[1:by] if not (most) else inner(lambda: by + 7)")
    }
    assert ("", "LIMIT = 9  # 9 < 10") in found["constant"] and ("", "width: int = 2") in found["constant"]
    assert ("", "def grow(self, by: int, most: int = 6) -> int:") in found["constant"]
    assert found["arithmetic"] == {
        (grow, "self.width -= each"),
        (grow, "self.shown = min(self.width, -by) / floor(self.width / 2)"),
        (grow, "self.shown = min(self.width, -by) * floor(self.width * 2)"),
        (grow, "return find(self.width, most)[1:by] if most else inner(lambda: by - 7)"),
    }


def test_texts_errors_and_annotations_have_no_bugs() -> None:
    lines = SOURCE.splitlines()
    quiet = [number for number, line in enumerate(lines, 1) if "Text" in line or "Return" in line or "raise" in line]
    quiet += [number for number, line in enumerate(lines, 1) if "logger" in line or "import" in line]
    found = mutants("m.py", SOURCE.encode())
    assert found and not {mutant.line for mutant in found} & set(quiet)


def test_methods_of_protocols_have_no_bugs() -> None:
    source = 'class Reader(Protocol):\n    def read(self, most: int = 5) -> int:\n        """Read."""\n        ...\n'
    assert not mutants("m.py", source.encode())
    assert mutants("m.py", source.replace("...", "return most").encode())


def test_a_bug_changes_one_place_of_a_file() -> None:
    source = (ROOT / "trainer" / "stream" / "labels" / "policy.py").read_bytes()
    found = mutants("policy.py", source)
    assert len(found) > 30
    for mutant in found:
        changed = mutant.apply(source)
        assert changed[: mutant.start] == source[: mutant.start]
        assert changed.endswith(source[mutant.stop :])
        ast.parse(changed)


def test_the_choice_is_the_same_for_a_seed_and_takes_turns() -> None:
    by_file = {name: mutants(name, SOURCE.encode()) for name in ("a.py", "b.py")}
    draws = [list(chosen(by_file, 12, seed, lambda mutant: mutant.kind != "constant")) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert [mutant.file for mutant in draws[0]] == ["a.py", "b.py"] * 6
    assert not any(mutant.kind == "constant" for mutant in draws[0])
    # What is chosen of a file does not depend on what the others hold.
    alone = list(chosen({"a.py": by_file["a.py"]}, 6, 1, lambda mutant: mutant.kind != "constant"))
    assert alone == [mutant for mutant in draws[0] if mutant.file == "a.py"]


def test_results_are_of_modules_and_tests_that_exist() -> None:
    """Results of a module that was moved or removed stay until the next ``python -m tests.mutants --count 0``."""
    for entry in json.loads(script.OUT.read_text())["mutants"]:
        assert entry["file"] in TESTS, entry["file"]
        file, name, _ = (entry["found_by"] or "").partition("::")
        assert not name or (ROOT / file).is_file(), file


def test_the_modules_and_their_tests_exist() -> None:
    for module, tests in TESTS.items():
        assert (ROOT / module).is_file()
        assert tests and all((ROOT / file).is_file() for file in tests), module
    for file, original, _ in EQUAL:
        assert original in {line.strip() for line in (ROOT / file).read_text().splitlines()}, original


MODULE = '''LIMIT = 3


def clipped(value: int) -> int:
    """Return the value, at most 3."""
    while value > LIMIT:
        value -= 1
    return value


def unused(value: int) -> bool:
    return value < 7
'''
TEST = """from box import clipped


def test_small_values_stay():
    assert clipped(2) == 2


def test_large_values_are_clipped():
    assert clipped(9) == 3


def test_that_always_fails():
    assert False
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a repository with a module and its tests."""
    root = tmp_path / "repository"
    (root / "tests").mkdir(parents=True)
    (root / "box.py").write_text(MODULE)
    (root / "tests" / "test_box.py").write_text(TEST.replace("assert False", "assert True"))
    (root / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    subprocess.run(["git", "init", "-q", root], check=True)
    return root


def options(out: Path, *arguments: str) -> argparse.Namespace:
    return script.parse(["--count", "99", "--out", str(out), *arguments])


@pytest.mark.slow
def test_bugs_are_tried_on_a_copy_and_results_are_merged(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The slow modules are here already, and orphans of other tests are not ours.
    monkeypatch.setattr(script, "preload", lambda: None)
    monkeypatch.setattr("tests.mutants.runner.PROCESSOR_SECONDS", 1)
    out, tests = tmp_path / "mutants.json", {"box.py": ("tests/test_box.py",)}

    def run(*arguments: str) -> dict[tuple[str, str], str | None]:
        result = script.run(repository, tests, options(out, *arguments))
        assert result["tried"] == result["found"] + result["survived"] + result["equal"] == len(result["mutants"])
        assert json.loads(out.read_text())["mutants"] == result["mutants"]
        return {(entry["original"], entry["mutant"]): entry["found_by"] for entry in result["mutants"]}

    large = "tests/test_box.py::test_large_values_are_clipped"
    first = run("--only", r"LIMIT = 3|value -= 1")
    assert first["LIMIT = 3", "LIMIT = 4"] == large, "outside of functions"
    assert first["value -= 1", "value += 1"] == large, "an endless loop"
    assert not any("7" in original for original, _ in first)
    assert (repository / "box.py").read_text() == MODULE

    # More is tried, and nothing a second time.
    both = r"LIMIT = 3|value -= 1|value < 7"
    second = run("--only", both)
    assert second.items() >= first.items() and second["return value < 7", "return value <= 7"] is None
    assert "survived: box.py:12" in capsys.readouterr().out
    monkeypatch.setattr(script.TestRunner, "find", lambda *arguments: pytest.fail("all bugs are known"))
    assert run("--only", both) == second
    monkeypatch.undo()
    monkeypatch.setattr(script, "preload", lambda: None)

    # A survivor is found by a new test; the bug of a line that has changed is forgotten.
    (repository / "tests" / "test_more.py").write_text(
        "from box import unused\n\n\ndef test_it():\n    assert not unused(7)\n"
    )
    (repository / "box.py").write_text(MODULE.replace("LIMIT = 3", "LIMIT = 1 + 2"))
    tests["box.py"] = ("tests/test_box.py", "tests/test_more.py")
    third = run("--survivors")
    assert third["return value < 7", "return value <= 7"] == "tests/test_more.py::test_it"
    assert not any(original == "LIMIT = 3" for original, _ in third)


@pytest.mark.slow
def test_a_test_that_fails_without_a_bug_finds_none(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "preload", lambda: None)
    (repository / "tests" / "test_box.py").write_text(TEST)
    result = script.run(
        repository, {"box.py": ("tests/test_box.py",)}, options(tmp_path / "mutants.json", "--only", "value < 7")
    )
    assert result["tried"] == result["survived"] > 0


BUSY = """import os, signal
from pathlib import Path
import pytest
from box import unused

TIMES = Path("times")


@pytest.fixture
def nursery():
    pass


def test_alone():
    TIMES.write_text(TIMES.read_text() + "a")
    if unused(7) and "aa" not in TIMES.read_text():
        os.kill(os.getpid(), signal.SIGALRM)


def test_of_processes(nursery):
    TIMES.write_text(TIMES.read_text() + "p")
    assert not unused(7) or "p" in TIMES.read_text()[:-1]
"""


@pytest.mark.slow
def test_a_bug_is_not_found_by_a_machine_that_is_busy(repository: Path, tmp_path: Path) -> None:
    (repository / "tests" / "test_box.py").write_text(BUSY)
    (repository / "times").write_text("")
    runner = script.TestRunner(repository, tmp_path)
    content = (repository / "box.py").read_text().replace("value < 7", "value <= 7").encode()
    outcome = runner.find("box.py", "unused", content, ["tests/test_box.py"])
    runner.close()
    assert outcome.found is None
    # With the bug, without it and with it, then with all others; a test of processes twice, and again what is left.
    assert (repository / "times").read_text() == "aaapp"
    assert (repository / "box.py").read_text() == MODULE


@pytest.mark.slow
def test_what_fails_without_a_bug_is_told_from_what_passes(repository: Path, tmp_path: Path) -> None:
    (repository / "tests" / "test_box.py").write_text(TEST)
    (repository / "tests" / "test_import.py").write_text("import missing_module\n\n\ndef test_it():\n    pass\n")
    runner = script.TestRunner(repository, tmp_path)
    names = ["test_large_values_are_clipped", "test_small_values_stay", "test_that_always_fails"]
    finders = [f"tests/test_box.py::{name}" for name in names]
    others = ["the import of tests/test_import.py", "tests/test_import.py::test_it"]
    assert runner.failing([*finders, *others, "the start of tests/test_box.py"]) == {finders[-1], *others}


def test_a_result_is_forgotten_when_its_test_is_no_longer_there(tmp_path: Path) -> None:
    source = b"def f(a):\n    return a < 1, a + 2\n"
    current = script.numbered(mutants("m.py", source))
    finders = ["tests/test_m.py::test_f[1-2]", "tests/test_m.py::test_g", "tests/none.py::test_f", None]
    finders += ["the import of m.py", "tests/test_m.py::TestAll::test_f"]
    assert len(current) == len(finders)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_m.py").write_text("def test_f():\n    pass\n")
    outcomes = [script.Outcome(finder, 1, 0.1) for finder in finders]
    entries = [script.entry_of(m, name[-1], one) for (name, m), one in zip(current.items(), outcomes, strict=True)]
    (tmp_path / "mutants.json").write_text(json.dumps({"mutants": entries}))
    kept = script.read_entries(tmp_path / "mutants.json", current, tmp_path)
    assert [entry["found_by"] for entry in kept] == [finders[0], *finders[3:]]


def test_a_reason_makes_a_survivor_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    (mutant,) = [each for each in mutants("m.py", b"def f(a):\n    return a < 1\n") if each.mutant == "return a <= 1"]
    monkeypatch.setitem(EQUAL, ("m.py", "return a < 1", "return a <= 1"), "a is never 1")
    assert isinstance(mutant, Mutant)
    entry = script.entry_of(mutant, 0, script.Outcome(None, 3, 1.5))
    assert entry["equal"] == "a is never 1" and entry["checked"] is None
    summary = script.document([entry], 1)
    assert (summary["tried"], summary["found"], summary["equal"], summary["survived"]) == (1, 0, 1, 0)
