"""``limelight evaluate``, ``score``, ``explain`` and ``export``: the use of trained models."""

from __future__ import annotations

from pathlib import Path

import click

from launch.cli.command import Command, json_option, messages_on_stderr, print_json
from launch.cli.jobs import forwarded, ranks_option
from trainer.console.errors import UserError
from trainer.console.job_arguments import EVALUATE_ARGUMENTS, EXPLAIN_ARGUMENTS
from trainer.console.outputs import InputPath, Output, OutputPath


@click.command(
    cls=Command,
    params=list(EVALUATE_ARGUMENTS),
    short_help="Print metrics of a ranker on a range of time.",
    help="Predict a range of time with the model of a ranker's run, and print AUC, GAUC and more for each behaviour.",
    example="limelight evaluate runs/kuairand --from 2022-05-05 --until 2022-05-06 --json",
)
@ranks_option
@click.pass_context
def evaluate(context: click.Context, ranks: int, **arguments: object) -> int:
    """Start the ranks of ``trainer.evaluate``."""
    _require_ranker(context)
    from launch.local import start_ranks

    return start_ranks("trainer.evaluate", forwarded(context), ranks)


@click.command(
    cls=Command,
    short_help="Score candidates or visits with a trained model.",
    help="""Score with a trained model. MODEL decides what is predicted.

\b
limelight score MODEL CANDIDATES.parquet OUT.parquet
  MODEL is a ranker's run or an exported model: the probability of each
  behaviour of each candidate, and its ranking score (Moment&Cross
  equation 4). CANDIDATES has user_id, item_id, author_id and request_ms.

\b
limelight score RUN OUT.parquet [--data PATH] [--from T] [--until T]
  RUN is a run of limelight staytime: the predicted seconds of the visits
  of a range of time after training, and their metrics. Without a range it
  is the run's held-out one. The dataset may have grown since.""",
    example="limelight score runs/kuairand candidates.parquet scores.parquet",
)
@click.argument("model", metavar="MODEL", type=InputPath(), help="Directory of a run or of an exported model.")
@click.argument(
    "files",
    metavar="[CANDIDATES.parquet] OUT.parquet",
    nargs=-1,
    required=True,
    type=OutputPath(),
    help="Candidates to score (of a ranker only), and the file to write.",
)
@click.option(
    "--data",
    metavar="PATH",
    type=InputPath(urls=True),
    help="Dataset (default: the model's own).",
)
@click.option("--from", "time_from", metavar="T", help="Staytime: first request, such as 2024-03-10.")
@click.option("--until", "time_until", metavar="T", help="Staytime: end of the range; this time is left out.")
@click.option("--json", "as_json", is_flag=True, help="Staytime: print the metrics as JSON instead of a table.")
def score(
    model: str,
    files: tuple[Output, ...],
    data: str | None,
    time_from: str | None,
    time_until: str | None,
    as_json: bool,
) -> int:
    """Score in the way that fits the directory."""
    from trainer.checkpoint.run_kind import run_kind

    kind = run_kind(model)
    if kind is None:
        raise UserError(f"{model}: no run here (config.json is missing), and no exported model")
    if kind == "align":
        raise UserError(f"{model}: an alignment scores no rows; limelight align encode writes its author vectors")
    if kind in ("finetune", "foresight"):
        what = "a fine-tuning run" if kind == "finetune" else "a run of Foresight"
        raise UserError(f"{model}: {what} scores nothing; its metrics are in {Path(model) / 'metrics.json'}")
    if kind == "staytime":
        if len(files) != 1:
            raise UserError(f"{model} is a staytime run, which takes one file: limelight score {model} OUT.parquet")
        _score_staytime(Path(model), files[0], data, time_from, time_until, as_json)
        return 0
    for option, value in (("--from", time_from), ("--until", time_until), ("--json", as_json)):
        if value:
            raise UserError(f"{option} is for a staytime run, and {model} is none; a ranker scores CANDIDATES.parquet")
    if len(files) != 2:
        raise UserError(
            f"{model} is a ranker, which takes two files: limelight score {model} CANDIDATES.parquet OUT.parquet"
        )
    from launch.local import start_ranks

    return start_ranks("trainer.score", [model, *map(str, files), *(["--data", data] if data else [])], 1)


