"""Predictions of the held-out range that a run keeps, for its report and for comparisons with other runs.

``RUN/held_out.parquet`` has the rows of all users, or of a sample of them if these are more than :data:`KEPT` rows. The
sample depends on the users' ids alone, so that two runs keep the same users. Columns, for each behaviour B::

    user_id, visit_id, request_ms    int64
    p_B, label_B, mask_B             float32, uint8, uint8
    truth_B                          float32: the true probability, if it is known
    item_id, author_id               int64: of the room or video; -1 if its row cannot be read
    earlier_user, earlier_author     float32: rows of the user, and of the author, before the request, if counted
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from trainer.data.format.dataset import Dataset
from trainer.data.format.schema import partition_of
from trainer.data.format.time_selection import Selection
from trainer.data.loading.batch_plan import partitions_of_rank
from trainer.ranking.evaluation import Predictions
from trainer.runtime.distributed import World
from trainer.runtime.files import whole_file

HELD_OUT = "held_out.parquet"

KEPT = 1 << 19
"""Largest number of rows that a run keeps, of all ranks together: about 50 MB."""

IDS = ("item_id", "author_id")
"""Ids of the stored rows that are kept."""

COUNTED = ("user", "author")
"""Keys of the statistics whose numbers of earlier rows are kept."""

TIME_ZONE = b"timezone"
USERS_BELOW = b"users_below"
"""Keys of the file's metadata: the dataset's time zone; the bound of the kept users' hashes."""

USER_HASHES = (1 << 31) - 1
"""Number of values of a user's hash; a prime, so that a range of them has users of every partition."""


def write_held_out(
    file: Path,
    predictions: Predictions,
    behaviours: Sequence[str],
    truth: Tensor | None,
    data: Dataset,
    selection: Selection,
    world: World,
) -> None:
    """Write the rows of all ranks that a run keeps. Collective.

    Args:
        file: to write, by the first rank.
        predictions: of this rank.
        behaviours: names of the K columns.
        truth: ``[rows, K]`` true probabilities of this rank's rows, if they are known.
        data: dataset of the rows.
        selection: the held-out range.
        world: the ranks.
    """
    rows = world.sum(len(predictions.user_id))
    below = USER_HASHES if rows <= KEPT else USER_HASHES * KEPT // rows
    kept = np.flatnonzero(partition_of(predictions.user_id.numpy(), USER_HASHES) < below)
    columns = {name: getattr(predictions, name).numpy()[kept] for name in ("user_id", "visit_id", "request_ms")}
    columns |= stored_columns(data, selection, columns["visit_id"], world)
    for k, behaviour in enumerate(behaviours):
        columns[f"p_{behaviour}"] = predictions.probability[:, k].numpy()[kept]
        columns[f"label_{behaviour}"] = predictions.label[:, k].numpy()[kept].astype(np.uint8)
        columns[f"mask_{behaviour}"] = predictions.mask[:, k].numpy()[kept].astype(np.uint8)
        if truth is not None:
            columns[f"truth_{behaviour}"] = truth[:, k].numpy()[kept]
    tables = world.gather(pa.table(columns))
    if tables is not None:
        notes = {TIME_ZONE: data.spec.timezone.encode(), USERS_BELOW: str(below).encode()}
        with whole_file(file) as tmp_path:
            pq.write_table(pa.concat_tables(tables).replace_schema_metadata(notes), tmp_path)


def stored_columns(data: Dataset, selection: Selection, visit_id: np.ndarray, world: World) -> dict[str, np.ndarray]:
    """Return columns of the stored rows of this rank's partitions, for each visit, ``[n]``.

    Returns:
        The columns of :data:`IDS`, int64, -1 for a visit whose row cannot be read; and for each key of :data:`COUNTED`
        that the dataset counts, the number of earlier rows of the user or author as float32, nan for such a visit.
    """
    width = 1 + len(data.spec.behaviours)
    places = {key: data.spec.statistics.index((key,)) * width for key in COUNTED if (key,) in data.spec.statistics}
    names = ("visit_id", *IDS, *(["stat"] if places else []))
    visits = [np.zeros(0, np.int64)]
    ids = [np.zeros((0, len(IDS)), np.int64)]
    counts = [np.zeros((0, len(places)), np.float32)]
    for partition in partitions_of_rank(data.spec.partitions, world.rank, world.size):
        for record in np.flatnonzero(selection.touches(data.store.records(partition))).tolist():
            rows = data.store.read(partition, record, names)
            if rows is not None:
                visits.append(rows["visit_id"])
                ids.append(np.stack([rows[name] for name in IDS], axis=1))
                if places:
                    counts.append(rows["stat"][:, list(places.values())])
    known = np.concatenate(visits)
    order = np.argsort(known, kind="stable")
    place = np.searchsorted(known, visit_id, sorter=order)
    row = np.append(order, -1)[place]
    # The last line stands for a visit that is not there.
    row = np.where(np.append(known, -1)[row] == visit_id, row, -1)
    values = np.append(np.concatenate(counts), np.full((1, len(places)), np.nan, np.float32), axis=0)
    of_row = np.append(np.concatenate(ids), np.full((1, len(IDS)), -1), axis=0)[row]
    return {
        **{name: of_row[:, column] for column, name in enumerate(IDS)},
        **{f"earlier_{key}": values[row, column] for column, key in enumerate(places)},
    }
