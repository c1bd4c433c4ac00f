"""Writes the dataset of a simulated world with known truth: ``limelight data simulate``.

Users watch short videos and live rooms for some days. Every behaviour has a true probability, a logistic function of
the world at request time. It is kept in ``truth/`` beside the log, on demand with the factors that it comes from, and
training never reads either. The parts of the world are described in ``trainer.data.simulator``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec
from trainer.data.simulator.comment_area import CommentReaders, comment_visits, make_comment_readers
from trainer.data.simulator.comments import Comments, comment_table, comment_truth, make_comments
from trainer.data.simulator.config import WorldConfig
from trainer.data.simulator.description import dataset_spec, entity_tables, segment_tables
from trainer.data.simulator.event_log import gift_prices, repeat_table, truth_table, visit_table
from trainer.data.simulator.factors import factor_names, factor_tables, factor_weights
from trainer.data.simulator.segment_vectors import DIM, MOST_NOISE, SegmentVectorGenerator
from trainer.data.simulator.texts import text_tables
from trainer.data.simulator.user_days import BLOCK, simulate_visits
from trainer.data.simulator.words import KINDS
from trainer.data.simulator.world import SimulatedWorld, make_world
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
    segment_noise: float | None = None,
    segment_taste: float = 0.0,
    lookahead: bool = False,
    newcomers: float = 0.0,
    interest_correlation: float | None = None,
    conflict: float = 0.0,
    factors: bool = False,
    video_rows: bool = False,
) -> DatasetSpec:
    """Simulate a world and write its log as a dataset.

    The world and its log depend on ``users``, ``days`` and ``seed`` only; ``partitions`` only distributes the rows over
    files. Memory is bounded by one day of ``user_days.BLOCK`` users and by what ``DatasetBuilder`` needs.

    Args:
        out: directory to make.
        users: number of users, each with about 36 exposures a day, a tenth of them live.
        days: number of simulated days.
        partitions: number of partitions of the dataset.
        seed: seed of every random stream.
        progress: callback that gets the name of a phase, the work done and the total work.
        texts: True to write the texts of videos, rooms and comments, and the time spent in the comments of videos.
            Everything else is the same, bit for bit, with and without them.
        segment_noise: noise of the vectors of the segments, 0 or more; None to write no vectors. Everything else is
            the same, bit for bit, with and without them.
        segment_taste: share of the variance of the authors' styles in these vectors that follows the traits which
            viewers like, from 0 to 1. It changes the vectors only.
        lookahead: True to let long views and gifts depend on the next three minutes of a room, too.
        newcomers: share of the live authors who open their first room on a random day of the log, from 0 to 1.
        interest_correlation: correlation over users between the interest in videos and that in rooms, from 0 to 1;
            None for the world of earlier versions, where it is about 0.7.
        conflict: how much what draws clicks repels likes, comments, gifts and follows, from 0 to 1.
        factors: True to write the true factors of every exposure beside its true probabilities. Everything else is the
            same, bit for bit, with and without them.
        video_rows: True to make training rows of the exposures of videos, too. The statistics of a row then count both
            domains. The log is the same.

    Raises:
        UserError: a size is below 1, another number is out of its range, or ``out`` cannot be built
            (``DatasetBuilder``).
    """
    for name, value in (("users", users), ("days", days), ("partitions", partitions), ("seed", seed)):
        least = 0 if name == "seed" else 1
        if value < least:
            raise UserError(f"simulate: {name} is {value}; it must be {least} or more")
    if segment_noise is not None and not 0 <= segment_noise <= MOST_NOISE:
        raise UserError(f"simulate: segment_noise is {segment_noise}; it must be in [0, {MOST_NOISE:.0f}]")
    if not 0 <= segment_taste <= 1:
        raise UserError(f"simulate: segment_taste is {segment_taste}; it must be in [0, 1]")
    if not 0 <= newcomers <= 1:
        raise UserError(f"simulate: newcomers is {newcomers}; it must be in [0, 1]")
    if interest_correlation is not None and not 0 <= interest_correlation <= 1:
        raise UserError(f"simulate: interest_correlation is {interest_correlation}; it must be in [0, 1]")
    if not 0 <= conflict <= 1:
        raise UserError(f"simulate: conflict is {conflict}; it must be in [0, 1]")
    config = WorldConfig(
        users,
        days,
        seed,
        lookahead=lookahead,
        newcomers=newcomers,
        interest_correlation=interest_correlation,
        conflict=conflict,
    )
    # A world without an option has no word of it, so that its description is that of earlier versions.
    extra: dict[str, Any] = {"comment_kinds": KINDS} if texts else {}
    if segment_noise is not None:
        extra["segment_vectors"] = {"dim": DIM, "noise": segment_noise}
        if segment_taste:
            extra["segment_vectors"]["taste"] = segment_taste
    if lookahead:
        extra["lookahead"] = True
    if newcomers:
        extra["newcomers"] = newcomers
    if interest_correlation is not None:
        extra["interest_correlation"] = interest_correlation
    if conflict:
        extra["conflict"] = conflict
    if factors:
        extra["factors"] = factor_names(config)
    spec = dataset_spec(config, partitions, ("video", "live") if video_rows else ("live",))
    total = days * -(-users // BLOCK)
    with DatasetBuilder(out, spec) as builder:
        world = make_world(config)
        for name, table in entity_tables(world).items():
            builder.table(name, table)
        for table in segment_tables(world, vectors=segment_noise is not None):
            builder.table("segments", table)
        if segment_noise is not None:
            SegmentVectorGenerator(world, segment_noise, segment_taste).write(builder)
        written = _write_texts(builder, world) if texts else None
        if factors:
            builder.text_truth("factor_weights", factor_weights(config))
        report = progress or (lambda what, done, total: None)
        report("simulating", 0, total)
        for day, visits in enumerate(simulate_visits(world)):
            rng = config.generator("log", day)
            price = gift_prices(world, visits, rng)
            builder.visits(visit_table(world, spec, visits, price, rng))
            builder.repeats(repeat_table(world, visits, rng))
            builder.truth(truth_table(visits))
            for table in factor_tables(world, visits) if factors else ():
                builder.factors(table)
            if written is not None:
                stays, truth = comment_visits(world, *written, visits, config.generator("comment area", day))
                builder.texts("visits", stays)
                builder.text_truth("staytime", truth)
            report("simulating", 1 + day, total)
        return builder.finish(progress, extra)


def _write_texts(builder: DatasetBuilder, world: SimulatedWorld) -> tuple[Comments, CommentReaders]:
    """Write the texts and the comments; return the comments and the traits of their readers."""
    for name, table in text_tables(world):
        builder.texts(name, table)
    comments = make_comments(world)
    builder.texts("comments", comment_table(world.config, comments))
    builder.text_truth("comments", comment_truth(comments))
    return comments, make_comment_readers(world)
