"""``limelight data``: make, describe and verify datasets."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launch.cli.command import Group, json_option, print_json
from launch.cli.data_instructions import instructions
from trainer.console.errors import UserError
from trainer.console.exit_status import CHECK_FAILED_STATUS
from trainer.console.outputs import InputPath, Output, OutputPath

if TYPE_CHECKING:
    from trainer.console.progress import Phases
    from trainer.data.format.schema import DatasetSpec

_UNITS = {
    "simulating": "blocks",
    "writing rows": "rows",
    "reading files": "bytes",
    "computing checksums": "bytes",
    "comparing checksums": "bytes",
    "reading rows": "rows",
}

_EVERYDAY_ONLY = {
    "--texts": "texts",
    "--segment-vectors": "segments",
    "--lookahead": "segments",
    "--newcomers": "authors who come later",
    "--interest-correlation": "interest that videos and rooms share",
    "--conflict": "conflict between behaviours",
    "--factors": "file of factors",
    "--video-rows": "choice of rows",
}
"""Option of `data simulate` -> what the world `cross` does not have for it."""

partitions_option = click.option(
    "--partitions",
    type=int,
    default=8,
    show_default=True,
    metavar="P",
    help="Partitions of the users, at least as many as ranks will train.",
)
out_argument = click.argument(
    "out",
    metavar="OUT",
    type=OutputPath(),
    help="Dataset to make: a new directory, or a URL (s3://BUCKET/PATH).",
)


def source_argument(help_text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the argument ``SRC`` of an import."""
    return click.argument("src", metavar="SRC", type=InputPath(), help=help_text)


@click.group(cls=Group, example="limelight data describe data/world")
def data() -> None:
    """Make, describe and verify datasets."""


@data.command(
    short_help="Simulate a world with known probabilities.",
    example="limelight data simulate data/world --users 20000 --days 7 --partitions 8 --seed 1",
)
@out_argument
@click.option(
    "--world",
    type=click.Choice(["everyday", "cross"]),
    default="everyday",
    show_default=True,
    help="everyday: many users for some days; cross: histories of up to 10,000 visits, in which each of five searches "
    "finds what the others do not, such as --users 400 --days 60.",
)
@click.option("--users", type=int, default=20_000, show_default=True, metavar="N", help="Number of users.")
@click.option("--days", type=int, default=7, show_default=True, metavar="D", help="Number of days.")
@partitions_option
@click.option("--seed", type=int, default=1, show_default=True, metavar="S", help="Seed of the world.")
@click.option(
    "--texts", is_flag=True, help="Add texts of videos, rooms and comments, and the time spent reading comments."
)
@click.option(
    "--segment-vectors",
    is_flag=True,
    help="Add a vector of 128 numbers for each 30-second segment of a room: topic, author, drift over the days, noise.",
)
@click.option(
    "--segment-noise",
    type=float,
    metavar="X",
    help="Noise of --segment-vectors, in lengths of its other parts (default 0.8).",
)
@click.option(
    "--segment-taste",
    type=float,
    default=0.0,
    metavar="SHARE",
    help="Share of the authors' styles in --segment-vectors that follows what viewers like, 0 to 1 (default 0).",
)
@click.option(
    "--lookahead", is_flag=True, help="Let long views and gifts depend on the next three minutes of a room, too."
)
@click.option(
    "--newcomers",
    type=float,
    default=0.0,
    metavar="SHARE",
    help="Share of the live authors who open their first room on a random day of the log, 0 to 1 (default 0).",
)
@click.option(
    "--interest-correlation",
    type=float,
    metavar="R",
    help="Correlation of the users' interests in videos with those in rooms, 0 to 1 (default: about 0.7, of vectors "
    "that are drawn in another way).",
)
@click.option(
    "--conflict",
    type=float,
    default=0.0,
    metavar="C",
    help="How much what draws clicks repels likes, comments, gifts and follows, 0 to 1 (default 0).",
)
@click.option(
    "--factors",
    is_flag=True,
    help="Store the true factors of each exposure (mood, taste, ...) beside its true probabilities.",
)
@click.option(
    "--video-rows",
    is_flag=True,
    help="Make training rows of the videos that users saw, too, not of rooms only: ten times as many rows.",
)
@json_option
def simulate(
    out: Output,
    world: str,
    users: int,
    days: int,
    partitions: int,
    seed: int,
    texts: bool,
    segment_vectors: bool,
    segment_noise: float | None,
    segment_taste: float,
    lookahead: bool,
    newcomers: float,
    interest_correlation: float | None,
    conflict: float,
    factors: bool,
    video_rows: bool,
    as_json: bool,
) -> None:
    """Simulate users of short videos and live rooms, and write their log as a dataset.

    The true probability of every behaviour is stored beside the log, in files that no training reads.

    \b
      # vectors for codebooks, and behaviours that depend on what comes next
      limelight data simulate data/segments --users 2000 --days 4 \\
          --segment-vectors --lookahead
    """
    from trainer.data.simulator.cross.write_dataset import simulate_cross
    from trainer.data.simulator.segment_vectors import DEFAULT_NOISE
    from trainer.data.simulator.write_dataset import simulate as simulate_everyday

    if world == "cross":
        options = {
            "--texts": texts,
            "--segment-vectors": segment_vectors,
            "--lookahead": lookahead,
            "--newcomers": newcomers,
            "--interest-correlation": interest_correlation is not None,
            "--conflict": conflict,
            "--factors": factors,
            "--video-rows": video_rows,
        }
        for option in (option for option, used in options.items() if used):
            raise UserError(
                f"{option}: the world `cross` has no {_EVERYDAY_ONLY[option]}; leave it out, or choose --world everyday"
            )
    if segment_noise is not None and not segment_vectors:
        raise UserError("--segment-noise: belongs to the vectors of --segment-vectors; add it, or leave the noise out")
    if segment_taste and not segment_vectors:
        raise UserError("--segment-taste: belongs to the vectors of --segment-vectors; add it, or leave the taste out")
    noise = (DEFAULT_NOISE if segment_noise is None else segment_noise) if segment_vectors else None

    def work(target: Path, progress: Phases) -> DatasetSpec:
        if world == "cross":
            return simulate_cross(target, users, days, partitions, seed, progress)
        return simulate_everyday(
            target,
            users,
            days,
            partitions,
            seed,
            progress,
            texts=texts,
            segment_noise=noise,
            segment_taste=segment_taste,
            lookahead=lookahead,
            newcomers=newcomers,
            interest_correlation=interest_correlation,
            conflict=conflict,
            factors=factors,
            video_rows=video_rows,
        )

    _make(out, work, as_json)


