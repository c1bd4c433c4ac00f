"""The benchmark of codebooks runs, and its figures belong together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.speed import codebook


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss", reason="needs the peer: pip install faiss-cpu")
    out, threads = tmp_path / "codebook.json", torch.get_num_threads()
    codebook.main(["--scale=2000", f"--out={out}", f"--scratch={tmp_path}"])
    result = json.loads(out.read_text())
    for kind in ("normal", "topics"):
        found = result["assignment"][kind]
        assert found["same_code_as_faiss"] == 1.0
        assert found["of_product"] == pytest.approx(found["gflops"]["nearest"] / found["gflops"]["product"])
        assert {name: spread["most"] for name, spread in found["spread"].items()} == found["gflops"]
        assert found["of_best_faiss"] <= found["of_faiss"]
    assert 0.9 < result["iteration"]["distortion_of_faiss"] < 1.1
    assert result["memory"]["vectors"] == 5000 and 0 < result["memory"]["gigabytes"] < 1
    assert list(tmp_path.iterdir()) == [out], "the large file is removed"
    assert torch.get_num_threads() == threads
    assert "an iteration" in capsys.readouterr().out
