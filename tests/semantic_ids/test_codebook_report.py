"""Reports: every number against its plain definition, a table, and a picture."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot
from matplotlib.figure import Figure

from modules.codebook import Codebook
from tests.semantic_ids.segment_world import write_segments, write_vectors, write_world
from trainer.semantic_ids.codebook_report import (
    CURVE_POINTS,
    HEADER,
    EncodedSegments,
    _use,
    draw_reports,
    encode_segments,
    measure,
    report_table,
)
from trainer.semantic_ids.segments import SegmentVectors


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
def test_the_use_of_codes_follows_its_definitions(counts: list[int]) -> None:
    found = _use(np.array(counts))
    total, n = sum(counts), len(counts)
    differences = sum(abs(a - b) for a in counts for b in counts)
    assert found["gini"] == pytest.approx(differences / (2 * n * total))
    assert found["unused"] == counts.count(0) / n
    assert found["top"] == pytest.approx(max(counts) / total)
    shares = [count / total for count in counts if count]
    assert found["perplexity"] == pytest.approx(np.prod([share**-share for share in shares]))
    assert found["curve"][0] == 0 and found["curve"][-1] == pytest.approx(1) and len(found["curve"]) == CURVE_POINTS
    assert all(b >= a - 1e-12 for a, b in pairwise(found["curve"]))


def test_the_top_one_percent_of_many_codes() -> None:
    counts = np.ones(300, np.int64)
    counts[[7, 50, 200, 201]] = 26
    assert _use(counts)["top"] == pytest.approx(3 * 26 / counts.sum())


def test_collisions_and_persistence(tmp_path: Path) -> None:
    room, codes = np.array([1, 1, 1, 2, 2]), np.array([[0, 1], [0, 1], [0, 0], [2, 0], [2, 0]], np.int32)
    write_segments(tmp_path, room, 30_000 * np.arange(5), {1: 1, 2: 2})
    write_vectors(tmp_path, np.eye(5, 8, dtype=np.float32))
    # Segments 3 and 4 have equal vectors, 0 and 1 different ones in one tuple.
    encoded = EncodedSegments(codes, np.array([5, 6, 7, 8, 8], np.uint64), np.array([10.0, 5.0]), np.ones(8), 10.0)
    report = measure(encoded, SegmentVectors.open(str(tmp_path)), np.arange(5), (3, 2))
    assert (report["segments"], report["distinct_vectors"], report["neighbours"]) == (5, 4, 3)
    assert report["tuples"] == {
        **{"possible": 6, "used": 3, "alone": pytest.approx(0.5), "largest": 2, "persistence": pytest.approx(2 / 3)}
    }
    first, second = report["levels"]
    assert (first["codes"], first["persistence"], second["persistence"]) == (3, 1.0, pytest.approx(2 / 3))
    assert report["variance"] == pytest.approx(2 - 8 / 25)
    assert first["distortion"] == 2 and first["of_variance"] == pytest.approx(2 / (2 - 8 / 25))
    assert second["distortion"] == 1 and first["unused"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("normalize", [False, True])
def test_distortion_is_measured_after_each_level(normalize: bool, tmp_path: Path) -> None:
    segments = SegmentVectors.open(str(write_world(tmp_path, rooms=3, segments=10)))
    generator = torch.Generator().manual_seed(0)
    levels = tuple(torch.randn(size, 8, generator=generator) for size in (4, 3, 2))
    book = Codebook(levels, normalize, (1.0, 0.7, 0.5) if normalize else ())
    rows = np.arange(5, 30)
    parts = [encode_segments(book, segments, rows[:11]), encode_segments(book, segments, rows[11:])]
    joined, whole = EncodedSegments.join(parts), encode_segments(book, segments, rows)
    vectors = torch.from_numpy(np.array(segments.table.vectors[5:30]))
    for place in range(3):
        prefix = Codebook(levels[: place + 1], normalize, book.scales[: place + 1])
        codes, error = prefix.encode(vectors)
        assert whole.errors[place] == pytest.approx(float(error.double().sum()), rel=1e-6)
        assert (whole.codes[:, : place + 1] == codes.numpy()).all()
    assert (joined.codes == whole.codes).all() and (joined.hashes == whole.hashes).all()
    assert joined.errors == pytest.approx(whole.errors) and joined.squares == pytest.approx(whole.squares)


def test_a_room_of_one_segment_has_no_persistence(tmp_path: Path) -> None:
    write_world(tmp_path, rooms=3, segments=1)
    segments, rows = SegmentVectors.open(str(tmp_path)), np.arange(3)
    book = Codebook((torch.eye(2, 8),))
    report = measure(encode_segments(book, segments, rows), segments, rows, (2,))
    assert report["levels"][0]["persistence"] is None and report["neighbours"] == 0
    (line,) = report_table({"2-abc": report}).splitlines()[1:]
    assert line.split()[-3:] == ["-", "100.0", "%"] or " - " in line


def test_a_table_and_a_picture_of_several_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = SegmentVectors.open(str(write_world(tmp_path / "world", rooms=4, segments=10)))
    rows, reports = np.arange(40), {}
    for name, sizes in (("6-a", (6,)), ("4x3-b", (4, 3))):
        book = Codebook(tuple(torch.randn(size, 8, generator=torch.Generator().manual_seed(size)) for size in sizes))
        reports[name] = measure(encode_segments(book, segments, rows), segments, rows, sizes)
    lines = report_table(reports).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["6-a", "1"],
        ["4x3-b", "1"],
        ["4x3-b", "2"],
        ["4x3-b", "tuple"],
    ]
    assert all(column in lines[0] for column in HEADER)
    drawn = list[Figure]()
    monkeypatch.setattr(pyplot, "close", drawn.append)
    draw_reports(reports, tmp_path / "report.png")
    monkeypatch.undo()
    (figure,) = drawn
    distortion, use, unused, steady = figure.axes
    levels = [level for report in reports.values() for level in report["levels"]]
    curves = [line.get_ydata() for line in distortion.lines]
    assert np.concatenate(curves).tolist() == [100 * level["of_variance"] for level in levels]
    for line, level in zip(use.lines[:-1], levels, strict=True):
        assert line.get_ydata().tolist() == [100 * share for share in level["curve"]]
    bars = [[bar.get_width() for bar in group] for group in unused.containers]
    assert bars == [
        [100 * level["unused"] for level in levels],
        [100 * level["top"] for level in levels],
        pytest.approx([100 * level["perplexity"] / level["codes"] for level in levels]),
    ]
    persistent = [*levels, reports["4x3-b"]["tuples"]]
    assert [bar.get_width() for bar in steady.patches] == [100 * one["persistence"] for one in persistent]
    for axes in (unused, steady):
        left, right = axes.get_xlim()
        assert left == 0 and right > 100
    pyplot.close(figure)
    content = (tmp_path / "report.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 20_000
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