@data.group(name="import", example="limelight data import kuairand downloads/KuaiRand-Pure data/kuairand")
def import_() -> None:
    """Import a published log, or your own."""


@import_.command(
    short_help="KuaiRand-Pure, -1K or -27K.",
    example="limelight data import kuairand downloads/KuaiRand-Pure data/kuairand",
)
@source_argument("The unpacked folder, or the folder data/ in it.")
@out_argument
@partitions_option
@click.option("--random", is_flag=True, help="Also import the randomly exposed videos of log_random_*.")
@json_option
def kuairand(src: str, out: Output, partitions: int, random: bool, as_json: bool) -> None:
    """Import KuaiRand as its authors publish it (Gao et al., CIKM 2022; https://zenodo.org/records/10439422)."""
    from trainer.data.importers.kuairand import import_kuairand

    _make(
        out,
        lambda target, progress: import_kuairand(src, target, partitions, random=random, progress=progress),
        as_json,
    )


@import_.command(
    short_help="KuaiLive: live rooms with exposures.",
    example="limelight data import kuailive downloads/KuaiLive data/kuailive",
)
@source_argument("The unpacked folder.")
@out_argument
@partitions_option
@json_option
def kuailive(src: str, out: Output, partitions: int, as_json: bool) -> None:
    """Import KuaiLive as its authors publish it (https://zenodo.org/records/16565801; not for commercial use).

    trainer/data/importers/kuailive.py lists the columns that are left out because they contain the future.
    """
    from trainer.data.importers.kuailive import import_kuailive

    _make(out, lambda target, progress: import_kuailive(src, target, partitions, progress), as_json)


@import_.command(
    name="kuailive-m3",
    short_help="KuaiLive-M3: live rooms, videos, vectors, texts.",
    example="limelight data import kuailive-m3 downloads/KuaiLive-M3 data/kuailive-m3",
)
@source_argument("The downloaded folder.")
@out_argument
@partitions_option
@json_option
def kuailive_m3(src: str, out: Output, partitions: int, as_json: bool) -> None:
    """Import KuaiLive-M3 as its authors publish it (https://huggingface.co/datasets/imgkkk2004/KuaiLive-M3).

    trainer/data/importers/kuailive_m3.py lists the columns that are left out because they contain the future.
    """
    from trainer.data.importers.kuailive_m3 import import_kuailive_m3

    _make(out, lambda target, progress: import_kuailive_m3(src, target, partitions, progress), as_json)


@import_.command(
    short_help="KuaiComt: videos, comments, staytimes.",
    example="limelight data import kuaicomt downloads/KuaiComt data/kuaicomt",
)
@source_argument("The unpacked folder.")
@out_argument
@partitions_option
@json_option
def kuaicomt(src: str, out: Output, partitions: int, as_json: bool) -> None:
    """Import KuaiComt as its authors publish it (https://github.com/lyingCS/KuaiComt.github.io).

    Its files may be separated by commas or tabs.
    """
    from trainer.data.importers.kuaicomt import import_kuaicomt

    _make(out, lambda target, progress: import_kuaicomt(src, target, partitions, progress), as_json)


