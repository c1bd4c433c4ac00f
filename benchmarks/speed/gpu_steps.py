"""Steps of ``benchmarks/speed/gpu.py``: what each shows, and its limit of time.

A step is a generator of parts of its result, so that a step that is ended keeps what it has measured. With ``small`` it
takes sizes of seconds and runs on a CPU too, where it can.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measure import run_limelight
from launch.machine import free_port
from modules.choices import Dynamic
from modules.embeddings import Table

if TYPE_CHECKING:
    from trainer.config.ranker import JobConfig
    from trainer.data.features.feature_map import FeatureMap
    from trainer.data.features.search_vectors import SearchSpace
    from trainer.data.format.dataset import Dataset
    from trainer.engine.dense_engine import DenseNetwork

Parts = Iterator[dict[str, Any]]
Inputs = tuple[Mapping[str, Tensor], Mapping[str, Tensor], Tensor]


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
        seconds: dict[str, list[float]] = {"loader": [], "loader without searches": [], "device": []}
        differing, waits = 0, None

        def timed(name: str, work: Callable[[], Any]) -> Any:
            synchronize()
            begin = time.perf_counter()
            result = work()
            synchronize()
            seconds[name].append(time.perf_counter() - begin)
            return result

        for _ in range(steps):
            whole = timed("loader", lambda: next(loaders[0], None))
            left = timed("loader without searches", lambda: next(loaders[1], None))
            if whole is None or left is None:
                break
            there = left.to(device())
            found = timed("device", partial(on_device.complete, there))
            waits = waits_of(partial(on_device.complete, there))
            for ours, theirs in zip(found.ids, whole.ids, strict=True):
                differing += int((ours.values().cpu() != theirs.values()).sum())
                differing += int((ours.lengths().cpu() != theirs.lengths()).sum())
        yield {
            **{"rows of a batch": rows, "batches": len(seconds["device"]), "ids_that_differ": differing},
            **{"waits": waits, "seconds_of_first_batch_on_device": seconds["device"][0]},
            "seconds_of_a_batch": {name: min(of_part) for name, of_part in seconds.items()},
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

    _be_the_only_rank()
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


def zero(small: bool) -> Parts:
    """Train the ranker under ZeRO 0 in fp32 and ZeRO 1 and 2 in bf16, and count the host's waits in a step.

    Limelight refuses ZeRO 0 in bf16, since the state of its optimizer cannot be saved.
    """
    from trainer.config.deepspeed import complete_settings
    from trainer.engine.dense_engine import DenseNetwork, DenseOptimizer
    from trainer.runtime.distributed import World
    from trainer.runtime.phase_timer import PhaseClock

    _be_the_only_rank()
    rows = 64 if small else 8192
    with World.join("auto") as world:
        inputs = random_inputs(rows, world.device)
        label = (torch.rand(rows, 3, device=world.device) < 0.2).float()
        for stage in (0, 1, 2):
            changes = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": stage > 0}}
            network = DenseNetwork(
                make_ranker(),
                DenseOptimizer(1e-3),
                complete_settings(changes, rows, world.size),
                device=world.device,
                clock=PhaseClock(world.device),
            )
            losses: list[Tensor] = []

            def step(network: DenseNetwork = network, losses: list[Tensor] = losses) -> None:
                loss = nn.functional.binary_cross_entropy_with_logits(network(*inputs), label)
                network.backward(loss, last=True)
                network.step()
                losses.append(loss.detach())

            seconds = seconds_of(step, 5)
            yield {
                f"stage {stage}, {'bf16' if stage else 'fp32'}": {
                    "seconds_per_step": seconds,
                    "waits_per_step": waits_of(step),
                    "first_loss": float(losses[0]),
                    "last_loss": float(losses[-1]),
                }
            }
            network.close()


def compilation(small: bool) -> Parts:
    """Train the ranker compiled and not, in fp32 without ZeRO and in bf16 with ZeRO 1, and compare the losses."""
    from trainer.config.deepspeed import complete_settings
    from trainer.engine.dense_engine import INDUCTOR, DenseNetwork, DenseOptimizer
    from trainer.runtime.distributed import World
    from trainer.runtime.phase_timer import PhaseClock

    _be_the_only_rank()
    rows, steps = (64, 3) if small else (8192, 20)
    with World.join("auto") as world:
        batches = [random_inputs(rows - number % 3, world.device) for number in range(steps)]
        for stage in (0, 1):
            losses = []
            # On a CPU compilation by a C++ compiler would take minutes.
            for compiler in (None, "aot_eager" if small else INDUCTOR):
                changes = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": stage > 0}}
                network = DenseNetwork(
                    make_ranker(),
                    DenseOptimizer(1e-3),
                    complete_settings({**changes, "gradient_clipping": 1.0}, rows, world.size),
                    device=world.device,
                    clock=PhaseClock(world.device),
                    compiler=compiler,
                )
                begin = time.perf_counter()
                losses.append(_losses_of(network, batches))
                synchronize()
                first = time.perf_counter() - begin
                seconds = seconds_of(partial(_losses_of, network, batches), 1) / steps
                name = f"ZeRO {stage}, {'bf16' if stage else 'fp32'}{', compiled' * (compiler is not None)}"
                yield {name: {"seconds_of_first_steps": first, "seconds_per_step": seconds}}
                network.close()
            plain, compiled = losses
            yield {f"largest difference of losses, ZeRO {stage}": float(((compiled - plain).abs() / plain).max())}


def _losses_of(network: DenseNetwork, batches: Sequence[Inputs]) -> Tensor:
    """Train a network one step on each batch; returns the losses."""
    losses = []
    for embedded, lengths, dense in batches:
        label = (dense[:, :3] > 1).float()
        loss = nn.functional.binary_cross_entropy_with_logits(network(embedded, lengths, dense), label)
        network.backward(loss, last=True)
        network.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def snapshot(small: bool) -> Parts:
    """Copy a table from the device to pageable and to pinned memory, and measure seconds and memory."""
    gigabytes = 0.05 if small else 20.0
    table = torch.ones(int(gigabytes * 1e9 / 4), device=device())
    before = torch.cuda.memory_allocated() if table.is_cuda else 0
    yield {"gigabytes": gigabytes}
    yield {"pageable": {"seconds": seconds_of(lambda: torch.empty_like(table, device="cpu").copy_(table), 1)}}
    begin = time.perf_counter()
    pinned = torch.empty_like(table, device="cpu", pin_memory=table.is_cuda)
    allocation = time.perf_counter() - begin
    seconds = seconds_of(lambda: pinned.copy_(table, non_blocking=True), 2)
    yield {"pinned": {"allocation_seconds": allocation, "seconds": seconds}}
    peak = torch.cuda.max_memory_allocated() - before if table.is_cuda else 0
    yield {"further_device_bytes": peak}


def language_model(small: bool) -> Parts:
    """Fine-tune the shape of Qwen2-7B with random weights, packed or not, beside the Trainer's defaults."""
    from benchmarks.speed import finetune

    shape, length = ("small", 64) if small else ("7b", 2048)
    if not small and (device().type == "cpu" or torch.cuda.get_device_properties(0).total_memory < 75e9):
        raise Missing("no CUDA device of 80 GB or more is here")
    yield from packed_attention(small)
    cells = [
        finetune.FinetuneCell("ours", 4, length, packing=True, checkpointing=False),
        finetune.FinetuneCell("Trainer", finetune.TRAINER_ROWS, length, packing=False, checkpointing=False),
        finetune.FinetuneCell("ours", 4, length, packing=True, checkpointing=True),
        finetune.FinetuneCell("ours", finetune.TRAINER_ROWS, length, packing=False, checkpointing=False),
    ]
    for cell in cells[:1] if small else cells:
        yield {cell.name: finetune.measure(cell, shape)}


