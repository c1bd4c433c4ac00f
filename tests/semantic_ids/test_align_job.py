"""The job that aligns authors: two ranks, killed and resumed, its vectors and metrics, and mistakes in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import trainer.align
from tests.conftest import RunRanks
from tests.device_waits import Waits
from tests.nursery import Nursery
from tests.semantic_ids import align_world
from tests.semantic_ids.align_world import EVAL_FROM, different, model_of, simulate_world
from trainer.checkpoint.manifest import list_checkpoints
from trainer.config.align import load_align
from trainer.console.errors import UserError
from trainer.data.format.content_vectors import SEGMENT_VECTORS, ContentVectors, Origin
from trainer.data.format.segments import DatasetSegments
from trainer.engine import build_engine
from trainer.engine.hybrid_engine import HybridEngine, StepResult
from trainer.ranking.training_state import TrainingState
from trainer.report.run_report import make_report
from trainer.runtime.distributed import World
from trainer.runtime.preemption import Preemption
from trainer.semantic_ids.align_encode import encode_segments
from trainer.semantic_ids.align_model import TrainedAlignment

HIDING = ("towers.unseen='unknown_id'", "towers.id_dropout=0.3", "towers.log_q_hours=2")
"""Settings of all runs here, so that the proofs of resumption and of the vectors' time are also about them."""


def job_arguments(world: Path, directory: Path, *overrides: str) -> list[str]:
    return align_world.job_arguments(world, directory, *HIDING, *overrides)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate_world(tmp_path_factory.mktemp("align") / "world")


