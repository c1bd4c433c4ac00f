"""``limelight checkpoint``: look at checkpoints, compare and export them. Imports wait until a command is asked for."""

from __future__ import annotations

import argparse
import json
import sys

from trainer.console.job_arguments import add_command

DIFFERENT_STATUS = 1
"""Exit status when checkpoints differ, or one is broken."""


def add_checkpoint_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb ``checkpoint`` and its commands; ``run(arguments)`` returns the exit status."""
    checkpoint = subparsers.add_parser(
        "checkpoint", help="look at a checkpoint, check, compare or export it", description="Work with checkpoints."
    )
    commands = checkpoint.add_subparsers(metavar="COMMAND", required=True)

    show = add_command(
        commands,
        "show",
        "what is in it",
        "Print step, rows, tables with their sharding and optimizer state, network, positions and sizes.",
        "limelight checkpoint show runs/first",
    )
    _add_path(show, "path", "PATH")
    show.add_argument("--all", action="store_true", help="list every dense parameter, position and file")
    show.add_argument("--json", action="store_true", help="print JSON instead of tables")
    show.set_defaults(run=_show)

    verify = add_command(
        commands,
        "verify",
        "whether its files are what was written",
        f"Read all files and compare their checksums; of a run, of all its checkpoints. Exit status {DIFFERENT_STATUS} "
        "if one is broken.",
        "limelight checkpoint verify runs/first",
    )
    verify.add_argument("path", metavar="PATH", help="a checkpoint, or a run, all of whose checkpoints are read")
    verify.add_argument("--json", action="store_true", help="print JSON instead of a table")
    verify.set_defaults(run=_verify)

    diff = add_command(
        commands,
        "diff",
        "how two differ",
        "Compare the settings, tables, network and optimizers of two checkpoints, whatever ranks and shardings wrote\n"
        f"them. Exit status 0 if all tensors are equal, {DIFFERENT_STATUS} if not; settings do not count.",
        "limelight checkpoint diff runs/first/checkpoints/step-00000120 runs/second",
    )
    _add_path(diff, "first", "A")
    _add_path(diff, "second", "B")
    diff.add_argument("--all", action="store_true", help="list equal tensors as well")
    diff.add_argument("--json", action="store_true", help="print JSON instead of tables")
    diff.set_defaults(run=_diff)

    export = add_command(
        commands,
        "export",
        "as plain safetensors, to score without TorchRec and DeepSpeed",
        "Write the model to a new directory: whole tables and the network as safetensors, its settings and features.\n"
        "`limelight score` takes the directory in place of a run.",
        "limelight checkpoint export runs/first exported/first",
    )
    _add_path(export, "path", "PATH")
    export.add_argument("out", metavar="OUT", help="directory to make; must not exist")
    export.set_defaults(run=_export)


def _add_path(parser: argparse.ArgumentParser, name: str, shown: str) -> None:
    parser.add_argument(name, metavar=shown, help="a checkpoint, or a run, whose newest whole checkpoint it is")


def _show(options: argparse.Namespace) -> int:
    from trainer.checkpoint.describe import describe_checkpoint, format_checkpoint

    found = describe_checkpoint(options.path)
    print(json.dumps(found, indent=1) if options.json else format_checkpoint(found, everything=options.all))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from trainer.checkpoint.describe import broken_line, format_verification, verify_checkpoints

    found = verify_checkpoints(options.path)
    print(json.dumps(found, indent=1) if options.json else format_verification(found))
    broken = broken_line(found)
    if broken is None:
        return 0
    print(f"limelight: error: {broken}", file=sys.stderr)
    return DIFFERENT_STATUS


def _diff(options: argparse.Namespace) -> int:
    from trainer.checkpoint.diff import diff_checkpoints, format_diff

    found = diff_checkpoints(options.first, options.second)
    print(json.dumps(found, indent=1) if options.json else format_diff(found, everything=options.all))
    return 0 if found["equal"] else DIFFERENT_STATUS


def _export(options: argparse.Namespace) -> int:
    from trainer.serving.export import export_checkpoint

    origin = export_checkpoint(options.path, options.out)
    print(f"{options.out}: {origin['kind']} of step {origin['step']:,}, from {origin['checkpoint']}")
    print(f"score with it: limelight score {options.out} CANDIDATES.parquet OUT.parquet")
    return 0