def packed_attention(small: bool) -> Parts:
    """Measure attention of packed samples both ways: a dense mask, variable lengths, and blocks of a mask."""
    heads, head_dim, rows, length = (2, 16, 1, 128) if small else (28, 128, 2, 4096)
    dtype = torch.float32 if device().type == "cpu" else torch.bfloat16
    lengths = np.minimum(np.exp(np.random.default_rng(1).normal(np.log(150), 0.6, 4 * length)).astype(int) + 1, length)
    ends = np.cumsum(lengths)
    ends = np.append(ends[ends < rows * length], rows * length)
    # A sample ends at the end of its row.
    ends = np.unique(np.concatenate([ends, np.arange(1, rows + 1) * length]))
    starts = torch.tensor(np.concatenate([[0], ends]), dtype=torch.int32, device=device())
    sample = torch.bucketize(torch.arange(rows * length, device=device()), starts[1:].long(), right=True)
    torch.manual_seed(1)
    q, k, v = (
        torch.randn(rows * length, heads, head_dim, device=device(), dtype=dtype, requires_grad=True) for _ in range(3)
    )
    # [rows, heads, length, head_dim]
    q_rows, k_rows, v_rows = (part.view(rows, length, heads, head_dim).transpose(1, 2) for part in (q, k, v))

    def dense() -> Tensor:
        of_row = sample.view(rows, length)
        place = torch.arange(length, device=device())
        mask = (of_row[:, :, None] == of_row[:, None, :]) & (place[:, None] >= place[None, :])
        out = nn.functional.scaled_dot_product_attention(q_rows, k_rows, v_rows, attn_mask=mask[:, None])
        return out.transpose(1, 2).reshape(q.shape)

    def variable_length() -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        longest = int(np.diff(np.concatenate([[0], ends])).max())
        out = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0))
        assert isinstance(out, Tensor)
        return out

    def blocks() -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        of_row = sample.view(rows, length)

        def same_sample(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (of_row[b, i] == of_row[b, j]) & (i >= j)

        mask = create_block_mask(same_sample, rows, None, length, length, device=device().type)
        attention = flex_attention if small else torch.compile(flex_attention)
        out = attention(q_rows, k_rows, v_rows, block_mask=mask)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).reshape(q.shape)

    expected = dense().detach()
    for name, attend in {"dense mask": dense, "variable lengths": variable_length, "blocks": blocks}.items():

        def work(attend: Callable[[], Tensor] = attend) -> None:
            attend().sum().backward()

        try:
            difference = float((attend().detach() - expected).abs().max())
            yield {f"attention, {name}": {"seconds": seconds_of(work, 3), "largest_difference": difference}}
        except Exception as error:
            yield {f"attention, {name}": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"}


def ranker(small: bool) -> Parts:
    """Measure the ranker's forward and backward pass alone, by precision and compilation, and count its launches."""
    from trainer.engine.dense_engine import INDUCTOR, compile_network

    for rows in (64,) if small else (2048, 8192):
        for precision in ("fp32",) if small else ("fp32", "tf32", "bf16"):
            for compiled in (False, True):
                model = make_ranker().to(device(), torch.bfloat16 if precision == "bf16" else torch.float32)
                inputs = random_inputs(rows, device())
                torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
                if compiled:
                    # On a CPU compilation by a C++ compiler would take minutes.
                    compile_network(model, "aot_eager" if small else INDUCTOR, device())

                def step(inputs: Any = inputs, model: nn.Module = model) -> None:
                    model.zero_grad()
                    model(*inputs).square().mean().backward()

                begin = time.perf_counter()
                step()
                synchronize()
                first = time.perf_counter() - begin
                name = f"{rows} rows, {precision}{', compiled' * compiled}"
                figures = {"seconds_of_first_step": first, "seconds": seconds_of(step, 5), "launches": _launches(step)}
                yield {name: figures}


def job(small: bool) -> Parts:
    """Train ``configs/simulated.toml`` on a CPU and on the device, compare both, then evaluate and resume."""
    import fbgemm_gpu  # noqa: F401 - says that it is missing
    import torchrec  # noqa: F401

    with tempfile.TemporaryDirectory() as scratch:
        found, command = yield from on_both_devices(scratch, small)
        run = Path(scratch, "device")
        run_limelight("evaluate", run)
        # As after a power failure just before the last checkpoint.
        shutil.rmtree(max((run / "checkpoints").iterdir()))
        (run / "metrics.json").unlink()
        run_limelight(*command)
        resumed = _held_out_loss(run)
        yield {"largest_difference_after_resume": max(abs(resumed[key] - found[key]) for key in resumed)}


def dynamic_job(small: bool) -> Parts:
    """Train ``configs/simulated.toml`` with dynamic ids on a CPU and on the device, and compare both."""
    import fbgemm_gpu  # noqa: F401 - says that it is missing
    import torchrec  # noqa: F401

    with tempfile.TemporaryDirectory() as scratch:
        dynamic = ['features.item.ids="dynamic"', "features.item.rows=2000", 'features.item.evict="both"']
        yield from on_both_devices(scratch, small, *dynamic)


def searched_job(small: bool) -> Parts:
    """Train ``configs/simulated.toml`` with searches on a CPU, by the loader, and on the device, and compare both."""
    import fbgemm_gpu  # noqa: F401 - says that it is missing
    import torchrec  # noqa: F401

    with tempfile.TemporaryDirectory() as scratch:
        histories = ['features.history.short.search="top"', 'features.history.live.search="top"']
        yield from on_both_devices(scratch, small, *histories, 'features.search.device="device"')


def on_both_devices(
    scratch: str, small: bool, *settings: str, job: str = "configs/simulated.toml"
) -> Generator[dict[str, Any], None, tuple[dict[str, float], tuple[str, ...]]]:
    """Train a job in ``scratch/cpu`` and ``scratch/device``; return the held-out loss and the command of the second."""
    users, days, every = (100, 3, 20) if small else (3000, 10, 100)
    world = f"{scratch}/world"
    run_limelight("data", "simulate", world, "--users", users, "--days", days, "--partitions", 4, "--seed", 1)
    settings = (f"data.path={world}", f"checkpoint.every_steps={every}", *settings)
    if small:
        settings = ("data.eval_from=2024-03-06", "train.batch_size=32", *settings)
    found: list[dict[str, float]] = []
    for name, kind in (("cpu", "cpu"), ("device", device().type)):
        run = Path(scratch, name)
        command = ("train", job, *settings, f"run.directory={run}", f"train.device={kind}")
        begin = time.perf_counter()
        run_limelight(*command)
        seconds = time.perf_counter() - begin
        found.append(_held_out_loss(run))
        yield {f"train on {name}": {"device": kind, "seconds": seconds, "held_out_logloss": found[-1]}}
    yield {"largest_difference_to_cpu": max(abs(found[0][key] - found[1][key]) for key in found[0])}
    return found[1], command


def _held_out_loss(run: Path) -> dict[str, float]:
    behaviours = json.loads((run / "metrics.json").read_text())["behaviours"]
    return {name: values["logloss"] for name, values in behaviours.items() if values["logloss"] is not None}


def make_ranker() -> nn.Module:
    """Return the ranker of the throughput benchmark."""
    from benchmarks.speed.limelight_training import WorkloadFeatures
    from benchmarks.speed.workload import BEHAVIOURS, DENSE, DIM
    from modules.ranker import Ranker

    torch.manual_seed(1)
    return Ranker(
        len(BEHAVIOURS),
        WorkloadFeatures.lookups,
        dict.fromkeys(("user", "author", "item", "side"), DIM),
        DENSE,
        WorkloadFeatures.sequences,
        tower=(128, 64),
    )


def random_inputs(rows: int, place: torch.device) -> Inputs:
    """Return embeddings, lengths and dense features of a batch of the throughput benchmark."""
    from benchmarks.speed.limelight_training import WorkloadFeatures
    from benchmarks.speed.workload import DENSE, DIM, LENGTH

    random = torch.Generator().manual_seed(2)
    counts = torch.randint(LENGTH // 2, LENGTH + 1, (rows,), generator=random)
    embedded, lengths = {}, {}
    for lookup in WorkloadFeatures.lookups:
        ids = int(counts.sum()) if lookup.length is None else rows * lookup.length
        embedded[lookup.name] = torch.randn(ids, DIM, generator=random).to(place).requires_grad_()
        if lookup.length is None:
            lengths[lookup.name] = counts.to(place)
    return embedded, lengths, torch.randn(rows, DENSE, generator=random).to(place)


def synchronize() -> None:
    """Wait until the device is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _be_the_only_rank() -> None:
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


def _launches(step: Callable[[], object]) -> int:
    """Return the number of kernels that one step launches; of operations on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    if torch.cuda.is_available():
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            step()
            synchronize()
        return sum(event.count for event in found.key_averages() if "LaunchKernel" in event.key)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    return sum(event.count for event in found.key_averages() if event.key.startswith("aten::"))


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
    "zero": Step(zero, 90),
    "compile": Step(compilation, 150),
    "snapshot": Step(snapshot, 60),
    "language_model": Step(language_model, 240),
    "ranker": Step(ranker, 120),
    "job": Step(job, 240),
    "dynamic_job": Step(dynamic_job, 180),
    "searched_job": Step(searched_job, 180),
}
"""Name -> step, in order of value."""
