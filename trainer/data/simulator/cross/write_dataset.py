"""Writes the dataset of a world of long histories in two domains: ``limelight data simulate --world cross``.

The world is described in ``trainer.data.simulator.cross``. Beside the log and the true probabilities, the dataset has a
content vector for each item in ``embeddings/items``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.console.errors import UserError
from trainer.data.format.content_vectors import ITEM_VECTORS, ContentVectors, Origin
from trainer.data.format.schema import DatasetSpec
from trainer.data.simulator.cross.config import CrossConfig
from trainer.data.simulator.cross.description import dataset_spec, entity_tables, visit_table
from trainer.data.simulator.cross.exposures import BLOCK, simulate_visits
from trainer.data.simulator.cross.population import make_catalogue, make_users
from trainer.data.simulator.event_log import truth_table
from trainer.data.writing.builder import DatasetBuilder, Progress


def simulate_cross(
    out: str | Path, users: int, days: int, partitions: int, seed: int, progress: Progress | None = None
) -> DatasetSpec:
    """Simulate a world and write its log as a dataset.

    The world and its log depend on ``users``, ``days`` and ``seed`` only. Memory is bounded by the visits of
    ``exposures.BLOCK`` users in all days and by what ``DatasetBuilder`` needs.

    Args:
        out: directory to make.
        users: number of users, each with 70 exposures a day on average, 15 of 100 live.
        days: number of simulated days; with 60, a user has 4,000 visits on average and the most active one 12,000.
        partitions: number of partitions of the dataset.
        seed: seed of every random stream.
        progress: callback that gets the name of a phase, the work done and the total work.

    Raises:
        UserError: a size is below 1, the seed is negative, or ``out`` cannot be built (``DatasetBuilder``).
    """
    for name, value in (("users", users), ("days", days), ("partitions", partitions), ("seed", seed)):
        least = 0 if name == "seed" else 1
        if value < least:
            raise UserError(f"simulate: {name} is {value}; it must be {least} or more")
    config = CrossConfig(users, days, seed)
    spec = dataset_spec(config, partitions)
    report = progress or (lambda what, done, total: None)
    blocks = -(-users // BLOCK)
    with DatasetBuilder(out, spec) as builder:
        catalogue, cross_users = make_catalogue(config), make_users(config)
        for name, table in entity_tables(config, catalogue, cross_users).items():
            builder.table(name, table)
        origin = Origin(pooling="content vectors of the simulated world")
        ContentVectors.write(builder.folder(ITEM_VECTORS), np.arange(config.items), catalogue.vector, origin=origin)
        report("simulating", 0, blocks)
        for block, visits in enumerate(simulate_visits(config, catalogue, cross_users)):
            builder.visits(visit_table(spec, catalogue, visits, config.generator("log", block)))
            builder.truth(truth_table(visits))
            report("simulating", 1 + block, blocks)
        return builder.finish(progress)
