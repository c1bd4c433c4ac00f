"""``limelight quantize``: what is started, and codes and reports as text, as JSON and as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli.main import main
from tests.launch.cli.conftest import Started
from tests.s3 import Bucket
from tests.semantic_ids.meaning_world import write_world as write_topic_world
from tests.semantic_ids.segment_world import make_version, write_world
from trainer.semantic_ids.code_files import read_codes
from trainer.semantic_ids.codebook_version import CodebookVersion

JOB = '[data]\npath = "nowhere"\n[codebook]\ndirectory = "book"\n'


@pytest.fixture
def started(recorded_starts: Started, tmp_path: Path) -> Started:
    """Record what would be started; the working directory has ``job.toml``, and ``job`` with the same content."""
    for name in ("job.toml", "job"):
        (tmp_path / name).write_text(JOB)
    return recorded_starts


@pytest.mark.parametrize("words", [["quantize"], ["quantize", "fit"]], ids=" ".join)
@pytest.mark.parametrize("file", ["job.toml", "job"])
def test_a_job_file_in_place_of_a_command_is_fitted(words: list[str], file: str, started: Started) -> None:
    assert main([*words, file, "codebook.seed=3", "--ranks", "2"]) == 0
    assert started == [("trainer.quantize", [file, "codebook.seed=3"], 2)]


def test_a_refresh_names_the_old_version(started: Started) -> None:
    assert main(["quantize", "refresh", "job.toml", "--from", "old", "codebook.seed=3"]) == 0
    assert main(["quantize", "refresh", "--from=old", "--compare-cold", "--ranks=2", "job.toml"]) == 0
    assert started == [
        ("trainer.quantize", ["job.toml", "codebook.seed=3", "--from", "old"], 1),
        ("trainer.quantize", ["job.toml", "--from", "old", "--compare-cold"], 2),
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "missing command (limelight quantize --help"),
        (["asign", "a", "b", "c"], "no command 'asign'; did you mean assign?"),
        (["absent.toml"], "absent.toml: no such job file"),
        (["refresh", "job.toml"], "missing option '--from'"),
        (["job.toml", "codebook.sed=3"], "unknown key codebook.sed; did you mean codebook.seed?"),
        (["job.toml", "codebook.levels=[]"], "codebook.levels"),
        (["job.toml", "codebook.directory=s3://bucket/x"], "codebook.directory = s3://bucket/x: "),
        (["report"], "missing argument 'VERSION...'"),
        (["report", "nowhere"], "nowhere: no codebook version here"),
        (["report", "nowhere", "--from", "2024-03-05"], "--vectors, --from and --until need --data"),
        (["assign", "nowhere", "nowhere", "absent/codes.parquet"], "there is no directory absent"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_starts_nothing(
    arguments: list[str], told: str, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("limelight: error: ") and told in line
    assert not started


@pytest.fixture
def version(tmp_path: Path) -> CodebookVersion:
    write_world(tmp_path / "world")
    return make_version(tmp_path / "version", 4, 3)


def test_codes_go_to_a_file_and_to_a_store(
    version: CodebookVersion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, store = tmp_path / "codes.parquet", tmp_path / "codes.sqlite"
    arguments = ["quantize", "assign", str(version.path), str(tmp_path / "world"), str(out), "--store", str(store)]
    assert main([*arguments, "--until", "2024-03-04T00:10:30"]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: 200 segments with codes of {version.name} (mean squared error " in printed
    assert "without a code: 0 segments without a vector; without an author: 0 segments of unknown rooms\n" in printed
    assert f"{store}: 200 stored, 0 repeated, 0 conflicting, 0 late\n" in printed
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["store"] == {"stored": 200, "repeated": 200, "conflicting": 0, "late": 0}
    assert (document["version"], document["segments"]) == (version.name, 400)
    assert len(read_codes(out, version)) == 400


def test_a_code_file_is_uploaded(version: CodebookVersion, bucket: Bucket, tmp_path: Path) -> None:
    places = [str(tmp_path / "codes.parquet"), f"{bucket.url}/codes.parquet"]
    for place in places:
        assert main(["quantize", "assign", str(version.path), str(tmp_path / "world"), place]) == 0
    assert bucket.read("codes.parquet") == (tmp_path / "codes.parquet").read_bytes()


def test_a_report_is_measured_on_a_dataset(
    version: CodebookVersion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_version(tmp_path / "other", 6)
    world = ["--data", str(tmp_path / "world"), "--from", "2024-03-04T00:15"]
    assert main(["quantize", "report", str(version.path), str(other.path), *world, "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert list(reports) == [version.name, other.name] and reports[other.name]["segments"] == 110
    picture = tmp_path / "report.png"
    assert main(["quantize", "report", str(version.path), str(other.path), *world, "--out", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == [version.name] * 3 + [other.name]
    assert lines[-1] == f"picture: {picture}" and picture.is_file()
    assert main(["quantize", "report", str(version.path)]) == 2
    assert "has no report, since no segment was held out" in capsys.readouterr().err


def test_a_report_of_the_meaning_as_text_json_and_picture(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_topic_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = ["quantize", "report", "book", "--interactions", "world", "--codes", "codes.parquet"]
    assert main([*command, "--out", "room.png", "-k", "2"]) == 0
    text = capsys.readouterr().out
    assert "An event belongs to the segment on air at its time." in text and text.endswith("picture: room.png\n")
    assert "the 2 codes with most watch time" in text and (tmp_path / "room.png").stat().st_size > 10_000
    assert main([*command, "--json", "--level", "1", "--out", f"{bucket.url}/room.png"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["level"] == 1 and len(document["codes"]) == document["used_codes"]
    assert bucket.names() == ["room.png"]
    before = sorted(tmp_path.rglob("*"))
    room = str(document["room"]["item_id"])
    for options, message in (
        (["--codes", "codes.parquet"], "--codes needs --interactions, the dataset with segments and events"),
        (["--room", room], "--room needs --interactions"),
        (["--level", "1"], "--level needs --interactions"),
        (["-k", "3"], "-k needs --interactions"),
        ([*command[3:], "--vectors", "x"], "--vectors has no effect with --codes; leave one of them out"),
        ([*command[3:], "--data", "world"], "--data has no effect with --interactions; leave one of them out"),
        (["book", *command[3:]], "--interactions takes one codebook version, and 2 are named"),
        ([*command[3:], "--room", "1", "--out", "other.png"], "has no segment of this room"),
        ([*command[3:], "--codes", "missing.parquet", "--out", "other.png"], "missing.parquet: no such file"),
        ([*command[3:], "--out", "no/room.png"], "cannot be written, there is no directory no"),
    ):
        assert main(["quantize", "report", "book", *options]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error, error
    assert sorted(tmp_path.rglob("*")) == before
