"""Every example of a help text, a docstring or a page is accepted; those that need no training are run."""

from __future__ import annotations

import inspect
import shlex
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from launch.cli.data import events
from launch.cli.main import main
from tests.examples import Example, Wrong, check, examples, of_comments, of_docstrings, of_page
from tests.launch.cli.parsing import every_command
from tests.nursery import Nursery
from tests.paths import ROOT

STORED = ROOT / "tests/checkpoint/stored/runs_0.1.tar.xz"


@pytest.fixture(autouse=True)
def without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a directory that has the repository's files, but neither data nor runs."""
    for folder in ("configs", "launch", "benchmarks", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for tables in ("D", "TABLES"):
        # Placeholders for tables of vectors, which a benchmark looks for when it reads its arguments.
        (tmp_path / tables / "items").mkdir(parents=True)
        (tmp_path / tables / "comments").mkdir()
    monkeypatch.chdir(tmp_path)
    yield


def test_every_example_is_accepted() -> None:
    wrong = []
    for example in examples():
        try:
            check(example)
        except Wrong as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


def test_examples_are_found_everywhere() -> None:
    found = Counter((example.place, example.kind) for example in examples())
    for words, _ in every_command():
        assert found[f"limelight {words} --help".replace("  ", " "), "command"], words
    for place, kind in (
        ("limelight data import events --help", "toml"),
        ("limelight score --help", "usage"),
        ("trainer/data/importers/events.py", "toml"),
        ("trainer/stream/sources/message_codec.py", "json"),
        ("trainer/llm/finetuning/samples.py", "json"),
        ("trainer/embed.py", "command"),
        ("benchmarks/speed/loader.py", "command"),
        ("tests/faults/chaos.py", "command"),
        ("configs/simulated.toml", "command"),
        ("docs/streaming.md", "toml"),
        ("docs/language_model.md", "json"),
        ("README.md", "command"),
        ("README.md", "words"),
    ):
        assert found[place, kind], (place, kind)


def test_a_new_example_is_found_by_its_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.examples.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "Use `limelight doctor`.\n\n```sh\nlimelight train \\\n  a.toml  # now\n```\n```yaml\na: 1\n```\n```\n"
        "  limelight embed a.toml\noutput\n```\n"
    )
    assert [(example.kind, example.text) for example in of_page(page)] == [
        ("command", "limelight train a.toml  # now"),
        ("yaml", "a: 1\n"),
        ("command", "limelight embed a.toml"),
        ("words", "limelight doctor"),
    ]
    module = tmp_path / "trainer" / "job.py"
    module.parent.mkdir()
    module.write_text(
        '"""A job::\n\n    [run]\n    name = "a"\n\nlimelight train a.toml\ntorchrun -m trainer.rank a.toml\n\n'
        'torchrun keeps one store.\nSee there.\n\n    python -m trainer.rank b.toml\n"""\n'
        'MESSAGE = f"repeat `limelight export RUN OUT`"\n'
    )
    assert [(example.kind, example.text) for example in of_docstrings(module)] == [
        ("command", "limelight train a.toml"),
        ("command", "torchrun -m trainer.rank a.toml"),
        ("command", "python -m trainer.rank b.toml"),
        ("toml", '[run]\nname = "a"'),
        ("words", "limelight export RUN OUT"),
    ]
    job = tmp_path / "job.toml"
    job.write_text("# A job.\n#   limelight train job.toml\nname = 1\n")
    assert [example.text for example in of_comments(job)] == ["limelight train job.toml"]


