"""``limelight instructions``: samples for ``limelight finetune``. Imports of the work wait until it is asked for."""

from __future__ import annotations

import argparse
from dataclasses import fields

from trainer.console.job_arguments import add_command
from trainer.console.progress import Phases


def add_instructions_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb ``instructions``; ``run(arguments)`` of the parsed arguments returns the exit status."""
    parser = add_command(
        subparsers,
        "instructions",
        "samples for a language model, from a dataset's visits and comments",
        "Write instruction samples of LCU's three tasks as JSON lines, split by time: how long a user stays in the\n"
        "comments of a video, which comment people like most, and which one the user likes or answers. The templates\n"
        "are text files to edit; ranges of staytimes are fitted on the days before --evaluate-from only.",
        "limelight instructions data/world data/world-instructions --evaluate-from 2024-03-08",
    )
    parser.add_argument("dataset", metavar="DATASET", help="dataset with texts, a directory or an fsspec URL")
    parser.add_argument("out", metavar="OUT", help="directory to make; must not exist")
    parser.add_argument(
        "--evaluate-from",
        required=True,
        metavar="T",
        help="date or time: visits that ended before it are trained on, those that began later are evaluated on",
    )
    for name, default, metavar, meaning in (
        ("samples", 20_000, "N", "most samples of a task to train on"),
        ("evaluate-samples", 2_000, "N", "most samples of a task to evaluate on"),
        ("candidates", 4, "K", "comments to choose from"),
        ("buckets", 4, "B", "ranges of staytimes"),
        ("history", 6, "H", "earlier stays or interactions in a prompt"),
        ("characters", 200, "C", "of a text; a longer one is cut there, and counted"),
        ("seed", 1, "S", "of which visits are drawn and of the order of candidates"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar=metavar, help=f"{meaning} (default: %(default)s)"
        )
    parser.add_argument(
        "--most",
        type=_of_a_task,
        action="append",
        default=[],
        metavar="TASK=N",
        help="most samples of one task to train on, in place of --samples; may be given for each",
    )
    parser.add_argument(
        "--templates", default="configs/templates", metavar="DIR", help="folder of templates (default: %(default)s)"
    )
    parser.set_defaults(run=_run)


def _of_a_task(text: str) -> tuple[str, int]:
    task, _, number = text.partition("=")
    try:
        return task, int(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write TASK=N, such as staytime=10000") from None


def _run(options: argparse.Namespace) -> int:
    from trainer.llm.instructions.write import Plan, write_instructions

    given = {field.name: getattr(options, field.name) for field in fields(Plan)}
    plan = Plan(**{**given, "most": dict(options.most)})
    with Phases({}, "samples") as progress:
        manifest = write_instructions(options.dataset, options.out, plan, progress)
    for split, counts in manifest["samples"].items():
        print(f"{options.out}/{split}.jsonl: " + ", ".join(f"{count:,} {task}" for task, count in counts.items()))
    if manifest["texts_cut"]:
        print(f"{manifest['texts_cut']:,} texts were cut at {plan.characters} characters")
    return 0
