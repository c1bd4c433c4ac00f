"""``limelight retrieve authors``: its answer as text and as JSON, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.cli.main import main
from tests.semantic_ids.segment_world import assigned, make_version, write_world

AS_OF = ["--as-of", "2024-03-04T00:05:10"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("retrieve")
    write_world(directory / "world", rooms=10, segments=12)
    assigned(make_version(directory / "book", 3, 4), directory / "world")
    make_version(directory / "another", 5)
    return directory


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def test_the_answer_as_text(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["retrieve", "authors", "world", "--author", "102", *AS_OF, "-k", "3"]) == 0
    first, header, *lines = capsys.readouterr().out.splitlines()
    assert first == (
        "authors like 102 by the cosine of the latest vectors, as of 2024-03-04T00:05:10 (UTC); compared with 4 other "
        "authors"
    )
    assert header.split() == ["author", "cosine", "room", "on", "air", "age"]
    assert len(lines) == 4
    assert lines[0].split() == ["102", "asked", "5", "10.0", "s"]


def test_the_answer_by_codes_as_text(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--by", "codes", "--codes", "world/codes.parquet", "--codebook", "book"]
    assert main(["retrieve", "authors", "world", "--author", "102", *AS_OF, *options, "--on-air"]) == 0
    first, header, asked, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith("compared with 4 other authors with a room on air")
    assert header.split()[:4] == ["author", "levels", "recent", "codes"]
    assert asked.split()[:2] == ["102", "asked"] and "/" in asked.split()[2]
    assert all("/" in line.split()[3] for line in lines)


def test_the_answer_as_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--codes", "world/codes.parquet", "--json"]
    assert main(["retrieve", "authors", "world", "--author", "102", *AS_OF, *options]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["asked"]["author"] == 102 and len(document["authors"]) == 4
    assert list(document["authors"][0]) == [
        *("author", "cosine", "codes", "room_on_air", "segment", "known_ms", "age_ms", "topic", "text")
    ]


BY_CODES = ["--by", "codes", "--codes", "world/codes.parquet"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--author", "7", *AS_OF], "--author 7: world/embeddings/segments has no segment of this author; 5 authors"),
        (["--author", "7", *AS_OF, *BY_CODES], "--author 7: world/codes.parquet has no segment of this author"),
        (["--author", str(10**30), *AS_OF], "has no segment of this author; 5 authors are known at --as-of"),
        (["--author", "-1", *AS_OF], "--author -1: world/embeddings/segments has no segment of this author"),
        (
            ["--author", "102", "--as-of", "2024-03-04"],
            "--as-of 2024-03-04: no segment of world/embeddings/segments is known then; the first is known from "
            "2024-03-04T00:00:30.000+00:00 on",
        ),
        (["--author", "102", "--as-of", "noon"], "--as-of = 'noon': not a time"),
        (["--author", "102", *AS_OF, "--by", "codes"], "--by codes needs --codes FILE"),
        (["--author", "102", *AS_OF, *BY_CODES, "--vectors", "x"], "--vectors has no effect with --by codes"),
        (["--author", "102", *AS_OF, "--codebook", "book"], "--codebook needs --codes FILE"),
        (["--author", "102", *AS_OF, *BY_CODES, "--codebook", "another"], "is of the codebook version"),
        (["--author", "102", *AS_OF, "--codes", "nowhere"], "nowhere: no such file"),
        (["--author", "102", *AS_OF, "--vectors", "nowhere"], "nowhere: no embedding table here"),
        (["--author", "102", *AS_OF, "-k", "0"], "'-k': 0 is not in the range"),
        (["--author", "102"], "missing option '--as-of'"),
    ],
)
def test_a_mistake_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["retrieve", "authors", "world", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_an_author_who_is_not_known_yet_is_named_with_the_first_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = write_world(tmp_path / "world", rooms=4, segments=3)

    table = pq.read_table(world / "segments.parquet").to_pydict()
    known_ms = np.array(table["known_ms"])
    known_ms[np.array(table["item_id"]) >= 2] += 3_600_000
    pq.write_table(pa.table({**table, "known_ms": known_ms}), world / "segments.parquet")
    assert main(["retrieve", "authors", str(world), "--author", "101", *AS_OF]) == 2
    assert (
        "--author 101: no segment of this author is known at --as-of 2024-03-04T00:05:10; the first is known from "
        "2024-03-04T01:00:30.000+00:00 on" in capsys.readouterr().err
    )
