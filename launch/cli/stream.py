"""``limelight stream``: the label stream of a log. Imports of a command's work wait until it is asked for."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from types import TracebackType

from launch.cli.stream_publish import add_publish_parser
from trainer.console.job_arguments import add_command
from trainer.console.progress import Progress
from trainer.stream.labels.policy import POLICIES, EventTimeouts, make_policy

_ASSEMBLE_DESCRIPTION = """\
Write the training rows that a report policy makes of a dataset's event log, partition after partition, each in order
of emit_ms. Columns: visit_id, user_id, author_id, item_id, kind, request_ms, emit_ms, and label_B and mask_B for each
behaviour B. Events that change no row are kept in OUT.unused_events.parquet, with the reason.

  full            one row at the end of the visit
  fast_slow       one row after --fast-seconds, one after --slow-seconds with the positives that the first one denied
  realtime        first positives every --tick-seconds, the rest at the end
  realtime_naive  positives and negatives every --tick-seconds, for comparison
"""

_CONSISTENCY_DESCRIPTION = """\
Print Table 1 of Moment&Cross for a dataset: the share of the positives of an hour that is visible at 5 minutes, with
the paper's figures beside it; and the number of rows that each report policy makes.
"""


def add_stream_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb ``stream`` and its commands; ``run(arguments)`` of the parsed arguments returns the exit status."""
    stream = subparsers.add_parser(
        "stream", help="the label stream of a log", description="Look at the label stream of a log."
    )
    commands = stream.add_subparsers(metavar="COMMAND", required=True)

    assemble = add_command(
        commands,
        "assemble",
        "training rows under a report policy",
        _ASSEMBLE_DESCRIPTION,
        "limelight stream assemble data/world --policy realtime rows.parquet",
    )
    assemble.add_argument("dataset", metavar="DATASET", help="dataset, a directory or an fsspec URL")
    assemble.add_argument("out", metavar="OUT.parquet", help="file to write; one that exists is replaced")
    assemble.add_argument("--policy", required=True, metavar="P", help=f"one of {', '.join(POLICIES)}")
    assemble.add_argument(
        "--mode",
        choices=("batch", "incremental"),
        default="batch",
        help="which assembler: that of stored logs or that of live streams; the rows are the same (default: batch)",
    )
    for setting, default in (("fast", 300), ("slow", 3600), ("tick", 30)):
        assemble.add_argument(
            f"--{setting}-seconds", type=_milliseconds, metavar="S", help=f"window of the policy (default: {default})"
        )
    _add_idle(assemble)
    assemble.add_argument(
        "--max-out-of-orderness-seconds",
        type=_milliseconds,
        default=EventTimeouts().max_out_of_orderness_ms,
        metavar="S",
        help="an event that comes more than so long after a later one is late "
        f"(default: {EventTimeouts().max_out_of_orderness_ms / 1000:g})",
    )
    assemble.set_defaults(run=_assemble)

    consistency = add_command(
        commands,
        "consistency",
        "how much of an hour's labels is known at 5 minutes",
        _CONSISTENCY_DESCRIPTION,
        "limelight stream consistency data/world --json",
    )
    consistency.add_argument("dataset", metavar="DATASET", help="dataset, a directory or an fsspec URL")
    _add_idle(consistency)
    consistency.add_argument("--json", action="store_true", help="print JSON instead of tables")
    consistency.set_defaults(run=_consistency)

    add_publish_parser(commands)


def _add_idle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--idle-seconds",
        type=_milliseconds,
        default=EventTimeouts().idle_ms,
        metavar="S",
        help=f"a visit without an exit ends so long after its last event (default: {EventTimeouts().idle_ms / 1000:g})",
    )


def _milliseconds(text: str) -> int:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return round(seconds * 1000)


def _assemble(options: argparse.Namespace) -> int:
    from trainer.stream.labels.write_rows import assemble_dataset

    given = {f"{name}_ms": getattr(options, f"{name}_seconds") for name in ("fast", "slow", "tick")}
    policy = make_policy(options.policy, **{name: value for name, value in given.items() if value is not None})
    timeouts = EventTimeouts(options.idle_seconds, options.max_out_of_orderness_seconds)
    with _EventsBar("assembling") as progress:
        written = assemble_dataset(options.dataset, policy, timeouts, Path(options.out), options.mode, progress.reached)
    rows, kinds = sum(written.rows.values()), ", ".join(f"{count:,} {kind}" for kind, count in written.rows.items())
    print(f"{options.out}: {rows:,} rows of {written.visits:,} visits" + (f" ({kinds})" if kinds else ""))
    if written.fast_slow_rows:
        print(f"rows to those of fast_slow: {rows / written.fast_slow_rows:.2f}")
    if written.unused_file is not None:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in written.unused_events.items() if count)
        print(f"{written.unused_file}: {sum(written.unused_events.values()):,} events that change no row ({reasons})")
    return 0


def _consistency(options: argparse.Namespace) -> int:
    from trainer.stream.labels.policy_consistency import consistency, format_consistency

    with _EventsBar("reading", quiet=options.json) as progress:
        figures = consistency(options.dataset, options.idle_seconds, progress.reached)
    print(json.dumps(figures, indent=1) if options.json else format_consistency(figures))
    return 0


class _EventsBar:
    """Shows how many events are done; the bar begins when their number is known."""

    def __init__(self, label: str, quiet: bool = False) -> None:
        self._label, self._quiet = label, quiet
        self._bar: Progress | None = None

    def __enter__(self) -> _EventsBar:
        return self

    def reached(self, done: int, total: int) -> None:
        """``done`` events of ``total`` are done."""
        if self._bar is None:
            self._bar = Progress(self._label, total, "events", quiet=self._quiet)
        self._bar.advance(done - self._bar.done)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)
