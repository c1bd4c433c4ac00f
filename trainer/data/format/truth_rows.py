"""Reading of the truth of a simulated world for some visits; nothing that trains does it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.console.errors import UserError
from trainer.data.format import storage
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import read_table
from trainer.data.format.schema import DatasetSpec, partition_of

PROBABILITIES, FACTORS = "part", "factors"
"""Beginnings of the names of files in ``truth/`` that have a line for each exposure."""


def read_truth_rows(
    path: str, kind: str, user_id: np.ndarray, visit_id: np.ndarray, columns: Sequence[str]
) -> dict[str, np.ndarray] | None:
    """Return columns of the truth of visits, each ``[n]``; None for a dataset without such files.

    Args:
        path: the dataset, a directory or an fsspec URL.
        kind: ``PROBABILITIES`` or ``FACTORS``.
        user_id, visit_id: ``[n]`` int64.
        columns: names of columns of the files.

    Raises:
        UserError: a file is damaged, or has no line of some of the visits.
    """
    spec, files = DatasetSpec.load(path), DatasetFiles(path)
    found: dict[str, np.ndarray] = {}
    owner = partition_of(user_id, spec.partitions)
    for partition in range(spec.partitions):
        name = f"truth/{kind}-{partition:05d}.parquet"
        mine = np.flatnonzero(owner == partition)
        # The first file says whether there are such files.
        if partition and not len(mine):
            continue
        try:
            table = read_table(files, name, ["visit_id", *columns])
        except FileNotFoundError:
            return None
        visits = table["visit_id"].to_numpy()
        order = np.argsort(visits)
        if not np.isin(visit_id[mine], visits).all():
            raise UserError(f"{storage.join(path, name)}: damaged, or of another world: it has no line of some rows")
        line = order[np.searchsorted(visits, visit_id[mine], sorter=order)]
        for column in columns:
            values = table[column].to_numpy()
            found.setdefault(column, np.zeros(len(visit_id), values.dtype))[mine] = values[line]
    return found
