"""``limelight retrieve``: authors that are like an author, as of a time."""

from __future__ import annotations

import click

from launch.cli.command import Group, json_option, messages_on_stderr, print_json
from trainer.console.outputs import InputPath


@click.group(
    cls=Group,
    short_help="Find authors like an author.",
    help="Find authors whose rooms show what an author's room shows, as of a time.",
    example="limelight retrieve authors data/segments --author 293 --as-of 2024-03-09T20:00 --on-air",
)
def retrieve() -> None:
    """Find authors like an author."""


@retrieve.command(
    short_help="Print the authors nearest to an author.",
    help="Print the authors nearest to an author: by the cosine of their latest segment vectors, by "
    "the codes that they share, or by the users that they share. Only what is known at T is read, so nothing later "
    "changes the answer.\n\n"
    "--by codes counts the shared levels of the latest codes, from the first level to the first one that differs. Of "
    "equal authors, the one that shares more in its latest 10 runs of codes comes first, then the one with the smaller "
    "id.\n\n"
    "--by interactions compares authors by the users who met the rooms of both with the same behaviour under the same "
    "code before T, and shows the ranks by codes beside it, and with --vectors those by vectors.\n\n"
    "A room is on air at T if one of its segments became known in the 60 seconds before T. So a room that has ended is "
    "on air for up to a minute longer, and a new one is not before its first segment is known.",
    example="limelight retrieve authors data/segments --author 293 --as-of 2024-03-09T20:00 --codes codes.parquet",
)
@click.argument("dataset", metavar="DATASET", type=InputPath(urls=True), help="Dataset directory with segments.")
@click.option("--author", type=int, required=True, metavar="A", help="Id of the author.")
@click.option("--as-of", required=True, metavar="T", help="Time, such as 2024-03-09T20:00, in the dataset's time zone.")
@click.option(
    "--by",
    type=click.Choice(["vectors", "codes", "interactions"]),
    default="vectors",
    show_default=True,
    help="Comparison of the authors.",
)
@click.option(
    "--vectors",
    metavar="TABLE",
    type=InputPath(),
    help="Table of segment vectors (default: embeddings/segments of the dataset).",
)
@click.option("--codes", metavar="FILE", type=InputPath(), help="Code file of `limelight quantize assign`.")
@click.option(
    "--level",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --by interactions: levels of a code that must be equal (default 1).",
)
@click.option("--codebook", metavar="VERSION", type=InputPath(), help="Refuse codes and vectors of another version.")
@click.option("--on-air", is_flag=True, help="Only authors with a room on air at T.")
@click.option("-k", "count", type=click.IntRange(min=1), default=10, show_default=True, help="Number of authors.")
@json_option
def authors(
    dataset: str,
    author: int,
    as_of: str,
    by: str,
    vectors: str | None,
    codes: str | None,
    codebook: str | None,
    level: int | None,
    on_air: bool,
    count: int,
    as_json: bool,
) -> None:
    """Compare the authors in this process."""
    from trainer.semantic_ids.retrieval import AuthorRequest, retrieval_table, retrieve_authors

    with messages_on_stderr(as_json):
        document = retrieve_authors(
            dataset,
            AuthorRequest(
                author,
                as_of,
                by,  # type: ignore[arg-type]
                vectors=vectors or "",
                codes=codes or "",
                codebook=codebook or "",
                level=level,
                on_air=on_air,
                count=count,
            ),
        )
    if as_json:
        print_json(document)
    else:
        print(retrieval_table(document))
