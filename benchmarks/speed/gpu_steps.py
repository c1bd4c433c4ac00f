"""Steps of ``benchmarks/speed/gpu.py`` for searches, ids and the process group, and what all steps share.

A step is a generator of parts of its result, so that a step that is ended keeps what it has measured. With ``small`` it
takes sizes of seconds and runs on a CPU too, where it can.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import run_limelight
from launch.machine import free_port
from modules.choices import Dynamic
from modules.embeddings import Table

if TYPE_CHECKING:
    from trainer.config.ranker import JobConfig
    from trainer.data.features.feature_map import FeatureMap
    from trainer.data.features.search_vectors import SearchSpace
    from trainer.data.format.dataset import Dataset
    from trainer.data.loading.batch import RankingBatch

Parts = Iterator[dict[str, Any]]


class Missing(Exception):
    """A device or a file that a step needs is not here."""


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        run: yields parts of the result.
        seconds: limit of its time.
    """

    run: Callable[[bool], Parts]
    seconds: float


def device() -> torch.device:
    """Return the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """Return the seconds of one run, the fastest of some, with the device idle before and after each."""
    best = float("inf")
    for _ in range(repeats + 1):
        synchronize()
        begin = time.perf_counter()
        work()
        synchronize()
        best = min(best, time.perf_counter() - begin)
    return best


class DeviceStopwatch:
    """Seconds of works by name, with the device idle before and after each.

    Args:
        names: names of the works.

    Attributes:
        seconds: name -> seconds of each run.
    """

    def __init__(self, *names: str) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in names}

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """Return the result of a work whose time is taken."""
        synchronize()
        begin = time.perf_counter()
        result = work()
        synchronize()
        self.seconds[name].append(time.perf_counter() - begin)
        return result

    def fastest(self) -> dict[str, float]:
        """Return name -> seconds of the fastest run."""
        return {name: min(of_work) for name, of_work in self.seconds.items()}


def count_differing_ids(found: RankingBatch, expected: RankingBatch) -> int:
    """Return how many ids and lengths of two batches of the same rows differ; ``found`` may be on the device."""
    return sum(
        int((getattr(ours, part)().cpu() != getattr(theirs, part)()).sum())
        for ours, theirs in zip(found.ids, expected.ids, strict=True)
        for part in ("values", "lengths")
    )


def tests(small: bool) -> Parts:
    """Run the tests that need a GPU."""
    if device().type == "cpu":
        raise Missing("no CUDA device is here")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    yield {"summary": lines[-1] if lines else done.stderr[-500:], "failures": [x for x in lines if "FAILED" in x]}


def search(small: bool) -> Parts:
    """Compile the GPU search, compare it with the reference, and measure the vectors that it reads a second."""
    if device().type == "cpu":
        raise Missing("no CUDA device is here")
    from modules.search import triton_kernel

    rows, entries, width, length = (64, 1000, 64, 100) if small else (8192, 10_000, 64, 100)
    for dtype in (torch.float16, torch.int8):
        for parts in (1, 2):
            chosen = [_search_part(rows, entries, width, dtype, seed) for seed in range(parts)]
            first = torch.arange(rows, device=device()) * entries
            name = f"{str(dtype).removeprefix('torch.')}, {parts} part{'s' * (parts > 1)}"
            begin = time.perf_counter()
            places = triton_kernel.top(first, first + entries, length, *chosen, longest=entries)
            synchronize()
            compile_seconds = time.perf_counter() - begin
            seconds = seconds_of(
                lambda first=first, chosen=chosen: triton_kernel.top(  # type: ignore[misc]
                    first, first + entries, length, *chosen, longest=entries
                ),
                5,
            )
            read = parts * rows * entries * width * torch.tensor([], dtype=dtype).element_size()
            yield {
                name: {
                    "seconds_of_first_call": compile_seconds,
                    "seconds": seconds,
                    "vector_bytes_per_second": read / seconds,
                    "rows_that_differ_from_reference": _differing_rows(places[:8], entries, length, chosen),
                }
            }
    source = torch.empty((1 << 22) if small else (1 << 30), dtype=torch.float32, device=device())
    target = torch.empty_like(source)
    yield {"copy_bytes_per_second": 2 * source.nbytes / seconds_of(lambda: target.copy_(source), 5)}


def searched_model(
    scratch: str, users: int, days: int, *more: str
) -> tuple[JobConfig, Dataset, FeatureMap, SearchSpace]:
    """Simulate long histories, and return a job, its dataset, its features and random search vectors."""
    from trainer.config.ranker import load_config
    from trainer.data.features.feature_map import FeatureMap
    from trainer.data.features.fit import fit_features
    from trainer.data.features.search_vectors import SearchSpace, SpaceTable
    from trainer.data.format.dataset import Dataset
    from trainer.ranking.setup import split_in_time

    size = ("--users", users, "--days", days, "--partitions", 2, "--seed", 1)
    run_limelight("data", "simulate", f"{scratch}/world", "--world", "cross", *size)
    settings = [f"data.path={scratch}/world", "features.search.embedding=", "data.eval_from=", "data.train_from="]
    config = load_config("configs/cross.toml", [*settings, *more])
    data = Dataset.open(config.data.path, "error")
    fitting = split_in_time(config, data.spec).fitting
    fitted = fit_features(data.spec, data.store, data.histories, config.features, fitting, {}, {})
    features = FeatureMap(data.spec, config.features, fitted)
    searched = config.features.search.tables
    tables: dict[str, SpaceTable] = {
        table.name: SpaceTable(table.rows, table.dim) for table in features.tables if table.name in searched
    }
    space = SearchSpace(tables, tables, config.features.search.dtype, 0)
    random = np.random.default_rng(1)
    for values in space.at(0).values():
        values[1:] = random.standard_normal(values[1:].shape)
    space.newest = 0
    return config, data, features, space


def device_searches(small: bool) -> Parts:
    """Make the batches of long histories with searches by the loader and on the device, and compare all their ids."""
    from trainer.data.features.device_places import DevicePlaces
    from trainer.data.loading.loader import Loader
    from trainer.ranking.device_histories import DeviceHistories

    users, days, rows, steps = (20, 10, 64, 4) if small else (400, 60, 2048, 20)
    with tempfile.TemporaryDirectory() as scratch:
        _, data, features, space = searched_model(scratch, users, days)
        places = DevicePlaces(data.histories, data.spec.partitions, range(data.spec.partitions))
        on_device = DeviceHistories(features, places, space, device())
        yield {"visits": places.entries, "bytes": DeviceHistories.bytes_needed(features, places, space)}

        loaders = [
            iter(Loader(data.store, data.histories, features, rank=0, world=1, batch_size=rows, seed=1, **options))
            for options in ({"space": space}, {"space": space, "left_to": places})
        ]
        watch = DeviceStopwatch("loader", "loader without searches", "device")
        differing, waits = 0, None

        for _ in range(steps):
            whole = watch.run("loader", lambda: next(loaders[0], None))
            left = watch.run("loader without searches", lambda: next(loaders[1], None))
            if whole is None or left is None:
                break
            there = left.to(device())
            found = watch.run("device", partial(on_device.complete, there))
            waits = waits_of(partial(on_device.complete, there))
            differing += count_differing_ids(found, whole)
        yield {
            **{"rows of a batch": rows, "batches": len(watch.seconds["device"]), "ids_that_differ": differing},
            **{"waits": waits, "seconds_of_first_batch_on_device": watch.seconds["device"][0]},
            "seconds_of_a_batch": watch.fastest(),
        }


def dynamic_ids(small: bool) -> Parts:
    """Give rows to ids that come and go, by policy, on the device and by the CPU map, and compare all columns."""
    from trainer.sparse.device_ids import DeviceIds
    from trainer.sparse.dynamic_ids import DynamicIds

    rows, per_step, steps = (500, 300, 4) if small else (1_000_000, 100_000, 20)
    for evict in ("recency", "frequency", "both"):
        table = Table("item", rows, 16, dynamic=Dynamic(2, evict))
        cpu, ours = DynamicIds(table, 0, rows), DeviceIds(table, 0, rows, device())
        random = np.random.default_rng(1)
        seconds = {"cpu": 0.0, "device": 0.0}
        waits = None
        for step in range(1, steps + 1):
            ids = torch.from_numpy(random.zipf(1.1, per_step) % (3 * rows) + step * rows // 20)
            there = ids.to(device())
            begin = time.perf_counter()
            expected, _ = cpu.learn(ids, step)
            seconds["cpu"] = time.perf_counter() - begin
            synchronize()
            begin = time.perf_counter()
            if step == steps:
                waits = waits_of(partial(ours.learn, there, step))
            if waits is None:
                ours.learn(there, step)
            synchronize()
            seconds["device"] = time.perf_counter() - begin
        differing = sum(int((ours.columns[name].cpu() != column).sum()) for name, column in cpu.columns.items())
        differing += int((ours.find(there).cpu() != expected).sum())
        yield {evict: {"values_that_differ": differing, "seconds_of_last_step": seconds, "waits": waits}}


def process_group(small: bool) -> Parts:
    """Join a group of one rank with the device's backend, and run the collectives of training and evaluation."""
    from trainer.metrics.behaviour_metrics import BehaviourMetrics
    from trainer.ranking.evaluation import Predictions, calibration_curve
    from trainer.runtime.distributed import World

    be_the_only_rank()
    with World.join("auto") as world:
        values = torch.ones(1 << 20, device=world.device)
        torch.distributed.all_reduce(values)
        yield {"backend": torch.distributed.get_backend(), "all_reduce": float(values.sum()), "sum": world.sum(3)}
        n = 1000
        random = torch.Generator().manual_seed(1)
        probability = torch.rand(n, 2, generator=random)
        label = (torch.rand(n, 2, generator=random) < probability).float()
        users, ones = torch.arange(n) % 50, torch.ones(n, 2)
        metrics = BehaviourMetrics(("click", "gift"))
        metrics.update(users, probability, label, ones)
        yield {"auc": metrics.compute(world.control)["click"]["auc"]}
        held_out = Predictions(users, torch.arange(n), torch.arange(n), probability, label, ones)
        curve = calibration_curve(held_out, ("click", "gift"), world.control)["click"]
        yield {"calibration_rows": float(sum(rows for _, _, rows in curve))}