@pytest.mark.parametrize(
    "line",
    [
        "limelight trian configs/simulated.toml",
        "limelight train configs/none.toml",
        "limelight train configs/simulated.toml --rank 2",
        "limelight train configs/simulated.toml train.epoch=2",
        "limelight train configs/simulated.toml train.epochs=0",
        "limelight train configs/cross.toml features.history.long.lenght=3",
        "limelight embed configs/embed.toml train.epochs=2",
        "limelight config check configs/embed.toml train.epochs=2",
        "limelight plan configs/simulated.toml --gpus 64 train.batchsize=4096",
        "limelight plan configs/quantize.toml --gpus 64",
        "limelight stream assemble data/world rows.parquet",
        "limelight evaluate runs/a --from 2022-13-05",
        "limelight data",
        "limelight --nonsense",
        "python -m benchmarks.none",
        "python -m benchmarks",
        "python -m benchmarks.speed.loader --wrkers 2",
        "python -m benchmarks.quality.staytime --parts nonsense",
        "python -m trainer.config.load",
        "torchrun --nproc-per-node 2 -m trainer.rank configs/simulated.toml train.epoch=2",
        "torchrun --nprocs-per-node 2 -m trainer.rank configs/simulated.toml",
        "deepspeed --hostfile launch/cluster/none --module trainer.rank configs/simulated.toml",
        "accelerate launch -m trainer.finetune configs/finetune_small.toml train.epoch=2",
        "sbatch launch/cluster/none.sbatch configs/kuairand.toml",
        "make tset",
        "rm -rf data",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    with pytest.raises(Wrong):
        check(Example("here", "command", line))


@pytest.mark.parametrize(
    "example",
    [
        Example("here", "words", "limelight train a.toml --rank 2"),
        Example("here", "words", "limelight train a.toml train.epoch=2"),
        Example("here", "usage", "limelight score RUN OUT.parquet [--date PATH]"),
        Example("here", "value", "train.epochs=2", ("embed", "overrides")),
        Example("here", "value", "yesterday", ("explain", "--at")),
        Example("here", "value", "for example", ("stream publish", "--speed")),
        Example("here", "toml", "[features.item]\nrow = 3\n"),
        Example("limelight data import events --help", "toml", "layout = 'exposure'"),
        Example("trainer/data/importers/events.py", "toml", "layout = 'exposures'\ntime_units = 's'"),
        Example("here", "json", '{"prompt": "a", "answer": "b"}'),
        Example("here", "json", '{"user_id": 1, "time_ms": 1700000000000}'),
        Example("here", "yaml", "a: 1"),
    ],
    ids=str,
)
def test_a_wrong_example_is_found(example: Example) -> None:
    with pytest.raises(Wrong):
        check(example)


LOG = """uid,anchor,room,ts,watched_ms,clicked,gift_price
7,70,700,1650000000000,5000,1,0
7,71,701,1650000001000,0,0,2.5
"""


def example_of(words: str, *more: str) -> list[str]:
    """Return the arguments of the example in the help of a command; a later option replaces an earlier one."""
    return [*shlex.split(dict(every_command())[words].example)[1:], *more]


def test_examples_that_make_and_read_data_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The examples of the help, one after the other, in a small world."""
    assert events.help is not None
    mapping = events.help.split("\b\n", 1)[1].split("\n\n", 1)[0]
    (tmp_path / "map.toml").write_text(inspect.cleandoc(mapping))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "log.csv").write_text(LOG)
    for line in (
        example_of("data simulate", "--users", "20", "--days", "6", "--texts"),
        example_of("data"),
        example_of("data describe"),
        example_of("data import events"),
        example_of("data instructions"),
        example_of("stream"),
        example_of("stream consistency"),
        example_of("stream assemble"),
        example_of("config"),
        *(
            example_of(f"config {kind}")
            for kind in ("train", "finetune", "embed", "staytime", "quantize", "align", "foresight")
        ),
    ):
        status = main(line)
        printed = capsys.readouterr()
        if line[:2] == ["config", "check"]:
            assert status == 2 and "data/simulated: no dataset here" in printed.err
        else:
            assert status == 0 and printed.out and not printed.err, (line, printed.err)
    assert (tmp_path / "rows.parquet").is_file() and (tmp_path / "data/mine/dataset.json").is_file()


@pytest.mark.slow
def test_examples_that_use_a_trained_run_run(tmp_path: Path, nursery: Nursery) -> None:
    with tarfile.open(STORED) as archive:
        archive.extractall(tmp_path, filter="data")
    for run in ("kuairand", "simulated", "first", "second"):
        shutil.copytree(tmp_path / "batch", tmp_path / "runs" / run)
    # The last item is a live room.
    candidate = str(pq.read_table("world/items.parquet")["item_id"][-1].as_py())
    step = next((tmp_path / "batch/checkpoints").iterdir()).name
    named = "step-00000120"
    for line in (
        example_of("evaluate", "--from", "2024-03-06", "--until", "2024-03-08"),
        example_of("score"),
        example_of("explain", "--user", "1", "--candidate", candidate),
        example_of("export"),
        example_of("checkpoint"),
        example_of("checkpoint show"),
        example_of("checkpoint verify"),
        [word.replace(named, step) for word in example_of("checkpoint diff")],
    ):
        ended = nursery.run("launch.cli.main", line, directory=tmp_path)
        assert ended.status == 0 and ended.stdout, (line, ended.stderr[-2000:])
    assert (tmp_path / "scores.parquet").is_file() and (tmp_path / "exported/first/export.json").is_file()
