"""Maps canonical rows and histories to model inputs: declares tables and lookups, and fills the ids of a batch.

Every feature is as of a time that the caller gives, usually the request. Histories can only be read as of a time, and
the statistics of a row were counted when the row was made (``trainer/data/format/statistics.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from modules.embeddings import Lookup, Table, group_lookups
from trainer.config.features import FeatureConfig
from trainer.data.features.code_inputs import CodeInputs, CodeReader
from trainer.data.features.content_inputs import (
    ContentReader,
    FoundVectors,
    OwnerVectors,
    SegmentReadings,
    content_layouts,
    content_lookups,
)
from trainer.data.features.dataset_checks import check_layout, check_names
from trainer.data.features.dense_inputs import DenseInputs
from trainer.data.features.fit import ID_TABLES, FittedFeatures
from trainer.data.features.history_sequences import HistoryReader, Searched, Space
from trainer.data.features.id_map import IdMap
from trainer.data.features.missing_inputs import VECTOR
from trainer.data.features.packed_batch import BatchLayout, ContentLayout, PackedBatch
from trainer.data.features.packed_side import PackedSide
from trainer.data.format.history import Histories, HistorySlice
from trainer.data.format.schema import DatasetSpec, Rows


class HistorySequence(NamedTuple):
    """Lookups of one history.

    Attributes:
        name: name of the history.
        keys: lookups of an entry: item and author and pre-trained vectors with one id per entry, then the context with
            several.
        query: lookups of the candidate that correspond to the keys, without the context.
        max_length: largest number of entries.
        alike: features that candidate and entries share; each is the candidate's lookup, the position of the id in it,
            the entry's lookup, and the position of the id in that one.
    """

    name: str
    keys: tuple[str, ...]
    query: tuple[str, ...]
    max_length: int
    alike: tuple[tuple[str, int, str, int], ...] = ()


class EntryRows(NamedTuple):
    """Ids of history entries in the tables, without their ages.

    Attributes:
        item: ``[n]`` int64, ids in the table ``item``.
        author: ``[n]`` int64, ids in the table ``author``.
        context: ``[n, context ids]`` int64, ids in the table ``side``, those of an age of 0.
        beyond: number of direct ids beyond their tables.
    """

    item: np.ndarray
    author: np.ndarray
    context: np.ndarray
    beyond: int


class FeatureMap:
    """Declares the tables and lookups of a model, and makes its batches.

    The table ``side`` is packed: each side feature, the domain (if candidates have more than one) and the contexts of
    history entries have a range of its rows. Row 0 belongs to no range.

    Args:
        spec: description of the dataset to read.
        config: the ``[features]`` section of the job.
        fitted: parameters that were learned from the training range.
        behaviours: behaviours to predict, in this order; empty means all behaviours of the dataset.
        codes: code set -> its codes; only batches need them.
        content: reader of the pre-trained vectors; batches of a model that has some cannot be made without it.

    Attributes:
        spec: as given.
        fitted: as given.
        tables: ``user``, ``author``, ``item`` and ``side``, without those that no lookup reads; then those of codes.
        lookups: one for each of these tables, then for each history H ``H_item``, ``H_author``, ``H_T`` for each table
            T of codes that entries have, and ``H_context``.
        codes: inputs from codes of segments.
        content_lookups: one for each table of pre-trained vectors, and ``H_NAME`` for each history H that has them.
        sequences: the histories.
        reads: name of each history -> its settings.
        behaviours: behaviours in the columns of ``label`` and ``mask``.
        label_columns: positions of these behaviours in the dataset.
        base_rates: rates of the behaviours in the training range, ``[behaviours]`` float64.
        author_side: side features of authors that are inputs of past visits.
        needs_space: True if a history searches by dot product.
        dense_names: names of the columns of ``dense``.
        n_dense: number of columns of ``dense``.
        context_ids: number of ids in the context of a history entry.
        direct: tables of entries whose ids are mapped directly.
        dynamic: tables of entries whose ids get rows during training.
        layout: layout of the batches.

    Raises:
        UserError: a feature or behaviour is unknown, or the dataset differs from the one that was fitted on.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        config: FeatureConfig,
        fitted: FittedFeatures,
        behaviours: Sequence[str] = (),
        codes: Mapping[str, CodeReader] | None = None,
        content: ContentReader | None = None,
    ) -> None:
        check_names(spec, config, behaviours)
        check_layout(spec, fitted)
        self.spec = spec
        self.behaviours: tuple[str, ...] = tuple(behaviours) or spec.behaviours
        self.label_columns = [spec.behaviours.index(behaviour) for behaviour in self.behaviours]
        self.base_rates = fitted.prior[self.label_columns]
        self.fitted, self._clip = fitted, config.clip
        self._inputs = DenseInputs(spec, config)
        self.dense_names, self.n_dense = self._inputs.names, len(self._inputs.names)

        self._side = PackedSide(spec, config, fitted.author_side)
        self._ids = {
            name: IdMap(name, getattr(config, name).ids, fitted.table_rows[name], fitted.vocabularies.get(name))
            for name in ID_TABLES
            if not (name == "user" and "user_id" in config.exclude)
        }
        self._sequences = HistoryReader(spec, config, self._ids)
        self.reads = self._sequences.reads
        self.context_ids = self._side.context_ids
        self.direct, self.dynamic = (
            tuple(name for name in ("item", "author") if self._ids[name].mapping == mapping)
            for mapping in ("direct", "dynamic")
        )
        self.codes = CodeInputs(config.codes, fitted.codes, codes or {})
        self.author_side, self.needs_space = config.author_side, config.needs_space
        # Histories read the same tables as candidates, so an item has one embedding in both roles.
        lookups = [Lookup(name, name, 1) for name in self._ids]
        if self._side.width:
            lookups.append(Lookup("side", "side", self._side.width))
        lookups += [Lookup(name, name, 1) for name in self.codes.lookups]
        parts = ("item", "author", *self.codes.of_entries)
        for name, history in config.history.items():
            lookups += [Lookup(f"{name}_{key}", key, None, max_length=history.length) for key in parts]
            ids = self._side.context_ids
            lookups.append(Lookup(f"{name}_context", "side", None, ids_per_entry=ids, max_length=ids * history.length))
        self.lookups: tuple[Lookup, ...] = tuple(lookups)
        vectors = content_layouts(config, fitted.content)
        self._content, self.content_lookups = content, content_lookups(vectors)
        parts = (*parts, *(table.name for table in vectors if table.entries))
        # Without a lookup, a table would only cost memory and gradients.
        rows = {**fitted.table_rows, "side": self._side.rows}
        self.tables: tuple[Table, ...] = (
            *(
                Table(name, rows[name], own.dim, own.init, own.init_scale, own.sharding, getattr(own, "dynamic", None))
                for name in (*ID_TABLES, "side")
                if any(lookup.table == name for lookup in lookups)
                for own in (getattr(config, name),)
            ),
            *self.codes.tables,
        )
        self.sequences: tuple[HistorySequence, ...] = tuple(
            HistorySequence(
                name,
                (*(f"{name}_{key}" for key in parts), f"{name}_context"),
                parts,
                history.length,
                tuple(("side", own, f"{name}_context", other) for own, other in self._side.alike),
            )
            for name, history in config.history.items()
        )
        self._of_history = {key: sequence.name for sequence in self.sequences for key in sequence.keys}
        groups = group_lookups(self.tables, self.lookups)
        self.layout = BatchLayout(
            tuple(tuple(lookup.name for lookup in members) for _, members in groups),
            self.n_dense,
            len(self.label_columns),
            content=vectors,
        )

    def prepare(self, histories: Histories, space: Searched | None = None) -> None:
        """Do the work that this process and its forked processes can share; optional, but packing is slower without."""
        self._sequences.prepare(histories, space)
        self._inputs.prepare(histories)
        if self._content is not None:
            nobody = np.zeros(0, np.int64)
            rows = {f"{name}_id": nobody for name in ID_TABLES}
            self._content.prepare(rows, self._sequences.read(rows, histories, nobody, space))

    def pack(
        self, rows: Rows, histories: Histories, as_of_ms: np.ndarray, space: Searched | None = None
    ) -> PackedBatch:
        """Return the model inputs of some rows, as a few flat tensors.

        Args:
            rows: n canonical rows.
            histories: histories of the dataset.
            as_of_ms: ``[n]`` int64; histories show visits known before this time, and their ages count from it.
            space: input of the searches. The ids of histories whose search is left to a device are zeros.

        Raises:
            UserError: codes cannot be read, a direct id is negative, a side value is outside the range of its feature,
                or a dense value is NaN or infinite.
        """
        n = len(rows["visit_id"])
        # Histories come first: the number of their entries determines the size of the buffer.
        slices, left = self._sequences.read_or_leave(rows, histories, as_of_ms, space)
        lengths = self._lengths(n, {name: found.lengths for name, found in (slices | left).items()})
        ids_per_key = {key: int(each.sum()) for key, each in lengths.items()}
        sizes = self.layout.integer_sizes(n, ids_per_key, len(left))
        integers = torch.empty(sum(sizes), dtype=torch.int64)
        places = _split(integers.numpy(), sizes)
        ids = {}
        for keys in self.layout.keys:
            ids.update({key: next(places) for key in keys})
            np.concatenate([lengths[key] for key in keys], out=next(places))
        found = self._find_vectors(rows, slices, as_of_ms)
        for table, of_table in zip(self.layout.content, found, strict=True):
            for of_lookup in of_table.places:
                next(places)[:] = of_lookup
            for _ in table.entries if left else ():
                next(places)[:] = -1
        if left:
            ends = (end for run in left.values() for end in (run.first, run.stop))
            of_candidates = (
                of_table.candidate_keys
                for table, of_table in zip(self.layout.content, found, strict=True)
                if table.entries
            )
            for of_rows in (as_of_ms, *ends, *of_candidates):
                next(places)[:] = of_rows
        for key in (key for key, history in self._of_history.items() if history in left and key in ids):
            ids[key][:] = 0
        for column in ("user_id", "visit_id", "request_ms"):
            next(places)[:] = rows[column]

        # From here on every id is written straight into its place in the buffer, without a copy.
        beyond = {name: table(rows[f"{name}_id"], ids[name]) for name, table in self._ids.items()}
        beyond["histories"] = 0
        if self._side.width:
            self._side.fill(rows, ids["side"].reshape(n, self._side.width))
        for name, visits in slices.items():
            beyond["histories"] += self._ids["item"](visits.item_id, ids[f"{name}_item"])
            beyond["histories"] += self._ids["author"](visits.author_id, ids[f"{name}_author"])
            age_ms = np.repeat(as_of_ms, visits.lengths) - visits.request_ms
            self._side.fill_context(visits, age_ms, ids[f"{name}_context"].reshape(-1, self._side.context_ids))
        missing = self.codes.fill(rows, slices, as_of_ms, ids)

        floats = torch.empty(sum(self.layout.float_sizes(n)))
        dense, label, mask = _split(floats.numpy(), self.layout.float_sizes(n))
        standardised = dense.reshape(n, self.n_dense)
        np.subtract(self._inputs.raw(rows, self.fitted.prior, histories, as_of_ms), self.fitted.mean, out=standardised)
        standardised /= self.fitted.deviation
        np.clip(standardised, -self._clip, self._clip, out=standardised)
        # Masked labels become 0, so that no result depends on an undefined value.
        label.reshape(n, len(self.label_columns))[:] = (rows["label"] & rows["mask"])[:, self.label_columns]
        mask.reshape(n, len(self.label_columns))[:] = rows["mask"][:, self.label_columns]
        beyond = {name: count for name, count in beyond.items() if count}
        longest = {name: int((run.stop - run.first).max(initial=0)) for name, run in left.items()}
        if not found:
            return PackedBatch(integers, floats, n, ids_per_key, beyond=beyond, missing=missing, longest=longest)
        vectors = self._read_vectors(found)
        counts = tuple(len(of_table.keys) for of_table in found)
        for table, of_table in zip(self.layout.content, found, strict=True):
            missing[f"{VECTOR}{table.name}"] = of_table.missing
        return PackedBatch(
            *(integers, floats, n, ids_per_key),
            beyond=beyond,
            missing=missing,
            vectors=vectors,
            vector_counts=counts,
            longest=longest,
        )

    def vectors_of_histories(self) -> list[tuple[ContentLayout, OwnerVectors | SegmentReadings]]:
        """Return the layout and the reader of each table of vectors that entries of histories have."""
        readers = {} if self._content is None else self._content.of_histories()
        return [(table, readers[table.name]) for table in self.layout.content if table.name in readers]

    def entry_rows(self, visits: HistorySlice) -> EntryRows:
        """Return the ids of entries of any histories in the tables.

        Raises:
            UserError: a direct id is negative.
        """
        n = len(visits.item_id)
        item, author = np.empty(n, np.int64), np.empty(n, np.int64)
        context = np.empty((n, self.context_ids), np.int64)
        beyond = self._ids["item"](visits.item_id, item) + self._ids["author"](visits.author_id, author)
        self._side.fill_context(visits, np.zeros(n, np.int64), context)
        return EntryRows(item, author, context, beyond)

    def hide_ids(self, name: str, hidden: np.ndarray, packed: PackedBatch) -> None:
        """Let the candidates of some rows read the unknown id, in place; their histories stay as they are.

        Args:
            name: ``user``, ``author`` or ``item``.
            hidden: ``[n]`` bool, rows.
            packed: a result of :meth:`pack`.
        """
        for group in packed.ids(self.layout):
            if name in group.keys:
                place = group.keys.index(name)
                ids = group.values[group.offsets[place] : group.offsets[place + 1]]
                ids[torch.from_numpy(hidden)] = self._ids[name].unknown

    def _find_vectors(self, rows: Rows, slices: Mapping[str, HistorySlice], as_of_ms: np.ndarray) -> list[FoundVectors]:
        """Return the pre-trained vectors of each table, for the candidates and the entries of histories."""
        if not self.layout.content:
            return []
        assert self._content is not None, "the features have pre-trained vectors, and their tables are not open"
        return self._content.find(rows, slices, as_of_ms)

    def _read_vectors(self, found: Sequence[FoundVectors]) -> torch.Tensor:
        """Return the distinct vectors of all tables as bytes."""
        sizes = self.layout.vector_sizes([len(of_table.keys) for of_table in found])
        vectors = torch.empty(sum(sizes), dtype=torch.uint8)
        assert self._content is not None
        self._content.read(
            found,
            (
                part[: len(of_table.keys) * table.width * np.dtype(table.dtype).itemsize]
                .view(table.dtype)
                .reshape(len(of_table.keys), table.width)
                for part, of_table, table in zip(
                    _split(vectors.numpy(), sizes), found, self.layout.content, strict=True
                )
            ),
        )
        return vectors

    def read_histories(
        self, rows: Rows, histories: Histories, as_of_ms: np.ndarray, space: Space | None = None
    ) -> dict[str, HistorySlice]:
        """Return the entries of each history by name, the same that :meth:`pack` uses; it has the same arguments."""
        return self._sequences.read(rows, histories, as_of_ms, space)

    def _lengths(self, rows: int, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return lookup -> number of ids of each row, ``[rows]`` int64, for the number of entries of each history."""
        lengths = {}
        for lookup in self.lookups:
            if lookup.length is not None:
                lengths[lookup.name] = np.full(rows, lookup.length)
            else:
                lengths[lookup.name] = found[self._of_history[lookup.name]] * lookup.ids_per_entry
        return lengths


def _split(flat: np.ndarray, sizes: list[int]) -> Iterator[np.ndarray]:
    """Return consecutive parts of an array as views."""
    edges = np.cumsum([0, *sizes]).tolist()
    return (flat[start:stop] for start, stop in itertools.pairwise(edges))
