"""The documents: length of README.md, links, and commands, options, job files, keys and messages that exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import get_origin

import click
import pytest
from pydantic import BaseModel

from launch.cli.main import limelight
from tests.paths import ROOT
from trainer.config.embed import EmbeddingJob
from trainer.config.finetune import FinetuneConfig
from trainer.config.ranker import JobConfig
from trainer.config.staytime import StaytimeConfig
from trainer.config.toml import fields, section_of
from trainer.data.importers.mapping import load_mapping

PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not path.relative_to(ROOT).parts[0].startswith((".", "data", "runs", "build"))
    and path.parent.name != "templates"
)
"""Pages of the repository; templates become pages elsewhere, where their links hold."""
GUIDES = [page for page in PAGES if page.parent in (ROOT, ROOT / "docs", ROOT / "benchmarks", ROOT / "launch")]
"""Pages whose commands a user types."""

JOBS: dict[str, type[BaseModel]] = {
    "train": JobConfig,
    "finetune": FinetuneConfig,
    "embed": EmbeddingJob,
    "staytime": StaytimeConfig,
    "trainer.rank": JobConfig,
    "trainer.finetune": FinetuneConfig,
    "trainer.embed": EmbeddingJob,
}
"""Command or module -> schema of the job file that it takes."""

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
INLINE = re.compile(r"`(limelight [^`]+)`")
OVERRIDE = re.compile(r"[a-z_]+(\.\w+)+=")
SHELL = ("sh", "bash", "console")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"`[^`]*`", "", FENCE.sub("", text))


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        count = sum(anchor == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", anchor) is not None for anchor in found)
        found.add(f"{slug}-{count}" if count else slug)
    return found


def command_lines(path: Path) -> Iterator[list[str]]:
    """Yield the words of each command in the shell blocks of a page, and of each `limelight ...` in its text."""
    text = path.read_text()
    for language, block in FENCE.findall(text):
        if language in SHELL:
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield words


def inline_commands(path: Path) -> Iterator[list[str]]:
    """Yield the words of each `limelight ...` in the text of a page; "..." and words of metavariables may be in it."""
    for span in INLINE.findall(FENCE.sub("", path.read_text())):
        yield shlex.split(span)


def resolve(words: list[str]) -> tuple[click.Command, click.Context, list[str]]:
    """Return the command that ``limelight`` runs for ``words``, its parent's context, and the words that are left."""
    command: click.Command = limelight
    context = click.Context(limelight, info_name="limelight")
    rest = words[1:]
    while isinstance(command, click.Group) and rest:
        assert not rest[0].startswith("-") or rest == ["--help"], f"option {rest[0]} before the command"
        if rest == ["--help"]:
            break
        parent = command
        found = parent.get_command(context, rest[0])
        assert found is not None, f"no command {rest[0]!r} in {sorted(parent.list_commands(context))}"
        command, rest = found, rest[1:]
        context = click.Context(command, info_name=command.name, parent=context)
    return command, context, rest


def options_of(command: click.Command) -> set[str]:
    """Return the options of a command as they are typed."""
    return {"--help", "-h", *(option for parameter in command.params for option in parameter.opts if option[0] == "-")}


@cache
def keys_of(job: type[BaseModel]) -> str:
    """Return a pattern of the dotted keys of a job, with free keys below sections and tables that have them."""
    patterns = []
    for section, info in job.model_fields.items():
        model = section_of(info.annotation)
        assert model is not None
        for name, field in fields(model):
            key = re.escape(f"{section}.{name}").replace("NAME", r"\w+")
            patterns.append(key + (r"\.\w+" if get_origin(field.annotation) is dict else ""))
    return "|".join(patterns)


def check_overrides(job: type[BaseModel], words: list[str]) -> None:
    """Assert that every ``section.key=value`` among ``words`` sets a key that the job has."""
    for word in words:
        if OVERRIDE.match(word):
            key = word.partition("=")[0]
            assert re.fullmatch(keys_of(job), key), f"no key {key} in {job.__name__}"


def check_files(words: list[str]) -> None:
    """Assert that files of the repository that ``words`` name exist."""
    for word in words:
        value = word.rpartition("=")[2]
        if re.fullmatch(r"(configs|launch|tests|benchmarks|modules|trainer)/[\w./-]+", value):
            assert (ROOT / value).exists(), f"no file {value}"


def check_module(module: str) -> None:
    """Assert that ``python -m module`` would run something."""
    spec = find_spec(module)
    assert spec is not None, f"no module {module}"
    if spec.submodule_search_locations is not None:
        spec = find_spec(f"{module}.__main__")
        assert spec is not None, f"package {module} has no __main__"
    elif spec.origin is not None and Path(spec.origin).is_relative_to(ROOT):
        assert "__main__" in Path(spec.origin).read_text(), f"{module} does nothing when it is run"


