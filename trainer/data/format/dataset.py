"""An opened dataset: its description, rows and histories."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.console.errors import UserError
from trainer.data.format import storage
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.history import Histories
from trainer.data.format.schema import DatasetSpec, Rows
from trainer.data.format.shards import FOLDER, RowStore, index_name
from trainer.data.format.statistics import FrozenStatistics, StatisticsAsOf
from trainer.data.format.time_selection import Selection
from trainer.runtime.checksums import CHECKSUMS

if TYPE_CHECKING:
    from trainer.runtime.distributed import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """An opened dataset.

    Attributes:
        spec: description of the dataset.
        store: its training rows.
        histories: the histories of its users.
    """

    spec: DatasetSpec
    store: RowStore
    histories: Histories

    @staticmethod
    def open(path: str, on_corrupt: Any = "error") -> Dataset:
        """Open the dataset at ``path``, and check that its files fit together; ``on_corrupt`` is for :class:`RowStore`.

        This reads the description, the index of the rows, and of the histories the users, offsets and times. The other
        columns of the histories are not compared with their checksums before :meth:`verify`.

        Raises:
            UserError: there is no dataset, it has another schema version, or a file is missing, of another size than
                was recorded, damaged, or does not fit to the others; names the file.
        """
        spec, files = DatasetSpec.load(path), DatasetFiles(path)
        # Shards have a checksum for each record; a job can leave out the records that are damaged.
        files.check_sizes(skip=lambda name: on_corrupt == "skip" and name.endswith(".tar"))
        store = RowStore(path, spec, on_corrupt)
        store.check(spec)
        return Dataset(spec, store, Histories(path, spec))

    def verify(self, world: World | None = None) -> None:
        """Read the histories whole, and compare them with their checksums.

        Args:
            world: ranks of the job, each of which reads its share of the files once on its machine. Collective. None
                reads all files in this process.

        Raises:
            UserError: a file is damaged; names the file, on every rank.
        """
        files = DatasetFiles(self.store.path)
        if files.checksums is None and (world is None or world.rank == 0):
            logger.info(
                f"{files.path}: only its structure is checked, it has no {CHECKSUMS} (an earlier version made it); "
                f"`limelight data verify {files.path} --record` adds one"
            )
        first, step = (0, 1) if world is None else world.place_on_machine()
        problem = None
        try:
            self.histories.verify(files, self.histories.file_names[first::step])
        except UserError as error:
            problem = str(error)
        if world is not None:
            found = world.gather(problem)
            problem = world.agree(next(filter(None, found), None) if found else None)
        if problem is not None:
            raise UserError(problem)


def fingerprint(path: str, spec: DatasetSpec) -> str:
    """Return a hash of a dataset's description and of the index of its rows, which has a checksum of every record."""
    digest = hashlib.blake2b(spec.to_json().encode(), digest_size=16)
    for partition in range(spec.partitions):
        digest.update(storage.read_bytes(storage.join(path, f"{FOLDER}/{index_name(partition)}")))
    return digest.hexdigest()


def freeze_statistics(data: Dataset, until_ms: int) -> FrozenStatistics:
    """Count the statistics over all rows of a dataset that were emitted before ``until_ms``, in one pass."""
    frozen = FrozenStatistics(data.spec)
    for rows in selected_rows(data, Selection(emit_until=until_ms)):
        frozen.add(rows)
    return frozen


def statistics_as_of(data: Dataset, requests: Rows) -> np.ndarray:
    """Return the statistics of requests, each over the rows of a dataset emitted before it, in one pass.

    Args:
        data: dataset whose rows are counted.
        requests: n rows with the columns of the keys and ``request_ms``, in any order.

    Returns:
        ``[n, keys * (1 + behaviours)] float32``.
    """
    statistics = StatisticsAsOf(data.spec, requests)
    for rows in selected_rows(data, Selection(emit_until=int(requests["request_ms"].max(initial=0)))):
        statistics.add(rows)
    return statistics.lookup()


def selected_rows(data: Dataset, selection: Selection) -> Iterator[Rows]:
    """Yield the selected rows of a dataset, record by record."""
    for partition in range(data.store.partitions):
        for record in np.flatnonzero(selection.touches(data.store.records(partition))).tolist():
            rows = data.store.read(partition, record)
            if rows is not None:
                kept = selection.mask(rows)
                yield {name: column[kept] for name, column in rows.items()}
