"""The ``limelight`` command: light to start, one line for a mistake, the nearest name, statuses that shells know."""

from __future__ import annotations

import os
import subprocess
import sys

import click
import pytest

from launch.cli import main as main_module
from launch.cli.command import Command
from launch.cli.main import RENAMED, main
from tests.launch.cli.parsing import every_command, parse
from tests.paths import ROOT
from trainer.console.exit_status import BROKEN_PIPE_STATUS

HEAVY = ("torch", "torchrec", "deepspeed", "numpy", "pyarrow", "pydantic", "matplotlib", "transformers", "tqdm")

COMMANDS = dict(every_command())


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["trian"], ["stream", "assemble", "--help"], ["train"]], ids=" ".join
)
def test_help_and_mistakes_load_nothing_heavy(arguments: list[str]) -> None:
    done = run_python(
        f"import sys; from launch.cli.main import main; main({arguments!r}); "
        f"print('loaded', sorted(set({HEAVY!r}) & sys.modules.keys()))"
    )
    assert done.stdout.splitlines()[-1] == "loaded []", done


@pytest.mark.parametrize(
    "arguments",
    [["runs", "list", "."], ["config", "train"], ["train", "configs/simulated.toml", "train.epochs=x"]],
    ids=" ".join,
)
def test_job_files_and_runs_are_read_without_a_model_s_libraries(arguments: list[str]) -> None:
    """`limelight train` reads its job file before the ranks start, and the ranks load the libraries again."""
    libraries = {"torch", "torchrec", "deepspeed", "pyarrow", "pandas", "numba", "matplotlib", "transformers"}
    done = run_python(
        f"import sys; from launch.cli.main import main; main({arguments!r}); import pydantic; "
        f"print('loaded', sorted({libraries!r} & sys.modules.keys()))"
    )
    assert done.stdout.splitlines()[-1] == "loaded []", done


@pytest.mark.parametrize("words", COMMANDS)
def test_help_ends_with_an_example_that_parses(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = COMMANDS[words]
    assert main([*words.split(), "--help"]) == 0
    example = capsys.readouterr().out.partition("Example:\n")[2]
    assert example.strip() == command.example
    if isinstance(command, Command) and words != "completion":
        assert command.example.startswith(f"limelight {words} ".rstrip())
        assert parse(command.example).command is command
    assert command.get_short_help_str(60) and not command.get_short_help_str(60).endswith("..."), words
    for parameter in command.params:
        assert parameter.help, (words, parameter.name)  # type: ignore[attr-defined]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = {line.split()[0] for line in capsys.readouterr().out.split("Commands:\n")[1].splitlines() if line.strip()}
    assert shown >= {words for words in COMMANDS if words and " " not in words}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "missing command (limelight --help"),
        (["data"], "missing command (limelight data --help"),
        (["train"], "missing argument 'CONFIG' (limelight train --help"),
        (["trian"], "no command 'trian'; did you mean train? (limelight --help"),
        (["expornt", "a", "b"], "did you mean export?"),
        (["checkpoints"], "did you mean checkpoint?"),
        (["checkpoint", "verfy"], "no command 'verfy'; did you mean verify? (limelight checkpoint --help"),
        (["data", "import", "kuairnd"], "did you mean kuairand? (limelight data import --help"),
        (["simulate", "out"], "no command 'simulate'; did you mean data simulate?"),
        (["verify", "run"], "did you mean checkpoint verify?"),
        (["kuairand", "a", "b"], "did you mean data import kuairand?"),
        (["xyzzy"], "no command 'xyzzy' (limelight --help"),
        (["train", "x.toml", "--rank", "2"], "no option '--rank'; did you mean --ranks? (limelight train --help"),
        (["data", "describe", "d", "--jsn"], "did you mean --json?"),
        (["evaluate", "run", "--form", "2024"], "did you mean --from?"),
        (["train", "x.toml", "--ranks", "0"], "'0' is not a number of processes, 1 or more"),
        (["train", "x.toml", "--ranks", "two"], "'two' is not a number of processes"),
        (["staytime", "x.toml", "--ranks", "2"], "no option '--ranks'"),
        (["doctor", "--ranks", "2"], "no option '--ranks'"),
        (["doctor", "now"], "unexpected extra argument (now)"),
        (["evaluate"], "missing argument 'RUN'"),
        (["explain", "run", "--user", "x", "--candidate", "1"], "'x' is not a valid integer"),
        (["stream", "assemble", "d", "o"], "missing option '--policy'. Choose from: full, fast_slow"),
        (["data", "simulate", "o", "--world", "cros"], "'cros' is not one of 'everyday', 'cross'"),
        (["stream", "consistency", "d", "--idle-seconds", "nan"], "'nan' is not a number of seconds"),
        (["data", "instructions", "d", "o", "--evaluate-from", "x", "--most", "a"], "'a': write TASK=N"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("limelight: error: ") and told in line and line.endswith("--help shows what is accepted)")
    assert not printed.out


@pytest.mark.parametrize("words", RENAMED, ids=" ".join)
def test_an_earlier_spelling_is_answered_with_the_present_one(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "a", "b"]) == 2
    assert capsys.readouterr().err == f"limelight: error: `limelight {' '.join(words)}` is now `{RENAMED[words]}`\n"
    command = parse(RENAMED[words] + (" --evaluate-from T" if "instructions" in words else "")).command
    assert isinstance(command, Command)


@pytest.mark.parametrize("option", [["--disorder-seconds", "3"], ["--disorder-seconds=3"]], ids=" ".join)
def test_an_earlier_option_is_answered_with_the_present_one(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stream", "assemble", "d", "o", "--policy", "full", *option]) == 2
    told = "limelight: error: --disorder-seconds is now --max-out-of-orderness-seconds\n"
    assert capsys.readouterr().err == told
    parse("limelight stream assemble d o --policy full --max-out-of-orderness-seconds 3")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("size", [1, 100_000])
def test_a_reader_that_left_is_no_error(size: int, unbuffered: str) -> None:
    program = (
        "import sys; from launch.cli.main import main; from launch.doctor import report\n"
        f"report.examine = lambda as_json: print('x' * {size})\n"
        "sys.exit(main(['doctor']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (BROKEN_PIPE_STATUS, "")


def test_a_broken_pipe_elsewhere_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(context: click.Context) -> None:
        raise BrokenPipeError("to a worker")

    monkeypatch.setattr(main_module.limelight, "invoke", fail)
    with pytest.raises(BrokenPipeError, match="to a worker"):
        main(["doctor"])
