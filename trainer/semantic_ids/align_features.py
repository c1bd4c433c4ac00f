"""Inputs of the two towers: positive pairs of training rows, and authors as of any time.

A pair has the ranker's features of its row (``trainer/data/features/feature_map.py``), the content of its author as of
the request, and the correction of its author. A request for an author has no user: its statistics are counted as of its
time, and its side and dense features come from the dataset's table of authors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from modules.author_fusion import TowerInputs
from trainer.config.align import AlignConfig
from trainer.console.errors import UserError
from trainer.data.features.author_features import AuthorSide, read_author_side
from trainer.data.features.dense_inputs import statistic_name
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.history_sequences import Searched
from trainer.data.features.packed_batch import BatchLayout, PackedBatch
from trainer.data.format import storage
from trainer.data.format.dataset import Dataset, statistics_as_of
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.history import Histories
from trainer.data.format.id_index import IdIndex
from trainer.data.format.moving_statistics import MovingStatistics
from trainer.data.format.parquet_files import read_table, table_footer
from trainer.data.format.schema import DOMAINS, DatasetSpec, Rows, partition_of, row_columns
from trainer.data.loading.batch import RankingBatch, unpack
from trainer.semantic_ids.align_content import ContentSource, content_width
from trainer.semantic_ids.align_popularity import AuthorPopularity, positive_rows

_HASHES = 1 << 20
"""Number of values of the hash that chooses rows with content alone or with the unknown id."""

REQUESTS_AT_ONCE = 1 << 20
"""Requests for authors whose statistics are counted in one pass over the dataset."""


def choose_positives(spec: DatasetSpec, config: AlignConfig) -> tuple[str, ...]:
    """Return the behaviours that make a pair positive.

    Raises:
        UserError: the dataset does not have one of them.
    """
    chosen = config.data.positives or (("click",) if "click" in spec.behaviours else spec.behaviours[:1])
    for name in chosen:
        if name not in spec.behaviours:
            raise UserError(
                f"data.positives: the dataset has no behaviour {name!r}; it has {', '.join(spec.behaviours)}"
            )
    return chosen


@dataclass(frozen=True)
class PairFeatures:
    """Makes batches of pairs; the loader reads rows with it as with a feature map.

    Attributes:
        base: features of the rows.
        content: segment vectors of the authors.
        popularity: positives of the training range.
        positives: behaviours that make a pair positive.
        smoothing: of the correction; None for no correction.
        window_ms: length of the time before a row whose positives the correction counts; None for all of it.
        exclude: features of the dataset that are no inputs.
        vocabulary: authors with a row of their own in the table, ascending; None if the table has no vocabulary.
        content_only: share of the rows whose author uses content alone; 0 outside of training.
        id_dropout: share of the rows whose author reads the unknown id, as authors that are not :meth:`known` always
            do; 0 outside of training. None: those use content alone.
        seed: of the choice of these rows.
    """

    base: FeatureMap
    content: ContentSource
    popularity: AuthorPopularity
    positives: tuple[str, ...]
    smoothing: float | None
    window_ms: int | None = None
    exclude: tuple[str, ...] = ()
    vocabulary: np.ndarray | None = None
    content_only: float = 0.0
    id_dropout: float | None = None
    seed: int = 0

    @property
    def spec(self) -> DatasetSpec:
        """Description of the dataset."""
        return self.base.spec

    @property
    def layout(self) -> BatchLayout:
        """Layout of the batches: content and 1 for an author with a trained id follow the dense features."""
        n_dense = self.base.n_dense + content_width(self.content.dim) + 1
        return dataclasses.replace(self.base.layout, n_dense=n_dense, behaviours=0, pairs=True)

    def evaluated(self) -> PairFeatures:
        """Return the features for other rows than those of training."""
        return dataclasses.replace(self, content_only=0.0, id_dropout=None if self.id_dropout is None else 0.0)

    def known(self, authors: np.ndarray) -> np.ndarray:
        """Return True for authors that were trained on and whose id has a row of its own, ``[n]`` bool."""
        known = self.popularity.known(authors)
        return known if self.vocabulary is None else known & np.isin(authors, self.vocabulary)

    def prepare(self, histories: Histories, space: Searched | None = None) -> None:
        """Do the work that this process and its forked processes can share."""
        self.base.prepare(histories, space)
        self.content.prepare()

    def pack(
        self, rows: Rows, histories: Histories, as_of_ms: np.ndarray, space: Searched | None = None
    ) -> PackedBatch:
        """Return the inputs of the positive rows; the arguments are those of ``FeatureMap.pack``.

        Raises:
            UserError: the errors of ``FeatureMap.pack``.
        """
        positive = positive_rows(rows, [self.spec.behaviours.index(name) for name in self.positives])
        kept = {name: column[positive] for name, column in rows.items()}
        packed = self.pack_all(kept, histories, as_of_ms[positive], space)
        return dataclasses.replace(packed, left_out_rows=int((~positive).sum()))

    def pack_all(
        self,
        rows: Rows,
        histories: Histories,
        as_of_ms: np.ndarray,
        space: Searched | None = None,
        latest: np.ndarray | None = None,
    ) -> PackedBatch:
        """Return the inputs of all rows, positive or not; ``latest`` is for :meth:`ContentSource.read`."""
        packed, author = self.base.pack(rows, histories, as_of_ms, space), rows["author_id"]
        known = self.known(author)
        if self.id_dropout is not None:
            self.base.hide_ids("author", ~known | self._drawn(rows["visit_id"], self.id_dropout, self.seed), packed)
            # The row of the unknown id is trained, so the gate reads it.
            known[:] = True
        elif self.content_only:
            known &= ~self._drawn(rows["visit_id"], self.content_only)
        log_q = np.zeros(len(author), np.float32)
        if self.smoothing is not None:
            log_q = self.popularity.log_q(author, as_of_ms, self.smoothing, self.window_ms)
        dense = np.concatenate(
            [
                packed.columns(self.base.layout)["dense"].numpy(),
                self.content.read(author, as_of_ms, latest),
                known[:, None].astype(np.float32),
            ],
            axis=1,
        )
        return dataclasses.replace(
            packed,
            integers=torch.cat([packed.integers, torch.from_numpy(np.ascontiguousarray(author))]),
            floats=torch.from_numpy(np.concatenate([dense.ravel(), log_q])),
        )

    @staticmethod
    def _drawn(visits: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
        """Return True for a share of the visits, ``[n]`` bool.

        The choice is by a hash, so that it is the same in every order of reading, on any ranks and after a resume.
        """
        if seed:
            visits = visits ^ partition_of(np.array([seed]), 1 << 62)
        return np.asarray(partition_of(visits, _HASHES) < share * _HASHES)


def tower_inputs(features: PairFeatures) -> TowerInputs:
    """Return the places of the towers' inputs in the batches."""
    base, spec = features.base, features.spec
    included = [side for side in spec.side if side.name not in features.exclude]

    def side(of: str) -> dict[str, tuple[int, ...]]:
        places = tuple(place for place, feature in enumerate(included) if feature.of == of)
        return {"side": places} if places else {}

    def dense(of: str) -> tuple[int, ...]:
        named = {feature.name for feature in spec.dense if feature.of == of}
        rates = tuple(f"{statistic_name(key)}:" for key in spec.statistics if _owned(spec, key, of))
        # Counts of past visits that share nothing with a candidate are the user's; a job has no others.
        rates += ("past:",) if of == "user" else ()
        return tuple(
            place for place, name in enumerate(base.dense_names) if name in named or (rates and name.startswith(rates))
        )

    return TowerInputs(
        user_lookups=tuple(lookup.name for lookup in base.lookups if lookup.name == "user"),
        user_ids=side("user"),
        user_dense=dense("user"),
        histories=tuple(sequence.keys for sequence in base.sequences),
        author_id="author",
        author_ids=side("author"),
        author_dense=dense("author"),
        content=base.n_dense,
        vector_dim=features.content.dim,
    )


