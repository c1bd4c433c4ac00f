"""Command lines of the jobs, defined once for ``limelight <verb>`` and ``torchrun -m trainer.<job>``.

Light to import: the ``limelight`` command reads it before it knows which job is meant.
"""

from __future__ import annotations

import argparse


def rank_parser(module: str, description: str) -> argparse.ArgumentParser:
    """Parser of ``python -m module``, as a launcher starts it on every rank."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description, allow_abbrev=False)
    # deepspeed's launcher gives this, beside LOCAL_RANK in the environment.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser


def add_command(
    commands: argparse._SubParsersAction, name: str, summary: str, description: str, example: str
) -> argparse.ArgumentParser:
    """Add a command to a verb; its help ends with an example."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """``CONFIG [section.key=value ...]``."""
    parser.add_argument("config", metavar="CONFIG", help="job file, such as configs/simulated.toml")
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", help="keys to set otherwise, such as train.epochs=2"
    )


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """``RUN OUT``."""
    parser.add_argument("directory", metavar="RUN", help="directory of a finished fine-tuning run")
    parser.add_argument("out", metavar="OUT", help="directory to make")


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """``RUN --data PATH --from T --until T [--json]``."""
    parser.add_argument("directory", metavar="RUN", help="directory of a finished run")
    parser.add_argument("--data", metavar="PATH", help="dataset to evaluate on (default: the run's own)")
    _add_range(parser)
    parser.add_argument(
        "--predictions", metavar="OUT.parquet", help="write each row's probabilities and labels as well"
    )
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON instead of a table")


def _add_range(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="time_from", metavar="T", help="first request, such as 2022-05-06")
    parser.add_argument("--until", dest="time_until", metavar="T", help="end of the range, itself not part of it")


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """``RUN CANDIDATES.parquet OUT.parquet``."""
    parser.add_argument("directory", metavar="RUN", help="directory of a finished run, or of an exported model")
    parser.add_argument("candidates", metavar="CANDIDATES.parquet", help="requests and candidates to score")
    parser.add_argument("out", metavar="OUT.parquet", help="file to write, one line a candidate in the same order")


def add_staytime_score_arguments(parser: argparse.ArgumentParser) -> None:
    """``RUN OUT.parquet [--data PATH] [--from T] [--until T]``."""
    parser.add_argument("directory", metavar="RUN", help="directory of a finished run of limelight staytime")
    parser.add_argument("out", metavar="OUT.parquet", help="file to write, one line a visit")
    parser.add_argument("--data", default="", metavar="PATH", help="dataset, if the run's own was moved")
    _add_range(parser)


def add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    """``RUN --user U --candidate C [--at TIME] [--top N] [--out PICTURE.png]``."""
    parser.add_argument("directory", metavar="RUN", help="directory of a run; its newest checkpoint is taken")
    parser.add_argument("--user", type=int, required=True, metavar="U", help="id of the user")
    parser.add_argument("--candidate", type=int, required=True, metavar="C", help="item id of the candidate")
    parser.add_argument(
        "--at", metavar="T", help="time of the request, such as 2024-03-12T20:00 (default: the dataset's last)"
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="entries of a history to tell (default: 10)")
    parser.add_argument("--out", metavar="PICTURE.png", help="picture to write (default: RUN/explain-U-C.png)")
