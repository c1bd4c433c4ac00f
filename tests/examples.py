"""Examples that a user would type: found in help texts, docstrings, pages and job files, and checked one by one.

:func:`collect` finds them by their form, so a new example is checked without being registered. A block whose form is
not known is an error.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import inspect
import io
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import BaseModel, ValidationError

from launch.cli.command import Command, DefaultGroup, Group
from launch.cli.main import limelight
from launch.config_check import check_job, job_model
from tests.launch.cli.parsing import every_command
from tests.paths import ROOT
from tests.stream.random_logs import SPEC
from trainer.config.iso_time import read_iso
from trainer.config.toml import validate
from trainer.console.errors import UserError
from trainer.data.importers.mapping import EventMapping
from trainer.llm.finetuning.samples import ReadCounts, read_samples
from trainer.llm.instructions.annotations import parse_annotation
from trainer.semantic_ids.segment_source import LiveSegment, parse_segment
from trainer.stream.sources.message_codec import MessageCodec

PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not path.relative_to(ROOT).parts[0].startswith((".", "data", "runs", "build"))
    and path.parent.name != "templates"
)
"""Pages of the repository; templates become pages elsewhere, where their links hold."""

JOBS = {"train": "train", "finetune": "finetune", "embed": "embed", "staytime": "staytime"} | {
    "foresight fit": "foresight",
    "trainer.foresight": "foresight",
    "foresight follow": "foresight",
    "trainer.foresight_follow": "foresight",
    "quantize fit": "quantize",
    "quantize refresh": "quantize",
    "trainer.quantize": "quantize",
    "align fit": "align",
    "trainer.align": "align",
    "trainer.rank": "train",
    "trainer.finetune": "finetune",
    "trainer.embed": "embed",
}
"""Command or module -> kind of the job file that it takes."""

ANY_JOB = {"plan": ("train", "finetune"), "config check": ()}
"""Command that finds the kind of its job file by the sections -> kinds that it takes; none for all of them."""

OTHERS = ("export", "eval", "kubectl", "pip", "sort", "source", ".ci/run")
"""Programs whose arguments are not ours; the files that they name must exist."""

PROGRAMS = ("limelight", "python", "torchrun", "deepspeed", "accelerate", "sbatch", "make", *OTHERS)
"""Programs that begin a command line of an example."""

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(limelight [^`]+)`")
SHELL = ("sh", "bash", "console")
OVERRIDE = re.compile(r"[a-z_]+(\.\w+)+=")
_COMMAND_LINE = re.compile(rf" *(?:{'|'.join(map(re.escape, PROGRAMS))}) [-\w.\[\"$/]")

NOT_THERE = re.compile(
    r"no such |has no texts/|No such file|no dataset here|is missing|no checkpoint|no adapter|cannot be downloaded"
)
"""Message about data that an example names, and that this machine does not have."""


@dataclass(frozen=True)
class Example:
    """An example as a user reads it.

    Attributes:
        place: page, or help, or module that has it.
        kind: ``command``, ``words`` (a command in a sentence), ``usage``, ``toml``, ``json``, ``python`` or ``value``.
        text: the example.
        command: for ``value``: command that takes it, and option or argument.
    """

    place: str
    kind: str
    text: str
    command: tuple[str, str] = ("", "")

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


class Wrong(AssertionError):
    """An example that would be refused, or that nothing checks."""


def name_of(path: Path) -> str:
    """Return the path of a file from the root of the repository."""
    return str(path.relative_to(ROOT))


def collect() -> Iterator[Example]:
    """Yield every example of help texts, docstrings, pages and the heads of job files."""
    for page in PAGES:
        yield from of_page(page)
    for words, command in every_command():
        yield from of_help(words, command)
    for package in ("trainer", "launch", "modules", "benchmarks", "tests"):
        for file in sorted((ROOT / package).rglob("*.py")):
            yield from of_docstrings(file)
    for file in sorted((ROOT / "configs").rglob("*.toml")):
        yield from of_comments(file)


def of_page(page: Path) -> Iterator[Example]:
    """Yield the commands of a page's shell blocks and sentences, and its other blocks."""
    text = page.read_text()
    for language, block in FENCE.findall(text):
        if language in SHELL:
            yield from (Example(name_of(page), "command", line) for line in command_lines(block))
        elif language:
            yield Example(name_of(page), language, block)
        else:
            # Output or a drawing; a command in it is an example all the same.
            yield from (Example(name_of(page), "command", line) for line in command_lines_in(block))
    for span in INLINE.findall(FENCE.sub("", text)):
        yield Example(name_of(page), "words", span)


