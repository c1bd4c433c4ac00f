"""Measure the cost and the choice of id maps of a dynamic table: ours and TorchRec's.

    python -m benchmarks.speed.id_maps --out benchmarks/results/id_maps.json

A stream of ids whose favourites change (Zipf's law over a sliding window) goes through maps of one table: ours with
buckets of several sizes, one order of all rows (as a bucket as large as the table would have), and TorchRec's
``MCHManagedCollisionModule`` with an eviction after every step and after every tenth. All admit an id at its first
lookup and evict by recency, which is the policy that TorchRec has; ids are looked up as in training. Times are CPU time
of one thread, the median of the steps. A lookup is an id of a step, however often the id occurs in it; it is served if
the id has a row, and kept if the row was last looked up by the same id, so that the row has learnt from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torchrec.modules.mc_modules import LRU_EvictionPolicy, MCHManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor

from benchmarks.measure import make_parser, median_and_range, write_result
from modules.embeddings import Dynamic, Table
from trainer.console.progress import Progress
from trainer.console.text_table import text_table
from trainer.sparse import dynamic_ids
from trainer.sparse.dynamic_ids import DynamicIds

SHORT = ("--steps", "10")

BUCKETS = (8, 64, 512)
INTERVALS = (1, 10)
"""Steps between two evictions of TorchRec's map."""

Map = Callable[[Tensor, int], Tensor]
"""Ids of a step and its number -> rows, -1 where there is none."""


def stream(ids: int, steps: int) -> Iterator[Tensor]:
    """Yield the ids ``[ids]`` int64 of each step."""
    random = np.random.default_rng(1)
    for step in range(steps):
        yield torch.from_numpy(random.zipf(1.1, ids) % (50 * ids) + step * ids // 2000)


def ours(rows: int, bucket_rows: int) -> Map:
    """Return the map of ``trainer.sparse.dynamic_ids`` with buckets of another size."""
    ids = DynamicIds(Table("ids", rows, 4, dynamic=Dynamic(1, "recency")), 0, rows)

    def look_up(values: Tensor, step: int) -> Tensor:
        with patch.object(dynamic_ids, "BUCKET_ROWS", bucket_rows):
            return ids.learn(values, step)[0]

    return look_up


def one_order(rows: int) -> Map:
    """Return a map that keeps the ids seen most recently; of ids seen in the same step it keeps the smaller ones.

    It has no rows, but numbers the ids that it admits.
    """
    held, seen, number = (np.empty(0, np.int64) for _ in range(3))
    admitted = 0

    def look_up(values: Tensor, step: int) -> Tensor:
        nonlocal held, seen, number, admitted
        now, where = np.unique(values.numpy(), return_inverse=True)
        new = now[~np.isin(now, held)]
        seen[np.isin(held, now)] = step
        held, seen = np.concatenate([held, new]), np.concatenate([seen, np.full(len(new), step)])
        number = np.concatenate([number, admitted + np.arange(len(new))])
        admitted += len(new)
        kept = np.sort(np.lexsort((held, -seen))[: rows - 1])
        held, seen, number = held[kept], seen[kept], number[kept]
        order = np.argsort(held)
        place = order[np.searchsorted(held[order], now).clip(max=len(held) - 1)]
        return torch.from_numpy(np.where(held[place] == now, number[place], -1)[where])

    return look_up


def torchrec(rows: int, interval: int) -> Map:
    """Return TorchRec's map; its last row is that of ids without a row."""
    module = MCHManagedCollisionModule(
        zch_size=rows,
        device=torch.device("cpu"),
        eviction_policy=LRU_EvictionPolicy(),
        eviction_interval=interval,
        input_hash_size=1 << 62,
    )
    module.train()

    def look_up(values: Tensor, step: int) -> Tensor:
        features = {"ids": JaggedTensor(values=values, lengths=torch.ones(len(values), dtype=torch.int64))}
        found = module(features)["ids"].values()
        module.evict()
        return torch.where(found == rows - 1, -1, found)

    return look_up


def measure(look_up: Map, ids: int, steps: int, tick: Callable[[], None]) -> dict[str, float]:
    """Return CPU milliseconds a step, ids a second, and shares of lookups served and kept after the first quarter."""
    seconds, served, kept, looked_up = [], 0, 0, 0
    holder: dict[int, int] = {}
    for step, values in enumerate(stream(ids, steps), 1):
        started = time.thread_time()
        rows = look_up(values, step)
        seconds.append(time.thread_time() - started)
        distinct, first = np.unique(values.numpy(), return_index=True)
        found = dict(zip(distinct.tolist(), rows.numpy()[first].tolist(), strict=True))
        if step > steps // 4:
            served += sum(row >= 0 for row in found.values())
            kept += sum(row >= 0 and holder.get(row) == value for value, row in found.items())
            looked_up += len(distinct)
        holder |= {row: value for value, row in found.items() if row >= 0}
        tick()
    spread = median_and_range([1e3 * one for one in seconds])
    return {
        "milliseconds": spread["median"],
        "milliseconds_least": spread["least"],
        "milliseconds_most": spread["most"],
        "ids_per_second": 1e3 * ids / spread["median"],
        "served": served / looked_up,
        "kept": kept / looked_up,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("speed.id_maps", __doc__)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the table (default: %(default)s)")
    parser.add_argument("--ids", type=int, default=100_000, help="ids of a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="steps (default: %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    maps: dict[str, Map] = {f"ours, buckets of {size}": ours(options.rows, size) for size in BUCKETS}
    maps["one order of all rows"] = one_order(options.rows)
    maps |= {f"TorchRec, every {interval} steps": torchrec(options.rows, interval) for interval in INTERVALS}
    result: dict[str, Any] = {}
    with Progress("id maps", options.steps * len(maps), "steps") as progress:
        for name, look_up in maps.items():
            result[name] = measure(look_up, options.ids, options.steps, lambda: progress.advance(1))
    lines = [
        [
            name,
            f"{found['milliseconds']:.1f}",
            f"{found['ids_per_second'] / 1e6:.2f}",
            *(f"{100 * found[key]:.1f} %" for key in ("served", "kept")),
        ]
        for name, found in result.items()
    ]
    print(text_table(["map", "CPU ms a step", "million ids/s", "lookups served", "kept"], lines))
    settings = {"rows": options.rows, "ids": options.ids, "steps": options.steps}
    write_result(options.out, {"question": "Cost and choice of id maps", **settings, "result": result})


if __name__ == "__main__":
    main()
