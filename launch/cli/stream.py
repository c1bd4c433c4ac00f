"""``limelight stream``: assemble the label stream of a log, measure it, and publish its events."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import click

from launch.cli.command import Group, json_option, print_json
from launch.cli.stream_publish import publish
from trainer.console.outputs import InputPath, Output, OutputPath

if TYPE_CHECKING:
    from trainer.console.progress import Progress
    from trainer.stream.labels.policy import EventTimeouts

# Names and defaults of trainer/stream/labels/policy.py, repeated since that file loads pydantic. A test compares.
POLICIES = ("full", "fast_slow", "realtime", "realtime_naive")
DEFAULT_SECONDS = {"fast": 300, "slow": 3600, "tick": 30, "idle": 7200, "max-out-of-orderness": 10}


def _milliseconds(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise click.BadParameter(f"{text!r} is not a number of seconds")
    return round(seconds * 1000)


def _seconds(name: str, help_text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        f"--{name}-seconds",
        callback=_milliseconds,
        metavar="S",
        help=f"{help_text} (default: {DEFAULT_SECONDS[name]}).",
    )


dataset_argument = click.argument(
    "dataset", metavar="DATASET", type=InputPath(urls=True), help="Dataset: a directory or an fsspec URL."
)
idle_option = _seconds("idle", "A visit without an exit event ends so long after its last event")


@click.group(cls=Group, example="limelight stream consistency data/world")
def stream() -> None:
    """Turn a log into a stream of labels or of events."""


@stream.command(
    short_help="Write training rows under a report policy.",
    example="limelight stream assemble data/world --policy realtime rows.parquet",
)
@dataset_argument
@click.argument(
    "out", metavar="OUT.parquet", type=OutputPath(), help="File or URL to write; an existing one is replaced."
)
@click.option("--policy", required=True, type=click.Choice(POLICIES), help="Report policy, see above.")
@click.option(
    "--mode",
    type=click.Choice(["batch", "incremental"]),
    default="batch",
    show_default=True,
    help="Assembler of stored logs, or that of live streams; both write the same rows.",
)
@_seconds("fast", "Window of the first row of fast_slow")
@_seconds("slow", "Window of the second row of fast_slow")
@_seconds("tick", "Interval of realtime and realtime_naive")
@idle_option
@_seconds("max-out-of-orderness", "An event that comes more than so long after a later one is late")
@json_option
def assemble(
    dataset: str,
    out: Output,
    policy: str,
    mode: Literal["batch", "incremental"],
    fast_seconds: int | None,
    slow_seconds: int | None,
    tick_seconds: int | None,
    idle_seconds: int | None,
    max_out_of_orderness_seconds: int | None,
    as_json: bool,
) -> None:
    """Write the training rows that a report policy makes of a dataset's event log.

    Partitions follow each other, each in order of emit_ms. Columns: visit_id, user_id, author_id, item_id, kind,
    request_ms, emit_ms, and label_B and mask_B for each behaviour B. Events that change no row are kept in
    OUT.unused_events.parquet, with the reason.

    \b
    full            one row at the end of the visit
    fast_slow       one row after --fast-seconds, and one after --slow-seconds
                    with the positives that the first row had as negatives
    realtime        first positives every --tick-seconds, the rest at the end
    realtime_naive  positives and negatives every --tick-seconds
    """
    from trainer.stream.labels.policy import make_policy
    from trainer.stream.labels.write_rows import assemble_dataset, unused_events_name

    windows = {"fast_ms": fast_seconds, "slow_ms": slow_seconds, "tick_ms": tick_seconds}
    report_policy = make_policy(policy, **{name: value for name, value in windows.items() if value is not None})
    timeouts = _timeouts(idle_seconds, max_out_of_orderness_seconds)
    # Made beside the rows, with a name of its own.
    unused = unused_events_name(str(out))
    with (
        out.writing(companions=(unused,), quiet=as_json) as file,
        _EventsBar("assembling", quiet=as_json) as progress,
    ):
        written = assemble_dataset(dataset, report_policy, timeouts, file, mode, progress.reached)
    unused_file = None if written.unused_file is None else out.beside(unused)
    rows = sum(written.rows.values())
    if as_json:
        print_json(
            {
                "out": str(out),
                "visits": written.visits,
                "rows": written.rows,
                "fast_slow_rows": written.fast_slow_rows,
                "unused_events": {reason: count for reason, count in written.unused_events.items() if count},
                "unused_events_file": unused_file,
            }
        )
        return
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in written.rows.items())
    print(f"{out}: {rows:,} rows of {written.visits:,} visits" + (f" ({kinds})" if kinds else ""))
    if written.fast_slow_rows:
        print(f"rows to those of fast_slow: {rows / written.fast_slow_rows:.2f}")
    if unused_file is not None:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in written.unused_events.items() if count)
        print(f"{unused_file}: {sum(written.unused_events.values()):,} events that change no row ({reasons})")


@stream.command(
    short_help="Print the share of labels known at 5 minutes.",
    example="limelight stream consistency data/world --json",
)
@dataset_argument
@idle_option
@json_option
def consistency(dataset: str, idle_seconds: int | None, as_json: bool) -> None:
    """Print Table 1 of Moment&Cross for a dataset.

    It is the share of an hour's positives that is visible at 5 minutes, with the paper's figures beside it, and the
    number of rows that each report policy makes.
    """
    from trainer.stream.labels.policy_consistency import consistency as measure
    from trainer.stream.labels.policy_consistency import format_consistency

    with _EventsBar("reading", quiet=as_json) as progress:
        figures = measure(dataset, _timeouts(idle_seconds).idle_ms, progress.reached)
    print_json(figures) if as_json else print(format_consistency(figures))


stream.add_command(publish)


def _timeouts(idle_ms: int | None, max_out_of_orderness_ms: int | None = None) -> EventTimeouts:
    from trainer.stream.labels.policy import EventTimeouts

    settings = {"idle_ms": idle_ms, "max_out_of_orderness_ms": max_out_of_orderness_ms}
    return EventTimeouts(**{name: value for name, value in settings.items() if value is not None})


class _EventsBar:
    """Progress over events; the bar starts when their number is known."""

    def __init__(self, label: str, quiet: bool) -> None:
        self._label, self._quiet = label, quiet
        self._bar: Progress | None = None

    def __enter__(self) -> _EventsBar:
        return self

    def reached(self, done: int, total: int) -> None:
        """Show that ``done`` events of ``total`` are done."""
        if self._bar is None:
            from trainer.console.progress import Progress

            self._bar = Progress(self._label, total, "events", quiet=self._quiet)
        self._bar.advance(done - self._bar.done)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)