def command_lines(block: str) -> Iterator[str]:
    """Yield the lines of a shell block without empty ones and comments; a line that is continued is one."""
    for line in re.sub(r" *\\\n#? *", " ", block).splitlines():
        if shlex.split(line, comments=True):
            yield line.strip()


def command_lines_in(text: str) -> Iterator[str]:
    """Yield the commands of a text: indented lines, and paragraphs that have nothing else."""
    for paragraph in re.split(r"\n\s*\n", re.sub(r" *\\\n#? *", " ", text)):
        lines = paragraph.splitlines()
        alone = all(map(_COMMAND_LINE.match, lines))
        yield from (line.strip() for line in lines if _COMMAND_LINE.match(line) and (alone or line.startswith("  ")))


def of_help(words: str, command: Command | Group) -> Iterator[Example]:
    """Yield what the help of a command shows: its example, its blocks, and values of options and arguments."""
    place = f"limelight {words} --help".replace("  ", " ")
    yield Example(place, "command", command.example)
    text = inspect.cleandoc(command.help or "")
    for block in re.findall(r"^[ \t]*\x08\n(.*?)(?:\n\s*\n|\Z)", text, re.MULTILINE | re.DOTALL):
        lines = block.splitlines()
        if re.match(r"\s*limelight ", lines[0]):
            yield Example(place, "usage", lines[0].strip())
        elif any(re.match(r"\s*(\[[\w.]+\]|\w+ = )", line) for line in lines):
            yield Example(place, "toml", block)
    for span in INLINE.findall(text):
        yield Example(place, "words", " ".join(span.split()))
    for parameter in command.params:
        name = parameter.opts[0] if isinstance(parameter, click.Option) else str(parameter.name)
        for value in re.findall(r"\bsuch as ([^();,]+[^();,.\s])", getattr(parameter, "help", None) or ""):
            yield Example(place, "value", value, (words, name))


def of_docstrings(file: Path) -> Iterator[Example]:
    """Yield the commands in docstrings of a module, its blocks of TOML and JSON, and ``limelight ...`` in its texts."""
    source = file.read_text()
    if "limelight " not in source and "::\n" not in source and not re.search(_COMMAND_LINE.pattern, source, re.M):
        return
    own = name_of(file).startswith("tests/")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            yield from (Example(name_of(file), "command", line) for line in command_lines_in(text))
            if not own:
                yield from literal_blocks(file, text)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not own:
            # Messages name commands; a span with a value of an f-string is cut, and has no closing quote.
            for span in INLINE.findall(node.value):
                yield Example(name_of(file), "words", " ".join(span.split()))


OWN_FORMATS = ("trainer/data/format/shards.py",)
"""Modules that show JSON which no user writes."""


def literal_blocks(file: Path, text: str) -> Iterator[Example]:
    """Yield the blocks after ``::`` in a docstring that a user would type or write."""
    for block in re.findall(r"::\n\n((?:(?: +.*)?\n)+)", f"{text}\n"):
        content = inspect.cleandoc(block)
        if content.startswith("{") and name_of(file) not in OWN_FORMATS:
            yield Example(name_of(file), "json", content)
        elif re.search(r"^(\[[\w.]+\]|\w+ = )", content, re.MULTILINE):
            yield Example(name_of(file), "toml", content)


def of_comments(file: Path) -> Iterator[Example]:
    """Yield the commands in comments of a job file."""
    text = "\n".join(line[1:] for line in file.read_text().splitlines() if line.startswith("#"))
    yield from (Example(name_of(file), "command", line) for line in command_lines_in(text))


