"""What the features learn from the training range before training: base rates, scales and vocabularies.

It is fitted once, saved with the run, and used unchanged by whatever evaluates or scores with that run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.features import FeatureConfig
from trainer.console.errors import UserError
from trainer.data.features.author_features import AuthorSide, read_author_side
from trainer.data.features.dense_inputs import DenseInputs, statistic_name
from trainer.data.features.id_map import table_rows
from trainer.data.format.history import HISTORY_LIMIT, Histories
from trainer.data.format.id_index import IdIndex
from trainer.data.format.schema import DOMAINS, DatasetSpec, Rows
from trainer.data.format.shards import RowStore
from trainer.data.format.time_selection import Selection

ID_TABLES: tuple[str, ...] = ("user", "author", "item")
"""Tables of ids; the id column of table T is ``T_id``, in rows and in histories."""

SAMPLE_ROWS = 2_000_000
"""Base rates and scales are fitted on about so many rows: whole records, evenly spaced over the range."""

_SAME = 1e-9
"""Inputs are float32: what deviates from its mean by less, relatively, only does so by rounding."""

_USERS_AT_ONCE = 256

_JSON_FILE, _ARRAY_FILE, _AUTHOR_FILE = "features.json", "vocabularies.npz", "authors.npz"


@dataclass(frozen=True)
class FittedFeatures:
    """Everything about the features that came from data.

    Attributes:
        layout: names and sizes of the dataset that it was fitted on; another dataset must have the same.
        table_rows: rows of the tables ``user``, ``author`` and ``item``.
        prior: ``[behaviours]`` float64, base rate of each behaviour, strictly between 0 and 1.
        mean: ``[n_dense]`` float64, of the dense inputs.
        deviation: ``[n_dense]`` float64, above 0; 1 for an input that does not vary.
        vocabularies: table -> known ids ascending, int64; tables that are looked up.
        author_side: of past visits' authors; None if histories carry none.
    """

    layout: dict[str, Any]
    table_rows: dict[str, int]
    prior: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    vocabularies: dict[str, np.ndarray] = field(default_factory=dict)
    author_side: AuthorSide | None = None

    def save(self, directory: str | Path) -> None:
        """Write ``features.json``, ``vocabularies.npz`` and, if there are any, ``authors.npz`` into a directory."""
        text = {
            "layout": self.layout,
            "table_rows": self.table_rows,
            **{name: getattr(self, name).tolist() for name in ("prior", "mean", "deviation")},
        }
        np.savez(Path(directory) / _ARRAY_FILE, **self.vocabularies)  # type: ignore[arg-type]
        if self.author_side is not None:
            known = self.author_side
            np.savez(Path(directory) / _AUTHOR_FILE, author_id=known.author_id, values=known.values)
        (Path(directory) / _JSON_FILE).write_text(json.dumps(text, indent=1))

    @staticmethod
    def load(directory: str | Path) -> FittedFeatures:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: it is not there.
        """
        try:
            text = json.loads((Path(directory) / _JSON_FILE).read_text())
            with np.load(Path(directory) / _ARRAY_FILE) as arrays:
                vocabularies = {name: arrays[name] for name in arrays.files}
            author_side = None
            if (Path(directory) / _AUTHOR_FILE).exists():
                with np.load(Path(directory) / _AUTHOR_FILE) as arrays:
                    author_side = AuthorSide(arrays["author_id"], arrays["values"])
        except FileNotFoundError as error:
            raise UserError(f"{directory}: not a run of `limelight train` ({error.filename} is missing)") from None
        return FittedFeatures(
            layout=text["layout"],
            table_rows=text["table_rows"],
            prior=np.array(text["prior"]),
            mean=np.array(text["mean"]),
            deviation=np.array(text["deviation"]),
            vocabularies=vocabularies,
            author_side=author_side,
        )


def feature_layout(spec: DatasetSpec) -> dict[str, Any]:
    """What two datasets must have in common for one model, as JSON types."""
    return {
        "behaviours": list(spec.behaviours),
        "candidates": list(spec.candidates),
        "side": [[side.name, side.rows] for side in spec.side],
        "dense": [dense.name for dense in spec.dense],
        "statistics": [statistic_name(key) for key in spec.statistics],
    }


def fit_features(
    spec: DatasetSpec, store: RowStore, histories: Histories, config: FeatureConfig, selection: Selection
) -> FittedFeatures:
    """Fit the features on the rows of a training range. Deterministic; reads no row outside the range.

    Args:
        spec: of the dataset.
        store: its rows.
        histories: its histories; read only for tables that are looked up, as of the end of the range.
        config: of the features.
        selection: the training range.

    Raises:
        UserError: no rows in the range, a dense value that is NaN or infinite, ids that do not fit their table, or no
            table of the authors where histories carry their features.
    """
    vocabularies = _vocabularies(spec, store, histories, config, selection)
    sizes = {name: table_rows(name, getattr(config, name), spec, len(vocabularies.get(name, ()))) for name in ID_TABLES}
    inputs = DenseInputs(spec, config)
    prior = _prior(spec, store, selection)
    mean, deviation = _moments(inputs, store, selection, prior)
    author_side = read_author_side(store.path, spec, config.author_side) if config.author_side else None
    return FittedFeatures(feature_layout(spec), sizes, prior, mean, deviation, vocabularies, author_side)


