"""``limelight quantize``: codebooks of segments: fit, assign, report and refresh."""

from __future__ import annotations

import click

from launch.cli.command import FIT, JobGroup, json_option, messages_on_stderr, print_json
from launch.cli.jobs import ranks_option
from trainer.console.job_arguments import TRAIN_ARGUMENTS
from trainer.console.outputs import InputPath, Output, OutputPath


@click.group(
    cls=JobGroup,
    short_help="Fit and use codebooks of segments.",
    help="Fit a codebook of the segments of a dataset by residual k-means, give segments their codes, measure "
    "codebooks, and refresh them.\n\nA job file in place of the command means `limelight quantize fit`.",
    example="limelight quantize configs/quantize.toml --ranks 2 codebook.levels=[20000]",
)
def quantize() -> None:
    """Fit and use codebooks of segments."""


@quantize.command(
    FIT,
    params=list(TRAIN_ARGUMENTS),
    short_help="Fit a codebook by a job file.",
    help="Fit a codebook of a dataset's segments by residual k-means, measure it on later segments, and write it as a "
    "version: a directory that is whole or not there. Any number of ranks gives the same bits. The same command again "
    "continues a fit that was ended.",
    example="limelight quantize fit configs/quantize.toml --ranks 2 codebook.levels=[20000]",
)
@ranks_option
def fit(config: str, overrides: tuple[str, ...], ranks: int) -> int:
    """Start the ranks of ``trainer.quantize``."""
    return _start(config, overrides, ranks)


@quantize.command(
    params=list(TRAIN_ARGUMENTS),
    short_help="Fit a newer version that keeps the numbers of an old one.",
    help="Fit a codebook that starts from the centroids of an old version. Then its codes are matched one to one to "
    "the old ones, so that as many segments as possible keep their code, and the shares of those that do are printed. "
    "The old version stays as it is.",
    example="limelight quantize refresh configs/quantize.toml --from data/codebooks/first "
    "codebook.directory=data/codebooks/second",
)
@click.option("--from", "old", metavar="OLD", type=InputPath(), required=True, help="Codebook version to refresh.")
@click.option(
    "--compare-cold",
    is_flag=True,
    help="Also fit from the job's own start, and say how many segments would keep their code then.",
)
@ranks_option
def refresh(config: str, overrides: tuple[str, ...], old: str, compare_cold: bool, ranks: int) -> int:
    """Start the ranks of ``trainer.quantize`` with an old version."""
    return _start(config, overrides, ranks, "--from", old, *(["--compare-cold"] if compare_cold else []))


VERSION = click.Argument(
    ["version"], metavar="VERSION", type=InputPath(), help="Directory of a codebook version, which the job wrote."
)
DATASET = click.Argument(
    ["dataset"], metavar="DATASET", type=InputPath(urls=True), help="Dataset directory with segments."
)
VECTORS = click.Option(
    ["--vectors"],
    metavar="TABLE",
    type=InputPath(),
    help="Table of segment vectors (default: embeddings/segments of the dataset).",
)


@quantize.command(
    params=[
        VERSION,
        DATASET,
        click.Argument(["out"], metavar="OUT.parquet", type=OutputPath(), help="Code file to write."),
        VECTORS,
        click.Option(
            ["--from", "time_from"], metavar="T", help="First time at which a segment became known, such as 2024-03-09."
        ),
        click.Option(["--until", "time_until"], metavar="T", help="End of the range; left out itself."),
    ],
    short_help="Write the codes of a dataset's segments.",
    help="Give the segments of a dataset their codes by a codebook version, and write them with room, author, segment "
    "and the time from which each is known to a Parquet file, which is whole or not there. With --store the codes are "
    "then appended to a store of recent codes, in the order in which they became known; the same command again changes "
    "nothing there.",
    example="limelight quantize assign data/codebooks/first data/segments codes.parquet --store codes.sqlite",
)
@click.option(
    "--store", metavar="ADDRESS", help="Also append to a store: an SQLite file, or redis://HOST:PORT/DATABASE."
)
@json_option
def assign(
    version: str,
    dataset: str,
    out: Output,
    vectors: str | None,
    time_from: str | None,
    time_until: str | None,
    store: str | None,
    as_json: bool,
) -> None:
    """Encode in this process."""
    from trainer.semantic_ids.code_files import assign_to_file
    from trainer.semantic_ids.redis_store import shown_address

    out.check()
    with messages_on_stderr(as_json), out.writing(quiet=as_json) as file:
        document = assign_to_file(
            version,
            dataset,
            file,
            vectors=vectors or "",
            time_from=time_from,
            time_until=time_until,
            store=store,
            quiet=as_json,
        )
    if as_json:
        print_json({"out": str(out), **document})
        return
    print(f"{out}: {document['segments']:,} segments with codes of {document['version']}", end="")
    print(f" (mean squared error {document['mean_error']:.4g})")
    print(f"without a code: {document['without_vector']:,} segments without a vector", end="")
    print(f"; without an author: {document['without_author']:,} segments of unknown rooms")
    if store is not None:
        print(f"{shown_address(store)}: " + ", ".join(f"{count:,} {name}" for name, count in document["store"].items()))


