"""``limelight data``: every command runs, prints JSON on demand, and answers a mistake in one line."""

import json
from pathlib import Path

import pytest

from launch.cli.main import main
from trainer.data.format.schema import DatasetSpec
from trainer.data.simulator.segment_vectors import DEFAULT_NOISE
from trainer.runtime.checksums import CHECKSUMS

MAPPING = """
layout = "exposures"
[columns]
user_id = "u"
author_id = "a"
item_id = "i"
time = "t"
[domain]
constant = "live"
[behaviours]
like = {column = "l"}
"""


def test_import_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "map.toml").write_text(MAPPING)
    (tmp_path / "log.csv").write_text("u,a,i,t,l\n1,2,3,1650000000000,1\n2,2,3,1650000000001,0\n")
    arguments = ["data", "import", "events", str(tmp_path / "log.csv"), str(tmp_path / "out")]
    arguments += ["--mapping", str(tmp_path / "map.toml"), "--partitions", "3"]
    assert main(arguments) == 0
    spec = DatasetSpec.load(tmp_path / "out")
    assert (spec.rows, spec.partitions) == (2, 3)
    assert "2 training rows of 2 users in 3 partitions" in capsys.readouterr().out
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error == f"limelight: error: {tmp_path / 'out'}: exists already; choose another directory or remove it\n"


def test_the_help_gives_the_default_noise(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "simulate", "--help"]) == 0
    assert f"(default {DEFAULT_NOISE})" in " ".join(capsys.readouterr().out.split())


def test_simulate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--users", "60", "--days", "1", "--partitions", "2", "--seed", "3"]
    assert main(["data", "simulate", str(tmp_path / "world"), *arguments, "--json"]) == 0
    spec = DatasetSpec.load(tmp_path / "world")
    assert spec.partitions == 2 and 0 < spec.rows <= spec.exposures
    document = json.loads(capsys.readouterr().out)
    assert document == {"out": str(tmp_path / "world"), "rows": spec.rows, "users": 60, "partitions": 2, "notes": []}


def test_simulate_cross(tmp_path: Path) -> None:
    arguments = ["--world", "cross", "--users", "5", "--days", "2", "--partitions", "2"]
    assert main(["data", "simulate", str(tmp_path / "world"), *arguments]) == 0
    spec = DatasetSpec.load(tmp_path / "world")
    assert (spec.name, spec.tag, spec.ids["item"].count) == ("simulated-cross", "item_niche", 144 * (2 + 5 + 5))


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = tmp_path / "world"
    assert main(["data", "simulate", str(world), "--users", "20", "--days", "1", "--partitions", "2"]) == 0
    capsys.readouterr()
    assert main(["data", "verify", str(world)]) == 0
    assert "all as they were written" in capsys.readouterr().out
    whole = {name: (world / name).read_bytes() for name in ("history/bits.npy", "users.parquet")}
    for name, content in whole.items():
        (world / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["data", "verify", str(world), "--json"]) == 1
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert (document["ok"], document["has_checksums"], len(document["problems"])) == (False, True, 2)
    lines = printed.err.splitlines()
    assert lines == [f"limelight: error: {problem}" for problem in document["problems"]]
    assert "history/bits.npy: damaged" in lines[0] and "users.parquet: damaged" in lines[1]

    (world / CHECKSUMS).unlink()
    for name, content in whole.items():
        (world / name).write_bytes(content)
    assert main(["data", "verify", str(world)]) == 0
    assert "there are no checksums to compare" in capsys.readouterr().out
    assert main(["data", "verify", str(world), "--record"]) == 0
    assert "all as they were written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "{}/none"], "no dataset here"),
        (["import", "kuairand", "{}/none", "{}/out"], "no such folder"),
        (["import", "events", "{}", "{}/out", "--mapping", "{}/none.toml"], "none.toml: no such mapping file"),
        (["simulate", "{}/out", "--users", "0"], "users is 0"),
        (["simulate", "{}/out", "--world", "cross", "--days", "0"], "days is 0"),
        (["simulate", "{}/out", "--world", "cross", "--texts"], "the world `cross` has no texts"),
        (["simulate", "{}/out", "--world", "cross", "--lookahead"], "--lookahead: the world `cross` has no segments"),
        (["simulate", "{}/out", "--world", "cross", "--segment-vectors"], "the world `cross` has no segments"),
        (["simulate", "{}/out", "--world", "cross", "--newcomers", "1"], "`cross` has no authors who come later"),
        (
            ["simulate", "{}/out", "--world", "cross", "--interest-correlation", "0"],
            "`cross` has no interest that videos and rooms share",
        ),
        (["simulate", "{}/out", "--conflict", "-0.1"], "conflict is -0.1; it must be in [0, 1]"),
        (["simulate", "{}/out", "--world", "cross", "--conflict", "1"], "`cross` has no conflict between behaviours"),
        (
            ["simulate", "{}/out", "--interest-correlation", "1.1"],
            "interest_correlation is 1.1; it must be in [0, 1]",
        ),
        (
            ["simulate", "{}/out", "--world", "cross", "--factors"],
            "--factors: the world `cross` has no file of factors",
        ),
        (["simulate", "{}/out", "--world", "cross", "--video-rows"], "`cross` has no choice of rows"),
        (["simulate", "{}/out", "--newcomers", "-1"], "newcomers is -1.0; it must be in [0, 1]"),
        (
            ["simulate", "{}/out", "--segment-noise", "2"],
            "--segment-noise: belongs to the vectors of --segment-vectors",
        ),
        (
            ["simulate", "{}/out", "--segment-taste", "0.5"],
            "--segment-taste: belongs to the vectors of --segment-vectors",
        ),
        (["simulate", "{}/out", "--segment-vectors", "--segment-taste", "2"], "segment_taste is 2.0; it must be in"),
        (["simulate", "{}/out", "--segment-vectors", "--segment-noise", "-1"], "segment_noise is -1.0; it must be in"),
        (["describe", "{}/none"], "no dataset here"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *(argument.format(tmp_path) for argument in arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("limelight: error: ") and printed.err.count("\n") == 1 and message in printed.err
    assert list(tmp_path.iterdir()) == []
