"""Measure what it saves to look up each id once: ids, bytes between ranks, and time.

    python -m benchmarks.speed.dedup --out benchmarks/results/dedup.json

Batches of five sequences of 100 entries (``--length``), each with an item, an author and two context ids, made as the
searches make them: users have 10,000 items of popularity 1/rank; ``long`` holds those of the candidate's topic,
``author`` those of its author, most often none, and ``mixed`` every third of the latest, which ``short`` has as well.
Each user has two rows a batch. Ids are looked up, sent, and their rows trained with row-wise Adagrad, on 1 and 2 ranks,
as they come and without duplicates (``trainer/sparse/dedup_exchange.py``), in the same process by turns. Bytes are
those that ``all_to_all_single`` sends to other ranks. Processor time of all threads of a rank stands beside elapsed
time, since other work on the machine disturbs it less. Both ways must leave equal tables.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.measure import make_parser, median_and_range, run_ranks, write_result
from modules.embeddings import Lookup, Table
from trainer.console.text_table import text_table
from trainer.runtime.distributed import World, control_group
from trainer.runtime.files import write_json
from trainer.runtime.phase_timer import PhaseClock
from trainer.sparse.planner import TableOptimizer
from trainer.sparse.sharded_tables import ShardedTables

SHORT = ("--length", "50")

DIM, SEED = 16, 1
HISTORY, TOPICS = 10_000, 64
ROWS = {"item": 2_000_000, "author": 200_000, "side": 4_096}
SEQUENCES = ("short", "long", "author", "live_long", "mixed")
LOOKUPS = (
    Lookup("item", "item", 1),
    Lookup("author", "author", 1),
    *(
        lookup
        for name in SEQUENCES
        for lookup in (
            Lookup(f"{name}_item", "item", None),
            Lookup(f"{name}_author", "author", None),
            Lookup(f"{name}_context", "side", None, ids_per_entry=2),
        )
    ),
)
WARM_UP, STEPS = 2, 9
STAGES = ("start", "send", "rows", "update")
WAYS = {"as they come": False, "once": True}


class AllToAllCounter:
    """Stands in for ``all_to_all_single`` and counts the bytes that go to other ranks."""

    def __init__(self) -> None:
        self.bytes, self._plain = 0, dist.all_to_all_single

    def __call__(self, output: Tensor, values: Tensor, received: list[int], sent: list[int], **options: Any) -> Any:
        others = sum(sent) - sent[dist.get_rank()]
        self.bytes += others * values[:1].numel() * values.element_size() if len(values) else 0
        return self._plain(output, values, received, sent, **options)


def author_of(items: np.ndarray) -> np.ndarray:
    """Return the authors of items; every author has ten."""
    return items // 10


def make_ids(rng: np.random.Generator, rows: int, length: int) -> KeyedJaggedTensor:
    """Return the ids of a batch, key by key."""
    users = rows // 2
    # Inverse of the distribution function of 1 / rank.
    history = np.exp(rng.random((users, HISTORY)) * np.log(ROWS["item"] - 1)).astype(np.int64)
    candidate = np.exp(rng.random(rows) * np.log(ROWS["item"] - 1)).astype(np.int64)
    ids: dict[str, list[np.ndarray]] = {lookup.name: [] for lookup in LOOKUPS}
    for row in range(rows):
        own, wanted = history[row // 2], candidate[row]
        found = {
            "short": own[-length:],
            "long": own[own % TOPICS == wanted % TOPICS][-length:],
            "author": own[author_of(own) == author_of(wanted)][-length:],
            "live_long": own[: HISTORY // 10][own[: HISTORY // 10] % TOPICS == wanted % TOPICS][-length:],
            "mixed": own[::-3][:length],
        }
        ids["item"].append(candidate[row : row + 1])
        ids["author"].append(author_of(candidate[row : row + 1]))
        for name, items in found.items():
            ids[f"{name}_item"].append(items)
            ids[f"{name}_author"].append(author_of(items))
            ids[f"{name}_context"].append(rng.integers(0, 300, 2 * len(items)))
    lengths = [len(of_row) for of_key in ids.values() for of_row in of_key]
    return KeyedJaggedTensor(
        keys=list(ids),
        values=torch.from_numpy(np.concatenate([of_row for of_key in ids.values() for of_row in of_key])),
        lengths=torch.tensor(lengths),
        stride=rows,
        length_per_key=[sum(map(len, of_key)) for of_key in ids.values()],
    )


def make_tables(world: World, rows: int, *, deduplicate: bool) -> ShardedTables:
    """Return the tables, all of them sharded row-wise."""
    return ShardedTables(
        [Table(name, size, DIM, sharding="row_wise") for name, size in ROWS.items()],
        LOOKUPS,
        TableOptimizer("rowwise_adagrad", 0.02),
        device=world.device,
        local_size=world.size,
        batch_size=rows,
        seed=SEED,
        clock=PhaseClock(world.device),
        control=control_group(),
        deduplicate=deduplicate,
    )


def step(tables: ShardedTables, ids: KeyedJaggedTensor, gradient: float) -> dict[str, float]:
    """Look up and train; return the seconds of each stage, and under ``processor`` the processor time of all."""
    spent, busy = {}, 0.0
    found: dict[str, Tensor] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        nonlocal busy
        started, before = time.perf_counter(), time.process_time()
        result = work()
        spent[stage] = time.perf_counter() - started
        busy += time.process_time() - before
        return result

    exchanges: list[Any] = list(tables.exchanges([ids]))
    timed("start", lambda: [exchange.start() for exchange in exchanges])
    timed("send", lambda: [exchange.send() for exchange in exchanges])
    for rows in timed("rows", lambda: [exchange.rows() for exchange in exchanges]):
        found |= rows
    # Each gradient has memory of its own, as in training.
    gradients = {name: [torch.sin(rows * gradient)] for name, rows in found.items()}
    timed("update", lambda: [exchange.update(gradients, 1.0 / ids.stride()) for exchange in exchanges])
    return spent | {"processor": busy}


def measure_rank(rows: int, length: int, out: Path) -> None:
    """Measure both ways by turns on the same batches on one rank; the first rank writes the result."""
    with World.join("cpu") as world:
        rng = np.random.default_rng([SEED, world.rank])
        models = {way: make_tables(world, rows, deduplicate=wanted) for way, wanted in WAYS.items()}
        traffic = AllToAllCounter()
        seconds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        bytes_sent = dict.fromkeys(WAYS, 0)
        ids, unique = 0, 0
        for number in range(WARM_UP + STEPS):
            batch = make_ids(rng, rows, length)
            if number >= WARM_UP:
                ids += len(batch.values())
                unique += sum(len(values) for values in _unique_ids(batch))
            for way, tables in models.items():
                world.barrier()
                traffic.bytes = 0
                with patch.object(dist, "all_to_all_single", traffic):
                    spent = step(tables, batch, 1.0 + number)
                if number >= WARM_UP:
                    seconds[way].append(spent)
                    bytes_sent[way] += traffic.bytes
        first, second = ([shard.values for shard in tables.shards()] for tables in models.values())
        apart = max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
        result = {
            "ranks": world.size,
            "ids": ids / STEPS,
            "unique_ids": unique / STEPS,
            "largest_difference_of_tables": world.max(round(apart * 1e9)) / 1e9,
            "ways": {
                way: {
                    "megabytes_to_other_ranks": bytes_sent[way] / STEPS / 1e6,
                    "milliseconds": {
                        stage: 1e3 * statistics.median(each[stage] for each in seconds[way]) for stage in STAGES
                    },
                    "milliseconds_in_all": 1e3
                    * statistics.median(sum(each[stage] for stage in STAGES) for each in seconds[way]),
                    "processor_milliseconds": 1e3 * statistics.median(each["processor"] for each in seconds[way]),
                    "spread": {
                        "milliseconds_in_all": median_and_range(
                            [1e3 * sum(each[stage] for stage in STAGES) for each in seconds[way]]
                        ),
                        "processor_milliseconds": median_and_range([1e3 * each["processor"] for each in seconds[way]]),
                    },
                }
                for way in WAYS
            },
        }
        if world.rank == 0:
            write_json(out, result)


def _unique_ids(batch: KeyedJaggedTensor) -> Iterator[Tensor]:
    """Yield the unique ids of each table."""
    pieces = dict(zip(batch.keys(), batch.values().split(batch.length_per_key()), strict=True))
    for table in ROWS:
        yield torch.cat([pieces[lookup.name] for lookup in LOOKUPS if lookup.table == table]).unique()


def start(ranks: int, rows: int, length: int) -> dict[str, Any]:
    """Run :func:`measure_rank` on some ranks."""
    return run_ranks("benchmarks.speed.dedup", ["--rows", rows, "--length", length, "--one"], ranks)


def describe(results: Sequence[dict[str, Any]]) -> str:
    """Return the results as a table."""
    lines = []
    for result in results:
        for way, found in result["ways"].items():
            ids = result["unique_ids"] if WAYS[way] else result["ids"]
            times = [*found["milliseconds"].values(), found["milliseconds_in_all"], found["processor_milliseconds"]]
            sent = f"{found['megabytes_to_other_ranks']:.1f}"
            lines.append([str(result["ranks"]), way, f"{ids:,.0f}", sent, *(f"{time:.1f}" for time in times)])
    stages = [f"{stage} ms" for stage in STAGES]
    return text_table(["ranks", "ids are sent", "ids a rank", "MB to others", *stages, "ms", "CPU ms"], lines, texts=2)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("speed.dedup", __doc__)
    parser.add_argument("--rows", type=int, default=512, help="rows of a rank in a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=100, help="most entries of a sequence (default: %(default)s)")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        measure_rank(options.rows, options.length, options.one)
        return
    results = [start(ranks, options.rows, options.length) for ranks in (1, 2)]
    print(describe(results))
    settings = {"rows_a_rank": options.rows, "length": options.length, "dim": DIM, "table_rows": ROWS}
    write_result(options.out, {"settings": settings, "results": results}, ranks=2)


if __name__ == "__main__":
    main()
