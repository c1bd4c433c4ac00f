"""The ``limelight`` command. Imports of a verb's work wait until that verb is asked for."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from launch.cli.checkpoint import add_checkpoint_parser
from launch.cli.data import add_data_parser
from launch.cli.instructions import add_instructions_parser
from launch.cli.stream import add_stream_parser
from trainer.console.exit_status import HUNG_STATUS, PREEMPTED_STATUS, USER_ERROR_STATUS, exit_status
from trainer.console.job_arguments import (
    add_command,
    add_evaluate_arguments,
    add_explain_arguments,
    add_merge_arguments,
    add_score_arguments,
    add_staytime_score_arguments,
    add_train_arguments,
)

MERGE, STAYTIME_SCORE = "finetune merge", "staytime score"
"""Verbs of two words: `limelight finetune` and `limelight staytime` take a job file otherwise."""

BROKEN_PIPE_STATUS = 141
"""128 + SIGPIPE: whoever read our output has gone."""


class Parser(argparse.ArgumentParser):
    """Answers a mistake in one line, and takes option names only in full."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Print the mistake and exit."""
        print(f"limelight: error: {message} ({self.prog} --help shows what is accepted)", file=sys.stderr)
        sys.exit(USER_ERROR_STATUS)


def build_parser() -> argparse.ArgumentParser:
    """Parser of all verbs; ``arguments.run(arguments)`` does the verb and may return an exit status."""
    parser = Parser(prog="limelight", description="Trains live-streaming recommenders.")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    add_data_parser(verbs)
    add_stream_parser(verbs)
    add_instructions_parser(verbs)

    train = add_command(
        verbs,
        "train",
        "train the model of a job file",
        "Train on this machine, and evaluate. The same command again goes on with a run that has not finished.\n"
        f"Exit status {PREEMPTED_STATUS}: SIGTERM has come and the state is saved. {HUNG_STATUS}: a rank made no "
        "progress.",
        "limelight train configs/kuairand.toml --ranks 2 train.epochs=1",
    )
    add_train_arguments(train)
    train.set_defaults(run=_train)

    evaluate = add_command(
        verbs,
        "evaluate",
        "metrics of a trained run on a range of time",
        "Predict a range of time with a run's model, and print AUC, GAUC and more of each behaviour.",
        "limelight evaluate runs/kuairand --from 2022-05-05 --until 2022-05-06 --json",
    )
    add_evaluate_arguments(evaluate)
    evaluate.set_defaults(run=_evaluate)

    finetune = add_command(
        verbs,
        "finetune",
        "adapt a language model by a job file",
        "Fine-tune a Qwen2-family model with LoRA under DeepSpeed's ZeRO on this machine, and evaluate it. The same\n"
        f"command again goes on with a run that has not finished. Exit statuses {PREEMPTED_STATUS} and {HUNG_STATUS} "
        "as of train.\n`limelight finetune merge RUN OUT` makes a model without an adapter of it.",
        "limelight finetune configs/finetune_small.toml --ranks 2 train.epochs=1",
    )
    add_train_arguments(finetune)
    finetune.set_defaults(run=_finetune)

    merge = add_command(
        verbs,
        MERGE,
        "write the model of a fine-tuning run without its adapter",
        "Write the model with the adapter's changes in its own weights, as a directory that transformers loads.",
        "limelight finetune merge runs/qwen2-7b models/qwen2-7b-tuned",
    )
    add_merge_arguments(merge)
    merge.set_defaults(run=_merge)

    embed = add_command(
        verbs,
        "embed",
        "vectors of a dataset's texts, by a language model",
        "Read videos, comments, segments of rooms or authors with a Qwen2-family model, with or without an adapter,\n"
        "and write a table of vectors for each. The same command again goes on with what is missing; where a table is\n"
        "there, only new and changed texts are read, and the table is replaced as a whole.",
        "limelight embed configs/embed.toml --ranks 2 embed.pooling=mean",
    )
    add_train_arguments(embed)
    embed.set_defaults(run=_embed)

    for verb in (train, evaluate, finetune, embed):
        verb.add_argument("--ranks", type=_positive, default=1, metavar="N", help="processes to start (default: 1)")

    score = add_command(
        verbs,
        "score",
        "probabilities and ranking score of candidates",
        "Predict each behaviour of each candidate, with its ranking score (Moment&Cross equation 4).",
        "limelight score runs/kuairand candidates.parquet scores.parquet",
    )
    add_score_arguments(score)
    score.set_defaults(run=_score)

    explain = add_command(
        verbs,
        "explain",
        "what each history held for a candidate, and how much attention each entry got",
        "For one user and one candidate: which items each history holds as of a time, and how much attention the\n"
        "model gives each of them, as text and as a picture.",
        "limelight explain runs/simulated --user 17 --candidate 4021 --at 2024-03-12T20:00",
    )
    add_explain_arguments(explain)
    explain.set_defaults(run=_explain)

    staytime = add_command(
        verbs,
        "staytime",
        "seconds in the comment area, with or without LCU",
        "Train a model of the seconds that users stay in the comment area of a video, and evaluate it on later days.\n"
        "A run that was ended begins anew. `limelight staytime score RUN OUT.parquet` predicts more days by its model.",
        "limelight staytime configs/staytime.toml base.loss=d2q lcu.enabled=false",
    )
    add_train_arguments(staytime)
    staytime.set_defaults(run=_staytime)

    staytime_score = add_command(
        verbs,
        STAYTIME_SCORE,
        "predicted seconds of visits, by the model of a staytime run",
        "Predict the visits of a range of time after training, write them as the run's predictions.parquet is, and\n"
        "print their metrics. Without a range it is the run's held-out one. The dataset may have grown since.",
        "limelight staytime score runs/staytime predictions.parquet --from 2024-03-10 --until 2024-03-11",
    )
    add_staytime_score_arguments(staytime_score)
    staytime_score.set_defaults(run=_staytime_score)

    add_checkpoint_parser(verbs)

    doctor = add_command(
        verbs,
        "doctor",
        "what on this machine is wrong, and what to type",
        "Check packages, accelerator, process groups, ports, shared memory and disk.",
        "limelight doctor --json",
    )
    doctor.add_argument("--json", action="store_true", help="print the checks as JSON")
    doctor.set_defaults(run=_doctor)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    try:
        try:
            return exit_status(lambda: _run(list(sys.argv[1:] if arguments is None else arguments)))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        # Python flushes stdout once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE_STATUS


