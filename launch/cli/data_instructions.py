"""``limelight data instructions``: write samples for ``limelight finetune``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from launch.cli.command import Command, json_option, print_json
from trainer.console.outputs import InputPath, LocalOutputPath, Output, OutputPath

if TYPE_CHECKING:
    from trainer.llm.instructions.write_segments import AskRows

KEY_VARIABLE = "LIMELIGHT_ANNOTATE_KEY"
"""Environment variable of the API key. It is no variable of another program, so no key of one is sent by accident."""

VISITS_ONLY = ("tune_from", "buckets", "history")
SEGMENTS_ONLY = ("annotations", "comments")
ASKING_ONLY = ("model", "concurrency", "timeout", "retries")
"""Options that are of use only for samples about visits, for those about segments, and with --annotate."""


def _number(
    name: str, default: int, metavar: str, help_text: str, least: int | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    kind = int if least is None else click.IntRange(least)
    return click.option(f"--{name}", type=kind, default=default, show_default=True, metavar=metavar, help=help_text)


def _by_task(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, int]:
    limits = {}
    for text in texts:
        task, _, number = text.partition("=")
        if not number.isdecimal():
            raise click.BadParameter(f"{text!r}: write TASK=N, such as staytime=10000")
        limits[task] = int(number)
    return limits


def _check_options(settings: dict[str, Any]) -> None:
    """Refuse options that have no effect beside the others."""
    context = click.get_current_context()

    def refuse(names: tuple[str, ...], reason: str) -> None:
        for name in names:
            if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
                raise click.UsageError(f"--{name.replace('_', '-')} {reason}")

    if not settings["segments"]:
        refuse((*SEGMENTS_ONLY, "annotate", *ASKING_ONLY), "is for samples about segments; add --segments")
        return
    refuse(VISITS_ONLY, "is not for samples about segments; leave it out")
    if settings["annotate"] is None:
        refuse(ASKING_ONLY, "is for the model that is asked; add --annotate URL")
    elif not settings["annotations"] or not settings["model"]:
        raise click.UsageError("--annotate needs --annotations FILE.jsonl for the answers and --model NAME")


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
    help="Date or time: visits and segments that ended before it are for training, later ones for evaluation.",
)
@click.option(
    "--tune-from",
    default="",
    metavar="T",
    help="Earlier date or time: training ends at it, and the visits from it until --evaluate-from are written to "
    "tune.jsonl, for the key data.tune of a fine-tuning job.",
)
@_number("samples", 20_000, "N", "Most training samples of a task.")
@_number("evaluate-samples", 2_000, "N", "Most evaluation samples of a task, and most to tune on.")
@_number("candidates", 4, "K", "Comments, or answers about a segment, to choose from.")
@_number("buckets", 4, "B", "Ranges of staytimes.")
@_number("history", 6, "H", "Earlier stays or interactions in a prompt.")
@_number("characters", 200, "C", "Most characters of a text; longer ones are cut and counted.")
@_number("seed", 1, "S", "Seed of the drawn visits or segments and of the order of candidates.")
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
@click.option("--segments", is_flag=True, help="Write samples about 30-second segments of rooms instead.")
@click.option(
    "--annotations",
    type=LocalOutputPath(),
    metavar="FILE",
    help="JSON Lines file with questions and descriptions of segments. A simulated world needs none: it has its truth.",
)
@_number("comments", 8, "K", "Most comments of a segment in a prompt.")
@click.option(
    "--annotate",
    metavar="URL",
    help="Let a larger model at an OpenAI-compatible endpoint annotate the drawn segments first. Its answers are "
    f"appended to --annotations. The API key is read from the environment variable {KEY_VARIABLE}.",
)
@click.option("--model", metavar="NAME", help="Name of the larger model at the endpoint.")
@_number("concurrency", 8, "N", "Requests to the endpoint at the same time.", 1)
@click.option(
    "--timeout",
    type=click.FloatRange(0.001, 86_400),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="Longest time of one request.",
)
@_number("retries", 6, "N", "Further tries of a request after a failure that may pass.", 0)
@json_option
def instructions(dataset: str, out: Output, as_json: bool, **settings: Any) -> None:
    """Write instruction samples as JSON lines, split by time.

    Without --segments they are LCU's three tasks: how long a user stays in the comments of a video, which comment
    people like most, and which one the user likes or answers. Ranges of staytimes are fitted on the days before
    --evaluate-from only.

    With --segments they are LARM's two: a question about a segment of a live room, and its structured description.
    The answers come from --annotations. A segment without an annotation has no sample. An interrupted --annotate
    continues with the same command, which asks only what is not yet in the file.

    \b
      limelight data instructions data/world data/world-segments --segments --evaluate-from 2024-03-08

    The templates are text files that you can edit.
    """
    from trainer.console.progress import Phases
    from trainer.llm.instructions.sample_files import MANIFEST

    _check_options(settings)
    ask = _asker(settings, as_json) if settings["annotate"] is not None else None
    with out.writing(MANIFEST, quiet=as_json) as target, Phases({}, "samples", quiet=as_json) as progress:
        if settings["segments"]:
            from trainer.llm.instructions.write_segments import SegmentPlan, write_segment_instructions

            settings["annotations"] = settings["annotations"] or ""
            plan = SegmentPlan(**{name: settings[name] for name in SegmentPlan.__dataclass_fields__})
            manifest = write_segment_instructions(dataset, target, plan, progress, ask)
        else:
            from trainer.llm.instructions.write import InstructionPlan, write_instructions

            names = InstructionPlan.__dataclass_fields__
            manifest = write_instructions(
                dataset, target, InstructionPlan(**{name: settings[name] for name in names}), progress
            )
    if as_json:
        print_json({"out": str(out), **manifest})
        return
    for split, counts in manifest["samples"].items():
        print(f"{out}/{split}.jsonl: " + ", ".join(f"{count:,} {task}" for task, count in counts.items()))
    if manifest["texts_cut"]:
        print(f"{manifest['texts_cut']:,} texts were cut at {settings['characters']} characters")
    if settings["segments"]:
        _print_annotations(manifest)


def _asker(settings: dict[str, Any], quiet: bool) -> AskRows:
    """Return the function that asks the endpoint; mistakes in its options are found here, before any work."""
    from pathlib import Path

    from trainer.llm.instructions.annotate import PROMPTS, Annotator
    from trainer.llm.instructions.chat_endpoint import ChatEndpoint
    from trainer.llm.models.prompt_templates import Template

    key = os.environ.get(KEY_VARIABLE, "")
    endpoint = ChatEndpoint.of(
        settings["annotate"],
        settings["model"],
        key,
        timeout_seconds=settings["timeout"],
        retries=settings["retries"],
    )
    template = Template.read(Path(settings["templates"]) / "annotate.txt", PROMPTS)
    annotator = Annotator(settings["annotations"], endpoint, template, concurrency=settings["concurrency"], quiet=quiet)

    def ask(segments: Any, rows: Any) -> None:
        counts = annotator.annotate(segments, rows)
        if not quiet:
            print(f"{settings['annotations']}: {counts.good:,} new answers, {counts.earlier:,} were there")
            if counts.malformed:
                print(f"{annotator.rejected}: {counts.malformed:,} answers that cannot be used, with the reasons")

    return ask


def _print_annotations(manifest: dict[str, Any]) -> None:
    """Print what was left out."""
    counts = manifest["annotations"]
    for count, what in (
        (counts["of_unknown_segments"], "annotations are of segments that the dataset does not have"),
        (counts["of_blank_segments"], "annotations are of segments without speech and frames"),
        (manifest["samples_without_options"], "evaluation samples have no second answer to choose from"),
    ):
        if count:
            print(f"{count:,} {what}; they were left out")