def check(example: Example) -> None:
    """Check an example to the point where only data is missing; the working directory has ``configs`` and no data.

    Raises:
        Wrong: it would be refused, or there is no check for its kind.
    """
    if example.kind not in CHECKS:
        raise Wrong(f"{example}: no check for {example.kind}; add one to tests/examples.py")
    try:
        CHECKS[example.kind](example)
    except (AssertionError, click.ClickException, UserError, ValueError, SystemExit) as error:
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        raise Wrong(f"{example}: {text}") from None


def check_line(example: Example) -> None:
    """Check a command line."""
    check_command(shlex.split(example.text, comments=True))


def check_command(words: Sequence[str]) -> None:
    """Check a command line by the parser of its program, and the job file that it names by ``config check``.

    Raises:
        AssertionError: it would be refused, or there is no check for the program.
    """
    check_files(words)
    program = words[0].removeprefix(".venv/bin/")
    if program == "limelight":
        check_limelight(words)
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        for target in words[1:]:
            assert target in targets or re.match(r"[A-Z]+=", target), f"no target {target} in the Makefile"
    elif program in ("python", "torchrun", "deepspeed", "accelerate"):
        check_module_line(words)
    elif program == "sbatch":
        assert (ROOT / words[1]).is_file(), f"no file {words[1]}"
        check_job_file(words[2], words[3:], "train", 1)
    elif re.match(r"[A-Z_]+=", program):
        check_command(words[1:])
    else:
        assert program in OTHERS, f"no check for the program {program}"


def check_limelight(words: Sequence[str]) -> None:
    """Check a command line of ``limelight``; a placeholder such as RUN may stand for a path."""
    if words[-1] == "--help":
        resolve(words[:-1])
        return
    command, context, rest = resolve(words)
    if isinstance(command, click.Group):
        assert rest, f"{' '.join(words)}: a command is missing"
        return
    # The real parser: unknown options, missing arguments and impossible values are errors.
    parsed = command.make_context(command.name, list(rest), parent=context.parent)
    for name, value in parsed.params.items():
        if name in ("time_from", "time_until", "at", "evaluate_from") and value not in (None, "T"):
            assert read_iso(value, "UTC") is not None, f"{value} is no time"
    kind = JOBS.get(path_of(parsed))
    if kind is not None and "config" in parsed.params and "overrides" in parsed.params:
        check_job_file(parsed.params["config"], parsed.params["overrides"], kind, parsed.params.get("ranks", 1))
    elif path_of(parsed) in ANY_JOB:
        file = parsed.params.get("file") or parsed.params["config"]
        ranks = parsed.params.get("ranks") or parsed.params["gpus"]
        found = check_job_file(file, parsed.params["overrides"], None, ranks)
        kinds = ANY_JOB[path_of(parsed)]
        assert not kinds or found in ("", *kinds), f"{file} is a job of {found}"


def check_job_file(file: str, overrides: Sequence[str], kind: str | None, ranks: int) -> str:
    """Check a job file as ``limelight config check`` does; only data may be missing.

    Returns:
        Kind of the job; empty for a placeholder of a file.
    """
    if not file.startswith("configs/"):
        assert not overrides or kind is not None
        for override in overrides:
            check_key(str(kind), override)
        return ""
    checked = check_job(file, overrides, kind, ranks)
    wrong = [problem for problem in checked.problems if not NOT_THERE.search(problem)]
    assert not wrong, "; ".join(wrong)
    return checked.kind


def check_key(kind: str, override: str) -> None:
    """Check that ``section.key=value`` sets a key of a kind of job."""
    key, _, text = override.partition("=")
    model: Any = job_model(kind)
    node: Any = text if not text else _toml_value(text)
    for part in reversed(key.split(".")):
        node = {part: node}
    check_keys(model, node)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def check_keys(model: type[BaseModel], raw: dict[str, Any], also: tuple[str, ...] = ()) -> None:
    """Check that a fragment of a file has known keys with values of their types; other keys may be missing."""
    try:
        model.model_validate(raw)
    except ValidationError as error:
        wrong = [found for found in error.errors() if found["type"] not in ("missing", *also)]
        assert not wrong, wrong[0]