@import_.command(
    short_help="Your own Parquet or CSV files.",
    example="limelight data import events logs/ data/mine --mapping map.toml",
)
@source_argument("A .parquet, .csv or .csv.gz file, or a folder of them.")
@out_argument
@click.option(
    "--mapping", required=True, metavar="MAP.toml", type=InputPath(), help="File that says what each column means."
)
@partitions_option
@json_option
def events(src: str, out: Output, mapping: str, partitions: int, as_json: bool) -> None:
    """Turn a log of your own (Parquet or CSV) into a dataset. A TOML file says what its columns mean:

    \b
      layout = "exposures"        # a line is an exposure with its outcomes;
                                  # "events": a line is one event
      files = "*"                 # "**/*.parquet" for folders dt=2022-05-04;
                                  # then dt is a column, too
      timezone = "Asia/Shanghai"  # of days, and of times without an offset
      [columns]
      user_id = "uid"             # canonical name = your column
      author_id = "anchor"
      item_id = "room"
      time = "ts"                 # an integer in time_unit (default "ms"),
                                  # or ISO 8601
      play_ms = "watched_ms"
      [domain]
      constant = "live"           # or: column = "kind", video = ["1"],
                                  #     live = ["2", "3"]
      [behaviours]                # in label order
      click = {column = "clicked", at = "start"}
      gift = {column = "gift_price"}               # the behaviour `gift` has a price

    trainer/data/importers/events.py describes all keys, and the layout "events". docs/data.md says how values are
    read: texts that mean "no value", categories, numbers, lines that are there twice.
    """
    from trainer.data.importers.events import import_events

    _make(out, lambda target, progress: import_events(src, target, mapping, partitions, progress), as_json)


@data.command(
    short_help="Print counts and distributions of a dataset.",
    example="limelight data describe data/world --json",
)
@click.argument("path", metavar="PATH", type=InputPath(urls=True), help="Dataset: a directory or an fsspec URL.")
@json_option
def describe(path: str, as_json: bool) -> None:
    """Print counts, time span, behaviour rates, history lengths, cardinalities and the balance of the partitions."""
    from trainer.data.format.description import describe as describe_dataset
    from trainer.data.format.description import format_description

    description = describe_dataset(path)
    print_json(description) if as_json else print(format_description(description))


@data.command(
    short_help="Read a dataset whole, and compare its checksums.",
    help="Read every file of a dataset, compare it with the checksum that was recorded when it was written, and check "
    "that rows, histories, events and tables fit together.\n\n"
    f"Exit status {CHECK_FAILED_STATUS} if a file is damaged; one line on stderr names each.",
    example="limelight data verify data/world",
)
@click.argument("path", metavar="PATH", type=InputPath(urls=True), help="Dataset: a directory or an fsspec URL.")
@click.option(
    "--record",
    is_flag=True,
    help="Record the present files after a change on purpose, or for a dataset without checksums.",
)
@json_option
def verify(path: str, record: bool, as_json: bool) -> int:
    """Print the result, and the damage on stderr."""
    from trainer.console.progress import Phases
    from trainer.data.format.verification import record_dataset, verify_dataset

    with Phases(_UNITS, quiet=as_json) as progress:
        result = (record_dataset if record else verify_dataset)(path, progress)
    print_json(result.to_json()) if as_json else print(result)
    for problem in result.problems:
        print(f"limelight: error: {problem}", file=sys.stderr)
    return CHECK_FAILED_STATUS if result.problems else 0


data.add_command(instructions)


def _make(out: Output, work: Callable[[Path, Phases], DatasetSpec], as_json: bool) -> None:
    """Make a dataset with progress bars, and print its size."""
    from trainer.console.progress import Phases
    from trainer.data.importers.import_notes import import_notes
    from trainer.runtime.malloc import keep_freed_memory

    keep_freed_memory()
    with out.writing("dataset.json", quiet=as_json) as target, Phases(_UNITS, quiet=as_json) as progress:
        spec = work(target, progress)
    users = spec.ids["user"].count
    if as_json:
        notes = import_notes(spec.extra)
        print_json({"out": str(out), "rows": spec.rows, "users": users, "partitions": spec.partitions, "notes": notes})
        return
    print(f"{out}: {spec.rows:,} training rows of {users:,} users in {spec.partitions} partitions")
    for note in import_notes(spec.extra):
        print(f"  {note}")
    print(f"look at it: limelight data describe {out}")
