"""Compiled loops: their cache, and what is logged."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

import numba
import pytest
from numba.core.event import install_listener

from modules.compiled import CompilationNotice


def test_a_change_of_another_part_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "loops.py").write_text(
        "import a_part\nfrom modules.compiled import compiled\n"
        "@compiled(a_part)\ndef loop(x):\n    return a_part.part(x)\n"
    )
    results, hits = [], []
    for factor in (2, 2, 3):
        (tmp_path / "a_part.py").write_text(f"import numba\n@numba.njit\ndef part(x):\n    return {factor} * x\n")
        sys.modules.pop("a_part", None)
        importlib.invalidate_caches()
        loop = runpy.run_path(str(tmp_path / "loops.py"))["loop"]
        results.append(loop(5))
        hits.append(sum(loop.stats.cache_hits.values()))
    sys.modules.pop("a_part")
    assert results == [10, 10, 15] and hits == [0, 1, 0]


def test_the_first_compilation_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), install_listener("numba:compile", CompilationNotice("sums")):
        for _ in range(2):
            numba.njit(lambda: 1)()
    assert [record.getMessage() for record in caplog.records if record.name == "modules.compiled"] == [
        "compiling sums for this processor, which takes some seconds"
    ]
