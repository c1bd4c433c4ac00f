"""Measure tables that admit and evict ids, with a tenth of the rows that all ids would need.

    python -m benchmarks.quality.dynamic_ids --out benchmarks/results/dynamic_ids.json
    python -m benchmarks.quality.dynamic_ids --seeds 2 --steps 300

Trains one model on a stream in which rooms live for a short while and authors come and go
(``benchmarks/quality/dynamic_stream.py``; the true probabilities are known). Every batch is predicted before it is
learnt, with tables that have a row for every id (``all``), and with tables of a tenth of the rows: hashed, and dynamic
under each policy. AUC is that of the predictions after the first
quarter of the stream: mean over seeds, with 95 % intervals (Student's t), also of the difference to ``all`` and to
``hash`` on the same stream. The tables' learning rate is chosen for each variant on the first third of another stream.

Runs that the file of ``--out`` has are not repeated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.measure import make_parser, mean_and_half_width, write_result
from benchmarks.quality.dynamic_stream import N_DENSE, PassingRooms, StepExposures
from modules.embeddings import Dynamic, Lookup, Table
from trainer.console.progress import Progress
from trainer.console.text_table import text_table
from trainer.data.features.id_map import IdMap
from trainer.metrics.behaviour_metrics import auc
from trainer.runtime.distributed import World
from trainer.runtime.phase_timer import PhaseClock
from trainer.sparse.planner import TableOptimizer
from trainer.sparse.sharded_tables import ShardedTables

DIM, ROWS, LIFE = 8, 1024, 25.0
ROOMS_PER_STEP, AUTHORS_PER_STEP = 16, 3.5
SHARE = 10
"""Ids for each row of the small tables."""
RATES = (0.05, 0.1, 0.2, 0.4)
TUNING_SEED = 100
VARIANTS: dict[str, Dynamic | None] = {
    "all": None,
    "hash": None,
    "recency, after 1": Dynamic(1, "recency"),
    "recency, after 2": Dynamic(2, "recency"),
    "frequency, after 2": Dynamic(2, "frequency"),
    "both, after 2": Dynamic(2, "both"),
}
LOOKUPS = (Lookup("room", "room", 1), Lookup("author", "author", 1))


class SmallNetwork(nn.Module):
    """A hidden layer over the embeddings of room and author and the dense features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * DIM + N_DENSE, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, embedded: dict[str, Tensor], dense: Tensor) -> Tensor:
        """Return the logits ``[rows]``."""
        return self.layers(torch.cat([embedded["room"], embedded["author"], dense], 1)).squeeze(1)


def stream_of(seed: int, steps: int) -> PassingRooms:
    """Return the stream of a seed; its ids grow with its length, so that the rooms open at a time do not."""
    return PassingRooms(seed, steps, ROWS, round(ROOMS_PER_STEP * steps), round(AUTHORS_PER_STEP * steps), LIFE)


def table_of(name: str, ids: int, variant: str) -> Table:
    """Return a table for the ids of a stream."""
    rows = ids if variant == "all" else ids // SHARE
    return Table(name, rows + 1, DIM, dynamic=VARIANTS[variant])


def ids_of(stream: Sequence[StepExposures], tables: Sequence[Table], variant: str) -> Iterator[KeyedJaggedTensor]:
    """Yield the ids of each step as the variant's tables take them."""
    maps = [IdMap(table.name, "direct" if variant == "all" else "hash", table.rows) for table in tables]
    for exposures in stream:
        ids = np.stack([exposures.room, exposures.author])
        if VARIANTS[variant] is None:
            for column, id_map in zip(ids, maps, strict=True):
                id_map(column.copy(), column)
        yield KeyedJaggedTensor(
            keys=["room", "author"],
            values=torch.from_numpy(ids.reshape(-1)),
            lengths=torch.ones(2 * ROWS, dtype=torch.int64),
            stride=ROWS,
            length_per_key=[ROWS, ROWS],
        )


@dataclass(frozen=True)
class TrainingContext:
    """Objects that all trainings share: the ranks (one), a clock, and a callback after each step."""

    world: World
    clock: PhaseClock
    tick: Callable[[], None]


