"""Retrieval with the two towers: the authors of held-out positives among all authors on air at the request.

The authors' vectors are renewed in intervals, as they would be in use: a request of 12:00:17 is answered with vectors
as of 12:00:00. The rank of an author counts those with a larger product with the user's vector; equal ones count as if
their order were drawn at random.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from trainer.config.align import AlignConfig
from trainer.console.errors import UserError
from trainer.console.progress import Progress
from trainer.console.text_table import text_table
from trainer.data.format import storage
from trainer.data.format.dataset import Dataset
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import read_table, table_footer
from trainer.data.format.schema import DOMAINS, partition_of
from trainer.data.loading.loader import Loader
from trainer.engine.build_engine import rows_per_rank
from trainer.engine.hybrid_engine import HybridEngine
from trainer.runtime.distributed import World
from trainer.runtime.files import whole_file
from trainer.runtime.host_copy import HostCopy, one_behind
from trainer.semantic_ids.align_features import AuthorRequests, PairFeatures
from trainer.semantic_ids.align_popularity import BUCKETS, AuthorPopularity

_HASHES = 1 << 30

HELD_OUT = "held_out.parquet"
"""File of a run with the outcomes of the held-out pairs."""

OUTCOME = ("visit_id", "user_id", "author_id", "request_ms", "larger", "equal", "on_air")
"""Columns of the outcomes. ``larger`` is the number of authors on air with a larger product with the user's vector,
``equal`` that of equal ones, the author included, and ``on_air`` that of all of them."""

_REPORTED = ("author_id", "larger", "equal", "on_air")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rooms:
    """Live rooms in the order of their start.

    Attributes:
        author_id, start_ms, end_ms: ``[n]`` int64.
    """

    author_id: np.ndarray
    start_ms: np.ndarray
    end_ms: np.ndarray

    @staticmethod
    def read(path: str) -> Rooms:
        """Read the rooms of a dataset.

        Raises:
            UserError: the dataset has no rooms with start and end.
        """
        files, place = DatasetFiles(path), storage.join(path, "items.parquet")
        columns = ["author_id", "start_ms", "end_ms"]
        try:
            names = table_footer(files, "items.parquet")[0].names
            if missing := [name for name in columns if name not in names]:
                raise UserError(
                    f"{place}: has no column {missing[0]!r}, so the authors on air at a request are not known; leave "
                    "out data.eval_from"
                )
            table = read_table(files, "items.parquet", columns, ["domain"])
        except FileNotFoundError:
            raise UserError(
                f"{place}: no such file, so the authors on air at a request are not known; leave out data.eval_from"
            ) from None
        author, start, end = (table[name].fill_null(-1).to_numpy().astype(np.int64) for name in columns)
        live = author >= 0
        if "domain" in table.column_names:
            live &= table["domain"].to_numpy() == DOMAINS.index("live")
        order = np.flatnonzero(live)[np.argsort(start[live], kind="stable")]
        return Rooms(author[order], start[order], end[order])

    def between(self, from_ms: int, until_ms: int) -> np.ndarray:
        """Return the places of the rooms that are on air at some time in ``[from_ms, until_ms)``."""
        longest = int((self.end_ms - self.start_ms).max(initial=0))
        first, stop = np.searchsorted(self.start_ms, [from_ms - longest, until_ms])
        return first + np.flatnonzero(self.end_ms[first:stop] > from_ms)


@dataclass(frozen=True)
class HeldOut:
    """Held-out positives of all ranks, in order of time.

    Attributes:
        visit_id, user_id, author_id, request_ms: ``[n]`` int64.
        user: ``[n, dim]`` float32, vectors.
    """

    visit_id: np.ndarray
    user_id: np.ndarray
    author_id: np.ndarray
    request_ms: np.ndarray
    user: np.ndarray


def encode_users(engine: HybridEngine, loader: Loader, limit: int, world: World) -> HeldOut:
    """Return the held-out positives with their users' vectors, at most about ``limit`` of them. Collective."""
    found: list[tuple[np.ndarray, ...]] = []
    with Progress("held-out users", loader.rows_total, "rows", quiet=world.rank > 0) as progress:

        def copies() -> Iterator[tuple[int, HostCopy]]:
            for batch, output in engine.predict(iter(loader)):
                dim, tensors = output.shape[1] // 2, list[Tensor]()
                if batch.author_id is not None:
                    columns = (batch.visit_id, batch.user_id, batch.author_id, batch.request_ms)
                    # Memory of the host may be used for another batch.
                    tensors = [*(column.clone() for column in columns), output[:, :dim].clone()]
                yield batch.rows + batch.left_out_rows, HostCopy(tensors)

        for rows, tensors in one_behind(copies()):
            if tensors:
                found.append(tuple(tensor.numpy() for tensor in tensors))
            progress.advance(rows)
    mine = [np.concatenate(parts) for parts in zip(*found, strict=True)] if found else None
    total = world.sum(0 if mine is None else len(mine[0]))
    if mine is not None and total > limit:
        # By a hash of the visit, so that the choice does not depend on the ranks.
        kept = partition_of(mine[0], _HASHES) < limit * _HASHES // total
        mine = [part[kept] for part in mine]
    parts = [part for part in world.agree(world.gather(mine)) or [] if part is not None]
    if not parts:
        none = np.empty(0, np.int64)
        return HeldOut(none, none, none, none, np.empty((0, 0), np.float32))
    visit, user_id, author, request, user = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.lexsort((visit, request))
    return HeldOut(visit[order], user_id[order], author[order], request[order], user[order])