@quantize.command(
    params=[
        click.Argument(
            ["versions"], nargs=-1, required=True, metavar="VERSION...", type=InputPath(), help="Codebook versions."
        ),
        click.Option(
            ["--data"],
            metavar="DATASET",
            type=InputPath(urls=True),
            help="Measure on the segments of this dataset (default: the report that the job stored).",
        ),
        click.Option(
            ["--interactions"],
            metavar="DATASET",
            type=InputPath(urls=True),
            help="Report the meaning of one version's codes by the segments and events of this dataset.",
        ),
        VECTORS,
        click.Option(
            ["--codes"],
            metavar="FILE",
            type=InputPath(),
            help="With --interactions: code file of `limelight quantize assign` (default: encode the vectors).",
        ),
        click.Option(
            ["--level"],
            type=click.IntRange(min=1),
            metavar="N",
            help="With --interactions: codes of the first N levels together (default 1).",
        ),
        click.Option(
            ["--room"],
            type=int,
            metavar="ID",
            help="With --interactions: room of the timeline (default: the one with most interactions).",
        ),
        click.Option(
            ["-k", "count"],
            type=click.IntRange(min=1),
            metavar="N",
            help="With --interactions: lines of each table (default 20).",
        ),
        click.Option(
            ["--from", "time_from"],
            metavar="T",
            help="With --data or --interactions: first time at which a segment became known, such as 2024-03-09.",
        ),
        click.Option(["--until", "time_until"], metavar="T", help="End of the range; left out itself."),
        click.Option(
            ["--out"],
            metavar="PICTURE.png",
            type=OutputPath(),
            help="Also draw the report, or with --interactions the room, to this file.",
        ),
    ],
    short_help="Print the quality of codebook versions, or the meaning of codes.",
    help="Print, for each level of each version: distortion on held-out segments, unused codes, perplexity, Gini "
    "coefficient, the share of the most frequent 1 % of the codes, and persistence (the share of neighbouring segments "
    "of a room with one code); for the tuples of all levels also the share of vectors that are alone in theirs.\n\n"
    "With --interactions, print for each code of one version its share of the segments and of the watch time, what it "
    "shows, and the rate of each behaviour in its segments: per hour watched, for click per exposure. The intervals "
    "are over authors and over users, and wide enough for the number of codes. Then one room follows as a timeline.",
    example="limelight quantize report data/codebooks/first --out codebook.png",
)
@json_option
def report(
    versions: tuple[str, ...],
    data: str | None,
    interactions: str | None,
    vectors: str | None,
    codes: str | None,
    level: int | None,
    room: int | None,
    count: int | None,
    time_from: str | None,
    time_until: str | None,
    out: Output | None,
    as_json: bool,
) -> None:
    """Print stored reports, or measure in this process."""
    from trainer.console.errors import UserError

    if interactions is None:
        for name, value in (("--codes", codes), ("--level", level), ("--room", room), ("-k", count)):
            if value is not None:
                raise UserError(f"{name} needs --interactions, the dataset with segments and events")
        _report_quality(versions, data, vectors, time_from, time_until, out, as_json)
        return
    if data is not None:
        raise UserError("--data has no effect with --interactions; leave one of them out")
    if len(versions) > 1:
        raise UserError(f"--interactions takes one codebook version, and {len(versions)} are named")
    if codes is not None and vectors is not None:
        raise UserError("--vectors has no effect with --codes; leave one of them out")
    if out is not None:
        out.check()
    from trainer.semantic_ids.code_meaning import MeaningRequest, report_meaning
    from trainer.semantic_ids.code_meaning_text import meaning_text
    from trainer.semantic_ids.room_timeline import draw_room

    request = MeaningRequest(
        versions[0], interactions, codes or "", vectors or "", time_from, time_until, level or 1, room
    )
    with messages_on_stderr(as_json):
        document = report_meaning(request, quiet=as_json)
        if out is not None:
            with out.writing(quiet=as_json) as file:
                draw_room(document, file)
    if as_json:
        print_json(document)
        return
    print(meaning_text(document, count or 20))
    if out is not None:
        print(f"\npicture: {out}")


def _report_quality(
    versions: tuple[str, ...],
    data: str | None,
    vectors: str | None,
    time_from: str | None,
    time_until: str | None,
    out: Output | None,
    as_json: bool,
) -> None:
    """Print the quality of codebook versions."""
    from trainer.console.errors import UserError
    from trainer.semantic_ids.codebook_report import draw_reports, refresh_text, report_table
    from trainer.semantic_ids.codebook_versions_report import read_reports

    if data is None and (vectors or time_from or time_until):
        raise UserError("--vectors, --from and --until need --data, the dataset to measure on")
    if out is not None:
        out.check()
    reports = read_reports(versions, data, vectors or "", time_from, time_until)
    if out is not None:
        with out.writing(quiet=as_json) as file:
            draw_reports(reports, file)
    if as_json:
        print_json(reports)
        return
    print(report_table(reports))
    for found in reports.values():
        if "refresh" in found:
            print(f"\n{refresh_text(found['refresh'])}")
    if out is not None:
        print(f"\npicture: {out}")


def _start(config: str, overrides: tuple[str, ...], ranks: int, *more: str) -> int:
    from launch.local import start_ranks
    from trainer.config.quantize import load_quantize

    load_quantize(config, overrides)
    return start_ranks("trainer.quantize", [config, *overrides, *more], ranks)