def _selected(store: RowStore, selection: Selection, limit: int | None) -> Iterator[Rows]:
    """Selected rows record by record; with a limit, of evenly spaced records that have about that many rows."""
    records: list[tuple[int, int]] = []
    rows = 0
    for partition in range(store.partitions):
        index = store.records(partition)
        chosen = np.flatnonzero(selection.touches(index))
        records += [(partition, record) for record in chosen.tolist()]
        rows += int(index.rows[chosen].sum())
    if limit is not None and rows > limit:
        spaced = np.linspace(0, len(records) - 1, max(1, len(records) * limit // rows)).astype(int)
        records = [records[place] for place in spaced]
    for partition, record in records:
        columns = store.read(partition, record)
        if columns is not None:
            mask = selection.mask(columns)
            yield columns if mask.all() else {name: column[mask] for name, column in columns.items()}


def _prior(spec: DatasetSpec, store: RowStore, selection: Selection) -> np.ndarray:
    positives, shown, rows = np.zeros(len(spec.behaviours)), np.zeros(len(spec.behaviours)), 0
    for columns in _selected(store, selection, SAMPLE_ROWS):
        positives += (columns["label"] & columns["mask"]).sum(axis=0)
        shown += columns["mask"].sum(axis=0)
        rows += len(columns["mask"])
    if not rows:
        span = Selection(request_from=spec.span_ms[0], request_until=spec.span_ms[1])
        raise UserError(f"no training rows {selection}; those of dataset {spec.name!r} were {span}")
    # Half a row of each kind keeps the rate of a behaviour that always or never happened away from 0 and 1.
    return (positives + 0.5) / (shown + 1)


def _moments(
    inputs: DenseInputs, store: RowStore, selection: Selection, prior: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the dense inputs, merged record by record (Chan, Golub and LeVeque, 1979)."""
    count, mean, squares = 0, np.zeros(len(inputs.names)), np.zeros(len(inputs.names))
    for columns in _selected(store, selection, SAMPLE_ROWS):
        values = inputs.raw(columns, prior).astype(np.float64)
        n = len(values)
        if n:
            own = values.mean(axis=0)
            shift = own - mean
            squares += ((values - own) ** 2).sum(axis=0) + shift**2 * (count * n / (count + n))
            mean += shift * (n / (count + n))
            count += n
    deviation = np.sqrt(squares / count)
    deviation[deviation <= _SAME * np.abs(mean)] = 1.0
    return mean, deviation


def _vocabularies(
    spec: DatasetSpec, store: RowStore, histories: Histories, config: FeatureConfig, selection: Selection
) -> dict[str, np.ndarray]:
    """Ids of the tables that are looked up, in training rows and in what their users watched before the range ended."""
    tables = [name for name in ID_TABLES if getattr(config, name).ids == "lookup"]
    if not tables:
        return {}
    shown = {name: _Tally() for name in {*tables, "user"}}
    for columns in _selected(store, selection, None):
        for name, tally in shown.items():
            tally.add(columns[f"{name}_id"])
    watched = {name: _Tally() for name in tables if name != "user"}
    if watched:
        for users in np.array_split(shown["user"].ids, -(-len(shown["user"].ids) // _USERS_AT_ONCE) or 1):
            as_of = np.full(len(users), selection.emit_until)
            for domain in range(len(DOMAINS)):
                visits = histories.latest(users, as_of, domain=domain, length=HISTORY_LIMIT)
                for name, tally in watched.items():
                    tally.add(getattr(visits, f"{name}_id"))
    vocabularies = {}
    for name in tables:
        kept = [
            tally.ids[tally.counts >= getattr(config, name).min_count]
            for tally in (shown[name], *([watched[name]] if name in watched else []))
        ]
        vocabularies[name] = np.unique(np.concatenate(kept))
    return vocabularies


class _Tally:
    """Counts distinct ids."""

    def __init__(self) -> None:
        self._index, self._counts = IdIndex(), np.zeros(1024, np.int64)

    def add(self, ids: np.ndarray) -> None:
        numbers = self._index.add(ids)
        if len(self._index) > len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros(len(self._index), np.int64)])
        self._counts += np.bincount(numbers, minlength=len(self._counts))

    @property
    def ids(self) -> np.ndarray:
        return self._index.ids

    @property
    def counts(self) -> np.ndarray:
        return self._counts[: len(self._index)]
