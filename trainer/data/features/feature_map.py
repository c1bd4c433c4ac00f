"""Maps canonical rows and histories to model inputs: declares tables and lookups, and fills the ids of a batch.

Every feature is as of a time that the caller gives, usually the request. Histories can only be read as of a time, and
the statistics of a row were counted when the row was made (``trainer/data/format/statistics.py``).
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from modules.embeddings import Lookup, Table, group_lookups
from trainer.config.features import FeatureConfig
from trainer.console.errors import UserError
from trainer.data.features.author_features import AuthorSide
from trainer.data.features.code_inputs import CodeInputs, CodeReader
from trainer.data.features.content_inputs import ContentReader, FoundVectors, content_layouts, content_lookups
from trainer.data.features.dense_inputs import DenseInputs, statistic_name
from trainer.data.features.fit import ID_TABLES, FittedFeatures, feature_layout
from trainer.data.features.history_sequences import HistoryReader, Searched, Space
from trainer.data.features.id_map import IdMap
from trainer.data.features.missing_inputs import VECTOR
from trainer.data.features.packed_batch import BatchLayout, PackedBatch
from trainer.data.format.history import Histories, HistorySlice
from trainer.data.format.schema import DOMAINS, DatasetSpec, Rows, SideFeature

ACTION_BITS = 12
"""Number of behaviours that are an input of a past visit: the first ones of the dataset, one bit each."""

GAP_BUCKETS = 64
"""Number of buckets for the age of a past visit."""

AGE_PLACE = 1
"""Position of the age in the context of a history entry."""

DOMAIN_RANGE, ACTIONS_RANGE, AGE_RANGE = "domain", "behaviours of a past visit", "age of a past visit"
PAST_DOMAIN_RANGE = "domain of a past visit"
"""Names of the ranges of the table ``side`` that do not belong to a side feature."""


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
        _check_layout(spec, fitted)
        self.spec = spec
        self.behaviours: tuple[str, ...] = tuple(behaviours) or spec.behaviours
        self.label_columns = [spec.behaviours.index(behaviour) for behaviour in self.behaviours]
        self.base_rates = fitted.prior[self.label_columns]
        self.fitted, self._clip = fitted, config.clip
        self._inputs = DenseInputs(spec, config)
        self.dense_names, self.n_dense = self._inputs.names, len(self._inputs.names)

        self._side = _PackedSide(spec, config, fitted.author_side)
        self._ids = {
            name: IdMap(name, getattr(config, name).ids, fitted.table_rows[name], fitted.vocabularies.get(name))
            for name in ID_TABLES
            if not (name == "user" and "user_id" in config.exclude)
        }
        self._sequences = HistoryReader(spec, config, self._ids)
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
            space: what is searched by dot product. The ids of histories whose search is left to a device are zeros.

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
        for of_table in found:
            for of_lookup in of_table.places:
                next(places)[:] = of_lookup
        if left:
            for of_rows in (as_of_ms, *(end for run in left.values() for end in (run.first, run.stop))):
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


class _PackedSide:
    """Ranges of the packed table ``side``, and the ids that rows and history entries have in it.

    Attributes:
        rows: number of rows of the table.
        width: number of ids of a row of the batch.
        context_ids: number of ids in the context of a history entry: its behaviours and its age; depending on the
            settings also its domain, the tag of its item and features of its author.
        alike: features that rows and contexts share, as pairs of the position in each.
    """

    def __init__(self, spec: DatasetSpec, config: FeatureConfig, author_side: AuthorSide | None) -> None:
        self._columns = [k for k, side in enumerate(spec.side) if side.name not in config.exclude]
        self._features: list[SideFeature] = [spec.side[k] for k in self._columns]
        ranges = side_ranges(feature_layout(spec), config)
        self._has_domain = DOMAIN_RANGE in ranges
        self.width = len(self._features) + self._has_domain
        self._offsets = np.array([rows.start for rows in ranges.values()], np.int64)
        self.rows = max((rows.stop for rows in ranges.values()), default=1)
        self._limits = np.array([feature.rows for feature in self._features])
        self._actions, self._age, self._past_domain = (
            np.int64(ranges[name].start if name in ranges else 0)
            for name in (ACTIONS_RANGE, AGE_RANGE, PAST_DOMAIN_RANGE)
        )
        # A past visit's tag and features of its author use the rows of the candidate's tag and author.
        self._tag = np.int64(ranges[f"feature {spec.tag}"].start if config.tags else 0)
        self._author_side = author_side if config.author_side else None
        self._author_offsets = np.array([ranges[f"feature {name}"].start for name in config.author_side], np.int64)
        self._tag_place = 2 + (PAST_DOMAIN_RANGE in ranges)
        self.context_ids = self._tag_place + config.tags + len(config.author_side)
        names = [feature.name for feature in self._features]
        shared = [spec.tag] * config.tags + list(config.author_side)
        self.alike = [(names.index(name), self._tag_place + place) for place, name in enumerate(shared)]

    def fill(self, rows: Rows, out: np.ndarray) -> None:
        """Write the ids of each row into ``[n, width]`` int64."""
        features = len(self._features)
        # Selecting columns copies the array, which is not needed if no feature is excluded.
        values = rows["side"] if features == rows["side"].shape[1] else rows["side"][:, self._columns]
        if len(values) and features and (values.min() < 0 or (values.max(axis=0) >= self._limits).any()):
            row, column = np.argwhere((values < 0) | (values >= self._limits))[0]
            feature = self._features[column]
            raise UserError(
                f"side feature {feature.name!r} is {values[row, column]} in visit {rows['visit_id'][row]}; the dataset "
                f"declares values 0 to {feature.rows - 1}"
            )
        np.add(values, self._offsets[:features], out=out[:, :features])
        if self._has_domain:
            np.add(rows["domain"], self._offsets[features], out=out[:, features])

    def fill_context(self, visits: HistorySlice, age_ms: np.ndarray, out: np.ndarray) -> None:
        """Write the context ids of each history entry into ``[n, context_ids]`` int64."""
        # All behaviours of a visit together are one id: each combination has a row of its own.
        np.bitwise_and(visits.bits, (1 << ACTION_BITS) - 1, out=out[:, 0])
        out[:, 0] += self._actions
        np.add(gap_bucket(age_ms), self._age, out=out[:, AGE_PLACE])
        if self._past_domain:
            np.add(visits.domain, self._past_domain, out=out[:, 2])
        if self._tag:
            np.add(visits.tag, self._tag, out=out[:, self._tag_place])
        if self._author_side is not None:
            own = out[:, -len(self._author_offsets) :]
            np.add(self._author_side.lookup(visits.author_id), self._author_offsets, out=own)


def side_ranges(layout: Mapping[str, Any], config: FeatureConfig) -> dict[str, range]:
    """Return the ranges of rows of the table ``side`` by name, in order. Row 0 belongs to no range.

    Args:
        layout: layout of the dataset, see :func:`trainer.data.features.fit.feature_layout`.
        config: the ``[features]`` section of the job.

    Returns:
        ``feature NAME`` for each side feature, and those of :data:`DOMAIN_RANGE`, :data:`ACTIONS_RANGE`,
        :data:`AGE_RANGE` and :data:`PAST_DOMAIN_RANGE` that the model has.
    """
    sizes = {f"feature {name}": rows for name, rows in layout["side"] if name not in config.exclude}
    if len(layout["candidates"]) > 1 and "domain" not in config.exclude:
        sizes[DOMAIN_RANGE] = len(DOMAINS)
    if config.history:
        sizes |= {ACTIONS_RANGE: 1 << min(len(layout["behaviours"]), ACTION_BITS), AGE_RANGE: GAP_BUCKETS}
    if any(history.domain == "both" for history in config.history.values()):
        sizes[PAST_DOMAIN_RANGE] = len(DOMAINS)
    # The order of the ranges is part of every checkpoint: rows of the table are known only by their position.
    ends = itertools.accumulate(sizes.values(), initial=1)
    return {name: range(end, end + size) for (name, size), end in zip(sizes.items(), ends, strict=False)}


def gap_bucket(age_ms: np.ndarray) -> np.ndarray:
    """Return the bucket of an age, in half octaves of seconds: edges at 0, 0.5, 1, 2, 3, 5, 7, 11, ... seconds.

    Args:
        age_ms: ``[n]`` int64, milliseconds; negative ages count as 0.

    Returns:
        ``[n]`` int32 in ``[0, GAP_BUCKETS)``.
    """
    seconds = (np.maximum(age_ms, 0) * np.float32(0.001)).astype(np.float32) + np.float32(1)
    # Exponent and first bit of the mantissa are the same on every machine; a logarithm near an edge may not be.
    return np.minimum((seconds.view(np.int32) >> 22) - (127 << 1), GAP_BUCKETS - 1)


def _split(flat: np.ndarray, sizes: list[int]) -> Iterator[np.ndarray]:
    """Return consecutive parts of an array as views."""
    edges = np.cumsum([0, *sizes]).tolist()
    return (flat[start:stop] for start, stop in itertools.pairwise(edges))


def check_names(spec: DatasetSpec, config: FeatureConfig, behaviours: Sequence[str]) -> None:
    """Check that the dataset has every feature and behaviour that a job names.

    Raises:
        UserError: it does not have one; the message gives the nearest name or the list of names.
    """
    required = {name: history.require for name, history in config.history.items()}
    for key, names in (
        ("data.behaviours", behaviours),
        ("features.rates", config.rates),
        *((f"features.history.{name}.require", names) for name, names in required.items()),
    ):
        for name in names:
            if name not in spec.behaviours:
                raise UserError(f"{key}: the dataset has no behaviour {name!r}; it has {', '.join(spec.behaviours)}")
    known = [
        "user_id",
        "domain",
        "stat:*",
        *(side.name for side in spec.side),
        *(dense.name for dense in spec.dense),
        *map(statistic_name, spec.statistics),
    ]
    for name in config.exclude:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"features.exclude: the dataset has no feature {name!r}; did you mean {nearest!r}?")
    if config.tags and (not spec.tag or spec.tag in config.exclude):
        why = f"{spec.tag!r} is in features.exclude" if spec.tag else "the dataset was built without `tag`"
        raise UserError(f"features.tags = true: histories have no tags, because {why}")
    for name, past in config.past.items():
        if past.same == "tag" and not spec.tag:
            raise UserError(
                f'features.past.{name}.same = "tag": histories have no tags, because the dataset was built without '
                '`tag`; "any", "author" and "item" need none'
            )
    of_authors = [side.name for side in spec.side if side.of == "author"]
    for name in config.author_side:
        if name not in of_authors:
            raise UserError(
                f"features.author_side: {name!r} is not a side feature of the dataset's authors; "
                f"they have {', '.join(of_authors) or 'none'}"
            )
        if name in config.exclude:
            raise UserError(
                f"features.author_side: {name!r} is also in features.exclude; remove it from one of the two"
            )


def _check_layout(spec: DatasetSpec, fitted: FittedFeatures) -> None:
    """Check that the dataset has the names and sizes of the one on which the features were fitted."""
    ours = feature_layout(spec)
    for part, theirs in fitted.layout.items():
        if ours.get(part) != theirs:
            raise UserError(
                f"dataset {spec.name!r} does not fit the model's features: its {part} are {ours.get(part)}, the model "
                f"was trained with {theirs}"
            )