def evaluate_held_out(
    engine: HybridEngine,
    loader: Loader,
    data: Dataset,
    features: PairFeatures,
    rooms: Rooms,
    config: AlignConfig,
    world: World,
    directory: Path,
) -> dict[str, Any]:
    """Evaluate the positives of a loader of held-out rows, see :func:`evaluate_retrieval`. Collective.

    Returns:
        The report. The first rank also writes the outcome of each pair to ``held_out.parquet`` in ``directory``.
    """
    held_out = encode_users(engine, loader, config.evaluate.requests, world)
    requests = AuthorRequests(data, features)
    report, outcomes = evaluate_retrieval(engine, held_out, requests, rooms, features.popularity, config, world)
    if world.rank == 0:
        with whole_file(directory / HELD_OUT) as tmp_path:
            pq.write_table(pa.table(dict(zip(OUTCOME, outcomes.T, strict=True))), tmp_path)
    return report


def evaluate_retrieval(
    engine: HybridEngine,
    held_out: HeldOut,
    requests: AuthorRequests,
    rooms: Rooms,
    popularity: AuthorPopularity,
    config: AlignConfig,
    world: World,
) -> tuple[dict[str, Any], np.ndarray]:
    """Find the author of each held-out positive among the authors on air at its request. Collective.

    Returns:
        Recall and reciprocal rank by popularity of the author, and the gate by popularity; and the outcomes of the
        pairs, ``[n, columns]`` int64 with the columns of ``OUTCOME``, in order of the visits.
    """
    refresh_ms = 1000 * config.evaluate.refresh_seconds
    slot = held_out.request_ms // refresh_ms * refresh_ms
    slots, first = np.unique(slot, return_index=True)
    bounds = np.append(first, len(slot))
    # Every rank takes its share of the intervals, whoever the users belong to.
    own = range(world.rank, len(slots), world.size)
    on_air = [_candidates(rooms, held_out, slots[k], refresh_ms, slice(bounds[k], bounds[k + 1])) for k in own]
    authors = np.concatenate([np.empty(0, np.int64), *on_air])
    as_of = np.repeat(slots[list(own)], [len(part) for part in on_air])
    vectors = encode_authors(
        engine, requests, authors, as_of, rows_per_rank(config, world.size), world, "authors on air"
    )
    outcomes: list[np.ndarray] = []
    gates = np.zeros((2, len(BUCKETS)))
    parts = iter(vectors)
    held = np.empty((0, held_out.user.shape[1] + 1), np.float32)
    for k, candidates in zip(own, on_air, strict=True):
        while len(held) < len(candidates):
            held = np.concatenate([held, next(parts)])
        block, held = held[: len(candidates)], held[len(candidates) :]
        place = popularity.buckets(candidates)
        np.add.at(gates[0], place, block[:, -1])
        np.add.at(gates[1], place, 1)
        outcomes.append(_ranks(rooms, held_out, slice(bounds[k], bounds[k + 1]), candidates, block[:, :-1]))
    for _ in parts:
        # The other ranks may have more intervals: encoding is collective.
        pass
    nothing = np.empty((0, len(OUTCOME)), np.int64)
    mine = np.concatenate([nothing, *outcomes])
    gathered = world.agree(world.gather((mine, gates))) or []
    joined = np.concatenate([nothing, *(part for part, _ in gathered)])
    joined = joined[np.argsort(joined[:, 0], kind="stable")]
    gates = sum((part for _, part in gathered), np.zeros_like(gates))
    return _report(joined, gates, popularity, config.evaluate.recall_at), joined


