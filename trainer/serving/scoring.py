"""Scoring of a candidates file with a trained ranker."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from trainer.config.ranker import JobConfig
from trainer.console.errors import UserError
from trainer.console.outputs import Output
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.id_map import beyond_message
from trainer.data.features.missing_inputs import MissingTally
from trainer.data.features.packed_batch import PackedBatch
from trainer.data.features.search_vectors import SearchSpace
from trainer.data.format import validation
from trainer.data.format.dataset import Dataset, statistics_as_of
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.feature_join import TABLE_OF, FeatureJoin
from trainer.data.format.parquet_files import read_table
from trainer.data.format.schema import DOMAINS, KINDS, DatasetSpec, Rows
from trainer.data.format.times import accepted_times, times_ms
from trainer.data.importers.field_parsers import accepted_ids, integer_ids
from trainer.data.importers.table_files import convert
from trainer.runtime.files import whole_file
from trainer.runtime.stored_files import open_regular

REQUIRED = ("user_id", "item_id", "author_id", "request_ms")
"""Columns that a candidates file must have."""

logger = logging.getLogger(__name__)

BATCH_ROWS = 4096
"""Candidates that are scored together."""


class Scorer(Protocol):
    """Model that can score: the model of a run, or an exported one.

    Attributes:
        config: settings of the job that trained the model.
        data: dataset that features, histories and statistics come from.
        features: map from stored rows to the model's inputs.
        space: vectors that histories are searched with; None if no history is searched.
    """

    @property
    def config(self) -> JobConfig: ...
    @property
    def data(self) -> Dataset: ...
    @property
    def features(self) -> FeatureMap: ...
    @property
    def space(self) -> SearchSpace | None: ...

    def logits(self, batches: Iterable[PackedBatch]) -> Iterator[Tensor]:
        """Yield the logits of each batch, ``[rows, behaviours]`` float32, on the CPU."""


def ranking_score(probability: np.ndarray, exponents: Sequence[float]) -> np.ndarray:
    """Return the product over behaviours of ``(1 + p) ** exponent`` (Moment&Cross equation 4).

    Args:
        probability: ``[n, behaviours]`` in [0, 1].
        exponents: one per behaviour.

    Returns:
        ``[n]`` float64.
    """
    # A sum of logarithms, because a long product with large exponents could overflow on the way.
    return np.exp(np.log1p(probability.astype(np.float64)) @ np.asarray(exponents, np.float64))


def read_candidates(file: Path, spec: DatasetSpec) -> validation.Columns:
    """Read the columns of a candidates file.

    Features of the request: a column or value that is missing, NaN included, is unknown (0 if dense), as in a log.

    Raises:
        UserError: no such file, not Parquet, a required column is missing, or a value is invalid.
    """
    try:
        # Parquet is read from its end, so a pipe cannot be read. Arrow would wait for the writer of a FIFO.
        open_regular(file).close()
        table = pq.read_table(file)
        # Names are decoded when they are asked for.
        names = table.column_names
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
    for name in REQUIRED:
        if name not in names:
            raise UserError(f"{file}: column {name!r} is missing; candidates need {', '.join(REQUIRED)}")
    context = tuple(side for side in spec.side if side.of == "context")
    dense = tuple(dense.name for dense in spec.dense if dense.of == "context")
    schema = pa.schema(
        [
            *((side.name, pa.int32()) for side in context),
            *((name, pa.float32()) for name in dense),
        ]
    )
    columns = {name: _required(table, name, file) for name in REQUIRED}
    table = table.select([name for name in schema.names if name in table.column_names])
    for place, name in enumerate(table.column_names):
        table = table.set_column(place, name, _filled(table.column(name)))
    columns |= validation.columns_of(table, schema, str(file), frozenset(schema.names))
    validation.check_side(columns, context, str(file))
    validation.check_finite(columns, dense, str(file))
    return columns


def _filled(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of numbers with 0 for null and NaN; other columns are returned unchanged."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column.cast(pa.float64())), pa.scalar(0, column.type), column)
    return column.fill_null(0) if pa.types.is_integer(column.type) or pa.types.is_floating(column.type) else column


def _required(table: pa.Table, name: str, file: Path) -> np.ndarray:
    """Return a required column of a candidates file, ``[n]`` int64; times are milliseconds UTC.

    Raises:
        UserError: a value is no id, or no time; names file, row, column and value.
    """
    column = table.column(name)
    # Times without a zone are UTC, as in pandas, polars and Arrow, and as in the numbers of this column.
    read: Callable[[pa.Array], pa.Array] = partial(times_ms, unit="ms", timezone="UTC")
    accepted = accepted_times(column.type, "ms", "UTC")
    if name != "request_ms":
        read, accepted = integer_ids, accepted_ids(column.type)
    parts, row = [np.empty(0, np.int64)], 1
    for chunk in column.chunks:
        parts.append(convert(chunk, read, file, name, row, accepted).to_numpy())
        row += len(chunk)
    return np.concatenate(parts)


def candidate_rows(model: Scorer, path: str, candidates: validation.Columns) -> Rows:
    """Return the candidates as rows without labels, with the features that are known at each request.

    Statistics are as of each candidate's own request, so that no candidate changes the result of another one.
    """
    spec = model.data.spec
    join = FeatureJoin(spec)
    for owner, name in TABLE_OF.items():
        try:
            table = read_table(DatasetFiles(path), f"{name}.parquet")
        except FileNotFoundError:
            continue
        join.add(owner, table)
    join.check()
    n = len(candidates["user_id"])
    side, dense = join.features(candidates)
    no_labels = np.zeros((n, len(spec.behaviours)), np.uint8)
    rows: Rows = {
        **{name: candidates[name] for name in ("user_id", "author_id", "item_id", "request_ms")},
        "visit_id": np.arange(n),
        "emit_ms": candidates["request_ms"],
        "domain": np.full(n, DOMAINS.index(spec.candidates[0]), np.uint8),
        "kind": np.full(n, KINDS.index("full"), np.uint8),
        "side": side,
        "dense": dense,
        "label": no_labels,
        "mask": no_labels,
    }
    rows["stat"] = statistics_as_of(model.data, rows)
    return rows


def score_candidates(model: Scorer, path: str, candidates: validation.Columns) -> pa.Table:
    """Score candidates. Returns one row per candidate, in order.

    The columns are ``user_id, item_id, author_id, request_ms``, a probability ``p_B`` per behaviour, and ``score``.
    """
    rows = candidate_rows(model, path, candidates)
    n = len(candidates["user_id"])
    beyond: Counter[str] = Counter()
    missing = MissingTally()
    vectors = None if model.space is None else model.space.at(model.space.newest)

    def batches() -> Iterator[PackedBatch]:
        for first in range(0, n, BATCH_ROWS):
            part = {name: column[first : first + BATCH_ROWS] for name, column in rows.items()}
            packed = model.features.pack(part, model.data.histories, part["request_ms"], vectors)
            beyond.update(packed.beyond)
            missing.add(packed.missing)
            yield packed

    probability = torch.sigmoid(torch.cat(list(model.logits(batches())))).numpy()
    if beyond:
        logger.info(beyond_message(beyond))
    for message in missing.messages():
        logger.info(message)
    behaviours = model.features.behaviours
    exponents = [model.config.score.exponents.get(behaviour, 1.0) for behaviour in behaviours]
    return pa.table(
        {
            **{name: candidates[name] for name in REQUIRED},
            **{f"p_{behaviour}": probability[:, k] for k, behaviour in enumerate(behaviours)},
            "score": ranking_score(probability, exponents),
        }
    )


def score_file(model: Scorer, candidates_file: Path, out: Output) -> None:
    """Score the candidates of one file and write another one, which appears only when it is complete.

    Raises:
        UserError: the candidates cannot be scored, or the file cannot be written.
    """
    candidates = read_candidates(candidates_file, model.data.spec)
    if not len(candidates["user_id"]):
        raise UserError(f"{candidates_file}: has no candidates; at least one row is needed")
    scores = score_candidates(model, model.config.data.path, candidates)
    with out.writing() as file, whole_file(file) as tmp_path:
        pq.write_table(scores, tmp_path)
    print(f"{scores.num_rows:,} candidates scored: {out}")
