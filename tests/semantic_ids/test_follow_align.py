"""Live segments with fused vectors: they and their codes are those of ``limelight align encode`` and ``quantize``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import trainer.align
from modules.codebook import Codebook
from tests.semantic_ids.align_world import job_arguments
from tests.semantic_ids.follow_parts import DIM, HashEncoder, ManualClock
from tests.semantic_ids.followed_job import SETTINGS
from trainer.config.align import load_align
from trainer.config.embed import FollowConfig
from trainer.console.errors import UserError
from trainer.data.format.content_vectors import SEGMENT_VECTORS, ContentVectors, Origin
from trainer.data.format.segment_codes import CodeFile
from trainer.data.format.segments import DatasetSegments
from trainer.data.simulator.write_dataset import simulate
from trainer.runtime.checksums import CHECKSUMS
from trainer.runtime.distributed import World
from trainer.runtime.preemption import Preemption
from trainer.semantic_ids import follow, follow_align
from trainer.semantic_ids.code_files import append_codes, assign_codes, read_codes
from trainer.semantic_ids.code_store import AppendCounts, SegmentCodes, StoreSettings
from trainer.semantic_ids.codebook_version import CodebookVersion, FittedVectors, write_version
from trainer.semantic_ids.follow import CodeTarget, Follower, StopRequest
from trainer.semantic_ids.follow_align import FusedAuthors
from trainer.semantic_ids.follow_setup import open_codes
from trainer.semantic_ids.segment_source import LiveSegment, SourceBatch
from trainer.semantic_ids.segment_source_replay import ReplaySegments
from trainer.semantic_ids.segments import SegmentVectors, TimeRange
from trainer.semantic_ids.store_address import open_store
from trainer.semantic_ids.vector_cache import VectorCache
from trainer.semantic_ids.vector_cache_parts import CacheSettings
from trainer.semantic_ids.vector_cache_reader import CachedVectors

ORIGIN = Origin(model="hashes", template={"segments": "{text}"}, hash="test")
UNTIL = "data.train_until=2024-03-04T20:00"
JOB = replace(SETTINGS, batch=48, keep_ms=1 << 50)


def texts_of(world: Path) -> tuple[np.ndarray, list[str]]:
    table = pq.read_table(world / "texts/segments.parquet", columns=["item_id", "segment", "text"])
    ids = table["item_id"].to_numpy() * 65_536 + table["segment"].to_numpy()
    order = np.argsort(ids)
    return ids[order], table["text"].take(order).to_pylist()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of a day with vectors of the texts of its segments."""
    path = tmp_path_factory.mktemp("follow_align") / "world"
    simulate(path, users=40, days=1, partitions=2, seed=5, texts=True)
    ids, texts = texts_of(path)
    encoder = HashEncoder()
    vectors = np.stack([encoder.vector(text) for text in texts])
    ContentVectors.write(path / SEGMENT_VECTORS, ids, vectors, origin=ORIGIN, dtype="float32")
    return path


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An alignment, with the fused vectors of all segments."""
    directory = tmp_path_factory.mktemp("follow_align") / "run"
    file, *overrides = job_arguments(world, directory, "train.epochs=1", "data.eval_from=", UNTIL)
    with World.join("cpu") as ranks:
        trainer.align.run_job(load_align(file, overrides), ranks, Preemption())
    return directory


@pytest.fixture(scope="module")
def codebook(run: Path) -> CodebookVersion:
    table = ContentVectors.open(run / "authors")
    # Centroids among the vectors, so that all codes are used.
    drawn = np.random.default_rng(0).choice(len(table), 16, replace=False)
    levels = (torch.from_numpy(np.array(table.vectors[drawn], np.float32)), 0.3 * torch.randn(4, table.dim))
    fitted = FittedVectors(dataset="", table="", count=1, hash="", from_ms=0, until_ms=1)
    return write_version(run.parent / "version", Codebook(levels), origin=table.origin, vectors=fitted, settings={})


@pytest.fixture(scope="module")
def ranks() -> Iterator[World]:
    with World.join("cpu") as joined:
        yield joined


class ListSource:
    """Source of segments whose position is the number of segments taken."""

    def __init__(self, segments: Sequence[LiveSegment], position: dict[str, Any]) -> None:
        self._segments, self._at = segments, position.get("at", [0])[0]

    @property
    def finished(self) -> bool:
        return self._at >= len(self._segments)

    def take(self, limit: int, timeout: float) -> SourceBatch:
        taken = list(self._segments[self._at : self._at + limit])
        self._at += len(taken)
        return SourceBatch({"at": [self._at]}, taken)

    def close(self) -> None:
        """Nothing to release."""


def source_of(segments: Sequence[LiveSegment]) -> Callable[[dict[str, Any]], ListSource]:
    return lambda position: ListSource(segments, position)


def live_segments(world: Path, from_ms: int = 0) -> list[LiveSegment]:
    """Return the segments from a time on, in the order in which they became known."""
    found = DatasetSegments.read(str(world), embedded=True)
    text = dict(zip(*texts_of(world), strict=True))
    rows = np.flatnonzero(found.known_ms >= from_ms)
    return [
        LiveSegment(
            int(found.item_id[row]),
            int(found.author_id[row]),
            int(found.ids[row] % 65_536),
            int(found.known_ms[row]),
            text[found.ids[row]],
            arrived_ms=int(found.known_ms[row]),
        )
        for row in rows[np.lexsort((found.ids[rows], found.known_ms[rows]))]
    ]


class FusedJob:
    """A job of the tests that makes fused vectors, which a test runs again and again."""

    def __init__(self, folder: Path, run: Path, codebook: CodebookVersion, ranks: World) -> None:
        self.folder, self._run, self.codebook, self._ranks = folder, run, codebook, ranks
        self.settings, self.vectors = JOB, CacheSettings(DIM, "float32", ORIGIN)
        self.aligned = True

    @property
    def store(self) -> str:
        return str(self.folder / f"{self.codebook.name}.sqlite")

    def run(self, source: Callable[[dict[str, Any]], Any], replayed: str = "", dataset: str = "") -> Follower:
        clock = ManualClock()
        with ExitStack() as stack:
            cache = stack.enter_context(VectorCache(self.folder / "cache", self.vectors, self.settings.keep_ms))
            fusion, target = None, None
            if self.aligned:
                fusion = FusedAuthors.open(self._run, dataset, cache, self.folder, replayed, self._ranks)
                stack.enter_context(closing(fusion))
                store = open_store(self.store, StoreSettings(self.codebook.name))
                target = CodeTarget(self.codebook, stack.enter_context(closing(store)), self.store)
            arguments = (cache, target, self.settings, clock, StopRequest(), fusion)
            follower = Follower(self.folder, source(cache.position), HashEncoder(), *arguments)
            follower.run()
        return follower

    def found(self) -> dict[int, tuple[bytes, int]]:
        """Return fused vector and code of each segment."""
        with CachedVectors(self.folder / follow_align.FUSED) as reader:
            settings = reader.settings
        with VectorCache(self.folder / follow_align.FUSED, settings, self.settings.keep_ms) as cache:
            both = [
                (entry, vector)
                for record, vectors in cache.records(0)
                for entry, vector in zip(record.entries, vectors, strict=True)
            ]
        found = {int(entry["id"]): (vector.tobytes(), int(entry["code"])) for entry, vector in both}
        assert len(found) == len(both), "a segment is there twice"
        return found

    def stored(self, authors: np.ndarray) -> list[list[int]]:
        """Return all runs that the store has of some authors."""
        with closing(open_store(self.store, StoreSettings(self.codebook.name))) as store:
            runs = store.recent(authors, np.full(len(authors), 1 << 45), 300)
        return [column.tolist() for column in (runs.counts, runs.code, runs.length, runs.first_ms, runs.last_ms)]


@pytest.fixture
def job(tmp_path: Path, run: Path, codebook: CodebookVersion, ranks: World) -> FusedJob:
    return FusedJob(tmp_path, run, codebook, ranks)


@dataclass(frozen=True)
class Expected:
    """Fused vector and code of each segment by the commands for stored segments, and the code file."""

    segments: dict[int, tuple[bytes, int]]
    codes: CodeFile

    def since(self, world: Path, from_ms: int) -> dict[int, tuple[bytes, int]]:
        found = DatasetSegments.read(str(world), embedded=True)
        later = set(found.ids[found.known_ms >= from_ms].tolist())
        return {one: values for one, values in self.segments.items() if one in later}


@pytest.fixture(scope="module")
def expected(world: Path, run: Path, codebook: CodebookVersion) -> Expected:
    table = ContentVectors.open(run / "authors")
    file = run.parent / "codes.parquet"
    assign_codes(codebook, SegmentVectors.open(str(world), str(table.path)), TimeRange(), file, quiet=True)
    codes = read_codes(file, codebook)
    number = dict(zip(codes.segment.tolist(), codebook.numbers(codes.codes).tolist(), strict=True))
    assert len(set(number.values())) > 10
    vectors = dict(zip(table.ids.tolist(), np.array(table.vectors), strict=True))
    return Expected({one: (vector.tobytes(), number[one]) for one, vector in vectors.items()}, codes)


@pytest.fixture(scope="module")
def middle_ms(world: Path) -> int:
    """A time with nine tenths of the segments before it."""
    return int(np.quantile(DatasetSegments.read(str(world), embedded=True).known_ms, 0.9))


def test_a_replay_gives_the_vectors_and_codes_of_the_stored_segments(
    world: Path, job: FusedJob, expected: Expected
) -> None:
    job.settings = replace(JOB, batch=256)
    follower = job.run(lambda position: ReplaySegments(str(world), 0, position, ManualClock()), replayed=str(world))
    assert follower.counts == {"embedded": len(expected.segments)}
    assert job.found() == expected.segments
    authors = np.unique(expected.codes.author_id)
    followed = job.stored(authors)
    (job.folder / f"{job.codebook.name}.sqlite").unlink()
    with closing(open_store(job.store, StoreSettings(job.codebook.name))) as batch:
        append_codes(expected.codes, batch, job.codebook, quiet=True)
    assert followed == job.stored(authors) and sum(followed[0]) > 2 * len(authors)


def test_live_segments_continue_the_means_of_the_stored_ones(
    world: Path,
    job: FusedJob,
    expected: Expected,
    middle_ms: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(follow_align, "ROWS_AT_ONCE", 100)
    segments = live_segments(world, middle_ms)
    job.run(source_of(segments[: len(segments) // 2]))
    job.run(source_of(segments))
    assert job.found() == expected.since(world, middle_ms)
    told = [line for line in capsys.readouterr().out.splitlines() if "earlier segments" in line]
    earlier = len(expected.segments) - len(segments)
    assert len(told) == 1 and f"begin with {earlier:,} earlier segments" in told[0]


class Killed(BaseException):
    """The end of a process, as far as its files show it."""


@pytest.mark.parametrize(
    "point",
    [
        (VectorCache, "begin_with", 1),
        (VectorCache, "append", 1),
        (VectorCache, "append", 2),
        (VectorCache, "append", 5),
        (VectorCache, "append", 6),
        (follow, "write_json", 3),
        (FusedAuthors, "encode", 4),
    ],
    ids=lambda point: f"{point[1]}-{point[2]}",
)
def test_a_job_that_was_killed_has_each_segment_once(
    world: Path,
    job: FusedJob,
    expected: Expected,
    middle_ms: int,
    point: tuple[Any, str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The caches alternate: an odd call of ``append`` is that of the segment vectors."""
    segments = live_segments(world, middle_ms)[:200]
    place, name, number = point
    work, calls = getattr(place, name), []

    def kill(*arguments: Any, **options: Any) -> Any:
        result = work(*arguments, **options)
        calls.append(name)
        if len(calls) == number:
            raise Killed
        return result

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(place, name, kill)
        job.run(source_of(segments))
    # The segments come in other batches now.
    job.settings = replace(JOB, batch=37)
    job.run(source_of(segments))
    known = expected.since(world, middle_ms)
    ids = [one.id for one in segments]
    assert job.found() == {one: known[one] for one in ids}
    with closing(open_store(job.store, StoreSettings(job.codebook.name))) as store:
        codes = expected.codes
        rows = np.isin(codes.segment, ids)
        again = SegmentCodes(
            codes.author_id[rows], codes.segment[rows], job.codebook.numbers(codes.codes[rows]), codes.known_ms[rows]
        )
        assert store.append(again) == AppendCounts(0, len(ids), 0, 0), "all are there already, with these codes"


