"""Kept trainings belong to their whole job, and to what the benchmark made for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality import kept_runs
from benchmarks.quality.kept_runs import KeptTables, key_of
from trainer.config.ranker import JobConfig, load_config


@pytest.mark.parametrize("relative", [False, True])
def test_a_key_changes_with_the_tables_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    monkeypatch.setattr(kept_runs, "fingerprint", lambda path, spec: "world")
    monkeypatch.setattr(kept_runs.DatasetSpec, "load", lambda path: None)
    base = Path("configs/simulated.toml").absolute()
    monkeypatch.chdir(tmp_path)
    work = Path("work") if relative else tmp_path / "work"
    vectors, codes, outside = work / "vectors", work / "codes.parquet", tmp_path / "outside"
    for folder in (vectors, outside, work / "world"):
        folder.mkdir(parents=True)

    def job(table: Path) -> JobConfig:
        content = [f"features.content.room.table={table}", f"features.codes.shown.file={codes}"]
        own = [f"data.path={work / 'world'}", f"run.directory={work / 'run'}"]
        return load_config(base, [*own, *content])

    def key(table: Path = vectors) -> str:
        return KeptTables(work).key_of(job(table))

    for file in (vectors / "one", codes, outside / "one"):
        file.write_text("first")
    keys = [key()]
    # What is trained, the dataset, whose fingerprint is in the key, and what others have made do not count.
    for file in (work / "world/rows", work / "run/metrics.json", outside / "one"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("second")
        assert key() == keys[0] and key(outside) == KeptTables(work).key_of(job(outside))
    for file in (vectors / "one", codes):
        file.write_text("second")
        keys.append(key())
    keys += [key(outside), KeptTables(work).key_of(job(vectors), more="more"), key_of(job(vectors))]
    assert len(set(keys)) == len(keys)
