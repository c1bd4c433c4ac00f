"""``limelight score`` of a staytime run: the run's own range again, and other ranges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.cli.main import main
from tests.paths import ROOT
from trainer.comment_staytime import model
from trainer.data.format.content_vectors import ContentVectors
from trainer.data.format.dataset_files import record_checksums
from trainer.data.format.text_schema import read_texts
from trainer.data.simulator.write_dataset import simulate
from trainer.runtime.checksums import CHECKSUMS, write_checksums

JOB = ROOT / "configs" / "staytime.toml"
SMALL = ["train.epochs=1", "train.batch_size=512", "input.dim=8", "base.widths=[8]", "lcu.heads=2", "lcu.hidden=8"]
LAST_DAY = "2024-03-06"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("staytime_score") / "world"
    simulate(out, users=40, days=3, partitions=1, seed=5, texts=True)
    random = np.random.default_rng(1)
    for name, column in (("items", "item_id"), ("comments", "comment_id")):
        ids = read_texts(out, name, [column]).column(column).to_numpy()
        ContentVectors.write(out.parent / name, ids, random.standard_normal((len(ids), 12)))
    return out


def train(world: Path, run: Path, *overrides: str) -> Path:
    arguments = [f"data.path={world}", f"data.eval_from={LAST_DAY}", f"run.directory={run}", *SMALL, *overrides]
    assert main(["staytime", str(JOB), *arguments]) == 0
    return run


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of D2Q, whose fitted quantiles matter, with LCU on texts."""
    texts = [f"lcu.{name}_embeddings={world.parent / name}s" for name in ("item", "comment")]
    return train(world, tmp_path_factory.mktemp("runs") / "run", "base.loss=d2q", *texts)


@pytest.mark.parametrize(
    "overrides",
    [
        ("base.loss=d2q", "texts"),
        ("base.loss=tpm", "lcu.enabled=false"),
        ("base.loss=wlr",),
        ("lcu.mode=released", "texts"),
    ],
)
def test_a_run_predicts_its_own_range_bit_for_bit(
    world: Path, tmp_path: Path, overrides: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"lcu.{name}_embeddings={world.parent / name}s" for name in ("item", "comment")]
    settings = [setting for override in overrides for setting in (texts if override == "texts" else [override])]
    run = train(world, tmp_path / "run", *settings)
    table = capsys.readouterr().out.split("\n\n")[1]
    assert main(["score", str(run), str(tmp_path / "again.parquet")]) == 0
    assert pq.read_table(tmp_path / "again.parquet").equals(pq.read_table(run / "predictions.parquet"))
    assert "true expectation" in table and table.strip() in capsys.readouterr().out


def predicted(file: Path) -> dict[int, float]:
    """Predicted seconds by visit id."""
    table = pq.read_table(file)
    return dict(zip(table["visit_id"].to_pylist(), table["predicted"].to_pylist(), strict=True))


def test_a_part_of_the_range_is_that_part(
    world: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The run predicted all rows at once.
    monkeypatch.setattr(model, "ROWS_AT_ONCE", 7)
    out = tmp_path / "part.parquet"
    assert main(["score", str(run), str(out), "--from", "2024-03-06T08:00", "--until", "2024-03-06T16:00"]) == 0
    part, whole = (predicted(file) for file in (out, run / "predictions.parquet"))
    assert 0 < len(part) < len(whole)
    assert part == pytest.approx({visit: whole[visit] for visit in part}, rel=1e-5)


def test_a_dataset_that_has_grown_gives_the_same(world: Path, run: Path, tmp_path: Path) -> None:
    """Trained while the world ended a day earlier: later visits change nothing that is printed of earlier ones."""
    short = tmp_path / "short"
    shutil.copytree(world, short)
    (short / CHECKSUMS).unlink()
    file = short / "texts" / "visits.parquet"
    visits = pq.read_table(file)
    noon = np.sort(visits.column("request_ms").to_numpy())[int(0.9 * len(visits))]
    pq.write_table(visits.filter(pa.array(visits.column("request_ms").to_numpy() < noon)), file)
    record_checksums(short, lambda done, total: None)
    old = train(short, tmp_path / "run", "base.loss=wlr", "input.past_watch=20")
    out = tmp_path / "out.parquet"
    assert main(["score", str(old), str(out), "--data", str(world)]) == 0
    later, first = (predicted(file) for file in (out, old / "predictions.parquet"))
    assert len(later) > len(first) > 0
    assert first == pytest.approx({visit: later[visit] for visit in first}, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--from", "2024-03-05"], "--from = '2024-03-05': the run was trained on visits until 2024-03-06"),
        (["--from", "yesterday"], "--from = 'yesterday': not a time"),
        (["--until", "2024-03-06"], "--until = '2024-03-06': must be later than --from = '2024-03-06'"),
        (["--from", "2025-01-01"], "no visit lies in the held-out range"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_ranges_are_told_in_one_line(
    run: Path, tmp_path: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", str(run), str(tmp_path / "out.parquet"), *arguments]) == 2
    printed = capsys.readouterr().err
    assert expected in printed and len(printed.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_bad_runs_are_told_in_one_line(
    world: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(directory: Path, *arguments: str) -> str:
        capsys.readouterr()
        assert main(["score", str(directory), str(tmp_path / "out.parquet"), *arguments]) == 2
        assert not (tmp_path / "out.parquet").exists()
        printed = capsys.readouterr().err
        assert len(printed.strip().splitlines()) == 1
        return printed

    assert "no run here (config.json is missing)" in refused(tmp_path)
    changed = tmp_path / "changed"
    shutil.copytree(run, changed)
    (changed / "metrics.json").unlink()
    assert "has not finished" in refused(changed)
    (changed / "config.json").write_text(json.dumps({"model": {}}))
    assert "is a ranker, which takes two files" in refused(changed)

    shutil.copytree(run, changed, dirs_exist_ok=True)
    (changed / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refused(changed)
    ContentVectors.write(tmp_path / "comments", np.arange(5), np.ones((5, 3)))
    config = json.loads((run / "config.json").read_text())
    config["lcu"]["comment_embeddings"] = str(tmp_path / "comments")
    shutil.copytree(run, changed, dirs_exist_ok=True)
    (changed / "config.json").write_text(json.dumps(config))
    assert "config.json: damaged" in refused(changed)
    write_checksums(changed, ("config.json", "fitted.json", "model.safetensors"))
    assert "does not fit the run's job" in refused(changed)

    other = tmp_path / "other"
    shutil.copytree(world, other)
    (other / CHECKSUMS).unlink()
    file = other / "texts" / "visits.parquet"
    pq.write_table(pq.read_table(file).slice(1), file)
    assert "its training range is not what" in refused(run, "--data", str(other))