def _run(arguments: list[str]) -> int | None:
    # --ranks may stand among the overrides, where argparse would not look for it.
    ranks = Parser(prog="limelight", add_help=False)
    ranks.add_argument("--ranks")
    found, rest = ranks.parse_known_args(arguments)
    given = [] if found.ranks is None else [f"--ranks={found.ranks}"]
    if (two := " ".join(rest[:2])) in (MERGE, STAYTIME_SCORE):
        rest[:2] = [two]
    options = build_parser().parse_args([*rest[:1], *given, *rest[1:]])
    options.forwarded = rest[1:]
    status: int | None = options.run(options)
    return status


def _train(options: argparse.Namespace) -> int:
    from launch.local import start_ranks
    from trainer.config.ranker import load_config

    load_config(options.config, options.overrides)
    return start_ranks("trainer.rank", options.forwarded, options.ranks)


def _embed(options: argparse.Namespace) -> int:
    from launch.local import start_ranks
    from trainer.config.embed import load_embedding

    load_embedding(options.config, options.overrides)
    return start_ranks("trainer.embed", options.forwarded, options.ranks)


def _evaluate(options: argparse.Namespace) -> int:
    from launch.local import start_ranks

    return start_ranks("trainer.evaluate", options.forwarded, options.ranks)


def _score(options: argparse.Namespace) -> int:
    from launch.local import start_ranks

    return start_ranks("trainer.score", options.forwarded, 1)


def _staytime(options: argparse.Namespace) -> None:
    from trainer.config.load import load_job
    from trainer.config.staytime import StaytimeConfig
    from trainer.staytime import run_job

    run_job(load_job(StaytimeConfig, options.config, options.overrides))


def _staytime_score(options: argparse.Namespace) -> None:
    from trainer.comment_staytime.scoring import score_range

    run, out = Path(options.directory), Path(options.out)
    score_range(run, out, data=options.data, time_from=options.time_from, time_until=options.time_until)


def _finetune(options: argparse.Namespace) -> int:
    from launch.local import start_ranks
    from trainer.config.finetune import load_finetune

    load_finetune(options.config, options.overrides)
    return start_ranks("trainer.finetune", options.forwarded, options.ranks)


def _merge(options: argparse.Namespace) -> None:
    from trainer.llm.models.adapter import merge_run

    merge_run(Path(options.directory), Path(options.out))
    print(f"merged: {options.out}")


def _explain(options: argparse.Namespace) -> int:
    from launch.local import start_ranks

    return start_ranks("trainer.explain", options.forwarded, 1)


def _doctor(options: argparse.Namespace) -> int:
    from launch.doctor.report import examine

    return examine(as_json=options.json)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes, 1 or more")
    return int(text)


def _reader_has_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more; another broken pipe is an error like any."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


if __name__ == "__main__":
    sys.exit(main())
