"""The job that fits a version: any ranks, killed and continued, nothing from after its range of time, refreshed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import trainer.quantize
from tests.conftest import RunRanks
from tests.runtime.recorded_mlflow import RecordedRun
from tests.semantic_ids.segment_world import world_vectors, write_vectors, write_world
from trainer.config.quantize import load_quantize
from trainer.console.errors import UserError
from trainer.console.exit_status import TERMINATED_STATUS
from trainer.report.run_report import make_report
from trainer.runtime.distributed import World
from trainer.runtime.run_status import read_status
from trainer.semantic_ids import kmeans
from trainer.semantic_ids.codebook_version import CodebookVersion

Quantize = Callable[..., CodebookVersion]

ROOMS, SEGMENTS, FITTED = 10, 40, 29
"""The range of the fit has the first 29 segments of each room."""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_world(tmp_path / "world", ROOMS, SEGMENTS)
    file = tmp_path / "job.toml"
    file.write_text(
        f'[data]\npath = "{tmp_path}/world"\nfit_until = "2024-03-04T00:15"\n'
        f'[codebook]\ndirectory = "{tmp_path}/first"\nlevels = [8, 4]\niterations = 6\ndevice = "cpu"\n'
    )
    return file


@pytest.fixture
def quantize(job: Path) -> Quantize:
    """``quantize("second", *overrides, old="first")`` runs the job in this process, on one rank."""

    def run(directory: str, *overrides: str, old: str | None = None, compare_cold: bool = False) -> CodebookVersion:
        place = job.parent / directory
        config = load_quantize(job, [f"codebook.directory={place}", *overrides])
        with World.join("cpu") as world:
            trainer.quantize.quantize(config, world, old and str(job.parent / old), compare_cold)
        return CodebookVersion.open(place)

    return run


def assert_equal(one: CodebookVersion, other: CodebookVersion) -> None:
    assert one.name == other.name
    for a, b in zip(one.codebook.levels, other.codebook.levels, strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()


def test_two_ranks_give_the_same_bits_and_a_finished_job_does_nothing(
    job: Path, quantize: Quantize, run_ranks: RunRanks
) -> None:
    printed = run_ranks("trainer.quantize", job)
    version, alone = CodebookVersion.open(job.parent / "first"), quantize("alone")
    assert f"codebook version {version.name} is written, fitted on 290 segments" in printed
    assert_equal(version, alone)
    # Sums of floats over ranks may differ in the last bit.
    report, report_alone = version.report(), alone.report()
    assert report is not None and report_alone is not None
    assert report["tuples"] == report_alone["tuples"] and report["variance"] == pytest.approx(report_alone["variance"])
    for one, other in zip(report["levels"], report_alone["levels"], strict=True):
        assert one.pop("curve") == other.pop("curve")
        assert one == pytest.approx(other, rel=1e-12)
    assert (version.path / "codebook.json").read_bytes() == (alone.path / "codebook.json").read_bytes()
    assert sorted(path.name for path in job.parent.iterdir()) == ["alone", "first", "job.toml", "world"]
    before = {path: path.stat().st_mtime_ns for path in version.path.iterdir()}
    quantize("first")
    assert before == {path: path.stat().st_mtime_ns for path in version.path.iterdir()}
    with pytest.raises(UserError, match=r"first: exists already; a version never changes"):
        quantize("first", "codebook.seed=2")


def test_the_manifest_says_what_was_fitted(job: Path, quantize: Quantize) -> None:
    manifest = quantize("first").manifest
    assert (manifest.levels, manifest.dim, manifest.origin.hash, manifest.matched_from) == ((8, 4), 8, "abc", "")
    assert manifest.vectors.count == 290 and manifest.vectors.dataset == f"{job.parent}/world"
    assert manifest.settings == {
        **{"levels": [8, 4], "normalize": False, "start": "k-means++", "iterations": 6, "tolerance": 1e-4},
        **{"mini_batch": 0, "seed": 1},
    }


@pytest.mark.parametrize("changes", [(), ("codebook.normalize=true", "codebook.mini_batch=100")], ids=str)
def test_vectors_known_after_the_range_change_no_bit(job: Path, quantize: Quantize, changes: tuple[str, ...]) -> None:
    version = quantize("first", *changes)
    vectors, later = world_vectors(ROOMS, SEGMENTS).reshape(ROOMS, SEGMENTS, -1), slice(FITTED, None)
    vectors[:, later] = 100 + world_vectors(ROOMS, SEGMENTS, seed=9).reshape(vectors.shape)[:, later]
    world = job.parent / "world"
    write_vectors(world, vectors.reshape(ROOMS * SEGMENTS, -1))
    changed = quantize("changed", *changes)
    assert_equal(version, changed)
    assert version.manifest == changed.manifest and version.report() != changed.report()
    known = np.tile(np.arange(SEGMENTS), ROOMS) < FITTED
    write_vectors(world, vectors.reshape(ROOMS * SEGMENTS, -1)[known], np.flatnonzero(known))
    removed = quantize("removed", *changes)
    assert_equal(version, removed)
    assert removed.report() is None
    # The last segment of the range does change it.
    vectors[:, FITTED - 1] += 1
    write_vectors(world, vectors.reshape(ROOMS * SEGMENTS, -1))
    assert quantize("other", *changes).name != version.name


def test_a_job_that_is_ended_continues_with_the_same_result(
    job: Path, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize("whole")
    left, write = [5], kmeans.write_state

    def killed(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kmeans, "write_state", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize("first")
    assert not (job.parent / "first").exists() and (job.parent / "first.fit/state.npz").is_file()
    with pytest.raises(UserError, match=r"first.fit/state.npz: the state of a fit of other vectors or other settings"):
        quantize("first", "codebook.seed=2")
    # It continues: it writes fewer states than a fit from the beginning.
    written = []
    monkeypatch.setattr(kmeans, "write_state", lambda *arguments: (written.append(1), write(*arguments)))
    assert_equal(quantize("first"), whole)
    continued = len(written)
    quantize("again")
    assert len(written) - continued == continued + 5
    assert not (job.parent / "first.fit").exists()


@pytest.fixture
def default_sigterm() -> Iterator[None]:
    """SIGTERM as in a new process: jobs of other tests in this one may have left their handlers."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("default_sigterm")
