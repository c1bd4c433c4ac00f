"""Measure what a checkpoint costs: the stall of training, rates of writing and reading, and memory.

    python -m benchmarks.speed.checkpoint --out benchmarks/results/checkpoint.json
    python -m benchmarks.speed.checkpoint --gigabytes 0.2 --directory /scratch

Tables of 2 GB with row-wise Adagrad, saved as training saves them (``trainer.ranking.checkpoints``), on 1 and 2 ranks:

* while training waits (``checkpoint.background = false``), and in the background while steps continue. The stall is the
  time for which the training thread stands still; its share of the interval is the cost of saves that are that far
  apart;
* loaded into the same layout, and into others. A restore compares all checksums and then loads.

All layouts are measured one after another, ``--repeats`` times around. The median counts, and the least and the largest
show the spread.

The disk's own rate is that of as many processes that write the same bytes and sync them, or read them back, in blocks
of 16 MB, measured beside each save and load. Nothing is dropped from the page cache, so both sides read cached files.
Memory is a rank's peak above that of the model itself: ``VmHWM`` of ``/proc/self/status``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.measure import make_parser, median_and_range, median_of, run_ranks, write_result
from modules.embeddings import Lookup, Table
from modules.ranker import Ranker
from trainer.checkpoint.manifest import MODEL, DatasetEntry, directory_name, find_checkpoint
from trainer.config.ranker import parse_config
from trainer.console.outputs import local_argument
from trainer.console.text_table import text_table
from trainer.data.loading.batch import RankingBatch
from trainer.engine.batch_pipeline import StepRequest
from trainer.engine.hybrid_engine import DenseOptimizer, HybridEngine, TableOptimizer
from trainer.engine.step_loss import BehaviourLoss
from trainer.ranking.checkpoints import Checkpoints, Identity
from trainer.ranking.training_state import TrainingState
from trainer.runtime.distributed import World
from trainer.runtime.files import write_json

SHORT = ("--gigabytes", "0.2", "--repeats", "1")

DIM = 16
SHARES = {"user": 0.6, "item": 0.4}
"""Shares of the bytes; the larger table is more than half of the model."""
BATCH = 2048
WARM_UP_STEPS, STEPS = 20, 60
CHUNK_BYTES = 16 << 20
MINUTES = (10.0, 1.0, 0.5)
"""Intervals between two saves; the first is the default of the job file."""
LAYOUTS: dict[int, dict[str, tuple[str, ...]]] = {
    2: {"table_wise": (), "row_wise": ("2 x table_wise",)},
    1: {"table_wise": ("2 x row_wise",)},
}
"""Ranks -> sharding -> layouts whose checkpoints are loaded into it, besides its own."""


def tables_of(gigabytes: float, sharding: str) -> list[Table]:
    """Return tables of some size with their optimizer's state: a number for each column of a row, and one a row."""
    rows = gigabytes * 1e9 / (4 * (DIM + 1))
    return [Table(name, int(rows * share), DIM, "zeros", sharding=sharding) for name, share in SHARES.items()]  # type: ignore[arg-type]


def make_engine(world: World, gigabytes: float, sharding: str) -> HybridEngine:
    """Return an engine of the tables with a logistic regression over them."""
    tables = tables_of(gigabytes, sharding)
    lookups = [Lookup(table.name, table.name, 1) for table in tables]
    torch.manual_seed(1)
    ranker = Ranker(1, lookups, {table.name: table.dim for table in tables}, 1, (), kind="logistic")
    return HybridEngine(
        tables,
        lookups,
        ranker,
        table_optimizer=TableOptimizer("rowwise_adagrad", 0.02),
        dense_optimizer=DenseOptimizer(1e-3),
        deepspeed={"zero_optimization": {"stage": 1}},
        loss=BehaviourLoss(torch.ones(1)),
        batch_size=BATCH // world.size,
        device=world.device,
        seed=1,
    )


def batches(world: World, gigabytes: float) -> Iterator[RankingBatch]:
    """Yield batches of random ids without end."""
    rows, random = BATCH // world.size, torch.Generator().manual_seed(world.rank)
    sizes = {table.name: table.rows for table in tables_of(gigabytes, "auto")}
    while True:
        keyed = KeyedJaggedTensor(
            keys=list(sizes),
            values=torch.cat([torch.randint(0, size, (rows,), generator=random) for size in sizes.values()]),
            lengths=torch.ones(len(sizes) * rows, dtype=torch.int64),
            stride=rows,
            length_per_key=[rows] * len(sizes),
        )
        index = torch.arange(rows)
        label = (torch.rand(rows, 1, generator=random) < 0.2).float()
        dense, mask = torch.zeros(rows, 1), torch.ones(rows, 1)
        yield RankingBatch([keyed], dense, label, mask, index, index, index, rows, {0: [0, 0, 0]})


