"""The loop that follows live rooms: order of storing, counts, lag, pace, signals, and stores that are down."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.nursery import Nursery
from tests.semantic_ids.follow_parts import DIM, NOW_MS, HashEncoder, ManualClock, SignCodebook, lines_of, message
from tests.semantic_ids.followed_job import CACHE, SETTINGS, Job
from tests.semantic_ids.killed_follow import POINTS
from trainer.console.errors import UserError
from trainer.llm.embedding.dataset_texts import _hashes
from trainer.runtime.preemption import Preempted
from trainer.semantic_ids import follow_dead_letters, vector_cache
from trainer.semantic_ids.code_store import AppendCounts, SegmentCodes
from trainer.semantic_ids.follow import CodeTarget, StopRequest, text_hash
from trainer.semantic_ids.follow_report import lag_quantiles
from trainer.semantic_ids.segment_source import LiveSegment, SourceBatch, parse_segment
from trainer.semantic_ids.vector_cache import VectorCache
from trainer.semantic_ids.vector_cache_reader import CachedVectors

MESSAGES = [message(room, segment) for segment in range(5) for room in range(4)]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path, MESSAGES)


def test_vectors_codes_and_times_are_in_cache_and_store(job: Job) -> None:
    follower = job.run()
    assert follower.counts == {"embedded": 20}
    cached = job.cached()
    assert len(cached) == 20
    codes: dict[int, list[tuple[int, int]]] = {0: [], 1: [], 2: []}
    for one in MESSAGES:
        vector = job.encoder.vector(one["text"])
        code = int((vector > 0) @ (1 << np.arange(DIM)))
        assert cached[one["item_id"] * 65_536 + one["segment"]] == (vector.tobytes(), code, one["known_ms"])
        codes[one["author_id"]].append((one["known_ms"], code))
    _, code, length, *_ = job.runs()
    expanded = [one for one, times in zip(code, length, strict=True) for _ in range(times)]
    assert expanded == [code for author in range(3) for _, code in sorted(codes[author])]
    with CachedVectors(job.directory / "cache") as reader:
        assert reader.latest(np.array([1]), np.array([NOW_MS])).known_ms.tolist() == [MESSAGES[17]["known_ms"]]


def test_the_same_command_again_goes_on_and_repeats_nothing(job: Job) -> None:
    job.run()
    with open(job.lines, "ab") as file:
        file.write(lines_of([MESSAGES[3], message(7, 0), message(7, 0), message(7, 1)]))
    follower = job.run()
    assert follower.counts == {"embedded": 22, "repeated": 2}
    assert job.encoder.texts == [one["text"] for one in MESSAGES] + ["7 says 0", "7 says 1"]
    assert len(job.cached()) == 22


def test_what_cannot_be_used_is_counted_and_kept(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    late = message(8, 0, known_ms=NOW_MS - 3_600_000 - SETTINGS.keep_ms - 1)
    bad = [
        message(5, 0, text="nan"),
        message(5, 1, text="zero"),
        message(5, 2, text="unseen"),
        message(5, 3, text="  "),
        late,
        {"item_id": 5},
        message(5, 4),
    ]
    with open(job.lines, "ab") as file:
        file.write(lines_of(bad) + b"nonsense\n")
    follower = job.run()
    assert follower.counts == {"embedded": 21, "rejected": 5, "empty": 1, "late": 1}
    letters = job.dead_letters()
    assert sorted(one["reason"] for one in letters) == [
        "author_id is missing; a whole number from 0 to 9223372036854775807 is expected",
        "cannot be seen",
        "its vector has only zeros",
        "its vector is not finite in float32",
        "not valid JSON",
    ]
    assert json.loads(next(one for one in letters if one["reason"] == "cannot be seen")["message"])["text"] == "unseen"
    assert all(one["place"].startswith("in.jsonl:") for one in letters)
    out = capsys.readouterr().out
    assert "21 segments of 5 rooms" in out and "1 too late; 1 empty; 5 rejected" in out


def test_a_segment_with_frames_alone_is_empty_where_frames_are_not_read(job: Job) -> None:
    job.lines.write_bytes(lines_of([message(1, number, text="", frames=["a.png"]) for number in range(2)]))
    assert job.run().counts == {"empty": 2}
    job.settings = replace(SETTINGS, frames=True)
    job.lines.write_bytes(lines_of([message(2, number, text="", frames=["a.png"]) for number in range(2)]))
    assert job.run().counts == {"empty": 2, "embedded": 2}


def test_dead_letters_do_not_fill_the_disk(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_dead_letters, "MAX_FILE_BYTES", 300)
    for number in range(9):
        with open(job.lines, "ab") as file:
            file.write(f"nonsense {number}\n".encode() * 2)
        job.run()
    assert job.followed.counts["rejected"] == 18
    assert (job.directory / "dead-letters.jsonl.old").stat().st_size < 600
    assert job.dead_letters()[-1]["message"] == "nonsense 8"


def test_the_lag_is_that_from_known_to_stored(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.lines.write_bytes(lines_of([message(1, number, known_ms=NOW_MS - 1000 * number) for number in range(4)]))
    job.encoder.seconds = 0.5
    job.run()
    (entry,) = [json.loads(line) for line in (job.directory / "metrics.jsonl").read_text().splitlines()]
    assert entry["lag_seconds"] == pytest.approx({"p50": 3.0, "p90": 5.0, "p99": 5.0, "max": 5.0})
    assert entry["reached_per_second"] == pytest.approx(2.0)
    assert "lag p50 3.00 s, p90 5.00 s, p99 5.00 s, max 5.00 s" in capsys.readouterr().out
    assert list((job.directory / "tensorboard").iterdir())


def test_quantiles_are_lags_of_segments() -> None:
    assert lag_quantiles([7.0]) == {"p50": 7.0, "p90": 7.0, "p99": 7.0, "max": 7.0}
    lags = np.random.default_rng(0).permutation(np.arange(1.0, 1001.0)).tolist()
    assert lag_quantiles(lags) == {"p50": 500.0, "p90": 900.0, "p99": 990.0, "max": 1000.0}


class LiveRooms:
    """Source of rooms on air: their segments arrive by the clock."""

    def __init__(self, clock: ManualClock, rooms: dict[int, int], until_ms: int) -> None:
        # Milliseconds after the start -> number of rooms from then on.
        self.clock, self.until_ms = clock, until_ms
        due = []
        for number in range((until_ms - NOW_MS) // 30_000):
            rooms_now = [count for begin, count in rooms.items() if NOW_MS + begin <= NOW_MS + 30_000 * number][-1]
            spread = 30_000 // rooms_now
            due += [
                message(room, number, known_ms=NOW_MS + 30_000 * number + spread * room) for room in range(rooms_now)
            ]
        self.due, self.taken = due, 0

    @property
    def finished(self) -> bool:
        return self.taken == len(self.due)

    def take(self, limit: int, timeout: float) -> SourceBatch:
        batch, now_ms = SourceBatch({}), self.clock.now * 1000
        while self.taken < len(self.due) and len(batch.segments) < limit:
            one = self.due[self.taken]
            if one["known_ms"] > now_ms:
                break
            parsed = parse_segment(json.dumps(one).encode(), round(now_ms), "live")
            assert isinstance(parsed, LiveSegment)
            batch.segments.append(parsed)
            self.taken += 1
        if not batch and not self.finished:
            self.clock.sleep(timeout)
        batch.position = {"taken": self.taken}
        return batch

    def close(self) -> None:
        """Nothing to release."""


def test_a_slow_model_warns_once_drops_every_second_segment_and_returns(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model makes two segments a second; 90 rooms need three, and 20 rooms less than one."""
    job.encoder.seconds = 0.5
    source = LiveRooms(job.clock, {0: 90, 480_000: 20}, NOW_MS + 780_000)
    job.run(source)
    lines = capsys.readouterr().out.splitlines()
    (warned,) = [line for line in lines if "too slow" in line]
    needed = re.fullmatch(
        r"follow: the model is too slow for the rooms on air: (.+) segments/s become known, the model reaches 2\.0, "
        r"and the lag is 3.\.. s; only every second segment of each room is embedded until it has caught up",
        warned,
    )
    assert needed is not None and float(needed[1]) == pytest.approx(3.0, rel=0.1)
    assert len([line for line in lines if "caught up:" in line and "all segments are embedded again" in line]) == 1
    counts = job.followed.counts
    assert counts["embedded"] + counts["dropped"] == len(source.due) and counts["dropped"] > 300
    cached = job.cached()
    dropped = [one for one in source.due if one["item_id"] * 65_536 + one["segment"] not in cached]
    assert {one["segment"] % 2 for one in dropped} == {1}
    # Without the drops it would be 240 seconds behind.
    entries = [json.loads(line) for line in (job.directory / "metrics.jsonl").read_text().splitlines()]
    assert max(entry["lag_seconds"]["max"] for entry in entries) < 60
    assert [entry["halved"] for entry in entries][-1] is False


