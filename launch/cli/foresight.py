"""``limelight foresight``: train a predictor of a room's next code, and write its forecasts for a ranker."""

from __future__ import annotations

import click

from launch.cli.command import FIT, JobGroup
from launch.cli.jobs import forwarded, ranks_option
from trainer.console.exit_status import HUNG_STATUS, PREEMPTED_STATUS
from trainer.console.job_arguments import FORECAST_ARGUMENTS, TRAIN_ARGUMENTS


@click.group(
    cls=JobGroup,
    short_help="Foresee the next code of a room.",
    help="Train Foresight's predictor, which foresees the code of a room's next segment from the latest codes of its "
    "author, and write its forecasts as tables of vectors that a ranker reads.\n\n"
    "A job file in place of the command means `limelight foresight fit`.",
    example="limelight foresight configs/foresight.toml --ranks 2 train.epochs=2",
)
def foresight() -> None:
    """Train and use a predictor of the next code."""


@foresight.command(
    FIT,
    params=list(TRAIN_ARGUMENTS),
    short_help="Train the predictor of a job file.",
    help="Train the predictor on a range of time, and measure it beside simple rules on later segments. The codes are "
    "those of `limelight quantize assign`. The same command again continues a run that has not finished. Exit statuses "
    f"{PREEMPTED_STATUS} and {HUNG_STATUS} as of train.",
    example="limelight foresight fit configs/foresight.toml --ranks 2 train.epochs=2",
)
@ranks_option
def fit(config: str, overrides: tuple[str, ...], ranks: int) -> int:
    """Start the ranks of ``trainer.foresight``."""
    from launch.local import start_ranks
    from trainer.config.foresight import load_foresight

    load_foresight(config, overrides)
    return start_ranks("trainer.foresight", [config, *overrides], ranks)


@foresight.command(
    params=list(FORECAST_ARGUMENTS),
    short_help="Write the forecasts of a finished predictor.",
    help="Write the forecast of each segment with the newest checkpoint of a run, from what was known when the segment "
    "became known: the tables DIR/encoder, DIR/decoder and DIR/expected. Without --all only segments after the range "
    "of training have a forecast, because the predictor has seen what came after the others. A ranker reads a table "
    "with `features.content.NAME.table=DIR/decoder features.content.NAME.of=segment`.",
    example="limelight foresight forecast runs/foresight --out data/forecasts",
)
@ranks_option
@click.pass_context
def forecast(context: click.Context, ranks: int, **arguments: object) -> int:
    """Start the ranks of ``trainer.forecast``."""
    from pathlib import Path

    from launch.local import start_ranks
    from trainer.checkpoint.run_directory import load_foresight_run

    load_foresight_run(Path(context.params["run"]))
    return start_ranks("trainer.forecast", forwarded(context), ranks)


@foresight.command(
    params=list(TRAIN_ARGUMENTS),
    short_help="Forecast and train in the order of time.",
    help="Forecast each segment by the predictor as it was when the segment became known, and train the predictor on "
    "what became known since, in the order of time: the tables RUN/forecasts/encoder, decoder and expected. It starts "
    "from scratch, or from a finished run (follow.init_from). The same command again continues a run that has not "
    "finished, and goes on to segments that were added to the code file since. Exit statuses "
    f"{PREEMPTED_STATUS} and {HUNG_STATUS} as of train.",
    example="limelight foresight follow configs/foresight.toml run.directory=runs/follow",
)
@ranks_option
def follow(config: str, overrides: tuple[str, ...], ranks: int) -> int:
    """Start the ranks of ``trainer.foresight_follow``."""
    from launch.local import start_ranks
    from trainer.config.foresight import load_foresight_follow

    load_foresight_follow(config, overrides)
    return start_ranks("trainer.foresight_follow", [config, *overrides], ranks)
