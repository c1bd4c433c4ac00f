"""``limelight data instructions``: write samples for ``limelight finetune``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from launch.cli.command import Command, json_option, print_json
from trainer.console.outputs import InputPath, Output, OutputPath


def _number(
    name: str, default: int, metavar: str, help_text: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(f"--{name}", type=int, default=default, show_default=True, metavar=metavar, help=help_text)


def _by_task(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, int]:
    limits = {}
    for text in texts:
        task, _, number = text.partition("=")
        if not number.isdecimal():
            raise click.BadParameter(f"{text!r}: write TASK=N, such as staytime=10000")
        limits[task] = int(number)
    return limits


@click.command(
    cls=Command,
    short_help="Write fine-tuning samples of a dataset.",
    example="limelight data instructions data/world data/world-instructions --evaluate-from 2024-03-08",
)
@click.argument(
    "dataset", metavar="DATASET", type=InputPath(urls=True), help="Dataset with texts: a directory or an fsspec URL."
)
@click.argument("out", metavar="OUT", type=OutputPath(), help="Directory or URL to make; it must not exist.")
@click.option(
    "--evaluate-from",
    required=True,
    metavar="T",
    help="Date or time: visits that ended before it are for training, those that began later for evaluation.",
)
@_number("samples", 20_000, "N", "Most training samples of a task.")
@_number("evaluate-samples", 2_000, "N", "Most evaluation samples of a task.")
@_number("candidates", 4, "K", "Comments to choose from.")
@_number("buckets", 4, "B", "Ranges of staytimes.")
@_number("history", 6, "H", "Earlier stays or interactions in a prompt.")
@_number("characters", 200, "C", "Most characters of a text; longer ones are cut and counted.")
@_number("seed", 1, "S", "Seed of the drawn visits and of the order of candidates.")
@click.option(
    "--most",
    callback=_by_task,
    multiple=True,
    metavar="TASK=N",
    help="Most training samples of one task, in place of --samples; may be repeated.",
)
@click.option(
    "--templates",
    type=InputPath(),
    default="configs/templates",
    show_default=True,
    metavar="DIR",
    help="Folder of templates.",
)
@json_option
def instructions(dataset: str, out: Output, as_json: bool, **settings: Any) -> None:
    """Write instruction samples of LCU's three tasks as JSON lines, split by time.

    The tasks: how long a user stays in the comments of a video, which comment people like most, and which one the user
    likes or answers. The templates are text files that you can edit. Ranges of staytimes are fitted on the days before
    --evaluate-from only.
    """
    from trainer.console.progress import Phases
    from trainer.llm.instructions.write import MANIFEST, InstructionPlan, write_instructions

    plan = InstructionPlan(**settings)
    with out.writing(MANIFEST, quiet=as_json) as target, Phases({}, "samples", quiet=as_json) as progress:
        manifest = write_instructions(dataset, target, plan, progress)
    if as_json:
        print_json({"out": str(out), **manifest})
        return
    for split, counts in manifest["samples"].items():
        print(f"{out}/{split}.jsonl: " + ", ".join(f"{count:,} {task}" for task, count in counts.items()))
    if manifest["texts_cut"]:
        print(f"{manifest['texts_cut']:,} texts were cut at {plan.characters} characters")
