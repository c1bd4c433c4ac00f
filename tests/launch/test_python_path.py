"""Tests of the search path of started processes: nothing is imported from the working directory."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
from pathlib import Path

import pytest

from launch import python_path
from launch.python_path import safe_environment
from tests.paths import ROOT

TRAPS = ("trainer", "modules", "launch", "tests", "random", "torch")
"""Modules that a user's folder may have too."""

LAUNCHER = """
import sys
from launch.local import start_ranks
sys.exit(start_ranks("job", sys.argv[1:], 2))
"""

JOB = """
import json, os, pathlib, subprocess, sys
import random, trainer, modules, launch, mine
child = "import random, trainer.console.errors; print(random.__file__, trainer.__file__)"
files = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout.split()
files += [module.__file__ for module in (random, trainer, modules, launch, mine)]
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(json.dumps(files))
"""


def make_traps(directory: Path) -> None:
    """Write modules and packages that end the process that imports them."""
    trap = "import os; os.write(2, b'imported from the working directory'); os._exit(99)"
    for name in ("random", "torch"):
        (directory / f"{name}.py").write_text(trap)
    for name in ("trainer", "modules", "launch", "tests"):
        (directory / name).mkdir()
        (directory / name / "__init__.py").write_text(trap)


def test_ranks_import_nothing_from_the_working_directory(tmp_path: Path) -> None:
    here, own = tmp_path / "here", tmp_path / "own"
    here.mkdir()
    make_traps(here)
    own.mkdir()
    (own / "mine.py").touch()
    (own / "job.py").write_text(JOB)
    # The empty entry stands for the working directory; the launcher itself is started without it.
    launcher = f"import os; os.environ['PYTHONPATH'] += os.pathsep\n{LAUNCHER}"
    done = subprocess.run(
        [sys.executable, "-P", "-c", launcher, str(tmp_path)],
        cwd=here,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(own), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in ("0", "1"):
        files = json.loads((tmp_path / rank).read_text())
        assert not [file for file in files if Path(file).is_relative_to(here)], files
        assert files[1] == files[3] == str(ROOT / "trainer" / "__init__.py")
        assert files[-1] == str(own / "mine.py"), "a user's PYTHONPATH must stay"


def test_the_probes_of_the_doctor_import_nothing_from_the_working_directory(tmp_path: Path) -> None:
    make_traps(tmp_path)
    program = (
        "from launch.doctor import probe\n"
        "process = probe._start(('none',), {})\n"
        "out, err = process.communicate()\n"
        "print(process.returncode, err)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    # The probe itself has started: it refuses the name.
    assert done.stdout.startswith("1 ") and "KeyError: 'none'" in done.stdout, done


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, [str(ROOT)]),
        ("", [str(ROOT)]),
        ("/a:/b", [str(ROOT), "/a", "/b"]),
        (f"/a:{ROOT}", ["/a", str(ROOT)]),
        ("/a::/b:", [str(ROOT), "/a", "/b"]),
    ],
)
def test_python_path_keeps_its_entries_and_has_the_checkout(given: str | None, expected: list[str]) -> None:
    environment = {"X": "1"} if given is None else {"X": "1", "PYTHONPATH": given}
    found = safe_environment(environment)
    assert found.pop("PYTHONPATH").split(os.pathsep) == expected
    assert found == {"X": "1", "PYTHONSAFEPATH": "1"}


def test_installed_packages_are_not_put_before_the_standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_path, "ROOT", Path(site.getsitepackages()[0]).resolve())
    assert safe_environment({}) == {"PYTHONSAFEPATH": "1"}
    assert safe_environment({"PYTHONPATH": "/a"}) == {"PYTHONSAFEPATH": "1", "PYTHONPATH": "/a"}
