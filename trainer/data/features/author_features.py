"""Side features of the authors of past visits, stored with the fitted features of a model.

Histories hold the author's id of each visit but no features of the author. ``features.author_side`` names side features
of authors that become inputs of the visits of a history. Their values are read from the dataset's table of authors when
the features are fitted, and are saved with them, so that scoring uses the same values as training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from trainer.console.errors import UserError
from trainer.data.format import storage, validation
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.id_index import IdIndex
from trainer.data.format.parquet_files import read_table
from trainer.data.format.schema import DatasetSpec


@dataclass(frozen=True)
class AuthorSide:
    """Values of some side features by author.

    Attributes:
        author_id: distinct ids, ``[authors]`` int64.
        values: ``[authors, features]`` int32.
    """

    author_id: np.ndarray
    values: np.ndarray
    _index: IdIndex = field(default_factory=IdIndex, init=False, repr=False, compare=False)
    _lines: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Line 0 stands for unknown authors; the other lines follow the numbers of the index.
        lines = np.zeros((len(self.author_id) + 1, self.values.shape[1]), np.int32)
        lines[self._index.add(self.author_id) + 1] = self.values
        object.__setattr__(self, "_lines", lines)

    def lookup(self, author_id: np.ndarray) -> np.ndarray:
        """Return the values of authors ``[n]`` as ``[n, features]`` int32; 0 (unknown) for unknown authors."""
        return self._lines[self._index.find(author_id) + 1]


def read_author_side(path: str, spec: DatasetSpec, names: Sequence[str]) -> AuthorSide:
    """Read side features of all authors of a dataset.

    Args:
        path: dataset, a local path or an fsspec URL.
        spec: description of the dataset.
        names: names of the features; all are side features of authors.

    Raises:
        UserError: the dataset has no table of authors, or a feature is missing there or has bad values.
    """
    file = storage.join(path, "authors.parquet")
    try:
        table = read_table(DatasetFiles(path), "authors.parquet")
    except FileNotFoundError:
        raise UserError(f"features.author_side: the dataset has no table of authors ({file})") from None
    schema = pa.schema([("author_id", pa.int64()), *((name, pa.int32()) for name in names)])
    columns = validation.columns_of(table.select([n for n in schema.names if n in table.column_names]), schema, file)
    validation.check_side(columns, tuple(side for side in spec.side if side.name in names), file)
    return AuthorSide(columns["author_id"], np.stack([columns[name] for name in names], axis=1))