def _owned(spec: DatasetSpec, key: Sequence[str], owner: str) -> bool:
    """True if all parts of a key of the statistics are the id or side features of one owner."""
    return set(key) <= {owner, *(side.name for side in spec.side if side.of == owner)}


class AuthorRequests:
    """Makes batches of authors as of given times, without users.

    Args:
        data: the dataset.
        features: of the model.
        in_time: the requests of one call come later than those of the calls before, as a rule.

    Raises:
        UserError: the dataset has features of authors, and no table of authors or a damaged one.
    """

    def __init__(self, data: Dataset, features: PairFeatures, *, in_time: bool = False) -> None:
        self._data, self._features, spec = data, features, data.spec
        self._side = [k for k, side in enumerate(spec.side) if side.of == "author"]
        self._dense = [k for k, dense in enumerate(spec.dense) if dense.of == "author"]
        self._values, self._dense_values = _read_author_tables(data)
        self._keys = [k for k, key in enumerate(spec.statistics) if _owned(spec, key, "author")]
        # The statistics of these keys alone, which need no user.
        counted = dataclasses.replace(spec, statistics=tuple(spec.statistics[k] for k in self._keys))
        counted_data = dataclasses.replace(data, spec=counted)
        moving = MovingStatistics(counted_data)
        self._statistics = moving.as_of if in_time else partial(statistics_as_of, counted_data)

    def batches(
        self, authors: np.ndarray, as_of_ms: np.ndarray, rows: int, latest: np.ndarray | None = None
    ) -> Iterator[RankingBatch]:
        """Yield batches of ``rows`` requests in order; the last one is filled up with repetitions of its last request.

        The size of a batch is the same for all, because a kernel may round otherwise in another one.

        Args:
            authors: ``[n]`` int64.
            as_of_ms: ``[n]`` int64; nothing that became known later is read.
            rows: requests of a batch.
            latest: ``[n]`` int64, see :meth:`ContentSource.read`.
        """
        for start in range(0, len(authors), REQUESTS_AT_ONCE):
            part = slice(start, start + REQUESTS_AT_ONCE)
            columns = self._rows(authors[part], as_of_ms[part])
            for first in range(0, len(columns["author_id"]), rows):
                place = np.minimum(np.arange(first, first + rows), len(columns["author_id"]) - 1)
                chosen = {name: column[place] for name, column in columns.items()}
                packed = self._features.pack_all(
                    chosen,
                    self._data.histories,
                    chosen["request_ms"],
                    latest=None if latest is None else latest[start + place],
                )
                yield unpack(packed, self._features.layout, {})

    def _rows(self, authors: np.ndarray, as_of_ms: np.ndarray) -> Rows:
        """Return rows of these authors with an unknown user and item."""
        spec, n = self._data.spec, len(authors)
        rows = {name: np.zeros((n, *shape), dtype) for name, (dtype, shape) in row_columns(spec).items()}
        rows["author_id"], rows["request_ms"] = authors, as_of_ms
        # Ids that the dataset does not have, so that no history is read.
        rows["user_id"][:], rows["item_id"][:] = spec.ids["user"].max + 1, spec.ids["item"].max + 1
        rows["domain"][:] = DOMAINS.index(spec.candidates[0])
        if self._values is not None:
            rows["side"][:, self._side] = self._values.lookup(authors)
        if self._dense:
            index, values = self._dense_values
            rows["dense"][:, self._dense] = values[index.find(authors) + 1]
        if self._keys:
            counts = self._statistics(rows).reshape(n, len(self._keys), 1 + len(spec.behaviours))
            rows["stat"].reshape(n, len(spec.statistics), -1)[:, self._keys] = counts
        return rows


