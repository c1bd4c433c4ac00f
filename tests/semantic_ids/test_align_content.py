"""Mean and latest vector of an author as of a time, against their definition; nothing that is known later counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.semantic_ids.segment_world import write_segments, write_vectors
from trainer.console.errors import UserError
from trainer.data.format.content_vectors import ContentVectors, Origin
from trainer.semantic_ids import align_content
from trainer.semantic_ids.align_content import (
    AuthorContent,
    ContentIdentity,
    check_vectors,
    content_scale,
    content_width,
)
from trainer.semantic_ids.segments import SegmentVectors

DIM, SCALE = 3, 2.0


def segments_of(author: np.ndarray, known_ms: np.ndarray, vectors: np.ndarray) -> SegmentVectors:
    table = ContentVectors(Path("t"), np.arange(len(author)), vectors, np.zeros(len(author), np.uint64), Origin(), "")
    return SegmentVectors(table, np.zeros_like(author), author, known_ms, known_ms, 0, "UTC")


def make(count: int, authors: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((count, DIM)).astype(np.float16)
    return random.integers(-1, authors, count), random.integers(0, count, count), vectors


def plain(author: np.ndarray, known_ms: np.ndarray, vectors: np.ndarray, who: int, when: int) -> np.ndarray:
    places = [k for k in np.lexsort((known_ms,)) if author[k] == who and known_ms[k] <= when]
    if who < 0 or not places:
        return np.zeros(2 * DIM + 1)
    rows = vectors[places].astype(np.float64)
    return np.concatenate([rows.mean(0) / SCALE, rows[-1] / SCALE, [1]])


@given(st.integers(0, 150), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=40)
def test_content_is_that_of_the_definition(count: int, authors: int, seed: int) -> None:
    columns = make(count, authors, seed)
    content = AuthorContent(segments_of(*columns), SCALE)
    random = np.random.default_rng(seed + 1)
    who, when = random.integers(-1, authors + 1, 30), random.integers(-1, count + 2, 30)
    found = content.read(who, when)
    assert found.dtype == np.float32 and found.shape == (30, content_width(DIM))
    expected = [plain(*columns, a, t) for a, t in zip(who.tolist(), when.tolist(), strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 99), st.integers(1, 150))
@settings(max_examples=30)
def test_nothing_that_becomes_known_later_changes_a_bit(seed: int, now: int) -> None:
    author, known_ms, vectors = make(150, 2, seed)
    random = np.random.default_rng(seed + 1)
    later = known_ms > now
    changed = vectors.copy()
    changed[later] = random.standard_normal((int(later.sum()), DIM))
    kept = ~later | (random.random(len(later)) < 0.5)
    more = random.integers(0, 9)
    others = (
        np.concatenate([author[kept], random.integers(0, 3, more)]),
        np.concatenate([np.where(later, known_ms + 1, known_ms)[kept], np.full(more, now + 1)]),
        np.concatenate([changed[kept], random.standard_normal((more, DIM)).astype(np.float16)]),
    )
    who, when = random.integers(0, 3, 50), random.integers(-1, now + 1, 50)
    before = AuthorContent(segments_of(author, known_ms, vectors), SCALE).read(who, when)
    after = AuthorContent(segments_of(*others), SCALE).read(who, when)
    assert before.tobytes() == after.tobytes()


def test_the_latest_vector_can_be_that_of_a_given_segment() -> None:
    author, known_ms, vectors = np.array([7, 7, 7]), np.array([5, 5, 9]), np.eye(3, dtype=np.float16)
    content = AuthorContent(segments_of(author, known_ms, vectors), 1.0)
    found = content.read(np.array([7, 7]), np.array([5, 5]), np.array([0, 1]))
    assert found[:, DIM : 2 * DIM].tolist() == [[1, 0, 0], [0, 1, 0]]
    assert (found[:, :DIM] == [0.5, 0.5, 0]).all(), "the mean is of all segments that are known then"


@pytest.mark.parametrize("segment", range(4))
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_vectors_that_cannot_be_averaged_are_refused(chunk: int, segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align_content, "CHUNK_ROWS", chunk)
    vectors = np.ones((4, DIM), np.float16)
    vectors[segment, 1] = np.inf
    with pytest.raises(UserError, match=rf"(^| )1 of 4 vectors are not finite and 0 are zero, .* segment {segment}"):
        check_vectors(segments_of(np.zeros(4, np.int64), np.arange(4), vectors))


@pytest.mark.parametrize("chunk", [1, 100])
def test_the_scale_is_the_root_mean_square_of_earlier_elements(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align_content, "CHUNK_ROWS", chunk)
    vectors = np.array([[3, 4, 0], [0, 0, 5], [9, 9, 9]], np.float16)
    segments = segments_of(np.zeros(3, np.int64), np.array([1, 2, 3]), vectors)
    assert content_scale(segments, 3) == pytest.approx(np.sqrt(50 / 6))
    with pytest.raises(UserError, match="no segment became known before the end of training"):
        content_scale(segments, 1)
    monkeypatch.setattr(align_content, "SCALE_ROWS", 1)
    assert content_scale(segments, 3) == pytest.approx(np.sqrt(25 / 3)), "a sample of them"


def test_other_vectors_than_those_of_the_model_are_refused(tmp_path: Path) -> None:
    write_segments(tmp_path, np.zeros(2, np.int64), np.array([1, 2]), {0: 7})
    write_vectors(tmp_path, np.ones((2, DIM)))
    segments = SegmentVectors.open(str(tmp_path))
    identity = ContentIdentity(str(segments.table.path), DIM, "abc", segments.table.hash, 1.0)
    identity.check("t", DIM, segments.table.origin, "RUN")
    with pytest.raises(UserError, match=rf"t: vectors have {DIM + 1} elements, and RUN was trained on {DIM}"):
        identity.check("t", DIM + 1, segments.table.origin, "RUN")
    with pytest.raises(UserError, match=r"t: vectors are from another model \(other\) than those of RUN \(abc\)"):
        identity.check("t", DIM, Origin(model="small", hash="other"), "RUN")
