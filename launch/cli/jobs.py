"""``limelight train``, ``finetune``, ``embed`` and ``staytime``: the jobs that a job file describes.

A job file is parsed here before any rank starts, so that a mistake in it costs no start of torch.
"""

from __future__ import annotations

from typing import Any

import click

from launch.cli.command import Command
from trainer.console.exit_status import HUNG_STATUS, PREEMPTED_STATUS
from trainer.console.job_arguments import EMBED_ARGUMENTS, TRAIN_ARGUMENTS


def _positive(context: click.Context, parameter: click.Parameter, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise click.BadParameter(f"{text!r} is not a number of processes, 1 or more")
    return int(text)


ranks_option = click.option(
    "--ranks",
    callback=_positive,
    default="1",
    show_default=True,
    metavar="N",
    help="Processes to start on this machine.",
)


@click.command(
    cls=Command,
    params=list(TRAIN_ARGUMENTS),
    short_help="Train the ranker of a job file.",
    help="Train the ranker of a job file on this machine and evaluate it. The same command again continues a run that "
    f"has not finished.\n\nExit status {PREEMPTED_STATUS}: SIGTERM has arrived and the state is saved. "
    f"{HUNG_STATUS}: a rank made no progress.",
    example="limelight train configs/simulated.toml --ranks 2 train.epochs=1",
)
@ranks_option
def train(config: str, overrides: tuple[str, ...], ranks: int) -> int:
    """Start the ranks of ``trainer.rank``."""
    from launch.local import start_ranks
    from trainer.config.ranker import load_config

    load_config(config, overrides)
    return start_ranks("trainer.rank", [config, *overrides], ranks)


@click.command(
    cls=Command,
    params=list(TRAIN_ARGUMENTS),
    short_help="Fine-tune a language model with LoRA.",
    help="Fine-tune a Qwen2-family model with LoRA under DeepSpeed's ZeRO on this machine and evaluate it. The same "
    f"command again continues a run that has not finished. Exit statuses {PREEMPTED_STATUS} and {HUNG_STATUS} as of "
    "train.\n\n`limelight export RUN OUT` writes the model with the adapter merged into its weights.",
    example="limelight finetune configs/finetune_small.toml --ranks 2 train.epochs=1",
)
@ranks_option
def finetune(config: str, overrides: tuple[str, ...], ranks: int) -> int:
    """Start the ranks of ``trainer.finetune``."""
    from launch.local import start_ranks
    from trainer.config.finetune import load_finetune

    load_finetune(config, overrides)
    return start_ranks("trainer.finetune", [config, *overrides], ranks)


@click.command(
    cls=Command,
    params=list(EMBED_ARGUMENTS),
    short_help="Embed a dataset's texts with a language model.",
    help="Embed videos, comments, segments of rooms or authors with a Qwen2-family model, with or without an adapter, "
    "and write a table of vectors for each kind. The same command again continues with the parts that are missing. "
    "Where a table exists, only new and changed texts are embedded, and the table is replaced as a whole.\n\n"
    "With --follow, one process embeds the segments of live rooms as they become known, and appends vectors to a cache "
    "and codes to the store of recent codes. The same command again continues after the last segment that was stored. "
    f"Exit status {PREEMPTED_STATUS}: SIGTERM has arrived, and all that was read is stored.",
    example="limelight embed configs/embed_follow.toml --follow follow.replay_speed=60",
)
@ranks_option
def embed(config: str, overrides: tuple[str, ...], follow: bool, ranks: int) -> int:
    """Start the ranks of ``trainer.embed``."""
    from launch.local import start_ranks
    from trainer.config.embed import load_embedding

    load_embedding(config, overrides, follow=follow)
    if follow and ranks > 1:
        raise click.UsageError(f"--follow is one process, and --ranks is {ranks}")
    return start_ranks("trainer.embed", [config, *overrides, *(["--follow"] if follow else [])], ranks)


@click.command(
    cls=Command,
    params=list(TRAIN_ARGUMENTS),
    short_help="Train a model of comment staytime.",
    help="Train a model of the seconds that users stay in the comment area of a video, with or without LCU, and "
    "evaluate it on later days. One process; a run that was ended starts again from the beginning.\n\n"
    "`limelight score RUN OUT.parquet` predicts further days with its model.",
    example="limelight staytime configs/staytime.toml base.loss=d2q lcu.enabled=false",
)
def staytime(config: str, overrides: tuple[str, ...]) -> None:
    """Train in this process."""
    from trainer.config.load import load_job
    from trainer.config.staytime import StaytimeConfig
    from trainer.staytime import run_job

    run_job(load_job(StaytimeConfig, config, overrides))


def forwarded(context: click.Context) -> list[str]:
    """Return the arguments of a command as its ranks are to parse them, without ``--ranks``."""
    words: list[str] = []
    for parameter in context.command.params:
        name: Any = parameter.name
        value = context.params[name]
        if isinstance(parameter, click.Argument):
            words += [] if value is None else [value]
        elif name != "ranks" and value is not None and value is not False:
            words += [parameter.opts[0]] if value is True else [parameter.opts[0], str(value)]
    return words
