"""The staytime benchmark runs, goes on where it stopped, and compares cells of one seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from benchmarks.quality.staytime import main
from benchmarks.quality.staytime_report import METRICS, pareto, summarise

SMALL = ["train.epochs=1", "input.dim=4", "base.widths=[4]", "lcu.hidden=4", "data.eval_from=2024-03-10"]


def test_two_cells_and_again_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "staytime.json"
    command = ["--work", str(tmp_path / "work"), "--users", "12", "--seeds", "1", "--grid-seeds", "1"]
    command += ["--parts", "comments", "--out", str(out), *SMALL]
    main(command)
    printed = capsys.readouterr().out
    assert "3/3 comments: 10 comments, seed 1" in printed and "kuairand: not run" in printed
    written = json.loads(out.read_text())
    assert written["kuairand"].startswith("not run")
    assert str(tmp_path) not in out.read_text()
    assert (written["cells"], written["cells_done"]) == (3, 3)
    cells = written["result"]["comments"]
    assert set(cells) == {"3 comments", "6 comments", "10 comments"}
    assert "difference" in cells["3 comments"] and "difference" not in cells["6 comments"]
    first = cells["3 comments"]["all"]["rmse"][0]
    assert cells["3 comments"]["difference"]["rmse"][0] == pytest.approx(first - cells["6 comments"]["all"]["rmse"][0])
    main(command)
    assert "seed 1" not in capsys.readouterr().out
    main([*command[: -len(SMALL)], *SMALL, "train.learning_rate=0.1", "--minutes", "1e-9"])
    assert "0 of 3" in capsys.readouterr().out  # other settings, other cells, and no time for them


def results(values: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Cells of the part ``bases`` whose every metric is one number a seed."""
    return [
        {
            "part": "bases",
            "name": name,
            "seed": seed,
            "metrics": {
                "all": dict.fromkeys(METRICS, value),
                "exposures": {group: dict.fromkeys(METRICS, value) for group in ("0", "1-5", "6-50", "more")},
            },
        }
        for name, seeds in values.items()
        for seed, value in enumerate(seeds)
    ]


def test_differences_are_between_cells_of_one_seed() -> None:
    alone, with_lcu = [1.0, 5.0, 9.0, 2.0], [1.5, 5.4, 9.7, 2.2]
    summary = summarise(results({"wlr alone": alone, "wlr with LCU": with_lcu}))["bases"]
    mean, half = summary["wlr with LCU"]["difference"]["xauc"]
    low, high = ttest_1samp(np.subtract(with_lcu, alone), 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))
    assert summary["wlr with LCU"]["against"] == "wlr alone" and "difference" not in summary["wlr alone"]


def test_pareto_keeps_what_nothing_beats() -> None:
    points = np.array([[1.0, 1.0], [2, 3], [2, 2], [3, 2.5], [0.5, 0.2], [2, 3]])
    assert points[pareto(points)].tolist() == [[0.5, 0.2], [1, 1], [2, 3], [2, 3]]