@pytest.fixture(scope="module")
def run(world: Path, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks."""
    directory = tmp_path_factory.mktemp("align") / "run"
    ended = nursery.run("trainer.align", job_arguments(world, directory), ranks=2)
    assert ended.status == 0, ended.stderr[-4000:]
    return directory


def encode(run: Path, out: Path, dataset: Path | None = None) -> ContentVectors:
    with World.join("cpu") as ranks:
        model = TrainedAlignment.open(run, None if dataset is None else str(dataset), None, ranks)
        summary = encode_segments(model, out, ranks)
        assert model.features.vocabulary is not None
        popularity = model.features.popularity
        trained = set(popularity.authors[np.diff(popularity.bounds) > 0].tolist())
        trained &= set(model.features.vocabulary.tolist())
        authors = model.features.content.segments.author_id.tolist()
        assert 0 < summary.unseen == sum(author not in trained for author in authors) < summary.segments
        assert (summary.segments, summary.without_author, summary.dim) == (len(authors), 0, 8)
        model.engine.close()
    return ContentVectors.open(out)


def copy_with(world: Path, copy: Path, vectors: np.ndarray, **origin: Any) -> Path:
    """Copy a world with other segment vectors."""
    shutil.copytree(world, copy)
    shutil.rmtree(copy / SEGMENT_VECTORS)
    there = ContentVectors.open(world / SEGMENT_VECTORS).origin
    ContentVectors.write(
        copy / SEGMENT_VECTORS, np.arange(len(vectors)), vectors, origin=Origin(**origin) if origin else there
    )
    return copy


def test_a_run_has_metrics_by_popularity_and_a_vector_of_each_segment(run: Path, world: Path) -> None:
    document = json.loads((run / "metrics.json").read_text())
    assert document["model"] == "align" and document["positives"] == ["click"]
    page = make_report(run)
    assert "random order, all" in page and "Mean gate of the authors on air" in page and "Throughput" in page
    report = document["retrieval"]
    pairs = [part["pairs"] for name, part in report.items() if name != "all"]
    assert report["all"]["pairs"] == sum(pairs) and report["unseen"]["pairs"]
    assert 0 < report["unseen"]["gate"] < 1, "an unseen author reads the unknown id, and features beside content"
    assert 0 < report["all"]["recall@1"] < report["all"]["recall@3"] <= 1 < report["all"]["on_air"]
    assert 0 < report["most popular quarter"]["gate"] < 1
    history = json.loads((list_checkpoints(run / "checkpoints")[-1] / "job.json").read_text())["trace"]
    assert history[-1]["loss"] < history[0]["loss"]
    table, source = ContentVectors.open(run / "authors"), ContentVectors.open(world / SEGMENT_VECTORS)
    assert np.array_equal(table.ids, source.ids) and table.dim == 8
    np.testing.assert_allclose(np.linalg.norm(table.vectors.astype(np.float32), axis=1), 1, atol=2e-3)
    assert table.origin.model == "run" and table.origin.pooling == "fused author vectors" and table.origin.hash
    assert not list((run / "authors").glob(".*"))


def test_tables_of_segments_have_the_hash_of_their_segments(run: Path, world: Path) -> None:
    segments = DatasetSegments.read(str(world), embedded=False)
    for table in (ContentVectors.open(run / "authors"), ContentVectors.open(world / SEGMENT_VECTORS)):
        assert table.segments == segments.hash(segments.rows_of(table.ids)) != ""
        moved = replace(segments, known_ms=segments.known_ms + 1)
        with pytest.raises(UserError, match="made from other segments than those of"):
            moved.check_table(table)


def test_the_outcome_of_each_held_out_pair_gives_the_recall(run: Path) -> None:
    report = json.loads((run / "metrics.json").read_text())["retrieval"]["all"]
    pairs = pq.read_table(run / "held_out.parquet").to_pydict()
    visits = np.array(pairs["visit_id"])
    assert len(visits) == report["pairs"] and (np.diff(visits) > 0).all()
    larger, equal, on_air = (np.array(pairs[name]) for name in ("larger", "equal", "on_air"))
    assert (
        (equal >= 1).all() and (larger + equal <= on_air).all() and np.mean(on_air) == pytest.approx(report["on_air"])
    )
    for k in (1, 3):
        assert np.clip((k - larger) / equal, 0, 1).mean() == pytest.approx(report[f"recall@{k}"])
    assert len(set(pairs["user_id"])) > 1 and len(set(pairs["author_id"])) == report["authors"]


def test_a_killed_run_resumes_to_the_same_bits(
    run: Path, world: Path, nursery: Nursery, run_ranks: RunRanks, tmp_path: Path
) -> None:
    arguments = job_arguments(world, tmp_path / "run", "checkpoint.every_steps=4", "checkpoint.background=false")
    killed = nursery.run("tests.semantic_ids.killed_align", ["7", *arguments], ranks=2)
    assert killed.status != 0 and not (tmp_path / "run" / "metrics.json").exists()
    printed = run_ranks("trainer.align", *arguments)
    assert "resuming from" in printed and "step 4" in printed
    assert different(model_of(run), model_of(tmp_path / "run")) == []
    one, other = (ContentVectors.open(place / "authors") for place in (run, tmp_path / "run"))
    assert one.vectors.tobytes() == other.vectors.tobytes()
    reports = [json.loads((place / "metrics.json").read_text())["retrieval"] for place in (run, tmp_path / "run")]
    assert reports[0] == reports[1]


def test_a_finished_run_is_not_trained_again(run: Path, world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.npy")}
    with World.join("cpu") as ranks:
        found = trainer.align.run_job(load_align(*split(job_arguments(world, run))), ranks, Preemption())
    assert found == json.loads((run / "metrics.json").read_text())
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.npy")}


def split(arguments: list[str]) -> tuple[str, list[str]]:
    return arguments[0], arguments[1:]


def test_nothing_that_becomes_known_later_changes_a_bit_of_a_vector(run: Path, world: Path, tmp_path: Path) -> None:
    known_ms = DatasetSegments.read(str(world), embedded=False).known_ms
    vectors = np.array(ContentVectors.open(world / SEGMENT_VECTORS).vectors)
    now = int(np.quantile(known_ms, 0.7))
    later = known_ms > now
    changed = vectors.copy()
    changed[later] = np.random.default_rng(0).standard_normal(changed[later].shape)
    other = copy_with(world, tmp_path / "changed", changed)
    before, after = encode(run, tmp_path / "before"), encode(run, tmp_path / "after", other)
    assert before.vectors[~later].tobytes() == after.vectors[~later].tobytes()
    assert (before.vectors[later] != after.vectors[later]).any(axis=1).all()
    # The table at the end of training is that of one rank but for its rounding in batches of another size.
    np.testing.assert_allclose(before.vectors, ContentVectors.open(run / "authors").vectors, atol=2e-3)
    assert before.hash != after.hash and before.origin.hash == after.origin.hash


def test_codes_are_fitted_on_the_vectors_as_they_are(run: Path, world: Path, tmp_path: Path) -> None:
    import trainer.quantize
    from tests.paths import ROOT
    from trainer.config.quantize import load_quantize
    from trainer.semantic_ids.codebook_version import CodebookVersion

    overrides = [f"data.path={world}", f"data.vectors={run / 'authors'}", f"data.fit_until={EVAL_FROM}"]
    overrides += [f"codebook.directory={tmp_path / 'book'}", "codebook.levels=[16, 8]", "codebook.device=cpu"]
    config = load_quantize(ROOT / "configs" / "quantize.toml", overrides)
    with World.join("cpu") as ranks:
        trainer.quantize.quantize(config, ranks, None, False)
    version = CodebookVersion.open(tmp_path / "book")
    assert version.dim == 8 and version.manifest.origin.pooling == "fused author vectors"


def test_other_vectors_are_refused_by_a_model_and_leave_no_table(run: Path, world: Path, tmp_path: Path) -> None:
    vectors = np.array(ContentVectors.open(world / SEGMENT_VECTORS).vectors)
    narrow = copy_with(world, tmp_path / "narrow", vectors[:, :5])
    foreign = copy_with(world, tmp_path / "foreign", vectors, model="m", hash="1234")
    for dataset, message in ((narrow, "vectors have 5 elements"), (foreign, "from another model (1234)")):
        with pytest.raises(UserError) as error:
            encode(run, tmp_path / "out", dataset)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="something else than a table of vectors is here"):
        encode(run, run / "logs")
    with pytest.raises(UserError, match=r"no run here"):
        encode(world, tmp_path / "out")


def test_the_segment_vectors_are_never_replaced_by_fused_ones(run: Path, world: Path, tmp_path: Path) -> None:
    vectors = shutil.copytree(world / SEGMENT_VECTORS, tmp_path / "vectors")
    before = {file.name: file.read_bytes() for file in vectors.iterdir()}
    with pytest.raises(
        UserError, match=r"has other vectors \(segment vectors of the simulated world\), and only a table"
    ):
        encode(run, vectors)
    assert {file.name: file.read_bytes() for file in vectors.iterdir()} == before


def test_a_run_refuses_other_vectors_than_it_began_with(run: Path, world: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    vectors = np.array(ContentVectors.open(world / SEGMENT_VECTORS).vectors)
    vectors[0, 0] += 1
    other = copy_with(world, tmp_path / "other", vectors)
    arguments = job_arguments(world, tmp_path / "run", f"data.vectors={other / SEGMENT_VECTORS}")
    with (
        pytest.raises(UserError, match=r"began with other segment vectors .* resume\.allow_new_data=true accepts them"),
        World.join("cpu") as ranks,
    ):
        trainer.align.run_job(load_align(*split(arguments)), ranks, Preemption())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.positives=['clik']"], "data.positives: the dataset has no behaviour 'clik'; it has click, "),
        (["data.train_until=2024-03-03T20:00"], "no segment became known before the end of training"),
        (["data.positives=['gift']", "data.train_until=2024-03-04T01:00"], "no positive pair in the training range"),
        (["data.eval_from=2030-01-01"], "data.eval_from = '2030-01-01' is after the dataset's last request"),
        (["data.vectors=nowhere"], "nowhere: no embedding table here"),
        (["data.path=nowhere"], "nowhere: no dataset here"),
        (["features.exclude=['author_gener']"], "did you mean 'author_genre'?"),
        (["towers.dims=3"], "did you mean towers.dim?"),
        (["towers.id_dropout=1"], "towers.id_dropout = 1: input should be less than 1"),
        (["towers.id_dropout=-0.1"], "towers.id_dropout = -0.1: input should be greater than or equal to 0"),
        (["towers.log_q_hours=-1"], "towers.log_q_hours = -1: input should be greater than or equal to 0"),
        (["towers.unseen='ids'"], "towers.unseen = 'ids': input should be 'content' or 'unknown_id'"),
        (["features.history.live.search='author'"], 'which the user\'s tower does not know; use "latest"'),
        (["features.past.near.same='tag'"], 'which the user\'s tower does not know; use "any"'),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_leaves_no_run(
    overrides: list[str], message: str, world: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error, World.join("cpu") as ranks:
        arguments = job_arguments(world, tmp_path / "run", *overrides)
        trainer.align.run_job(load_align(*split(arguments)), ranks, Preemption())
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_zero_vector_or_a_missing_table_of_authors_leaves_no_run(world: Path, tmp_path: Path) -> None:
    vectors = np.array(ContentVectors.open(world / SEGMENT_VECTORS).vectors)
    vectors[3] = 0
    zero = copy_with(world, tmp_path / "zero", vectors)
    bare = shutil.copytree(world, tmp_path / "bare")
    for name in ("authors.parquet", "checksums.json"):
        (bare / name).unlink()
    for dataset, message in ((zero, "1 are zero"), (bare, r"authors\.parquet: no such file")):
        with pytest.raises(UserError, match=message), World.join("cpu") as ranks:
            arguments = job_arguments(dataset, tmp_path / "run")
            trainer.align.run_job(load_align(*split(arguments)), ranks, Preemption())
        assert not (tmp_path / "run").exists()


def test_a_dataset_without_segments_is_refused(world: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(world, bare)
    (bare / "segments.parquet").unlink()
    (bare / "checksums.json").unlink()
    with pytest.raises(UserError, match=r"segments\.parquet: no such file"), World.join("cpu") as ranks:
        arguments = job_arguments(bare, tmp_path / "run")
        trainer.align.run_job(load_align(*split(arguments)), ranks, Preemption())
    assert not (tmp_path / "run").exists()


def test_the_host_waits_for_the_device_once_a_step(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are read late, as on a GPU; several micro-batches compute their vectors twice."""
    starts: list[int] = []
    advance = TrainingState.advance

    def counted_advance(self: TrainingState, result: StepResult) -> None:
        starts.append(len(waits.calls))
        advance(self, result)

    (tmp_path / "parts.json").write_text(
        '{"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0, "gradient_accumulation_steps": 2}'
    )
    monkeypatch.setattr(build_engine, "HybridEngine", partial(HybridEngine, read_later=True))
    monkeypatch.setattr(TrainingState, "advance", counted_advance)
    settings = ("data.eval_from=", f"train.deepspeed={tmp_path / 'parts.json'}")
    file, *overrides = job_arguments(world, tmp_path / "run", *settings)
    with World.join("cpu") as ranks, Waits() as waits:
        trainer.align.run_job(load_align(file, overrides), ranks, Preemption())
    of_steps = [waits.calls[start:stop] for start, stop in pairwise(starts)]
    assert len(of_steps) > 5
    # Adam's moments and DeepSpeed's buffers are made in the first step.
    assert of_steps[1:] == (len(of_steps) - 1) * [["values of a step"]]
