"""Fitting of the features on the training range: base rates, scales and vocabularies.

The features are fitted once, before training, and saved with the run. Evaluation and scoring use them unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.features import ContentConfig, FeatureConfig
from trainer.console.errors import UserError, one_line
from trainer.data.features.author_features import AuthorSide, read_author_side
from trainer.data.features.content_tables import TableFacts
from trainer.data.features.dense_inputs import DenseInputs, statistic_name
from trainer.data.features.fitted_codes import FittedCodes, check_authors, read_code_files
from trainer.data.features.id_map import table_rows
from trainer.data.format.content_vectors import ContentVectors
from trainer.data.format.history import HISTORY_LIMIT, Histories
from trainer.data.format.id_index import IdIndex
from trainer.data.format.schema import DOMAINS, DatasetSpec, Rows
from trainer.data.format.segments import DatasetSegments
from trainer.data.format.shards import RowStore
from trainer.data.format.time_selection import Selection
from trainer.runtime.checksums import verify_checksums, write_checksums
from trainer.runtime.stored_files import load_arrays, read_json_object

ID_TABLES: tuple[str, ...] = ("user", "author", "item")
"""Embedding tables of ids; the id column of table T is ``T_id``, in rows and in histories."""

SAMPLE_ROWS = 2_000_000
"""Approximate number of rows on which base rates and scales are fitted: whole records, evenly spaced over the range."""

_SAME = 1e-9
"""Relative deviation below which an input counts as constant: in float32 it is only rounding."""

_USERS_AT_ONCE = 256

_JSON_FILE, _ARRAY_FILE, _AUTHOR_FILE = "features.json", "vocabularies.npz", "authors.npz"


@dataclass(frozen=True)
class FittedFeatures:
    """Parameters of the features that are learned from data.

    Attributes:
        layout: names and sizes of the dataset on which they were fitted; another dataset must have the same ones.
        table_rows: rows of the tables ``user``, ``author`` and ``item``.
        prior: base rate of each behaviour, ``[behaviours]`` float64, strictly between 0 and 1.
        mean: means of the dense inputs, ``[n_dense]`` float64.
        deviation: standard deviations of the dense inputs, ``[n_dense]`` float64, above 0; 1 for a constant input.
        vocabularies: table -> known ids in ascending order, int64; only tables with ``ids = "lookup"``.
        author_side: side features of the authors of past visits; None if histories have none.
        codes: code set -> identity of the codes of segments.
        content: facts of the tables of pre-trained vectors, by name.
    """

    layout: dict[str, Any]
    table_rows: dict[str, int]
    prior: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    vocabularies: dict[str, np.ndarray] = field(default_factory=dict)
    author_side: AuthorSide | None = None
    codes: dict[str, FittedCodes] = field(default_factory=dict)
    content: dict[str, TableFacts] = field(default_factory=dict)

    def save(self, directory: str | Path) -> None:
        """Write ``features.json``, ``vocabularies.npz``, ``authors.npz`` if there are any, and their checksums."""
        text = {
            "layout": self.layout,
            "table_rows": self.table_rows,
            **{name: getattr(self, name).tolist() for name in ("prior", "mean", "deviation")},
            **({"codes": {name: vars(codes) for name, codes in self.codes.items()}} if self.codes else {}),
        }
        if self.content:
            text["content"] = {name: asdict(facts) for name, facts in self.content.items()}
        np.savez(Path(directory) / _ARRAY_FILE, **self.vocabularies)  # type: ignore[arg-type]
        if self.author_side is not None:
            known = self.author_side
            np.savez(Path(directory) / _AUTHOR_FILE, author_id=known.author_id, values=known.values)
        (Path(directory) / _JSON_FILE).write_text(json.dumps(text, indent=1))
        names = (_JSON_FILE, _ARRAY_FILE, *([] if self.author_side is None else [_AUTHOR_FILE]))
        write_checksums(Path(directory), names)

    @staticmethod
    def load(directory: str | Path) -> FittedFeatures:
        """Read the files that :meth:`save` wrote.

        Raises:
            UserError: a file is missing or damaged.
        """
        folder = Path(directory)
        verify_checksums(folder, (_JSON_FILE, _ARRAY_FILE, _AUTHOR_FILE))
        try:
            text = read_json_object(folder / _JSON_FILE)
            vocabularies = load_arrays(folder / _ARRAY_FILE)
            author_side = None
            if (folder / _AUTHOR_FILE).exists():
                arrays = load_arrays(folder / _AUTHOR_FILE)
                author_side = AuthorSide(arrays["author_id"], arrays["values"])
            return FittedFeatures(
                layout=text["layout"],
                table_rows=text["table_rows"],
                prior=np.array(text["prior"], np.float64),
                mean=np.array(text["mean"], np.float64),
                deviation=np.array(text["deviation"], np.float64),
                vocabularies=vocabularies,
                author_side=author_side,
                codes={name: FittedCodes.from_json(codes) for name, codes in dict(text.get("codes", {})).items()},
                content={name: TableFacts(**facts) for name, facts in text.get("content", {}).items()},
            )
        except FileNotFoundError as error:
            raise UserError(f"{directory}: not a run of `limelight train` ({error.filename} is missing)") from None
        except OSError as error:
            raise UserError(f"{directory}: the features cannot be read ({one_line(error)})") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{directory}: the features are damaged ({one_line(error)})") from None


def feature_layout(spec: DatasetSpec) -> dict[str, Any]:
    """Return the names and sizes that two datasets must share to be used with one model, as JSON types."""
    return {
        "behaviours": list(spec.behaviours),
        "candidates": list(spec.candidates),
        "side": [[side.name, side.rows] for side in spec.side],
        "dense": [dense.name for dense in spec.dense],
        "statistics": [statistic_name(key) for key in spec.statistics],
    }


def fit_features(
    spec: DatasetSpec,
    store: RowStore,
    histories: Histories,
    config: FeatureConfig,
    selection: Selection,
    tables: Mapping[str, ContentVectors] | None = None,
    segments: Mapping[str, DatasetSegments] | None = None,
) -> FittedFeatures:
    """Fit the features on the rows of a training range. The result is deterministic and uses no row outside the range.

    Args:
        spec: description of the dataset.
        store: rows of the dataset.
        histories: histories of the dataset; read as of the end of the range if a table has ids = "lookup", and as of
            each row for counts of past visits.
        config: the ``[features]`` section of the job.
        selection: the training range.
        tables: opened tables of pre-trained vectors, by name.
        segments: segments of the dataset for each table of segment vectors, whose later growth is then accepted.

    Raises:
        UserError: a code file cannot be read or is of other authors, the range has no rows, a dense value is NaN or
            infinite, ids do not fit their table, histories have features of authors and the dataset has no table of
            authors, or a table of vectors has none of the rows.
    """
    # First, since it takes little time and finds what a user can get wrong.
    files = read_code_files(config.codes)
    codes = {name: FittedCodes.of(file) for name, file in files.items()}
    vocabularies = _vocabularies(spec, store, histories, config, selection)
    sizes = {name: table_rows(name, getattr(config, name), spec, len(vocabularies.get(name, ()))) for name in ID_TABLES}
    inputs = DenseInputs(spec, config)
    prior = _prior(spec, store, selection)
    check_authors(files, (columns["author_id"] for columns in _selected(store, selection, SAMPLE_ROWS)))
    mean, deviation = _moments(inputs, store, histories, selection, prior)
    author_side = read_author_side(store.path, spec, config.author_side) if config.author_side else None
    for name, table in (tables or {}).items():
        _check_owners(name, config.content[name], table, store, selection)
    content = {name: TableFacts.of(table, (segments or {}).get(name)) for name, table in (tables or {}).items()}
    return FittedFeatures(
        feature_layout(spec), sizes, prior, mean, deviation, vocabularies, author_side, codes, content
    )


def _check_owners(
    name: str, content: ContentConfig, table: ContentVectors, store: RowStore, selection: Selection
) -> None:
    """Check that a table of vectors has the vector of at least one row's item or author.

    Raises:
        UserError: it has none.
    """
    if content.of == "segment":
        return
    for columns in _selected(store, selection, SAMPLE_ROWS):
        if (table.lookup(columns[f"{content.of}_id"]) >= 0).any():
            return
    raise UserError(
        f"features.content.{name}.table = {content.table!r}: has a vector of no {content.of} of the training rows; it "
        f'may be of another dataset, or of something else than of = "{content.of}"'
    )


def _selected(store: RowStore, selection: Selection, limit: int | None) -> Iterator[Rows]:
    """Yield the selected rows, record by record.

    Args:
        store: rows of the dataset.
        selection: rows to select.
        limit: read only evenly spaced records, with about this number of rows together; None reads all.
    """
    records: list[tuple[int, int]] = []
    rows = 0
    for partition in range(store.partitions):
        index = store.records(partition)
        chosen = np.flatnonzero(selection.touches(index))
        records += [(partition, record) for record in chosen.tolist()]
        rows += int(index.rows[chosen].sum())
    # Whole records are read and not single rows, because a record is the unit of a read.
    if limit is not None and rows > limit:
        spaced = np.linspace(0, len(records) - 1, max(1, len(records) * limit // rows)).astype(int)
        records = [records[place] for place in spaced]
    for partition, record in records:
        columns = store.read(partition, record)
        if columns is not None:
            mask = selection.mask(columns)
            yield columns if mask.all() else {name: column[mask] for name, column in columns.items()}


def _prior(spec: DatasetSpec, store: RowStore, selection: Selection) -> np.ndarray:
    """Return the base rate of each behaviour over the rows where it can happen, ``[behaviours]``."""
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
    inputs: DenseInputs, store: RowStore, histories: Histories, selection: Selection, prior: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of the dense inputs, each ``[n_dense]``.

    They are merged record by record with the update of Chan, Golub and LeVeque (1979).
    """
    count, mean, squares = 0, np.zeros(len(inputs.names)), np.zeros(len(inputs.names))
    for columns in _selected(store, selection, SAMPLE_ROWS):
        values = inputs.raw(columns, prior, histories).astype(np.float64)
        n = len(values)
        if n:
            # Sums of squares about each mean are merged: plain sums of squares would cancel for large values.
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
    """Return the known ids of each table with ``ids = "lookup"``.

    They come from the training rows, and from the visits of their users that ended before the end of the range.
    """
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
    # An id qualifies if it is frequent among the rows or among the visits; the two counts are not added, since the same
    # visit can be in both.
    for name in tables:
        kept = [
            tally.ids[tally.counts >= getattr(config, name).min_count]
            for tally in (shown[name], *([watched[name]] if name in watched else []))
        ]
        vocabularies[name] = np.unique(np.concatenate(kept))
    return vocabularies


class _Tally:
    """Counts how often each id occurs."""

    def __init__(self) -> None:
        self._index, self._counts = IdIndex(), np.zeros(1024, np.int64)

    def add(self, ids: np.ndarray) -> None:
        """Count ids, ``[n]`` int64."""
        numbers = self._index.add(ids)
        if len(self._index) > len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros(len(self._index), np.int64)])
        self._counts += np.bincount(numbers, minlength=len(self._counts))

    @property
    def ids(self) -> np.ndarray:
        """Distinct ids in the order of their first occurrence."""
        return self._index.ids

    @property
    def counts(self) -> np.ndarray:
        """Count of each id of :attr:`ids`."""
        return self._counts[: len(self._index)]
