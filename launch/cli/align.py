"""``limelight align``: aligned author vectors: train the two towers, and encode segments with them."""

from __future__ import annotations

import click

from launch.cli.command import FIT, JobGroup
from launch.cli.jobs import forwarded, ranks_option
from trainer.console.exit_status import HUNG_STATUS, PREEMPTED_STATUS
from trainer.console.job_arguments import ENCODE_AUTHORS_ARGUMENTS, TRAIN_ARGUMENTS


@click.group(
    cls=JobGroup,
    short_help="Align author vectors with what users do.",
    help="Train LARM's two towers on the positive pairs of a dataset: users, and authors as a mixture of their "
    "features and of the vectors of their segments. The result is a vector of the author for each segment.\n\n"
    "A job file in place of the command means `limelight align fit`.",
    example="limelight align configs/align.toml --ranks 2 train.epochs=2",
)
def align() -> None:
    """Train and use aligned author vectors."""


@align.command(
    FIT,
    params=list(TRAIN_ARGUMENTS),
    short_help="Train the two towers of a job file.",
    help="Train the two towers of a job file on this machine, evaluate the retrieval of authors on air, and write the "
    "fused author vector of each segment to RUN/authors. The same command again continues a run that has not finished. "
    f"Exit statuses {PREEMPTED_STATUS} and {HUNG_STATUS} as of train.",
    example="limelight align fit configs/align.toml --ranks 2 train.epochs=2",
)
@ranks_option
def fit(config: str, overrides: tuple[str, ...], ranks: int) -> int:
    """Start the ranks of ``trainer.align``."""
    from launch.local import start_ranks
    from trainer.config.align import load_align

    load_align(config, overrides)
    return start_ranks("trainer.align", [config, *overrides], ranks)


@align.command(
    params=list(ENCODE_AUTHORS_ARGUMENTS),
    short_help="Write the fused author vector of each segment.",
    help="Write the fused author vector of each segment of a dataset, as of the time when the segment became known, "
    "with the newest checkpoint of a run. Later segments change no vector of an earlier one. The table is read by "
    "`limelight quantize configs/quantize.toml data.vectors=DIR`.",
    example="limelight align encode runs/align data/segments --out data/fused",
)
@ranks_option
@click.pass_context
def encode(context: click.Context, ranks: int, **arguments: object) -> int:
    """Start the ranks of ``trainer.encode_authors``."""
    from launch.local import start_ranks
    from trainer.checkpoint.run_directory import load_align_run

    load_align_run(context.params["run"])
    return start_ranks("trainer.encode_authors", forwarded(context), ranks)
