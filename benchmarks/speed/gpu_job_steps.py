"""Steps of ``benchmarks/speed/gpu.py`` that train whole jobs, on a CPU and on the device."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from benchmarks.measure import run_limelight
from benchmarks.speed.gpu_steps import Parts, Step, device


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


STEPS = {"job": Step(job, 240), "dynamic_job": Step(dynamic_job, 180), "searched_job": Step(searched_job, 180)}
"""Name -> step, in order of value."""