def train(
    context: TrainingContext, stream: Sequence[StepExposures], sizes: tuple[int, int], variant: str, rate: float
) -> dict[str, Any]:
    """Train on a stream once; return the AUC after its first quarter and the counts of ids."""
    declared = [table_of(name, ids, variant) for name, ids in zip(("room", "author"), sizes, strict=True)]
    tables = ShardedTables(
        declared,
        LOOKUPS,
        TableOptimizer("rowwise_adagrad", rate),
        device=context.world.device,
        local_size=1,
        batch_size=ROWS,
        seed=1,
        clock=context.clock,
        control=context.world.control,
    )
    torch.manual_seed(1)
    network = SmallNetwork()
    adam = torch.optim.Adam(network.parameters(), 3e-3)
    scores, milliseconds = [], []
    for step, (ids, exposures) in enumerate(zip(ids_of(stream, declared, variant), stream, strict=True), 1):
        started = time.thread_time()
        exchanges = tables.exchanges([ids])
        for exchange in exchanges:
            exchange.start()
        for exchange in exchanges:
            exchange.send()
        found = {name: rows for exchange in exchanges for name, rows in exchange.rows(step).items()}
        spent = time.thread_time() - started
        for leaf in found.values():
            leaf.requires_grad_()
        logits = network(found, torch.from_numpy(exposures.dense))
        adam.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(exposures.label)).backward()
        adam.step()
        started = time.thread_time()
        for exchange in exchanges:
            exchange.update({name: [leaf.grad] for name, leaf in found.items() if leaf.grad is not None}, 1.0)
        milliseconds.append(1e3 * (spent + time.thread_time() - started))
        scores.append(logits.detach().numpy())
        context.tick()
    judged = slice(len(stream) // 4, None)
    labels = np.concatenate([each.label for each in stream[judged]])
    return {
        "variant": variant,
        "learning_rate": rate,
        "auc": auc(np.concatenate(scores[judged]), labels),
        "best_auc": auc(np.concatenate([each.probability for each in stream[judged]]), labels),
        "rows": {table.name: table.rows for table in declared},
        "ids": {name: asdict(counts) for name, counts in tables.dynamic.counts().items()},
        "tables_ms": float(np.median(milliseconds)),
    }


def run(world: World, steps: int, seeds: Sequence[int], done: list[dict[str, Any]], save: Callable[[], None]) -> None:
    """Train all variants on the streams of all seeds, except those in ``done``; append the new ones to it."""
    open_runs = [(s, v) for s in seeds for v in VARIANTS if not any((e["seed"], e["variant"]) == (s, v) for e in done)]
    tuned = {entry["variant"]: entry["learning_rate"] for entry in done}
    missing = [variant for variant in VARIANTS if variant not in tuned]
    total = steps * len(open_runs) + steps // 3 * len(missing) * len(RATES)
    with Progress("dynamic ids", total, "steps") as progress:
        context = TrainingContext(world, PhaseClock(world.device), lambda: progress.advance(1))
        world_of = stream_of(TUNING_SEED, steps)
        early = list(world_of)[: steps // 3]
        for variant in missing:
            found = [train(context, early, (world_of.rooms, world_of.authors), variant, rate) for rate in RATES]
            tuned[variant] = max(found, key=lambda outcome: outcome["auc"])["learning_rate"]
        for seed in seeds:
            left = [variant for s, variant in open_runs if s == seed]
            if not left:
                continue
            world_of = stream_of(seed, steps)
            stream, sizes = list(world_of), (world_of.rooms, world_of.authors)
            for variant in left:
                done.append({"seed": seed, **train(context, stream, sizes, variant, tuned[variant])})
                save()


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return by variant the AUC, its differences on the same stream, unserved lookups, and the time of a step."""
    by_seed: dict[str, dict[int, dict[str, Any]]] = {}
    for outcome in runs:
        by_seed.setdefault(outcome["variant"], {})[outcome["seed"]] = outcome
    summary: dict[str, Any] = {}
    for variant, outcomes in by_seed.items():
        entry: dict[str, Any] = {"auc": mean_and_half_width([each["auc"] for each in outcomes.values()])}
        for other in ("all", "hash"):
            paired = [each["auc"] - by_seed[other][seed]["auc"] for seed, each in outcomes.items()]
            entry[f"minus_{other}"] = mean_and_half_width(paired)
        first = next(iter(outcomes.values()))
        entry["learning_rate"], entry["rows"] = first["learning_rate"], first["rows"]
        entry["unserved"] = {
            name: float(np.mean([o["ids"][name]["unserved"] / o["ids"][name]["looked_up"] for o in outcomes.values()]))
            for name in first["ids"]
        }
        clocked = [each["tables_ms"] for each in outcomes.values() if each["tables_ms"] is not None]
        entry["tables_ms"] = float(np.median(clocked)) if clocked else None
        entry["streams"] = len(outcomes)
        summary[variant] = entry
    summary["best possible"] = {"auc": mean_and_half_width([each["best_auc"] for each in by_seed["all"].values()])}
    return summary


def table(summary: dict[str, Any]) -> str:
    """Return the summary as a table, a line for each variant."""

    def interval(value: list[float | None] | None) -> str:
        return "" if value is None else f"{value[0]:.4f}" + ("" if value[1] is None else f" ±{value[1]:.4f}")

    lines = []
    for variant, entry in summary.items():
        unserved = entry.get("unserved", {})
        lines.append(
            [
                variant,
                f"{sum(entry['rows'].values()):,}" if "rows" in entry else "",
                *(interval(entry.get(key)) for key in ("auc", "minus_all", "minus_hash")),
                ", ".join(f"{name} {100 * share:.1f} %" for name, share in unserved.items()),
                "" if entry.get("tables_ms") is None else f"{entry['tables_ms']:.2f}",
                str(entry.get("streams", "")),
            ]
        )
    heads = [
        "tables",
        "rows",
        "AUC",
        "minus all",
        "minus hash",
        "lookups unserved",
        "tables, CPU ms a step",
        "streams",
    ]
    return text_table(heads, lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("quality.dynamic_ids", __doc__)
    parser.add_argument("--seeds", type=int, default=5, help="number of streams (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=800, help="length of a stream (default: %(default)s)")
    options = parser.parse_args(argv)
    # A step has so little work that threads would cost more than they save.
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    if options.out and options.out.exists():
        before = json.loads(options.out.read_text())
        runs = before["runs"] if before["steps"] == options.steps else []

    with World.join("cpu") as world:
        facts = {
            "question": "Rooms and authors that come and go: dynamic tables of a tenth of the ids",
            "steps": options.steps,
            "rows_per_step": ROWS,
        }

        def save() -> None:
            # The variants with which the others are compared come first on every stream.
            compared = {outcome["seed"] for outcome in runs if outcome["variant"] == "hash"}
            result = summarise([outcome for outcome in runs if outcome["seed"] in compared]) if compared else {}
            write_result(options.out, {**facts, "result": result, "runs": runs})

        run(world, options.steps, range(1, options.seeds + 1), runs, save)
    print(table(summarise(runs)))


if __name__ == "__main__":
    main()