def test_a_segment_waits_for_others_no_longer_than_it_may(job: Job) -> None:
    source = LiveRooms(job.clock, {0: 3}, NOW_MS + 300_000)
    job.run(source)
    entries = [json.loads(line) for line in (job.directory / "metrics.jsonl").read_text().splitlines()]
    assert max(entry["lag_seconds"]["max"] for entry in entries) <= 0.5 + 0.2 + 1e-3


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_ends_it_with_everything_stored(
    job: Job, number: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = HashEncoder.encode

    def signalled(self: HashEncoder, *arguments: Any) -> Any:
        if len(self.texts) == 4:
            signal.raise_signal(number)
        return encode(self, *arguments)

    monkeypatch.setattr(HashEncoder, "encode", signalled)
    before = signal.getsignal(number)
    with pytest.raises(error), job.stop.installed():
        job.run()
    assert signal.getsignal(number) is before
    # The batch in which the signal came is whole, in the cache and in the store.
    assert len(job.cached()) == 8 and sum(job.runs()[2]) == 8
    job.stop = StopRequest()
    job.run()
    assert len(job.encoder.texts) == 20 and len(job.cached()) == 20


class WaitingStore:
    """Store that does not answer; a signal arrives while it is waited for."""

    def __init__(self, number: int) -> None:
        self.number = number

    def append(self, codes: SegmentCodes) -> AppendCounts:
        signal.raise_signal(self.number)
        raise AssertionError("it would wait for long")


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_while_the_store_is_waited_for_ends_it_at_once(
    job: Job, number: int, error: type[BaseException]
) -> None:
    store: Any = WaitingStore(number)
    with pytest.raises(error), job.stop.installed():
        job.run(target=CodeTarget(job.codebook, store, job.place))
    assert len(job.cached()) == 4 and sum(job.runs()[2]) == 0
    job.stop = StopRequest()
    job.run()
    assert sum(job.runs()[2]) == 20


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_while_the_source_is_waited_for_ends_it_at_once(
    job: Job, number: int, error: type[BaseException]
) -> None:
    class Silent(LiveRooms):
        def take(self, limit: int, timeout: float) -> SourceBatch:
            if not self.taken or limit < job.settings.batch:
                return super().take(limit, timeout)
            signal.raise_signal(number)
            raise AssertionError("it would wait for long")

    with pytest.raises(error), job.stop.installed():
        job.run(Silent(job.clock, {0: 4}, NOW_MS + 60_000))
    assert len(job.cached()) == 1 and sum(job.runs()[2]) == 1
    # The last report is written.
    assert (job.directory / "metrics.jsonl").exists()


def test_a_store_that_fails_ends_it_and_gets_its_codes_later(job: Job) -> None:
    class Down:
        def append(self, codes: SegmentCodes) -> AppendCounts:
            raise UserError("redis://here: no answer in 60 s")

    store: Any = Down()
    with pytest.raises(UserError, match="redis://here: no answer in 60 s"):
        job.run(target=CodeTarget(job.codebook, store, job.place))
    assert len(job.cached()) == 4
    job.run()
    assert len(job.encoder.texts) == 20 and sum(job.runs()[2]) == 20


def test_a_new_version_fills_its_store_from_the_cache(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.run()
    before = job.runs()

    class Reversed(SignCodebook):
        def numbers(self, codes: np.ndarray) -> np.ndarray:
            return 15 - super().numbers(codes)

    job.codebook = Reversed("reversed")
    job.run()
    assert len(job.encoder.texts) == 20, "nothing is embedded again"
    assert "20 segments of the cache were appended to" in capsys.readouterr().out
    after = job.runs()
    assert after[1] == [15 - code for code in before[1]] and after[2:] == before[2:]
    job.run()
    assert "of the cache were appended" not in capsys.readouterr().out


def test_what_a_store_lost_in_a_power_failure_is_appended_again(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.run()
    before = job.runs()
    Path(job.place).unlink()
    job.run()
    assert job.runs() == before and len(job.encoder.texts) == 20
    assert "20 segments of the cache were appended to" in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["everything", "the end"])
def test_a_store_that_lost_more_gets_everything(job: Job, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that was removed, or restored from a backup; its address is that of the marked one."""
    monkeypatch.setattr(vector_cache, "LATEST_SEGMENTS", 4)
    job.lines.write_bytes(lines_of(MESSAGES[:8]))
    job.run()
    backup = Path(job.place).read_bytes()
    job.lines.write_bytes(lines_of(MESSAGES))
    job.run()
    before = job.runs()
    assert sum(before[2]) == 20
    Path(job.place).unlink()
    if lost == "the end":
        Path(job.place).write_bytes(backup)
        assert sum(job.runs()[2]) == 8
    job.run()
    assert job.runs() == before and len(job.encoder.texts) == 20


class QuietRooms:
    """Source without segments, at a position."""

    finished = True

    def take(self, limit: int, timeout: float) -> SourceBatch:
        return SourceBatch({"topic/0": 5})

    def close(self) -> None:
        """Nothing to release."""


def test_the_first_position_is_stored_without_a_segment(job: Job) -> None:
    """A job that begins at the latest message must not skip those that arrive while it is away."""
    for _ in range(2):
        job.run(QuietRooms())
        with VectorCache(job.directory / "cache", CACHE, SETTINGS.keep_ms) as cache:
            assert (cache.position, cache.sequence) == ({"topic/0": 5}, 1)


def test_a_signal_is_noticed_while_a_segment_waits_for_others_of_its_batch(job: Job) -> None:
    class Signalled(LiveRooms):
        def take(self, limit: int, timeout: float) -> SourceBatch:
            if self.taken:
                signal.raise_signal(signal.SIGTERM)
            return super().take(limit, timeout)

    job.settings = replace(SETTINGS, wait_seconds=86_400.0)
    with pytest.raises(Preempted), job.stop.installed():
        job.run(Signalled(job.clock, {0: 1}, NOW_MS + 90_000))
    assert job.clock.now * 1000 - NOW_MS < 1000 and len(job.cached()) == 1


def test_codes_in_conflict_are_counted(job: Job) -> None:
    with job.target() as target:
        first = MESSAGES[0]
        target.store.append(
            SegmentCodes(
                np.array([first["author_id"]]), np.array([first["item_id"] * 65_536]), np.array([99], np.int32),
                np.array([first["known_ms"]]),
            )
        )  # fmt: skip
    job.run()
    entries = [json.loads(line) for line in (job.directory / "metrics.jsonl").read_text().splitlines()]
    assert [entry["conflicting"] for entry in entries] == [1]


def content_of(job: Job) -> tuple[Any, ...]:
    """Return all that a job has stored, which does not depend on the division into batches."""
    with VectorCache(job.directory / "cache", CACHE, SETTINGS.keep_ms) as cache:
        counts = cache.note["counts"]
    return job.cached(), job.runs(), job.dead_letters(), counts


def test_a_job_that_is_killed_at_any_point_misses_nothing_and_has_nothing_twice(
    nursery: Nursery, tmp_path: Path
) -> None:
    """One job is killed at each point in turn, with lines that arrive between; batches are other ones than else."""
    lines = [*lines_of([message(room, segment) for segment in range(30) for room in range(4)]).splitlines(True)]
    for at in range(3, len(lines), 5):
        lines[at] = b"nonsense %d\n" % at
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, killed = Job(tmp_path / "whole"), Job(tmp_path / "killed")
    whole.lines.write_bytes(b"".join(lines))
    ended = nursery.run("tests.semantic_ids.killed_follow", [whole.folder, killed.folder])
    assert ended.status == 0, ended
    expected = dict.fromkeys(POINTS, -signal.SIGKILL)
    assert json.loads(ended.stdout.splitlines()[-1]) == {"undisturbed": 0, **expected, "the last": 0}, ended.stderr
    assert content_of(killed) == content_of(whole)
    assert len(content_of(whole)[0]) == 96 and len(whole.dead_letters()) == 24


def test_the_hash_of_a_text_is_that_of_a_table_of_vectors() -> None:
    texts = ["", "hello", "Grüße 主播", "\U0001f600"]
    assert _hashes(pa.array(texts, pa.large_string())).tolist() == [text_hash(text) for text in texts]
