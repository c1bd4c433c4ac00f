"""The staytime benchmark runs, goes on where it stopped, and compares cells of one seed."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import ttest_1samp

from benchmarks.quality import staytime, staytime_watch
from benchmarks.quality.staytime import PARTS, StaytimeCell, kuairand_cells, main, run_cells, word_tables, world_cells
from benchmarks.quality.staytime_report import METRICS, pareto, summarise
from trainer.data.format.dataset_files import record_checksums
from trainer.data.simulator.write_dataset import simulate
from trainer.runtime.checksums import CHECKSUMS

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


def test_a_kept_cell_is_of_the_data_that_are_there_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another dataset, other texts or another table at the same path: the cell is trained again."""
    data, words = tmp_path / "data", tmp_path / "words"
    trained: list[str] = []

    def train(config: Any) -> dict[str, int]:
        trained.append(config.data.path)
        return {"training": len(trained)}

    monkeypatch.setattr(staytime, "run_cell", train)
    options = Namespace(work=tmp_path / "work", minutes=None, overrides=SMALL)

    def trainings() -> list[int]:
        cells = [
            StaytimeCell("kuairand", "wlr", 1, ("base.loss=wlr",), None),
            StaytimeCell("bases", "wlr with LCU", 1, ("base.loss=wlr",), words),
        ]
        found = run_cells(cells, {"kuairand": data, "world": data}, options)
        return [result["metrics"]["training"] for result in found]

    def dataset(seed: int) -> None:
        shutil.rmtree(data, ignore_errors=True)
        simulate(data, users=8, days=1, partitions=1, seed=seed, texts=True)

    def fewer_visits() -> None:
        file = data / "texts" / "visits.parquet"
        pq.write_table(pq.read_table(file).slice(1), file)
        (data / CHECKSUMS).unlink()
        record_checksums(data, lambda done, total: None)

    def other_table() -> None:
        word_tables(data, words)

    dataset(1)
    word_tables(data, words)
    changes: list[tuple[Callable[[], None], list[int]]] = [
        (lambda: None, [1, 2]),
        (lambda: None, [1, 2]),
        (lambda: dataset(2), [3, 4]),
        (fewer_visits, [5, 6]),
        # Texts are read by the cell with LCU alone.
        (other_table, [5, 7]),
    ]
    for change, expected in changes:
        change()
        assert trainings() == expected


def test_parts_are_those_of_the_cells(tmp_path: Path) -> None:
    options = Namespace(seeds=1, grid_seeds=1, embeddings=[("tuned", tmp_path)])
    cells = [*world_cells(options, tmp_path), *kuairand_cells(1)]
    assert list(dict.fromkeys(cell.part for cell in cells)) == list(PARTS)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (staytime.main, ["--parts", "base"], "invalid choice: 'base'"),
        (staytime.main, ["--parts", "kuairand"], "no cell to run: these parts need --kuairand"),
        (staytime.main, ["--seeds", "0", "--grid-seeds", "0"], "no cell to run"),
        (staytime_watch.main, ["--parts", "input"], "invalid choice: 'input'"),
        (staytime_watch.main, ["--seeds", "0"], "no cell to run"),
    ],
)
def test_a_command_without_cells_writes_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: Callable[[list[str]], None],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        command(["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json"), *arguments])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


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
