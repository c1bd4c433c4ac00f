"""Arguments of the jobs, defined once for ``limelight VERB`` and for ``torchrun -m trainer.JOB``.

Light to import: the ``limelight`` command reads it before it knows which job is meant.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace

import click

from trainer.console.exit_status import USER_ERROR_STATUS
from trainer.console.outputs import InputPath, LocalOutputPath, OutputPath

Parameters = tuple[click.Parameter, ...]

OVERRIDES = click.Argument(
    ["overrides"],
    nargs=-1,
    metavar="[section.key=value]...",
    help="Keys that replace those of the file; limelight config prints all of them.",
)

TRAIN_ARGUMENTS: Parameters = (
    click.Argument(["config"], metavar="CONFIG", type=InputPath(), help="Job file, such as configs/simulated.toml."),
    OVERRIDES,
)
"""``CONFIG [section.key=value ...]``."""

QUANTIZE_ARGUMENTS: Parameters = (
    *TRAIN_ARGUMENTS,
    click.Option(
        ["--from", "old"],
        metavar="OLD",
        type=InputPath(),
        help="Codebook version to refresh: the fit starts from its centroids, and its numbers are kept.",
    ),
    click.Option(
        ["--compare-cold"],
        is_flag=True,
        help="Also fit from the job's own start, and say how many segments would keep their code then.",
    ),
)
"""``CONFIG [section.key=value ...] [--from OLD] [--compare-cold]``."""

ENCODE_AUTHORS_ARGUMENTS: Parameters = (
    click.Argument(["run"], metavar="RUN", type=InputPath(), help="Directory of a run of limelight align."),
    click.Argument(
        ["dataset"],
        metavar="[DATASET]",
        required=False,
        type=InputPath(urls=True),
        help="Dataset with segments (default: the one that the run was trained on).",
    ),
    click.Option(
        ["--out"],
        metavar="DIR",
        required=True,
        type=LocalOutputPath(),
        help="Directory of the table to write; a table that is there is replaced as a whole.",
    ),
    click.Option(
        ["--vectors"],
        metavar="TABLE",
        type=InputPath(),
        help="Table of segment vectors (default: the run's, or embeddings/segments of DATASET).",
    ),
    click.Option(["--json", "as_json"], is_flag=True, help="Print JSON instead of text."),
)
"""``RUN [DATASET] --out DIR [--vectors TABLE] [--json]``."""

FORECAST_ARGUMENTS: Parameters = (
    click.Argument(
        ["run"], metavar="RUN", type=InputPath(), help="Directory of a finished run of limelight foresight."
    ),
    click.Option(
        ["--out"],
        metavar="DIR",
        required=True,
        type=LocalOutputPath(),
        help="Directory of the tables to write; tables of forecasts that are there are replaced as a whole.",
    ),
    click.Option(
        ["--codes"],
        metavar="FILE",
        type=InputPath(),
        help="Code file of the segments (default: the one that the run was trained on).",
    ),
    click.Option(
        ["--from", "time_from"],
        metavar="T",
        help="Time from which on segments have a forecast (default: the end of the run's range of training).",
    ),
    click.Option(
        ["--all", "every"],
        is_flag=True,
        help="Also make forecasts of segments of the range of training. The predictor has seen what came after them.",
    ),
    click.Option(
        ["--pooling"],
        type=click.Choice(["mean", "last", "attention"]),
        default="mean",
        show_default=True,
        help="Pooling of the encoder's output over the runs.",
    ),
    click.Option(["--json", "as_json"], is_flag=True, help="Print JSON instead of text."),
)
"""``RUN --out DIR [--codes FILE] [--from T] [--all] [--pooling P] [--json]``."""

EMBED_ARGUMENTS: Parameters = (
    *TRAIN_ARGUMENTS,
    click.Option(
        ["--follow"],
        is_flag=True,
        help="Embed segments of live rooms as they become known, from the source of the section [follow].",
    ),
)
"""``CONFIG [section.key=value ...] [--follow]``."""

RANGE_OPTIONS: Parameters = (
    click.Option(
        ["--from", "time_from"], metavar="T", help="First request, such as 2022-05-06 (default: the run's own range)."
    ),
    click.Option(["--until", "time_until"], metavar="T", help="End of the range; requests at this time are left out."),
)
"""``[--from T] [--until T]``."""

DATA_OPTION = click.Option(
    ["--data"], metavar="PATH", type=InputPath(urls=True), help="Dataset (default: the path that the model stores)."
)

EVALUATE_ARGUMENTS: Parameters = (
    click.Argument(["directory"], metavar="RUN", type=InputPath(), help="Directory of a finished run."),
    DATA_OPTION,
    *RANGE_OPTIONS,
    click.Option(
        ["--predictions"],
        metavar="OUT.parquet",
        type=OutputPath(),
        help="Also write the probabilities and labels of each row to this file.",
    ),
    click.Option(["--json"], is_flag=True, help="Print the metrics as JSON instead of a table."),
)
"""``RUN [--data PATH] [--from T] [--until T] [--predictions OUT.parquet] [--json]``."""

SCORE_ARGUMENTS: Parameters = (
    click.Argument(["directory"], metavar="RUN", type=InputPath(), help="Directory of a run or of an exported model."),
    click.Argument(["candidates"], metavar="CANDIDATES.parquet", type=InputPath(), help="Candidates to score."),
    click.Argument(["out"], metavar="OUT.parquet", type=OutputPath(), help="File to write, one row per candidate."),
    DATA_OPTION,
)
"""``RUN CANDIDATES.parquet OUT.parquet [--data PATH]``."""

EXPLAIN_ARGUMENTS: Parameters = (
    click.Argument(
        ["directory"], metavar="RUN", type=InputPath(), help="Directory of a run; its newest checkpoint is read."
    ),
    DATA_OPTION,
    click.Option(["--user"], type=int, required=True, metavar="U", help="Id of the user."),
    click.Option(["--candidate"], type=int, required=True, metavar="C", help="Item id of the candidate."),
    click.Option(
        ["--at"], metavar="T", help="Time of the request, such as 2024-03-12T20:00 (default: the dataset's last)."
    ),
    click.Option(
        ["--top"], type=int, default=10, show_default=True, metavar="N", help="Entries of each history to print."
    ),
    click.Option(
        ["--out"], metavar="PICTURE.png", type=OutputPath(), help="Picture to write (default: RUN/explain-U-C.png)."
    ),
    click.Option(["--json", "as_json"], is_flag=True, help="Print JSON instead of text."),
)
"""``RUN [--data PATH] --user U --candidate C [--at T] [--top N] [--out PICTURE.png] [--json]``."""


def parse_rank_arguments(
    module: str, description: str, parameters: Parameters, arguments: Sequence[str] | None
) -> SimpleNamespace:
    """Parse the arguments of ``python -m module``, which a launcher starts on every rank.

    Args:
        module: name after ``-m``, for the usage line.
        description: for ``--help``.
        parameters: of the job.
        arguments: as typed; None for those of this process.

    Returns:
        An attribute for each parameter. The process ends after ``--help``, and with status 2 after a mistake.
    """
    # DeepSpeed's launcher passes --local_rank in addition to LOCAL_RANK in the environment.
    local_rank = click.Option(["--local_rank"], hidden=True)
    command = click.Command(module, params=[*parameters, local_rank], help=description)
    try:
        context = command.make_context(f"python -m {module}", list(sys.argv[1:] if arguments is None else arguments))
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.UsageError as error:
        print(f"limelight: error: {usage_message(error)}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR_STATUS)
    return SimpleNamespace(**context.params)


def usage_message(error: click.UsageError) -> str:
    """Return a mistake in the arguments as one line that names the nearest option and the help to read."""
    if isinstance(error, click.NoSuchOption):
        nearest = f"; did you mean {error.possibilities[0]}?" if error.possibilities else ""
        message = f"no option {error.option_name!r}{nearest}"
    else:
        text = " ".join(error.format_message().split())
        message = text[:1].lower() + text[1:].rstrip(".")
    path = error.ctx.command_path if error.ctx else "limelight"
    return f"{message} ({path} --help shows what is accepted)"
