"""Score candidates with a trained run: probabilities per behaviour and the ranking score.

The candidates file has ``user_id``, ``item_id``, ``author_id`` and ``request_ms``, and, where the model uses them, a
column for each feature of the request itself; one that is left out is unknown. Features of users, authors and items,
histories and statistics come from the run's dataset, as of each request.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from trainer.command import add_score_arguments, rank_parser
from trainer.data import checks, storage
from trainer.data.batch import Batch, unpack
from trainer.data.dataset import freeze_statistics
from trainer.data.join import TABLE_OF, FeatureJoin
from trainer.data.schema import DOMAINS, KINDS, DatasetSpec, Rows
from trainer.distributed import World, run_rank
from trainer.errors import UserError
from trainer.evaluate import TrainedModel, open_run

REQUIRED = ("user_id", "item_id", "author_id", "request_ms")

BATCH_ROWS = 4096


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


def read_candidates(file: Path, spec: DatasetSpec) -> checks.Columns:
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
    columns = checks.columns_of(table, schema, str(file), optional)
    checks.check_ids(columns, REQUIRED, str(file))
    checks.check_side(columns, context, str(file))
    checks.check_finite(columns, dense, str(file))
    return columns


def rows_of_candidates(run: TrainedModel, path: str, candidates: checks.Columns) -> Rows:
    """Training rows without labels: what the model may know of each candidate at its request.

    Statistics are those of the earliest request of the file, so that nothing later than any request is in them.
    """
    spec = run.data.spec
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
    rows["stat"] = freeze_statistics(run.data, int(candidates["request_ms"].min())).lookup(rows)
    return rows


def score_candidates(run: TrainedModel, path: str, candidates: checks.Columns) -> pa.Table:
    """Scores in the order of the candidates: ``user_id, item_id, author_id, request_ms, p_B ..., score``."""
    rows = rows_of_candidates(run, path, candidates)
    n = len(candidates["user_id"])

    def batches() -> Iterator[Batch]:
        for first in range(0, n, BATCH_ROWS):
            part = {name: column[first : first + BATCH_ROWS] for name, column in rows.items()}
            packed = run.features.pack(part, run.data.histories, part["request_ms"])
            yield unpack(packed, run.features.layout, {})

    logits = torch.cat([found.float().cpu() for _, found in run.engine.predict(batches())])
    probability = torch.sigmoid(logits).numpy()
    behaviours = run.features.behaviours
    exponents = [run.config.score.exponents.get(behaviour, 1.0) for behaviour in behaviours]
    return pa.table(
        {
            **{name: candidates[name] for name in REQUIRED},
            **{f"p_{behaviour}": probability[:, k] for k, behaviour in enumerate(behaviours)},
            "score": ranking_score(probability, exponents),
        }
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``limelight score`` and ``python -m trainer.score``."""
    parser = rank_parser("trainer.score", "Score candidates with a run.")
    add_score_arguments(parser)
    given = parser.parse_args(arguments)

    def job() -> None:
        with World.join("auto") as world:
            run = open_run(given.directory, world)
            candidates = read_candidates(Path(given.candidates), run.data.spec)
            if not len(candidates["user_id"]):
                raise UserError(f"{given.candidates}: no candidates in it")
            scores = score_candidates(run, run.config.data.path, candidates)
            aside = Path(f"{given.out}.{os.getpid()}")
            try:
                pq.write_table(scores, aside)
                aside.replace(given.out)
            except OSError as error:
                aside.unlink(missing_ok=True)
                raise UserError(f"{given.out}: cannot be written ({error.strerror})") from None
            print(f"{scores.num_rows:,} candidates scored: {given.out}")

    return run_rank(job)


if __name__ == "__main__":
    sys.exit(main())
