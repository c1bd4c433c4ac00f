"""Scores a file of candidates with a trained ranker."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from trainer.config.ranker import JobConfig
from trainer.console.errors import UserError
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.packed_batch import PackedBatch
from trainer.data.features.search_vectors import SearchSpace
from trainer.data.format import storage, validation
from trainer.data.format.dataset import Dataset, freeze_statistics
from trainer.data.format.feature_join import TABLE_OF, FeatureJoin
from trainer.data.format.schema import DOMAINS, KINDS, DatasetSpec, Rows

REQUIRED = ("user_id", "item_id", "author_id", "request_ms")


BATCH_ROWS = 4096


class Scorer(Protocol):
    """A model that scores: of a run, or exported.

    Attributes:
        config: of the job that trained it.
        data: the dataset that features, histories and statistics come from.
        features: of the model.
        space: vectors that histories are searched with; None if there are no such histories.
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
        """``[rows, behaviours]`` float32 of each batch, on the CPU."""


def ranking_score(probability: np.ndarray, exponents: Sequence[float]) -> np.ndarray:
    """Product over behaviours of ``(1 + p) ** exponent`` (Moment&Cross equation 4).

    Args:
        probability: ``[n, behaviours]`` in [0, 1].
        exponents: one a behaviour.

    Returns:
        ``[n]`` float64.
    """
    # A sum of logarithms: long products of large exponents would overflow.
    return np.exp(np.log1p(probability.astype(np.float64)) @ np.asarray(exponents, np.float64))


def read_candidates(file: Path, spec: DatasetSpec) -> validation.Columns:
    """Columns of a candidates file; features of the request that it lacks are unknown, or 0 where dense.

    Raises:
        UserError: no such file, not Parquet, a required column is missing, or a value cannot be.
    """
    try:
        table = pq.read_table(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
    for name in REQUIRED:
        if name not in table.column_names:
            raise UserError(f"{file}: column {name!r} is missing; candidates need {', '.join(REQUIRED)}")
    context = tuple(side for side in spec.side if side.of == "context")
    dense = tuple(dense.name for dense in spec.dense if dense.of == "context")
    schema = pa.schema(
        [
            *((name, pa.int64()) for name in REQUIRED),
            *((side.name, pa.int32()) for side in context),
            *((name, pa.float32()) for name in dense),
        ]
    )
    table = table.select([name for name in schema.names if name in table.column_names])
    optional = frozenset(schema.names) - frozenset(REQUIRED)
    columns = validation.columns_of(table, schema, str(file), optional)
    validation.check_ids(columns, REQUIRED, str(file))
    validation.check_side(columns, context, str(file))
    validation.check_finite(columns, dense, str(file))
    return columns


def rows_of_candidates(model: Scorer, path: str, candidates: validation.Columns) -> Rows:
    """Training rows without labels: what the model may know of each candidate at its request.

    Statistics are those of the earliest request of the file, so that nothing later than any request is in them.
    """
    spec = model.data.spec
    join = FeatureJoin(spec)
    for owner, name in TABLE_OF.items():
        try:
            table = pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(path, f"{name}.parquet"))))
        except FileNotFoundError:
            continue
        join.add(owner, table)
    join.check()
    n = len(candidates["user_id"])
    side, dense = join.features(candidates)
    nothing = np.zeros((n, len(spec.behaviours)), np.uint8)
    rows: Rows = {
        **{name: candidates[name] for name in ("user_id", "author_id", "item_id", "request_ms")},
        "visit_id": np.arange(n),
        "emit_ms": candidates["request_ms"],
        "domain": np.full(n, DOMAINS.index(spec.candidates[0]), np.uint8),
        "kind": np.full(n, KINDS.index("full"), np.uint8),
        "side": side,
        "dense": dense,
        "label": nothing,
        "mask": nothing,
    }
    rows["stat"] = freeze_statistics(model.data, int(candidates["request_ms"].min())).lookup(rows)
    return rows


def score_candidates(model: Scorer, path: str, candidates: validation.Columns) -> pa.Table:
    """Scores in the order of the candidates: ``user_id, item_id, author_id, request_ms, p_B ..., score``."""
    rows = rows_of_candidates(model, path, candidates)
    n = len(candidates["user_id"])
    vectors = None if model.space is None else model.space.at(model.space.newest)

    def batches() -> Iterator[PackedBatch]:
        for first in range(0, n, BATCH_ROWS):
            part = {name: column[first : first + BATCH_ROWS] for name, column in rows.items()}
            yield model.features.pack(part, model.data.histories, part["request_ms"], vectors)

    probability = torch.sigmoid(torch.cat(list(model.logits(batches())))).numpy()
    behaviours = model.features.behaviours
    exponents = [model.config.score.exponents.get(behaviour, 1.0) for behaviour in behaviours]
    return pa.table(
        {
            **{name: candidates[name] for name in REQUIRED},
            **{f"p_{behaviour}": probability[:, k] for k, behaviour in enumerate(behaviours)},
            "score": ranking_score(probability, exponents),
        }
    )


def score_file(model: Scorer, candidates_file: Path, out: Path) -> None:
    """Score the candidates of a file into a file, which appears when it is complete.

    Raises:
        UserError: candidates that cannot be scored, or a file that cannot be written.
    """
    candidates = read_candidates(candidates_file, model.data.spec)
    if not len(candidates["user_id"]):
        raise UserError(f"{candidates_file}: no candidates in it")
    scores = score_candidates(model, model.config.data.path, candidates)
    aside = Path(f"{out}.{os.getpid()}")
    try:
        pq.write_table(scores, aside)
        aside.replace(out)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    print(f"{scores.num_rows:,} candidates scored: {out}")
