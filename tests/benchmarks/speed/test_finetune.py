"""The benchmark of fine-tuning runs, and its figures add up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.speed import finetune

pytest.importorskip("peft", reason="needs peft: make setup EXTRAS=llm,dev,kafka")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples and steps in this process; cells in processes of their own have all."""
    monkeypatch.setattr(finetune, "SAMPLES", 200)
    monkeypatch.setattr(finetune, "STEPS", 2)
    monkeypatch.setattr(finetune, "WARM_UP_STEPS", 1)
    small = {**finetune.SHAPES["small"], "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2}
    monkeypatch.setattr(finetune, "SHAPES", {"small": small, "7b": finetune.SHAPES["7b"]})


def check(cell: dict[str, Any]) -> None:
    assert cell["tokens_per_second"] > 0 and cell["peak_bytes"] >= 0
    for run in cell["runs"]:
        assert run["utilisation"] == pytest.approx(run["flops_per_second"] / run["matrix_flops_per_second"])
    assert 0 <= cell["padding_share"] < 1


def test_a_small_run_in_this_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure_here(cell: finetune.FinetuneCell, shape: str) -> dict[str, Any]:
        capsys.readouterr()
        finetune.main(["--cell", json.dumps(asdict(cell)), "--shape", shape])
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
        figures: dict[str, Any] = json.loads(lines[-1])
        return figures

    def ours(rows: Sequence[int], lengths: Sequence[int]) -> Iterator[finetune.FinetuneCell]:
        # The Hugging Face Trainer leaves its settings in the environment of its process.
        return (cell for cell in cells(rows, lengths) if cell.who == "ours")

    cells = finetune.cells
    monkeypatch.setattr(finetune, "cells", ours)
    monkeypatch.setattr(finetune, "measure", measure_here)
    out = tmp_path / "results" / "finetune.json"
    finetune.main(["--shape=small", "--rows=1", "--lengths=64", "--cells=2", "--repeats=2", f"--out={out}"])
    written = json.loads(out.read_text())
    names = [cell["name"] for cell in written["cells"]]
    assert names == ["ours, 8 x 64, padded", "ours, 1 x 64, packed"]
    for cell in written["cells"]:
        check(cell)
        assert len(cell["runs"]) == 2
        assert cell["attention"] == "sdpa" and cell["pairs"]["computed"] >= cell["pairs"]["needed"] > 0
    assert written["shape"]["name"] == "small" and written["environment"]["threads"] == 1
    assert out.with_suffix(".png").stat().st_size > 1000
    assert "utilisation" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cell_in_a_process_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "finetune.json"
    finetune.main(["--shape=small", "--rows=1", "--lengths=32", "--cells=2", "--repeats=1", f"--out={out}"])
    cells = json.loads(out.read_text())["cells"]
    assert [cell["who"] for cell in cells] == ["Trainer", "ours"]
    for cell in cells:
        check(cell)


def test_a_cell_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune.sys, "executable", "/bin/false")
    cell = finetune.FinetuneCell("ours", 1, 32, packing=True, checkpointing=False)
    assert finetune.measure(cell, "small") == {"failed": "no output"}
    assert finetune.whole([{"tokens_per_second": 1.0}, {"failed": "no output"}]) == {"failed": "no output"}
    assert "no output" in finetune.table([{"name": cell.name, "failed": "no output"}])


def test_flops_are_those_of_the_formula() -> None:
    tokens = finetune.make_tokens(64, 512)
    assert len(tokens.lengths) == 200 and tokens.lengths.max() <= 64 and tokens.ids.min() >= 1
    model = finetune.make_model("small", 64, finetune.torch.device("cpu"))
    one, two = (finetune.model_flops(model, np.array([n]), 4) for n in (10, 20))
    lora = sum(value.numel() for value in model.parameters() if value.requires_grad)
    head = 64 * 512
    linear = sum(value.numel() for value in model.parameters()) - lora - 2 * head
    attention = 3 * 2 * 2 * 64
    assert one == pytest.approx((4 * linear + 6 * lora) * 10 + attention * 100 + 4 * head * 4)
    assert two - one == pytest.approx((4 * linear + 6 * lora) * 10 + attention * 300)