@click.command(
    cls=Command,
    params=list(EXPLAIN_ARGUMENTS),
    short_help="Show the attention to each history entry.",
    help="Show, for one user and one candidate, which items each history holds at a time, and how much attention a "
    "ranker gives each of them, as text and as a picture.",
    example="limelight explain runs/simulated --user 17 --candidate 4021 --at 2024-03-12T20:00",
)
@click.pass_context
def explain(context: click.Context, **arguments: object) -> int:
    """Start the one rank of ``trainer.explain``."""
    _require_ranker(context)
    from launch.local import start_ranks

    return start_ranks("trainer.explain", forwarded(context), 1)


@click.command(
    cls=Command,
    short_help="Write a trained model as plain files.",
    help="""Write a trained model to a new directory. RUN decides the format.

A ranker's run, or one of its checkpoints: whole tables and the network as safetensors, with settings and features.
`limelight score` takes the directory in place of a run, without TorchRec and DeepSpeed.

A finished fine-tuning run: the model with the adapter merged into its weights, which transformers loads by itself.""",
    example="limelight export runs/first exported/first",
)
@click.argument(
    "run", metavar="RUN", type=InputPath(), help="A run, whose newest checkpoint is taken, or a ranker's checkpoint."
)
@click.argument("out", metavar="OUT", type=OutputPath(), help="Directory or URL to make; it must not exist.")
@click.option(
    "--data", metavar="PATH", type=InputPath(urls=True), help="Dataset (default: the path that the run stores)."
)
@click.option(
    "--with-dataset",
    is_flag=True,
    help="Copy the part of the dataset that scoring reads, so that OUT scores on a machine without it.",
)
@json_option
def export(run: str, out: Output, data: str | None, with_dataset: bool, as_json: bool) -> None:
    """Export in the format that fits the run."""
    from trainer.checkpoint.run_kind import run_kind

    kind = run_kind(run)
    if kind == "staytime":
        raise UserError(f"{run}: a staytime run has nothing to export; its model is {Path(run) / 'model.safetensors'}")
    if kind == "align":
        raise UserError(f"{run}: an alignment has nothing to export; limelight align encode writes its author vectors")
    if kind == "foresight":
        raise UserError(
            f"{run}: a run of Foresight has nothing to export; its predictor is in {Path(run) / 'checkpoints'}"
        )
    if kind == "export":
        raise UserError(f"{run}: this is an exported model already; name the run that it came from")
    if kind == "finetune":
        if data or with_dataset:
            raise UserError(f"--data and --with-dataset are for a ranker, and {run} is a fine-tuning run")
        from trainer.llm.models.adapter import merge_run

        with out.writing("config.json", quiet=as_json) as target:
            merge_run(Path(run), target)
        if as_json:
            print_json({"kind": "merged", "out": str(out)})
        else:
            print(f"{out}: the model of {run} with its adapter merged")
        return
    from trainer.serving.export import export_checkpoint

    with out.writing("export.json", quiet=as_json) as target:
        origin = export_checkpoint(run, target, data, with_dataset=with_dataset)
        explained = (target / "README.md").exists()
    if as_json:
        print_json({"out": str(out), **origin})
        return
    print(f"{out}: {origin['kind']} of step {origin['step']:,}, from {origin['checkpoint']}")
    copied = "" if out.path is not None else " (a local copy of the directory)"
    print(f"score with it: limelight score {out} CANDIDATES.parquet OUT.parquet{copied}")
    if explained:
        print(f"without Limelight: {out}/README.md says how, {out}/score_one.py does it in PyTorch")


def _require_ranker(context: click.Context) -> None:
    from trainer.checkpoint.run_kind import run_kind

    run = context.params["directory"]
    kind = run_kind(run)
    if kind not in ("ranker", None):
        other = {
            "align": "an alignment's run",
            "export": "an exported model",
            "finetune": "a fine-tuning run",
            "foresight": "a run of Foresight",
            "staytime": "a staytime run",
        }[kind]
        raise UserError(f"{run}: limelight {context.info_name} takes a ranker's run, and this is {other}")


def _score_staytime(
    run: Path, out: Output, data: str | None, time_from: str | None, time_until: str | None, as_json: bool
) -> None:
    from trainer.comment_staytime.evaluation import metrics_table
    from trainer.comment_staytime.scoring import score_range

    with messages_on_stderr(as_json), out.writing(quiet=as_json) as file:
        metrics = score_range(run, file, data=data, time_from=time_from, time_until=time_until)
    if as_json:
        print_json({"out": str(out), **metrics})
    else:
        print(f"{metrics_table(metrics)}\n\npredictions: {out}")
