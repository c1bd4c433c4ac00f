"""The benchmark of durations and watch times runs, goes on where it stopped, and compares cells of one seed."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.quality.staytime_report import METRICS
from benchmarks.quality.staytime_watch import INPUTS, LOSSES, PARTS, main, summarise_inputs, watch_cells

SMALL = ["train.epochs=1", "input.dim=4", "base.widths=[4]", "lcu.hidden=4", "data.eval_from=2024-03-10"]


def test_a_base_with_all_inputs_and_again_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "staytime_watch.json"
    command = [
        "--work",
        str(tmp_path / "work"),
        "--parts",
        "inputs",
        "--losses",
        "wlr",
        "--users",
        "12",
        "--seeds",
        "1",
    ]
    main([*command, "--out", str(out), *SMALL])
    printed = capsys.readouterr().out
    assert "6/6 inputs world: wlr past and joint, seed 1" in printed
    written = json.loads(out.read_text())
    assert (written["cells"], written["cells_done"]) == (6, 6) and written["kuairand"].startswith("not run")
    cells = written["result"]["inputs world"]
    assert list(cells) == [f"wlr {inputs}" for inputs in INPUTS]
    assert cells["wlr duration"]["against"] == "wlr nothing" and cells["wlr past"]["against"] == "wlr duration"
    assert "difference" not in cells["wlr nothing"] and "truth" in cells["wlr nothing"]
    assert {name for name, cell in cells.items() if "explained" in cell} == {
        "wlr predicted",
        "wlr joint",
        "wlr past and joint",
    }
    assert len({cell["all"]["rmse"][0] for cell in cells.values()}) == 6
    main([*command, *SMALL])
    assert "seed 1," not in capsys.readouterr().out


def test_parts_are_those_of_the_cells(tmp_path: Path) -> None:
    cells = list(watch_cells(Namespace(seeds=1, losses=LOSSES, kuairand=tmp_path), tmp_path))
    assert {cell.part.split()[0] for cell in cells} == set(PARTS)
    # The settings of all bases were chosen with one of them.
    assert {cell.name.split()[0] for cell in cells if cell.part.startswith("tuning")} == {"wlr"}


def test_differences_are_between_cells_of_one_seed() -> None:
    def results(name: str, values: list[float]) -> list[dict[str, Any]]:
        return [
            {"part": "inputs world", "name": name, "seed": seed, "metrics": {"all": dict.fromkeys(METRICS, value)}}
            for seed, value in enumerate(values)
        ]

    base, more = [1.0, 5.0, 9.0], [1.5, 5.4, 9.7]
    summary = summarise_inputs([*results("d2q duration", base), *results("d2q past", more)])["inputs world"]
    mean, half = summary["d2q past"]["difference"]["gauc"]
    differences = np.subtract(more, base)
    assert mean == pytest.approx(differences.mean())
    # Student's t with two degrees of freedom.
    assert half == pytest.approx(4.3027 * differences.std(ddof=1) / np.sqrt(3), rel=1e-4)
    assert "difference" not in summary["d2q duration"]