def synchronize() -> None:
    """Wait until the device is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def be_the_only_rank() -> None:
    """Describe a group of this process alone, as torchrun describes one."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


def waits_of(step: Callable[[], object]) -> int | None:
    """Return how often the host waits for the device in one step; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def _search_part(rows: int, entries: int, width: int, dtype: torch.dtype, seed: int) -> Any:
    from modules.search.tensor_search import DevicePart

    random = torch.Generator().manual_seed(seed)
    items = 1000 + rows * entries // 50
    values = torch.randn(items, width, generator=random)
    table = (values if dtype == torch.float16 else (values * 40).clamp(-128, 127)).to(dtype)
    table[0] = 0
    column = torch.randint(0, items, (rows * entries,), generator=random)
    candidate = torch.randint(0, items, (rows,), generator=random)
    return DevicePart(column.to(device()), candidate.to(device()), table.to(device()))


def _differing_rows(places: Tensor, entries: int, length: int, parts: list[Any]) -> int:
    """Return how many of the first rows differ from the reference."""
    from modules.search import reference
    from modules.search.search import SearchPart, SearchVectors

    rows = len(places)
    first = np.arange(rows) * entries
    on_cpu = [
        SearchPart(
            part.column[: rows * entries].cpu().numpy(),
            part.candidate[:rows].cpu().numpy(),
            SearchVectors(part.vectors.cpu().numpy(), part.shift),
        )
        for part in parts
    ]
    expected = reference.top(first, first + entries, length, *on_cpu).at.reshape(rows, length)
    return int((torch.from_numpy(expected) != places.cpu()).any(1).sum())


STEPS = {
    "tests": Step(tests, 120),
    "search": Step(search, 60),
    "device_searches": Step(device_searches, 90),
    "dynamic_ids": Step(dynamic_ids, 60),
    "process_group": Step(process_group, 60),
}
"""Name -> step, in order of value."""