def memory(key: str) -> int:
    """Return bytes of this process: ``VmRSS``, in use, or ``VmHWM``, the peak since :func:`measured` began."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def measured(world: World, own: int, work: Callable[[], object]) -> dict[str, float]:
    """Return the seconds until the slowest rank is done, and the largest peak of a rank above its ``own`` bytes."""
    world.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    started = time.monotonic()
    work()
    world.barrier()
    seconds = time.monotonic() - started
    return {"seconds": seconds, "peak_bytes": world.max(max(0, memory("VmHWM") - own))}


def write_plainly(path: Path, bytes_: int) -> None:
    """Write and sync some bytes."""
    block = memoryview(os.urandom(CHUNK_BYTES))
    with path.open("wb") as file:
        for start in range(0, bytes_, CHUNK_BYTES):
            file.write(block[: min(CHUNK_BYTES, bytes_ - start)])
        file.flush()
        os.fsync(file.fileno())


def read_plainly(files: Sequence[Path]) -> None:
    """Read files once."""
    for path in files:
        with path.open("rb") as file:
            while file.read(CHUNK_BYTES):
                pass


def checkpoints_of(directory: Path, world: World, *, background: bool) -> Checkpoints:
    """Return checkpoints as a job has them."""
    settings = {"data": {"path": "random"}, "checkpoint": {"keep": 1, "background": background}}
    config, dataset = parse_config(settings, "benchmark"), DatasetEntry(path="random", fingerprint="")
    return Checkpoints(directory, Identity(config, "logistic", ("click",), dataset), world)


def measure_rank(scratch: Path, gigabytes: float, out: Path) -> None:
    """Measure all layouts of this number of ranks on one of them; the first rank writes the results.

    Checkpoints stay in ``scratch``.
    """
    with World.join("cpu") as world:
        saves, loads = [], []
        for sharding, others in LAYOUTS[world.size].items():
            layout = f"{world.size} x {sharding}"
            directory = scratch / layout / "checkpoints"
            engine = make_engine(world, gigabytes, sharding)
            own = memory("VmRSS")
            loads += [{"by": layout, **measure_load(engine, world, own, scratch, other)} for other in others]
            saves.append({"by": layout, **measure_save(engine, world, own, directory, gigabytes)})
            loads.append({"by": layout, **measure_load(engine, world, own, scratch, layout)})
            engine.close()
            del engine
        if world.rank == 0:
            write_json(out, {"saves": saves, "loads": loads})


def measure_save(engine: HybridEngine, world: World, own: int, directory: Path, gigabytes: float) -> dict[str, Any]:
    """Save while training waits and in the background, with the plain rate between them; the second one stays."""
    state = TrainingState.at_start(("click",))
    steps = step_seconds(engine.steps(batches(world, gigabytes)), WARM_UP_STEPS + STEPS)[WARM_UP_STEPS:]
    result: dict[str, Any] = {"step_seconds": sum(steps) / len(steps)}

    stopping = checkpoints_of(directory, world, background=False)
    state.step = 1
    result["stopping"] = measured(world, own, lambda: stopping.save(engine, state))
    stopping.close()
    own_bytes = sum(file.stat().st_size for file in find_checkpoint(directory).rglob(f"__{world.rank}_*.distcp"))
    plain = directory / f"plain-{world.rank}"
    result["plain_write"] = measured(world, own, lambda: write_plainly(plain, own_bytes))
    plain.unlink()
    result["bytes"] = world.sum(own_bytes)

    behind = checkpoints_of(directory, world, background=True)
    state.step = 2
    during: list[float] = []

    def save_and_train() -> None:
        behind.save(engine, state)
        written = directory / directory_name(state.step)
        training = engine.steps(batches(world, gigabytes), lambda step: StepRequest(stop=written.exists()))
        during.extend(step_seconds(training))
        behind.wait()

    result["background"] = measured(world, own, save_and_train)
    # The slowest rank holds the others up.
    result["background"]["stall_seconds"] = world.max(round(behind.stalls[0] * 1e6)) / 1e6
    result["background"]["step_seconds"] = sum(during) / max(1, len(during))
    behind.close()
    return result


def measure_load(engine: HybridEngine, world: World, own: int, scratch: Path, saved: str) -> dict[str, Any]:
    """Load the checkpoint of this layout or of another one, plainly and as a job restores it."""
    directory = scratch / saved / "checkpoints"
    model = find_checkpoint(directory) / MODEL
    files = sorted(model.glob("*.distcp"))
    result: dict[str, Any] = {"saved_by": saved, "bytes": sum(file.stat().st_size for file in files)}
    # A file for each rank that saved: with fewer of them than ranks the others have nothing to read.
    result["plain_read"] = measured(world, own, lambda: read_plainly(files[world.rank :: world.size]))
    result["load"] = measured(world, own, lambda: engine.load(model))
    checkpoints, state = checkpoints_of(directory, world, background=False), TrainingState.at_start(("click",))
    result["restore"] = measured(world, own, lambda: checkpoints.restore(engine, state))
    checkpoints.close()
    result["largest_table_bytes"] = max(table["rows"] * table["dim"] * 4 for table in engine.plan)
    return result


def step_seconds(training: Iterator[Any], most: int | None = None) -> list[float]:
    """Return the seconds of each step until all ranks stop, or of the first ``most`` steps."""
    seconds, started = [], time.monotonic()
    for result in training:
        now = time.monotonic()
        seconds.append(now - started)
        started = now
        if result.stop or len(seconds) == most:
            return seconds
    return seconds


def start(ranks: int, scratch: Path, gigabytes: float) -> dict[str, Any]:
    """Run :func:`measure_rank` on some ranks."""
    return run_ranks("benchmarks.speed.checkpoint", ["--one", scratch, gigabytes], ranks)


def measure_by_turns(directory: str | None, gigabytes: float, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Return the medians of saves and loads, with their runs; every turn has checkpoints of its own."""
    turns = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            turns.append([start(ranks, Path(scratch), gigabytes) for ranks in LAYOUTS])
    return {
        what: [
            median_of([turn[place][what][number] for turn in turns])
            for place, of_ranks in enumerate(turns[0])
            for number in range(len(of_ranks[what]))
        ]
        for what in ("saves", "loads")
    }