def encode_authors(
    engine: HybridEngine,
    requests: AuthorRequests,
    authors: np.ndarray,
    as_of_ms: np.ndarray,
    rows: int,
    world: World,
    label: str,
    latest: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Yield the vectors and gates of authors as of given times, ``[m, dim + 1]`` float32, in order. Collective.

    The arguments are those of :meth:`AuthorRequests.batches`; ``label`` names the progress.
    """
    left = len(authors)
    with Progress(label, world.max(left), "vectors", quiet=world.rank > 0) as progress:
        outputs = engine.predict(requests.batches(authors, as_of_ms, rows, latest))
        copies = ((output.shape[1] // 2, HostCopy([output])) for _, output in outputs)
        for dim, (output,) in one_behind(copies):
            block = output[: min(left, len(output)), dim:].numpy()
            left -= len(block)
            progress.advance(len(block))
            if len(block):
                yield block


def _candidates(rooms: Rooms, held_out: HeldOut, slot: int, refresh_ms: int, part: slice) -> np.ndarray:
    """Return the authors on air in an interval, and those of its held-out positives, ascending."""
    return np.union1d(rooms.author_id[rooms.between(slot, slot + refresh_ms)], held_out.author_id[part])


def _ranks(rooms: Rooms, held_out: HeldOut, part: slice, candidates: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Return the outcomes of some held-out positives, see :func:`evaluate_retrieval`."""
    scores = held_out.user[part] @ vectors.T
    request, author = held_out.request_ms[part], held_out.author_id[part]
    own = np.searchsorted(candidates, author)
    on_air = np.zeros(scores.shape, bool)
    near = rooms.between(int(request.min()), int(request.max()) + 1)
    for row, moment in enumerate(request.tolist()):
        here = near[(rooms.start_ms[near] <= moment) & (rooms.end_ms[near] > moment)]
        on_air[row, np.searchsorted(candidates, rooms.author_id[here])] = True
    line = np.arange(len(author))
    # The user was shown a room of the author, whatever the table of the rooms says.
    on_air[line, own] = True
    of_own = scores[line, own][:, None]
    larger, equal = (on_air & (scores > of_own)).sum(1), (on_air & (scores == of_own)).sum(1)
    columns = (held_out.visit_id[part], held_out.user_id[part], author, request, larger, equal, on_air.sum(1))
    return np.stack(columns, axis=1).astype(np.int64)


def _report(
    outcomes: np.ndarray, gates: np.ndarray, popularity: AuthorPopularity, recall_at: Sequence[int]
) -> dict[str, Any]:
    author, larger, equal, on_air = (outcomes[:, OUTCOME.index(name)] for name in OUTCOME if name in _REPORTED)
    bucket = popularity.buckets(author)

    def of(chosen: np.ndarray) -> dict[str, Any]:
        n = int(chosen.sum())
        result: dict[str, Any] = {"pairs": n, "authors": len(np.unique(author[chosen]))}
        for k in recall_at:
            share = np.clip((k - larger[chosen]) / equal[chosen], 0, 1)
            result[f"recall@{k}"] = float(share.mean()) if n else None
        middle = larger[chosen] + (equal[chosen] + 1) / 2
        result["mrr"] = float((1 / middle).mean()) if n else None
        result["on_air"] = float(on_air[chosen].mean()) if n else None
        return result

    report = {"all": of(np.ones(len(author), bool))}
    for place, name in enumerate(BUCKETS):
        report[name] = of(bucket == place)
        report[name]["gate"] = float(gates[0, place] / gates[1, place]) if gates[1, place] else None
    report["all"]["gate"] = float(gates[0].sum() / gates[1].sum()) if gates[1].sum() else None
    return report


def retrieval_table(report: dict[str, Any]) -> str:
    """Format a report as text."""
    columns = [name for name in report["all"] if name not in ("pairs", "authors")]

    def shown(value: float | None, name: str) -> str:
        return "-" if value is None else f"{value:.1f}" if name == "on_air" else f"{value:.4f}"

    lines = [
        [bucket, f"{part['pairs']:,}", f"{part['authors']:,}", *(shown(part[name], name) for name in columns)]
        for bucket, part in report.items()
    ]
    return text_table(["author", "pairs", "authors", *columns], lines)