def test_sigterm_is_the_state_of_the_job_and_it_continues(
    job: Path, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(kmeans, "record_scalars", lambda values, step: os.kill(os.getpid(), signal.SIGTERM))
        assert trainer.quantize.main([str(job)]) == TERMINATED_STATUS
    status = read_status(job.parent / "first.fit")
    assert status is not None and (status.state, status.reason) == ("stopped", "SIGTERM")
    assert_equal(quantize("first"), quantize("whole"))


def test_a_refresh_starts_warm_and_keeps_numbers(job: Path, quantize: Quantize) -> None:
    old = quantize("first")
    new = quantize("second", "data.fit_until=2024-03-04T00:18", "codebook.seed=7", old="first", compare_cold=True)
    assert new.manifest.matched_from == old.name != new.name
    assert CodebookVersion.open(old.path).name == old.name
    report = new.report()
    assert report is not None
    refresh, kept = report["refresh"], report["refresh"]["kept"]
    assert (refresh["from"], refresh["segments"]) == (old.name, 50)
    assert list(kept) == ["warm, before matching", "warm, after matching"] + [
        f"k-means++, {when} matching" for when in ("before", "after")
    ]
    # The shares are those of the codes that the two versions give, and the best of all is a warm start.
    vectors = world_vectors(ROOMS, SEGMENTS).reshape(ROOMS, SEGMENTS, -1)[:, 35:].reshape(50, -1)
    same = old.encode(vectors)[0] == new.encode(vectors)[0]
    assert kept["warm, after matching"]["levels"] == same.mean(0).tolist()
    assert kept["warm, after matching"]["tuple"] == same.all(1).mean() > 0.5
    assert kept["warm, after matching"]["tuple"] > kept["k-means++, after matching"]["tuple"]
    assert kept["k-means++, after matching"]["tuple"] > kept["k-means++, before matching"]["tuple"]


def test_a_refresh_with_nothing_new_changes_no_code(quantize: Quantize) -> None:
    quantize("first", "codebook.iterations=100", "codebook.tolerance=1e-12")
    same = quantize("same", "codebook.iterations=100", "codebook.tolerance=1e-12", "codebook.seed=3", old="first")
    report = same.report()
    assert report is not None
    assert report["refresh"]["kept"]["warm, before matching"] == {"levels": [1.0, 1.0], "tuple": 1.0}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["codebook.levels=[8]"], "the warm start has levels"),
        (["codebook.normalize=true"], "the warm start has levels"),
        (
            ["data.fit_until=2024-03-04T00:01", "codebook.levels=[50]"],
            "10 segments became known in the range of the fit",
        ),
    ],
)
def test_settings_that_do_not_fit_are_one_line(overrides: list[str], message: str, quantize: Quantize) -> None:
    quantize("first")
    with pytest.raises(UserError) as error:
        quantize("second", *overrides, old="first")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_fewer_distinct_vectors_than_codes_are_refused_with_both_numbers(job: Path, quantize: Quantize) -> None:
    vectors = np.tile(world_vectors(1, 5), (ROOMS * SEGMENTS // 5, 1))
    write_vectors(job.parent / "world", vectors)
    with pytest.raises(UserError, match=r"(^| )5 distinct vectors for 8 centroids"):
        quantize("first")
    assert not (job.parent / "first").exists()


@pytest.mark.parametrize("segment", [3, SEGMENTS - 1], ids=["fitted", "held out"])
def test_zero_vectors_are_counted_and_refused(segment: int, job: Path, quantize: Quantize) -> None:
    vectors = world_vectors(ROOMS, SEGMENTS)
    vectors[[segment, SEGMENTS + segment]] = 0
    write_vectors(job.parent / "world", vectors)
    count = ROOMS * (FITTED if segment < FITTED else SEGMENTS - FITTED)
    with pytest.raises(
        UserError, match=rf"(^| )0 of {count} vectors are not finite and 2 are zero, .* segment {segment};"
    ):
        quantize("first")
    assert sorted(path.name for path in job.parent.iterdir()) == ["job.toml", "world"]


def test_a_link_to_nothing_is_refused_before_the_fit(job: Path, quantize: Quantize) -> None:
    (job.parent / "first").symlink_to("nowhere")
    with pytest.raises(UserError, match="first: exists already"):
        quantize("first", "codebook.iterations=1000000", "codebook.tolerance=0")
    assert not (job.parent / "first.fit").exists()


def test_a_held_out_range_without_segments_is_said(quantize: Quantize, caplog: pytest.LogCaptureFixture) -> None:
    version = quantize("first", "codebook.levels=[2]", "codebook.iterations=1", "data.eval_from=2034-01-01")
    assert version.report() is None
    assert "no segment became known in the held-out range; there is no report" in caplog.text
    assert "its report is not about" not in caplog.text


def test_the_report_of_a_finished_job_is_said_to_be_about_another_range(
    quantize: Quantize, caplog: pytest.LogCaptureFixture
) -> None:
    fit = ("codebook.levels=[2]", "codebook.iterations=1")
    quantize("first", *fit)
    quantize("first", *fit)
    assert "its report is not about" not in caplog.text
    quantize("first", *fit, "data.eval_until=2024-03-04T00:18")
    assert "first: its report is not about the held-out range of this job" in caplog.text


def test_an_old_version_of_another_model_is_refused(job: Path, quantize: Quantize) -> None:
    quantize("first")
    write_vectors(job.parent / "world", world_vectors(ROOMS, SEGMENTS), model="other")
    with pytest.raises(UserError, match=r"vectors are from another model \(small, hash other\)"):
        quantize("second", old="first")


def test_the_stored_report_is_what_was_measured_and_the_passes_are_scalars(
    job: Path, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow_runs = RecordedRun.in_place_of_mlflow(monkeypatch)
    version = quantize("first", f"run.mlflow={job.parent / 'store'}")
    report = json.loads((version.path / "report.json").read_text())
    (tracked_run,) = mlflow_runs
    assert tracked_run.target.name == "first" and tracked_run.ends == [("finished", "")]
    passes = [(value, step) for name, value, step in tracked_run.scalars if name == "level 1/distortion"]
    assert [step for _, step in passes] == list(range(1, len(passes) + 1))
    assert passes[0][0] > passes[-1][0] > report["levels"][1]["distortion"] > 0
    assert ("held_out/2/distortion", report["levels"][1]["distortion"], 0) in tracked_run.scalars
    page = make_report(version.path)
    assert "Distortion after each level" in page and version.name in page and "Use of the codes" in page
    vectors = world_vectors(ROOMS, SEGMENTS).reshape(ROOMS, SEGMENTS, -1)[:, FITTED:].reshape(110, -1)
    error = version.encode(vectors)[1]
    assert report["segments"] == 110
    assert report["levels"][1]["distortion"] == pytest.approx(error.mean(), rel=1e-5)
    assert report["variance"] == pytest.approx(((vectors - vectors.mean(0)) ** 2).sum(1).mean(), rel=1e-5)
