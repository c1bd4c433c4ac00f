"""A world with known truth: ``limelight data simulate``.

Users watch short videos and live rooms for some days; every behaviour has a true probability, a logistic function of
the world at request time, which is kept in ``truth/`` beside the log and read by nothing that trains. The world is
described part by part in ``trainer.data.simulator``.
"""

from __future__ import annotations

from pathlib import Path

from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec
from trainer.data.simulator.comment_area import Readers, comment_visits, make_readers
from trainer.data.simulator.comments import Comments, comment_table, comment_truth, make_comments
from trainer.data.simulator.config import WorldConfig
from trainer.data.simulator.description import describe_world, tables
from trainer.data.simulator.event_log import gift_prices, repeat_table, truth_table, visit_table
from trainer.data.simulator.texts import text_tables
from trainer.data.simulator.user_days import BLOCK, visits_of
from trainer.data.simulator.words import KINDS
from trainer.data.simulator.world import World, make_world
from trainer.data.writing.builder import DatasetBuilder, Progress


def simulate(
    out: str | Path,
    users: int,
    days: int,
    partitions: int,
    seed: int,
    progress: Progress | None = None,
    *,
    texts: bool = False,
) -> DatasetSpec:
    """Simulate a world and write its log as a dataset.

    The world and all that happens in it depend on ``users``, ``days`` and ``seed`` alone; ``partitions`` decides only
    which file holds what. Memory is bounded by a day of ``life.BLOCK`` users and by what ``DatasetBuilder`` needs.

    Args:
        out: directory to make.
        users: number of users, each with about 36 exposures a day, a tenth of them live.
        days: simulated days.
        partitions: of the dataset.
        seed: of every random number.
        progress: told what is being done, how much of it is done, and how much there is.
        texts: with what videos, rooms and comments say, and with the time spent in the comments of videos. All else
            is the same, bit for bit, with and without them.

    Raises:
        UserError: a size below 1, a negative seed, or ``out`` cannot be built (``DatasetBuilder``).
    """
    for name, value in (("users", users), ("days", days), ("partitions", partitions), ("seed", seed)):
        least = 0 if name == "seed" else 1
        if value < least:
            raise UserError(f"simulate: {name} is {value}; it must be {least} or more")
    config = WorldConfig(users, days, seed)
    spec = describe_world(config, partitions)
    total = days * -(-users // BLOCK)
    with DatasetBuilder(out, spec) as builder:
        world = make_world(config)
        for name, table in tables(world).items():
            builder.table(name, table)
        written = _write_texts(builder, world) if texts else None
        report = progress or (lambda what, done, total: None)
        report("simulating", 0, total)
        for day, visits in enumerate(visits_of(world)):
            rng = config.generator("log", day)
            price = gift_prices(world, visits, rng)
            builder.visits(visit_table(world, spec, visits, price, rng))
            builder.repeats(repeat_table(world, visits, rng))
            builder.truth(truth_table(visits))
            if written is not None:
                stays, truth = comment_visits(world, *written, visits, config.generator("comment area", day))
                builder.texts("visits", stays)
                builder.text_truth("staytime", truth)
            report("simulating", 1 + day, total)
        return builder.finish(progress, {"comment_kinds": KINDS} if texts else None)


def _write_texts(builder: DatasetBuilder, world: World) -> tuple[Comments, Readers]:
    """Write what there is to read; returns the comments and what their readers are like."""
    for name, table in text_tables(world):
        builder.texts(name, table)
    comments = make_comments(world)
    builder.texts("comments", comment_table(world.config, comments))
    builder.text_truth("comments", comment_truth(comments))
    return comments, make_readers(world)