def check_files(words: Sequence[str]) -> None:
    """Check that files of the repository that ``words`` name exist."""
    for word in words:
        value = word.rpartition("=")[2]
        if re.fullmatch(r"(configs|launch|tests|benchmarks|modules|trainer)/[\w./-]+", value):
            target = ROOT / value
            assert target.exists() or target.parent.name == "results", f"no file {value}"


def check_module_line(words: Sequence[str]) -> None:
    """Check a command line that runs a module of the project, alone or by a launcher of ranks."""
    program, *rest = words
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(rest)
        assert parsed.module, f"{' '.join(words)}: -m is missing"
        module, arguments = parsed.training_script, parsed.training_script_args
        ranks = int(parsed.nproc_per_node) if parsed.nproc_per_node.isdecimal() else 1
    elif program == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        parsed = parse_args(rest)
        assert parsed.module, f"{' '.join(words)}: --module is missing"
        module, arguments, ranks = parsed.user_script, parsed.user_args, 1
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        parsed = launch_command_parser().parse_args(rest[1:])
        assert rest[0] == "launch" and parsed.module, f"{' '.join(words)}: -m is missing"
        module, arguments, ranks = parsed.training_script, parsed.training_script_args, parsed.num_processes or 1
    else:
        assert rest[:1] == ["-m"] and len(rest) > 1, f"{' '.join(words)}: no module"
        module, arguments, ranks = rest[1], rest[2:], 1
    check_module(module)
    if module in JOBS:
        check_job_file(arguments[0], arguments[1:], JOBS[module], ranks)
    elif module.startswith("benchmarks.") or module in ("tests.faults.chaos", "tests.faults.stream_kills"):
        check_options(module, arguments)


def check_module(module: str) -> None:
    """Check that ``python -m module`` would run something."""
    spec = find_spec(module)
    assert spec is not None, f"no module {module}"
    if spec.submodule_search_locations is not None:
        spec = find_spec(f"{module}.__main__")
        assert spec is not None, f"package {module} has no __main__"
    elif spec.origin is not None and Path(spec.origin).is_relative_to(ROOT):
        assert "__main__" in Path(spec.origin).read_text(), f"{module} does nothing when it is run"


class _Parsed(Exception):
    """Raised in place of the work, when the arguments were accepted."""


def check_options(module: str, arguments: Sequence[str]) -> None:
    """Let a benchmark parse arguments, and stop it before its work."""
    spec = find_spec(module)
    name = f"{module}.__main__" if spec is not None and spec.submodule_search_locations is not None else module
    main = importlib.import_module(name).main
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None, namespace: None = None) -> None:
        parser.error = _refuse  # type: ignore[method-assign, assignment]
        parse(parser, list(arguments), namespace)
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(_Parsed):
            main()


def _refuse(message: str) -> None:
    raise AssertionError(message)


def resolve(words: Sequence[str]) -> tuple[click.Command, click.Context, list[str]]:
    """Return the command that ``limelight`` runs for ``words``, its context, and the words that are left."""
    command: click.Command = limelight
    context = click.Context(limelight, info_name="limelight")
    rest = list(words[1:])
    while isinstance(command, click.Group):
        if isinstance(command, DefaultGroup):
            rest = command.complete(rest)
        if not rest:
            break
        if rest[0].startswith("-"):
            assert rest[0] in options_of(command), f"option {rest[0]} before the command"
            break
        found = command.get_command(context, rest[0])
        assert found is not None, f"no command {rest[0]!r} in {sorted(command.list_commands(context))}"
        command, rest = found, rest[1:]
        context = click.Context(command, info_name=command.name, parent=context)
    return command, context, rest


def path_of(context: click.Context) -> str:
    """Return the words of a command without ``limelight``."""
    return context.command_path.removeprefix("limelight ")


