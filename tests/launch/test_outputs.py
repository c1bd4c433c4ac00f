"""No output is forgotten: every parameter, key and option that names a path goes through one rule."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import click
import pyarrow.parquet as pq
import pytest

from launch.cli.main import main
from launch.config_check import check_job, job_model
from tests.launch.cli.parsing import every_command
from tests.paths import ROOT
from tests.s3 import Bucket
from trainer.config.load import load_job
from trainer.config.paths import path_mark
from trainer.config.toml import fields
from trainer.console import job_arguments
from trainer.console.outputs import InputPath, LocalOutputPath, OutputPath
from trainer.data.format.dataset import Dataset

JOBS = ("train", "finetune", "embed", "staytime", "quantize", "align", "foresight")

PLAIN_TEXT = {
    *("time_from", "time_until", "at", "as_of", "evaluate_from", "tune_from", "most", "overrides", "ranks"),
    *("local_rank", "store", "annotate", "model", "sort", "gpu", "names", "options"),
    *("brokers", "topic", "dead_letter_topic"),
    *("fast_seconds", "slow_seconds", "tick_seconds", "idle_seconds", "max_out_of_orderness_seconds"),
}
"""Parameters of commands that are texts and no paths."""

PLAIN_KEYS = {
    "data.positives",
    *("run.name", "data.train_from", "data.train_until", "data.eval_from", "data.eval_until", "data.behaviours"),
    *("data.fit_from", "data.fit_until", "follow.brokers", "follow.topic", "follow.since", "follow.until"),
    *("stream.brokers", "stream.topic", "stream.dead_letter", "stream.since", "stream.until"),
    *("features.side.exclude", "features.dense.exclude", "features.statistics.rates", "features.author_side"),
    *("features.rates", "features.exclude", "features.history.NAME.require", "alignment.anchor", "init_from.tables"),
    *("train.weights", "score.exponents", "lora.targets", "lora.modules_to_save", "input.exclude"),
}
"""Keys of job files that are texts and no paths."""

BENCHMARK_INPUTS = {"--data", "--source", "--world", "--kuairand", "--results", "--one"}
"""Options of benchmarks that are paths to read."""

OUTPUTS = {
    "data simulate",
    *(f"data import {log}" for log in ("kuairand", "kuailive", "kuailive-m3", "kuaicomt", "events")),
    "data instructions",
    "stream assemble",
    "evaluate",
    "score",
    "explain",
    "export",
    "configs",
    "quantize assign",
    "quantize report",
    "align encode",
    "foresight forecast",
    "report",
    "plan",
    "bench",
}
"""Commands with an output."""


def every_parameter() -> Iterator[tuple[str, click.Parameter]]:
    """Yield the words of each command of ``limelight`` and of each job on a rank, and its parameters."""
    for words, command in every_command():
        for parameter in command.params:
            yield words, parameter
    for name in ("TRAIN", "EVALUATE", "SCORE", "EXPLAIN", "QUANTIZE", "ENCODE_AUTHORS", "FORECAST"):
        for parameter in getattr(job_arguments, f"{name}_ARGUMENTS"):
            yield f"python -m trainer.{name.lower()}", parameter


def test_every_parameter_with_a_path_is_an_input_or_an_output() -> None:
    for words, parameter in every_parameter():
        kind = parameter.type
        if isinstance(kind, click.Path):
            assert isinstance(kind, InputPath | LocalOutputPath | OutputPath), (
                f"{words}: {parameter.name} is a plain click.Path"
            )
        elif isinstance(kind, click.types.StringParamType):
            assert parameter.name in PLAIN_TEXT, f"{words}: {parameter.name} is a text: a path, or one of PLAIN_TEXT?"
        else:
            assert not isinstance(kind, click.File), f"{words}: {parameter.name} is a click.File"


def test_these_commands_have_an_output() -> None:
    found = {
        words
        for words, command in every_command()
        for it in command.params
        if isinstance(it.type, LocalOutputPath | OutputPath)
    }
    assert found == OUTPUTS
    page = (ROOT / "docs" / "operations.md").read_text()
    table = page[page.index("## Where results go") :].partition("\n## ")[0]
    assert [
        words for words in OUTPUTS if f"`{words.removesuffix(words.partition('import ')[2]).strip()}" not in table
    ] == []


@pytest.mark.parametrize("job", JOBS)
def test_every_text_of_a_job_file_is_a_path_with_a_mark_or_no_path(job: str) -> None:
    for name, info in fields(job_model(job)):
        holds_text = info.annotation is str or str in get_args(info.annotation)
        if path_mark(info) is not None:
            assert holds_text
        elif holds_text:
            assert name in PLAIN_KEYS, f"{name} is a text: mark it (trainer/config/paths.py), or add it to PLAIN_KEYS"


def test_the_outputs_of_job_files_are_these() -> None:
    marked = {
        (job, name) for job in JOBS for name, info in fields(job_model(job)) if (m := path_mark(info)) and m.instead
    }
    assert marked == {
        *((job, "run.directory") for job in ("train", "finetune", "staytime", "align", "foresight")),
        *((job, "run.mlflow") for job in JOBS),
        *(("embed", key) for key in ("embed.directory", "follow.store")),
        ("quantize", "codebook.directory"),
    }


def benchmark_options() -> Iterator[tuple[str, str]]:
    """Yield the file and the name of each option of a benchmark that is a plain ``Path``."""
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                kinds = [word.value for word in node.keywords if word.arg == "type"]
                if any(isinstance(kind, ast.Name) and kind.id == "Path" for kind in kinds):
                    yield path.name, ast.literal_eval(node.args[0])


def test_every_path_of_a_benchmark_is_an_input_or_local() -> None:
    options = list(benchmark_options())
    assert options
    assert {name for _, name in options} <= BENCHMARK_INPUTS, "an output has type=local_argument"


@pytest.mark.parametrize("url", ["s3://bucket/x.json", "memory:x.json", "s3:/x.json"])
def test_a_benchmark_refuses_a_url(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.measure import make_parser

    with pytest.raises(SystemExit) as ended:
        make_parser("x", "text").parse_args(["--out", url])
    assert ended.value.code == 2 and url in capsys.readouterr().err


def one_line(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail by a mistake of the user, and return its one line."""
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("limelight: error: ")
    return lines[0]


