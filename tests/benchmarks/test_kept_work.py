"""A directory of kept parts belongs to one set of settings, in each benchmark that keeps parts."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kept_work import SETTINGS_FILE, begin_work, content_of
from benchmarks.quality.larm_report import IDS, RAW
from trainer.data.simulator.write_dataset import simulate


class Reached(Exception):
    """The benchmark has taken its directory, and begins to work."""


def reach(*arguments: Any, **settings: Any) -> None:
    raise Reached


REFUSED = {
    "alignment": (["--users", "40"], ["--users", "80"], "with --users 40"),
    "cross": (["--days", "50"], [], "with --days 50"),
    "foresight": ([], ["--predictor", "model.dim=8"], "without --predictor"),
    "full": (["--tables", "align:train.epochs=1"], ["--tables"], "with --tables align:train.epochs=1"),
    "highlights": (["--borders", "a", "b", "c"], ["--borders", "a", "b", "d"], "with --borders a b c"),
    "larm": (["train.epochs=2", "--levels", "4"], ["--levels", "4"], "with train.epochs=2"),
    "neighbours": ([], ["train.epochs=2"], "without KEY=VALUE"),
}
"""Benchmark -> arguments that begin a directory, others that it is refused to, and what the line says."""
ACCEPTED = {
    "alignment": ["train.epochs=2", "--seeds", "7", "--days", "tuning"],
    "cross": ["--seeds", "7", "--minutes", "1"],
    "foresight": ["--seeds", "7", "--finished", "--rankers"],
    "full": ["--seeds", "7", "--finished"],
    "highlights": ["--seeds", "7"],
    "larm": ["--seeds", "7", "--rankers", IDS, RAW],
    "neighbours": ["--neighbours", "3"],
}
"""Benchmark -> arguments that may follow those that begin its directory."""


@pytest.mark.parametrize("name", REFUSED)
def test_no_benchmark_reports_parts_of_other_settings(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = importlib.import_module(f"benchmarks.quality.{name}")
    # The first things that are done in the directory, or with it.
    for place in ("torch.set_num_threads", "simulate_cross"):
        if hasattr(module, place.split(".")[0]):
            monkeypatch.setattr(module, place, reach) if "." not in place else monkeypatch.setattr(place, reach)
    begun, other, line = REFUSED[name]
    work = f"--work={tmp_path / 'work'}"
    for arguments in (begun, begun, [*begun, *ACCEPTED[name]]):
        with pytest.raises(Reached):
            module.main([work, *arguments])
    with pytest.raises(SystemExit) as stopped:
        module.main([work, *other])
    text = str(stopped.value)
    assert f"work: was begun {line}; repeat that, or name another --work" in text and "\n" not in text
    assert [path.name for path in (tmp_path / "work").iterdir()] == [SETTINGS_FILE]


def test_the_moment_benchmark_refuses_another_job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main: Any = importlib.import_module("benchmarks.moment.__main__")
    monkeypatch.setattr(main.World, "join", reach)
    for arguments in ([], ["live", "--minutes", "2", "--seeds", "1"]):
        with pytest.raises(Reached):
            main.main([*arguments, f"--work={tmp_path}"])
    first, second = (main.live_file(argparse.Namespace(work=tmp_path, minutes=n), "full") for n in (2.0, 10.0))
    assert first != second
    job = tmp_path / "other.toml"
    job.write_text("")
    monkeypatch.setattr(main, "BASE", str(job))
    with pytest.raises(
        SystemExit, match=r"was begun without .*other.toml, with another content of configs/moment.toml"
    ):
        main.main([f"--work={tmp_path}"])


def test_what_is_stored_and_what_is_refused(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text("one")

    def begin(benchmark: str = "quality.one", folder: str = "work", content: Path | None = job, **changes: Any) -> None:
        options = {"users": 40, "seeds": [1], "borders": (1, 2), "data": tmp_path, "fast": True, "out": None} | changes
        begin_work(benchmark, argparse.Namespace(work=tmp_path / folder, **options), ("seeds",), {"--job": content})

    begin()
    begin(seeds=[1, 2], out=tmp_path / "out.json", borders=[1, 2], data=str(tmp_path))
    with pytest.raises(SystemExit, match=r"was begun with --users 40, with --borders 1 2; repeat"):
        begin(users=80, borders=(1, 3))
    with pytest.raises(SystemExit, match="was begun with --fast, without --new-one; repeat"):
        begin(fast=False, new_one=3)
    with pytest.raises(SystemExit, match=r"was begun by benchmarks\.quality\.one; repeat"):
        begin("quality.two")
    with pytest.raises(SystemExit, match="was begun with another content of --job; repeat"):
        begin(content=None)
    job.write_text("two")
    with pytest.raises(SystemExit, match="was begun with another content of --job; repeat"):
        begin()
    # Nothing says of which settings these files are.
    (tmp_path / "older").mkdir()
    begin(folder="older")
    (tmp_path / "older" / SETTINGS_FILE).rename(tmp_path / "older" / "world")
    with pytest.raises(SystemExit, match=r"older: has files, but no settings\.json that says of which settings; name"):
        begin(folder="older")
    with pytest.raises(SystemExit, match="No such file"):
        begin(folder="third", content=tmp_path / "none")
    assert not (tmp_path / "third").exists()
    with pytest.raises(ValueError, match="has no options"):
        begin_work("quality.one", argparse.Namespace(work=tmp_path), ("sedes",))


def test_content_is_that_of_files_directories_and_datasets(tmp_path: Path) -> None:
    folder = tmp_path / "table"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a").write_text("one")
    first = content_of(folder)
    (folder / "inner" / "a").rename(folder / "b")
    moved = content_of(folder)
    (folder / "b").write_text("two")
    assert len({first, moved, content_of(folder), content_of(folder / "b")}) == 4
    for seed in (1, 2):
        simulate(tmp_path / f"world-{seed}", 5, 1, 1, seed)
    simulate(tmp_path / "again", 5, 1, 1, 1)
    one, two, again = (content_of(tmp_path / name) for name in ("world-1", "world-2", "again"))
    assert one == again != two
