"""Compiled loops: their cache, and what is logged."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from modules import loop_cache
from trainer.runtime import unique as unique_module
from trainer.sparse import row_loops


def test_a_change_of_another_part_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "loops.py").write_text(
        "import a_part\nfrom modules.compiled import compiled\n"
        "@compiled('adding', a_part)\ndef loop(x):\n    return a_part.part(x)\n"
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


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.name == "modules.loop_cache"]
    caplog.clear()
    return found


@pytest.mark.parametrize("keep", [False, True])
def test_each_kind_of_work_that_is_compiled_is_logged_once(
    keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "modules.loop_cache")
    (tmp_path / "loops.py").write_text(
        "from modules.compiled import compiled\n"
        f"@compiled('sums', keep={keep})\ndef add(x):\n    return x + 1\n"
        f"@compiled('sums', keep={keep})\ndef subtract(x):\n    return x - 1\n"
        f"@compiled('products', keep={keep})\ndef double(x):\n    return 2 * x\n"
    )
    told = [f"compiling loops of {work} for this processor, which takes some seconds" for work in ("sums", "products")]
    for again in (False, True):
        monkeypatch.setattr(loop_cache, "_told", set())
        loops = runpy.run_path(str(tmp_path / "loops.py"))
        assert [loops[name](5) for name in ("add", "subtract", "double")] == [6, 4, 10]
        assert messages(caplog) == ([] if keep and again else told)


def test_the_loops_of_a_first_step_are_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(loop_cache, "_told", set())
    caplog.set_level("INFO", "modules.loop_cache")
    unique, places = runpy.run_path(unique_module.__file__)["find_unique"](np.array([7, 3, 7]))
    assert unique.tolist() == [7, 3] and places.tolist() == [0, 1, 0]
    values, out = np.arange(8, dtype=np.float32).reshape(2, 4), np.empty((1, 4), np.float32)
    runpy.run_path(row_loops.__file__)["read_rows"](0, 1, np.array([1]), values, out)
    assert out.tolist() == [[4, 5, 6, 7]]
    told = [
        f"compiling loops of {work} for this processor, which takes some seconds"
        for work in ("finding unique ids", row_loops.WORK)
    ]
    assert messages(caplog) == told
