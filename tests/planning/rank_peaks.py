"""Steps of a whole job on one or two ranks: prints the peak of each rank's memory and its plan as JSON.

    torchrun --nproc-per-node 2 -m tests.planning.rank_peaks DIRECTORY WORLD SETTING ...

A small job before it loads what a process needs beside a job: libraries, compiled loops, process groups. The peak is
the kernel's (``VmHWM``), so it has all memory, whoever asks for it: tables in large pages, device histories, search
vectors, exchange buffers, activations, and a snapshot that is held while training goes on.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

from modules import blocks
from trainer.config.ranker import JobConfig, parse_config
from trainer.data.format.dataset import Dataset
from trainer.engine.build_engine import rows_per_rank
from trainer.planning.accelerators import Accelerator, Cluster
from trainer.planning.counted_ids import counts_of
from trainer.planning.ranker_plan import Assumptions, plan_ranker
from trainer.ranking.device_histories import open_device_histories
from trainer.ranking.job_features import open_features
from trainer.ranking.search_refresh import SearchSpaceRefresher, make_space
from trainer.ranking.setup import build_engine, split_in_time, training_loader
from trainer.runtime.distributed import World
from trainer.semantic_ids.store_address import open_existing_store

STEPS = 3


def job(path: str, settings: list[str], **changes: dict[str, Any]) -> JobConfig:
    """Return the job of the test on a dataset."""
    raw: dict[str, Any] = {
        "data": {"path": path, "workers": 0},
        "features": {
            "history": {"long": {"domain": "video", "length": 50, "search": "top"}},
            "item": {"dim": 64, "ids": "hash", "rows": 600_000},
            "user": {"dim": 32, "ids": "hash", "rows": 400_000},
            "search": {"device": "device", "tables": ["item"]},
        },
        "train": {"batch_size": 4096},
        # A plan counts PyTorch's operations, as on a GPU; compiled loops keep less.
        "model": {"compiled_attention": False, "compiled_experts": False},
    }
    for text in settings:
        section, key, value = text.replace("=", ".", 1).split(".", 2)
        raw.setdefault(section, {})[key] = json.loads(value)
    for section, values in changes.items():
        raw[section] = {**raw.get(section, {}), **values}
    return parse_config(raw, "job")


def memory(key: str) -> int:
    """Return bytes of this process: ``VmRSS``, in use, or ``VmHWM``, the peak."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def train(config: JobConfig, world: World, scratch: Path) -> Any:
    """Make some steps of a job with a snapshot in the middle; return the counts of the ids of its first batch."""
    data = Dataset.open(config.data.path, "error")
    split = split_in_time(config, data.spec)
    features = open_features(config, data, split, scratch / "features", world, open_existing_store)
    engine = build_engine(config, features, "ple", world)
    space = make_space(config, features)
    assert space is not None
    SearchSpaceRefresher(space, config, features, engine, world).begin()
    on_device = open_device_histories(config, features, data.histories, space, world, engine)
    assert on_device is not None
    engine.complete = on_device.complete
    loader = training_loader(
        config, data, split, features, world, None, space=space, first_step=0, left_to=on_device.places
    )
    counted = snapshot = None
    for step, result in enumerate(engine.steps(iter(loader)), 1):
        if counted is None:
            counted = counts_of(result.batch, features.tables, features.lookups, deduplicate=config.tables.deduplicate)
        if step == STEPS - 1:
            snapshot = engine.state(copy=True)
        if step == STEPS:
            break
    assert snapshot is not None
    engine.close()
    return counted


def main() -> None:
    """Measure and print the figures of all ranks."""
    scratch, path, *settings = sys.argv[1:]
    # As on a GPU, a batch is one block.
    blocks.BLOCK_VALUES = 1 << 30
    with World.join("cpu") as world:
        own = Path(scratch)
        small = {"item": {"dim": 64, "ids": "hash", "rows": 500}, "user": {"dim": 32, "ids": "hash", "rows": 500}}
        features = job(path, settings).features.model_dump(mode="json", exclude_unset=True)
        train(job(path, settings, features={**features, **small}, train={"batch_size": 64}), world, own / "small")
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        world.barrier()
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        config = job(path, settings)
        counted = train(config, world, own / "large")
        peak = memory("VmHWM") - before
        cpu = Accelerator(
            device="cpu",
            memory_gb=64,
            memory_gb_per_s=20,
            fp32_tflops=0.1,
            bf16_tflops=0.1,
            nvlink_gb_per_s=5,
            network_gb_per_s=5,
            host_memory_gb=64,
            host_link_gb_per_s=5,
        )
        cluster = Cluster(name="cpu", gpus=world.size, hosts=1, accelerator=cpu)
        spec = Dataset.open(path, "error").spec
        plan = plan_ranker(config, spec, cluster, Assumptions(), {}, counted)
        assert counted.rows == rows_per_rank(config, world.size)
        found = world.gather({"measured": peak, "plan": plan["memory"], "rank": world.rank})
        if found is not None:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
