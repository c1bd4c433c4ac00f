"""A world of long histories in two domains with known truth: ``limelight data simulate --world cross``.

It is described in ``trainer.data.simulator.cross``. Beside the log and the true probabilities it has a content vector
for each item, an embedding table in ``embeddings/items``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.console.errors import UserError
from trainer.data.format.content_vectors import ContentVectors, Origin
from trainer.data.format.schema import DatasetSpec
from trainer.data.simulator.cross.config import CrossConfig
from trainer.data.simulator.cross.description import describe_world, tables, visit_table
from trainer.data.simulator.cross.exposures import BLOCK, visits_of
from trainer.data.simulator.cross.population import make_catalogue, make_users
from trainer.data.simulator.event_log import truth_table
from trainer.data.writing.builder import DatasetBuilder, Progress

ITEM_VECTORS = "embeddings/items"


def simulate_cross(
    out: str | Path, users: int, days: int, partitions: int, seed: int, progress: Progress | None = None
) -> DatasetSpec:
    """Simulate a world and write its log as a dataset.

    The world and all that happens in it depend on ``users``, ``days`` and ``seed`` alone. Memory is bounded by what
    ``life.BLOCK`` users do in all days and by what ``DatasetBuilder`` needs.

    Args:
        out: directory to make.
        users: number of users, each with 70 exposures a day on average, 15 of 100 live.
        days: simulated days; 60 give 4,000 visits to a user on average, and 12,000 to the busiest.
        partitions: of the dataset.
        seed: of every random number.
        progress: told what is being done, how much of it is done, and how much there is.

    Raises:
        UserError: a size below 1, a negative seed, or ``out`` cannot be built (``DatasetBuilder``).
    """
    for name, value in (("users", users), ("days", days), ("partitions", partitions), ("seed", seed)):
        least = 0 if name == "seed" else 1
        if value < least:
            raise UserError(f"simulate: {name} is {value}; it must be {least} or more")
    config = CrossConfig(users, days, seed)
    spec = describe_world(config, partitions)
    report = progress or (lambda what, done, total: None)
    blocks = -(-users // BLOCK)
    with DatasetBuilder(out, spec) as builder:
        catalogue, people = make_catalogue(config), make_users(config)
        for name, table in tables(config, catalogue, people).items():
            builder.table(name, table)
        origin = Origin(pooling="content vectors of the simulated world")
        ContentVectors.write(builder.folder(ITEM_VECTORS), np.arange(config.items), catalogue.vector, origin=origin)
        report("simulating", 0, blocks)
        for block, visits in enumerate(visits_of(config, catalogue, people)):
            builder.visits(visit_table(spec, catalogue, visits, config.generator("log", block)))
            builder.truth(truth_table(visits))
            report("simulating", 1 + block, blocks)
        return builder.finish(progress)