JOB_FILES = {
    "train": ("configs/simulated.toml", "run.directory", "run.mlflow"),
    "finetune": ("configs/finetune_small.toml", "run.directory", "run.mlflow"),
    "staytime": ("configs/staytime.toml", "run.directory", "run.mlflow"),
    "embed": ("configs/embed.toml", "embed.directory", "run.mlflow"),
    "quantize": ("configs/quantize.toml", "codebook.directory", "run.mlflow"),
    "align": ("configs/align.toml", "run.directory", "run.mlflow"),
    "foresight": ("configs/foresight.toml", "run.directory", "run.mlflow"),
}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("url", ["s3://bucket/x", "memory://x", "s3:/bucket/x"])
def test_a_live_directory_is_refused_in_one_line(job: str, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    file, *keys = JOB_FILES[job]
    for key in keys:
        line = one_line([job, str(ROOT / file), f"{key}={url}"], capsys)
        assert line.startswith(f"limelight: error: {key} = {url}: ")
        assert ("did you mean s3://bucket/x?" if url == "s3:/bucket/x" else "local or shared file system") in line


@pytest.mark.parametrize("job", JOBS)
def test_a_store_without_its_package_is_refused_before_a_rank_starts(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    file = str(ROOT / JOB_FILES[job][0])
    line = one_line([job, file, f"run.mlflow={tmp_path}/store"], capsys)
    assert re.search(
        r"run\.mlflow = '.*/store': needs the package mlflow-skinny; type: make setup EXTRAS=.*mlflow$", line
    )
    assert line.removeprefix("limelight: error: ") in check_job(file, [f"run.mlflow={tmp_path}/store"], job, 1).problems
    assert list(tmp_path.iterdir()) == []


def test_a_job_reads_its_directory_from_a_file_url(tmp_path: Path) -> None:
    from trainer.checkpoint.run_directory import choose_directory

    job = load_job(job_model("train"), ROOT / "configs/simulated.toml", [f"run.directory=file://{tmp_path}/run"])
    assert choose_directory(job) == tmp_path / "run"  # type: ignore[arg-type]


COMMANDS = {
    "data simulate": ["data", "simulate", "{}", "--users", "5"],
    "data import": ["data", "import", "kuairand", "nowhere", "{}"],
    "data instructions": ["data", "instructions", "nowhere", "{}", "--evaluate-from", "2024-03-01"],
    "stream assemble": ["stream", "assemble", "nowhere", "{}", "--policy", "full"],
    "evaluate": ["evaluate", "nowhere", "--predictions", "{}"],
    "score": ["score", "nowhere", "candidates.parquet", "{}"],
    "explain": ["explain", "nowhere", "--user", "1", "--candidate", "1", "--out", "{}"],
    "export": ["export", "nowhere", "{}"],
    "configs": ["configs", "{}"],
    "quantize assign": ["quantize", "assign", "nowhere", "nowhere", "{}"],
    "quantize report": ["quantize", "report", "nowhere", "--out", "{}"],
    "align encode": ["align", "encode", "nowhere", "--out", "{}"],
    "foresight forecast": ["foresight", "forecast", "nowhere", "--out", "{}"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("url", ["s3:/bucket/x", "memory://x", "hdfs://host/x"])
def test_a_command_refuses_a_place_where_nothing_is_whole(
    command: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert url in one_line([word.format(url) for word in COMMANDS[command]], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outputs") / "world"
    assert main(["data", "simulate", str(path), "--users", "60", "--days", "2", "--partitions", "2", "--texts"]) == 0
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def uploaded(bucket: Bucket, name: str) -> dict[str, bytes]:
    return {found.removeprefix(f"{name}/"): bucket.read(found) for found in bucket.names(name)}


def test_a_simulated_dataset_is_uploaded_and_read_there(
    world: Path, bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{bucket.url}/world"
    arguments = ["--users", "60", "--days", "2", "--partitions", "2", "--texts", "--json"]
    assert main(["data", "simulate", url, *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == url
    assert uploaded(bucket, "world") == contents(world)
    assert main(["data", "describe", url]) == 0
    assert Dataset.open(url).spec.rows == Dataset.open(str(world)).spec.rows
    assert "exists already" in one_line(["data", "simulate", url, *arguments], capsys)


def test_an_imported_dataset_is_uploaded(bucket: Bucket, tmp_path: Path) -> None:
    from tests.launch.cli.test_data import MAPPING

    (tmp_path / "map.toml").write_text(MAPPING)
    (tmp_path / "log.csv").write_text("u,a,i,t,l\n1,2,3,1650000000000,1\n2,2,3,1650000000001,0\n")
    arguments = [str(tmp_path / "log.csv"), f"{bucket.url}/log", "--mapping", str(tmp_path / "map.toml")]
    assert main(["data", "import", "events", *arguments]) == 0
    assert Dataset.open(f"{bucket.url}/log").spec.rows == 2


def test_instructions_are_uploaded(world: Path, bucket: Bucket, tmp_path: Path) -> None:
    from trainer.data.format.schema import DatasetSpec

    spec = DatasetSpec.load(world)
    border = str((spec.span_ms[0] + spec.span_ms[1]) // 2)
    import datetime

    border = datetime.datetime.fromtimestamp(int(border) / 1000, datetime.UTC).isoformat()
    arguments = ["data", "instructions", str(world), "{}", "--evaluate-from", border, "--samples", "20"]
    arguments += ["--evaluate-samples", "20", "--templates", str(ROOT / "configs" / "templates")]
    for out in (str(tmp_path / "samples"), f"{bucket.url}/samples"):
        assert main([word.format(out) for word in arguments]) == 0
    assert uploaded(bucket, "samples") == contents(tmp_path / "samples")
    assert "manifest.json" in contents(tmp_path / "samples")


def test_assembled_rows_are_uploaded_with_their_unused_events(
    world: Path, bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = []
    for out in (str(tmp_path / "rows.parquet"), f"{bucket.url}/rows.parquet"):
        # An event within the hour after a visit's end is late, so that some change no row.
        assert (
            main(["stream", "assemble", str(world), out, "--policy", "realtime", "--idle-seconds", "1", "--json"]) == 0
        )
        documents.append(json.loads(capsys.readouterr().out))
    local, remote = documents
    assert sum(local["unused_events"].values()) > 0
    assert remote == {
        **local,
        "out": f"{bucket.url}/rows.parquet",
        "unused_events_file": f"{bucket.url}/rows.unused_events.parquet",
    }
    (tmp_path / "copy.parquet").write_bytes(bucket.read("rows.parquet"))
    assert pq.read_table(tmp_path / "copy.parquet").equals(pq.read_table(tmp_path / "rows.parquet"))
    assert bucket.names() == ["rows.parquet", "rows.unused_events.parquet"]


def test_exports_and_scores_are_uploaded_by_the_command(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.launch.cli.test_models import directory_of

    def write(out: Path, names: Sequence[str]) -> None:
        out.mkdir()
        for name in names:
            (out / name).write_text(name)

    monkeypatch.setattr(
        "trainer.llm.models.adapter.merge_run", lambda run, out: write(out, ("config.json", "model.safetensors"))
    )

    def score_range(run: Path, out: Path, **options: Any) -> dict[str, Any]:
        out.write_text("predictions")
        return {"all": {"rmse": 2.0, "rows": 3}, "exposures": {}, "constant": {}}

    monkeypatch.setattr("trainer.comment_staytime.scoring.score_range", score_range)
    assert main(["export", directory_of("finetune", tmp_path), f"{bucket.url}/merged"]) == 0
    assert main(["score", directory_of("staytime", tmp_path), f"{bucket.url}/p.parquet"]) == 0
    assert bucket.names() == ["merged/config.json", "merged/model.safetensors", "p.parquet"]
    printed = capsys.readouterr().out
    assert f"{bucket.url}/merged: the model of" in printed and f"predictions: {bucket.url}/p.parquet" in printed


def test_a_missing_bucket_ends_every_command_before_its_work(
    world: Path, bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ["data", "simulate", "s3://no-such-bucket/x", "--users", "100000000"],
        ["stream", "assemble", str(world), "s3://no-such-bucket/x", "--policy", "full"],
    ):
        line = one_line(arguments, capsys)
        assert re.search(r"error: s3://no-such-bucket/x: cannot be written \(.*bucket does not exist\)$", line)