def check_author_tables(data: Dataset) -> None:
    """Check that features of authors can be read for :class:`AuthorRequests`, before anything is trained.

    Raises:
        UserError: as :class:`AuthorRequests`.
    """
    _read_author_tables(data)


def _read_author_tables(data: Dataset) -> tuple[AuthorSide | None, tuple[IdIndex, np.ndarray]]:
    """Return side and dense features of the dataset's authors."""
    spec, path = data.spec, data.store.path
    names = [side.name for side in spec.side if side.of == "author"]
    dense = [feature.name for feature in spec.dense if feature.of == "author"]
    if names or dense:
        try:
            table_footer(DatasetFiles(path), "authors.parquet")
        except FileNotFoundError:
            file = storage.join(path, "authors.parquet")
            raise UserError(
                f"{file}: no such file; the dataset has features of authors, and this table has them"
            ) from None
    return read_author_side(path, spec, names) if names else None, _dense_of_authors(path, dense)


def _dense_of_authors(path: str, names: Sequence[str]) -> tuple[IdIndex, np.ndarray]:
    """Return the numbers of the authors, and their dense features ``[1 + authors, names]``; line 0 is unknown."""
    index = IdIndex()
    if not names:
        return index, np.zeros((1, 0), np.float32)
    table = read_table(DatasetFiles(path), "authors.parquet", ["author_id", *names])
    author = table["author_id"].to_numpy()
    values = np.zeros((len(author) + 1, len(names)), np.float32)
    values[index.add(author) + 1] = np.stack([table[name].to_numpy() for name in names], axis=1)
    return index, values