def spread(runs: Sequence[dict[str, Any]], way: str, name: str = "seconds") -> str:
    """Return the least and the largest of some seconds of all runs."""
    found = median_and_range([run[way][name] for run in runs])
    return f"{found['least']:.1f} to {found['most']:.1f}"


def describe_saves(saves: Sequence[dict[str, Any]]) -> str:
    """Return the saves as a table."""
    lines = []
    for save in saves:
        plain = save["bytes"] / save["plain_write"]["seconds"]
        for way in ("stopping", "background"):
            seconds, peak = save[way]["seconds"], save[way]["peak_bytes"]
            stall = save[way].get("stall_seconds", seconds)
            steps = save["step_seconds"], save[way].get("step_seconds")
            lines.append(
                [
                    save["by"],
                    way,
                    f"{seconds:.1f}",
                    spread(save["runs"], way),
                    f"{save['bytes'] / seconds / 1e9:.2f}",
                    f"{plain / 1e9:.2f}",
                    f"{stall:.2f}",
                    # A save waits for the one before it: at intervals shorter than a save there is always one going on.
                    *(f"{stall / 60 / minutes:.2%}" if seconds < 60 * minutes else "-" for minutes in MINUTES),
                    f"{1e3 * steps[0]:.1f}",
                    "-" if steps[1] is None else f"{1e3 * steps[1]:.1f}",
                    f"{peak / 1e6:,.0f}",
                ]
            )
    intervals = [f"of {minutes:g} min" for minutes in MINUTES]
    header = ["layout", "save", "s", "spread", "GB/s", "disk GB/s", "stall s", *intervals]
    header += ["step ms", "meanwhile", "peak MB a rank"]
    return text_table(header, lines, texts=2)


def describe_loads(loads: Sequence[dict[str, Any]]) -> str:
    """Return the loads as a table."""
    lines = []
    for load in loads:
        size = load["bytes"] / 1e9
        lines.append(
            [
                load["saved_by"],
                load["by"],
                f"{load['load']['seconds']:.1f}",
                spread(load["runs"], "load"),
                f"{size / load['load']['seconds']:.2f}",
                f"{size / load['restore']['seconds']:.2f}",
                f"{size / load['plain_read']['seconds']:.2f}",
                f"{load['load']['peak_bytes'] / 1e6:,.0f}",
                f"{load['restore']['peak_bytes'] / 1e6:,.0f}",
                f"{load['largest_table_bytes'] / 1e6:,.0f}",
            ]
        )
    header = ["saved by", "loaded by", "s", "spread", "GB/s", "with checksums", "disk GB/s"]
    header += ["peak MB a rank", "with checksums", "largest table MB"]
    return text_table(header, lines, texts=2)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("speed.checkpoint", __doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of tables and optimizer (default: 2)")
    parser.add_argument(
        "--directory", type=local_argument, help="directory to write to (default: the system's temporary one)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="interleaved runs of each (default: %(default)s)")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        scratch, gigabytes, out = options.one
        measure_rank(Path(scratch), float(gigabytes), Path(out))
        return
    found = measure_by_turns(options.directory, options.gigabytes, options.repeats)
    print(f"\n{describe_saves(found['saves'])}\n\n{describe_loads(found['loads'])}")
    settings = {"gigabytes": options.gigabytes, "repeats": options.repeats}
    write_result(options.out, {**found, "settings": settings}, ranks=2)


if __name__ == "__main__":
    main()