def test_an_alignment_that_is_added_later_encodes_what_the_cache_has(
    world: Path, job: FusedJob, expected: Expected, middle_ms: int, capsys: pytest.CaptureFixture[str]
) -> None:
    segments = live_segments(world, middle_ms)[:150]
    job.aligned = False
    job.run(source_of(segments[:100]))
    job.aligned = True
    job.run(source_of(segments))
    assert "100 segments of the cache have fused vectors now" in capsys.readouterr().out
    known = expected.since(world, middle_ms)
    found = job.found()
    assert {one: vector for one, (vector, _) in found.items()} == {one.id: known[one.id][0] for one in segments}
    with closing(open_store(job.store, StoreSettings(job.codebook.name))) as store:
        number = [known[one.id][1] for one in segments]
        columns = [np.array([getattr(one, name) for one in segments]) for name in ("author_id", "id", "known_ms")]
        codes = SegmentCodes(columns[0], columns[1], np.array(number, np.int32), columns[2])
        assert store.append(codes) == AppendCounts(0, len(segments), 0, 0)


def test_removed_parts_stay_in_the_means_and_are_needed_for_an_alignment(
    world: Path, job: FusedJob, expected: Expected, middle_ms: int
) -> None:
    segments = live_segments(world, middle_ms)
    job.settings = replace(JOB, keep_ms=(segments[-1].known_ms - segments[0].known_ms) // 8, batch=16)
    job.run(source_of(segments))
    found, known = job.found(), expected.since(world, middle_ms)
    assert 0 < len(found) < len(known) and found == {one: known[one] for one in found}
    shutil.rmtree(job.folder / follow_align.FUSED)
    with pytest.raises(UserError, match="segments from before the alignment were removed"):
        job.run(source_of(segments))


def test_a_segment_that_comes_late_is_as_of_its_own_time(
    world: Path, job: FusedJob, expected: Expected, middle_ms: int
) -> None:
    segments = live_segments(world, middle_ms)[:300]
    author = segments[-1].author_id
    own = [at for at, one in enumerate(segments) if one.author_id == author]
    assert len(own) > 3
    # The one before the last of an author arrives behind it, in a batch of its own.
    late = segments[own[-2]]
    job.run(source_of([*segments[: own[-2]], *segments[own[-2] + 1 :]]))
    job.run(source_of([*segments[: own[-2]], *segments[own[-2] + 1 :], late]))
    found, known = job.found(), expected.since(world, middle_ms)
    others = {one.id: known[one.id] for one in segments if one.id != segments[own[-1]].id}
    assert {one: found[one] for one in others} == others
    # What was written before it came does not have it.
    assert found[segments[own[-1]].id][0] != known[segments[own[-1]].id][0]


def test_a_segment_of_the_time_before_the_first_one_is_late(world: Path, job: FusedJob, middle_ms: int) -> None:
    segments = live_segments(world, middle_ms)[:40]
    earlier = [one for one in live_segments(world) if one.known_ms < middle_ms][-1]
    job.run(source_of(segments))
    follower = job.run(source_of([*segments, earlier]))
    assert follower.counts == {"embedded": 40, "late": 1} and earlier.id not in job.found()


def refused(job: FusedJob, world: Path, message: str, **options: str) -> None:
    with pytest.raises(UserError) as error:
        job.run(source_of(live_segments(world)[:3]), **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_another_model_dataset_or_run_is_refused_in_one_line(
    world: Path, job: FusedJob, run: Path, tmp_path: Path
) -> None:
    simulate(tmp_path / "other", users=40, days=1, partitions=2, seed=5, lookahead=True)
    spec = json.loads((tmp_path / "other/dataset.json").read_text())
    spec["side"] = [side for side in spec["side"] if side["of"] != "author"]
    (tmp_path / "other/dataset.json").write_text(json.dumps(spec))
    (tmp_path / "other" / CHECKSUMS).unlink()
    refused(job, world, "does not fit the model's features", dataset=str(tmp_path / "other"))
    refused(job, world, "no dataset here", dataset=str(tmp_path / "none"))
    job.vectors = replace(job.vectors, origin=replace(ORIGIN, hash="another"))
    shutil.rmtree(job.folder / "cache")
    refused(job, world, f"this job: vectors are from another model (another) than those of {run} (test)")
    job.vectors = CacheSettings(DIM + 1, "float32", ORIGIN)
    shutil.rmtree(job.folder / "cache")
    refused(job, world, f"this job: vectors have {DIM + 1} elements, and {run} was trained on {DIM}")
    job._run = tmp_path / "nothing"
    refused(job, world, "nothing")


def test_a_codebook_of_other_vectors_is_refused(tmp_path: Path, codebook: CodebookVersion, run: Path) -> None:
    settings = CacheSettings(8, "float32", ContentVectors.open(run / "authors").origin)
    config = FollowConfig(codebook=str(codebook.path), store=str(tmp_path / "codes.sqlite"))
    with open_codes(config, settings) as target:
        assert target is not None
    raw = CacheSettings(8, "float32", ORIGIN)
    with pytest.raises(UserError, match="vectors are from another model"), open_codes(config, raw):
        pass