def check_command(words: list[str]) -> None:
    """Assert that a command line of a page would be accepted."""
    check_files(words)
    if words[0] == "limelight":
        command, context, rest = resolve(words)
        if rest != ["--help"]:
            assert not isinstance(command, click.Group), f"{' '.join(words)}: a command is missing"
            # The real parser: unknown options, missing arguments and impossible values are errors.
            command.make_context(command.name, list(rest), parent=context.parent)
        if command.name in JOBS:
            check_overrides(JOBS[command.name], rest)
        return
    if words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        for target in words[1:]:
            assert target in targets or re.match(r"[A-Z]+=", target), f"no target {target} in the Makefile"
        return
    for flag in ("-m", "--module"):
        if flag in words and (words[0].startswith("python") or words[0] in ("torchrun", "deepspeed", "accelerate")):
            module = words[words.index(flag) + 1]
            check_module(module)
            if module in JOBS:
                check_overrides(JOBS[module], words)


def refusals(check: Callable[[list[str]], None], page: Path, words: list[str]) -> list[str]:
    """Return what ``check`` finds wrong with a command line: one text, or none."""
    try:
        check(words)
    except (AssertionError, click.ClickException) as error:
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        return [f"{name_of(page)}: {shlex.join(words)}: {text}"]
    return []


def check_inline(words: list[str]) -> None:
    """Assert that a command in a sentence exists, and its options; its arguments need not be complete."""
    if not words[1][0].islower():
        return
    check_files(words)
    command, _, rest = resolve([word for word in words if word != "..."])
    for word in rest:
        if word.startswith("-"):
            option = word.partition("=")[0]
            assert option in options_of(command), f"no option {option} in {sorted(options_of(command))}"
    if command.name in JOBS:
        check_overrides(JOBS[command.name], rest)


@cache
def messages() -> tuple[str, ...]:
    """Return every string of the product's source; "\\0" stands for a value in an f-string."""
    found = []
    for package in ("trainer", "launch", "modules"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return tuple(found)


def test_the_readme_can_be_read_in_one_sitting() -> None:
    assert 150 <= len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        if not file.exists():
            broken.append(f"{target}: no such file")
        elif anchor and (file.suffix != ".md" or anchor not in anchors(file)):
            broken.append(f"{target}: no such section")
    assert not broken


@cache
def files() -> tuple[str, ...]:
    """Return the files of the repository's folders, from the root."""
    folders = ("benchmarks", "configs", "docs", "launch", "modules", "tests", "trainer")
    return tuple(f"/{name_of(path)}" for folder in folders for path in (ROOT / folder).rglob("*.*"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """A page names a file by its path from the root, or by the end of it."""
    named = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|toml|sh|yaml))`", FENCE.sub("", page.read_text())))
    missing = {name for name in named if not any(file.endswith(f"/{name}") for file in files())}
    assert not missing - {"pyproject.toml", "map.toml", "score_one.py"}


def test_commands_of_the_pages_are_accepted() -> None:
    assert not [
        text for page in GUIDES for words in command_lines(page) for text in refusals(check_command, page, words)
    ]


def test_commands_at_the_head_of_job_files_are_accepted() -> None:
    found = []
    for file in sorted((ROOT / "configs").glob("*.toml")):
        head = re.sub(r"\\\n#", " ", file.read_text())
        for line in re.findall(r"^#\s+((?:limelight|python) .*)", head, re.MULTILINE):
            found += refusals(check_command, file, shlex.split(line, comments=True))
    assert not found


def test_commands_in_sentences_exist() -> None:
    assert not [
        text for page in PAGES for words in inline_commands(page) for text in refusals(check_inline, page, words)
    ]


@pytest.mark.parametrize(
    "line",
    [
        "limelight trian configs/simulated.toml",
        "limelight train configs/none.toml",
        "limelight train configs/simulated.toml --rank 2",
        "limelight train configs/simulated.toml train.epoch=2",
        "limelight train configs/cross.toml features.history.long.lenght=3",
        "limelight stream assemble data/world rows.parquet",
        "limelight data",
        "python -m benchmarks.none",
        "python -m benchmarks",
        "python -m trainer.config.load",
        "torchrun --nproc-per-node 2 -m trainer.rank configs/simulated.toml train.epoch=2",
        "deepspeed --hostfile launch/cluster/none --module trainer.rank configs/simulated.toml",
        "make tset",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    assert refusals(check_command, ROOT / "README.md", shlex.split(line))


def test_the_mapping_in_the_help_of_data_import_events_is_accepted(tmp_path: Path) -> None:
    command, _, _ = resolve(["limelight", "data", "import", "events"])
    _, _, after = (command.help or "").partition("\b\n")
    example, _, _ = after.partition("\n\n")
    file = tmp_path / "map.toml"
    file.write_text(example)
    assert set(load_mapping(file).behaviours) == {"click", "gift"}


def test_messages_under_trouble_are_what_the_code_says() -> None:
    """The first column of the table: "..." stands for what differs from case to case."""
    _, _, chapter = (ROOT / "docs" / "operations.md").read_text().partition("\n## Trouble\n")
    rows = re.findall(r"^\| `([^`]+)` \|", chapter, re.MULTILINE)
    assert len(rows) >= 20
    for row in rows:
        for part in re.split(r"\.\.\.", row):
            if len(part.strip()) > 3:
                assert any(part.strip() in text for text in messages()), f"no message has {part.strip()!r}"