def options_of(command: click.Command) -> set[str]:
    """Return the options of a command as they are typed."""
    return {"--help", "-h", *(option for parameter in command.params for option in parameter.opts if option[0] == "-")}


def check_words(example: Example) -> None:
    """Check that a command in a sentence exists, and its options and keys; its arguments need not be complete."""
    words = shlex.split(example.text)
    if not words[1][0].islower():
        return
    check_files(words)
    command, context, rest = resolve([word for word in words if word not in ("...", "…")])
    for word in rest:
        if word.startswith("-"):
            option = word.partition("=")[0]
            assert option in options_of(command), f"no option {option} in {sorted(options_of(command))}"
        elif OVERRIDE.match(word) and path_of(context) in JOBS:
            check_key(JOBS[path_of(context)], word)


def check_usage(example: Example) -> None:
    """Check a usage line: its options in brackets are all given."""
    check_limelight(shlex.split(example.text.replace("[", "").replace("]", "")))


def check_value(example: Example) -> None:
    """Check a value that the help of an option or argument shows, in the command's own example."""
    words, name = example.command
    command = dict(every_command())[words]
    value = shlex.split(example.text)
    if name in ("config", "file"):
        assert (ROOT / example.text).is_file(), f"no file {example.text}"
    elif OVERRIDE.match(example.text) or value[0].startswith("--"):
        check_limelight([*shlex.split(command.example), *value])
    elif example.text not in PHRASES:
        check_limelight([*shlex.split(command.example), name, *value])


PHRASES = ("for TLS",)
"""Words after "such as" that are no value."""


def check_toml(example: Example) -> None:
    """Check a block of TOML: a fragment of one kind of job file, or a mapping of a log."""
    raw = tomllib.loads(example.text)
    if "data.importers" in example.place.replace("/", ".") or "data import" in example.place:
        # The docstring of the importer lists the keys of both layouts at once.
        check_keys(EventMapping, raw, ("value_error",) if example.place.endswith(".py") else ())
        if not example.place.endswith(".py"):
            validate(EventMapping, raw, example.place)
        return
    models = {kind: job_model(kind) for kind in JOBS.values()} | {"data import events": EventMapping}
    refusals = []
    for kind, model in models.items():
        try:
            check_keys(model, raw)
        except AssertionError as error:
            refusals.append(f"{kind}: {error}")
    assert len(refusals) < len(models), "; ".join(refusals)


def check_json(example: Example) -> None:
    """Check a block of JSON: a sample of the fine-tuning, an annotation or a message of a segment, or an event."""
    fields = json.loads(example.text)
    if "prompt" in fields:
        file = Path("sample.jsonl")
        file.write_text(json.dumps(fields) + "\n")
        assert len(list(read_samples([str(file)], ReadCounts()))) == 1
    elif "end_ms" in fields:
        parsed = parse_segment(example.text.encode(), fields["end_ms"], example.place)
        assert isinstance(parsed, LiveSegment), parsed.reason
    elif "segment" in fields:
        parse_annotation(json.dumps(fields).encode(), example.place)
    else:
        decoded = MessageCodec("json", SPEC, ahead_ms=0).decode([example.text.encode()], fields["time_ms"])
        assert not decoded.rejected, decoded.rejected[0].reason


def check_python(example: Example) -> None:
    """Run a block of Python, and compare what it prints with the comments behind its calls of ``print``."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example.text, example.place, "exec"), {"__name__": "example"})
    assert printed.getvalue().splitlines() == re.findall(r"^print\(.*\)  # (.*)$", example.text, re.MULTILINE)


CHECKS: dict[str, Callable[[Example], None]] = {
    "command": check_line,
    "words": check_words,
    "usage": check_usage,
    "value": check_value,
    "toml": check_toml,
    "json": check_json,
    "python": check_python,
}
"""Kind of an example -> its check."""


@cache
def examples() -> tuple[Example, ...]:
    """Return all examples, each once for each place."""
    return tuple(dict.fromkeys(collect()))
