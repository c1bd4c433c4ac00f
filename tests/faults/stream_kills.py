"""Kills ranks of a job that trains on a stream repeatedly, and compares the result with an undisturbed run.

    python -m tests.faults.stream_kills --source files --kills 10
    python -m tests.faults.stream_kills --source kafka --kills 10

The job is ``limelight train configs/moment.toml`` on two ranks. At random moments one rank is killed, and the same
command resumes the run. At the end, tables, dense network, optimizers, open visits, histories, metrics and positions
must be equal to those of the undisturbed run, bit for bit. A third run is killed in the middle and resumed with one
rank: it must train on the same numbers of rows and events. Kafka is librdkafka's mock cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.faults.command import children
from tests.faults.harness import model_of, state_differences
from tests.paths import ROOT
from trainer.checkpoint.manifest import list_checkpoints, read_manifest

SETTINGS = (
    "configs/moment.toml",
    "data.train_until=2024-03-05",
    "stream.slice_seconds=300",
    "stream.flush_seconds=1800",
    "model.expert_layers=[[32], [16]]",
    "model.tower=[8]",
    "model.dropout=0.1",
    "features.history.short.length=10",
    "features.history.live.length=10",
    "train.batch_size=256",
    "train.log_every=10",
    "checkpoint.every_steps=3",
    "checkpoint.every_minutes=0",
    "train.device=cpu",
)
TOPIC = "watch"

LIMIT_SECONDS = 1800.0
"""Time limit of one start of the job."""


@dataclass(frozen=True)
class Run:
    """Run directory in the form that ``state_differences`` takes."""

    run: Path

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        directory = self.run / "checkpoints"
        return list_checkpoints(directory) if directory.exists() else []

    @property
    def step(self) -> int:
        """Step of the newest checkpoint, 0 without one."""
        found = self.checkpoints()
        return int(found[-1].name.removeprefix("step-")) if found else 0


def train(run: Run, settings: Sequence[str], ranks: int, kill: Callable[[], bool] | None, rng: random.Random) -> bool:
    """Run the command, and kill a rank when ``kill`` returns True; return True if the job finished."""
    command = [
        sys.executable,
        "-m",
        "launch.cli.main",
        "train",
        *settings,
        f"run.directory={run.run}",
        "--ranks",
        str(ranks),
    ]
    with (run.run.parent / f"{run.run.name}.out").open("a") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=out, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + LIMIT_SECONDS
        killed = False
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
                raise SystemExit(f"{run.run}: not finished in {LIMIT_SECONDS:.0f} s")
            if kill is not None and not killed and kill():
                time.sleep(rng.uniform(0, 2))
                victims = children(process.pid)
                if victims:
                    os.kill(rng.choice(victims), signal.SIGKILL)
                    killed = True
            time.sleep(0.02)
    return process.returncode == 0


def disturbed(run: Run, settings: Sequence[str], steps: int, kills: int, rng: random.Random) -> int:
    """Train to the end with ``kills`` kills; return the number of kills that happened."""
    targets = sorted(rng.sample(range(1, max(steps - 3, kills + 1)), kills))
    done = 0
    while not train(run, settings, 2, _reached(run, targets[done]) if done < kills else None, rng):
        done += 1
        print(f"kill {done} of {kills}: after step {run.step} of {steps}", flush=True)
    return done


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.stream_kills", description=__doc__)
    parser.add_argument("--source", choices=("files", "kafka"), default="files")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--days", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="working directory (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return compare(options, options.directory or Path(temporary))


def compare(options: argparse.Namespace, directory: Path) -> int:
    """Make all runs and compare them; return the exit status."""
    rng = random.Random(options.seed)
    directory.mkdir(parents=True, exist_ok=True)
    world = directory / "world"
    if not world.exists():
        size = ("--users", str(options.users), "--days", str(options.days), "--partitions", "4", "--seed", "7")
        _limelight("data", "simulate", str(world), *size)
    settings = [*SETTINGS, f"data.path={world}"]
    # The mock cluster lives as long as this object.
    cluster = None
    if options.source == "kafka":
        cluster, brokers = _brokers()
        properties = directory / "client.properties"
        # The mock cluster keeps 5 MB of a partition, so the messages are compressed.
        properties.write_text("compression.type=zstd\ncompression.level=9\nlinger.ms=200\n")
        arguments = ("--brokers", brokers, "--topic", TOPIC, "--format", "arrow", "--properties", str(properties))
        _limelight("stream", "publish", str(world), *arguments)
        settings += ["stream.source=kafka", f"stream.brokers={brokers}", f"stream.topic={TOPIC}", "stream.format=arrow"]
        settings += ["stream.until_end=true"]

    runs = {name: Run(directory / f"{options.source}-{name}") for name in ("undisturbed", "killed", "fewer")}
    began = time.monotonic()
    assert train(runs["undisturbed"], settings, 2, None, rng), "the undisturbed run has failed"
    seconds, steps = time.monotonic() - began, runs["undisturbed"].step
    counts = _counts(runs["undisturbed"])
    print(f"{options.source}: undisturbed, {counts['events']:,} events, {steps} steps, {seconds:.0f} s", flush=True)

    kills = disturbed(runs["killed"], settings, steps, options.kills, rng)
    different = state_differences(runs["killed"], runs["undisturbed"])
    if _counts(runs["killed"]) != counts:
        different.append("counters of the stream")
    print(f"{kills} kills: " + ("equal bit for bit" if not different else "; ".join(different[:9])), flush=True)

    train(runs["fewer"], settings, 2, _reached(runs["fewer"], steps // 2), rng)
    assert train(runs["fewer"], settings, 1, None, rng), "one rank has not finished"
    manifests = [read_manifest(runs[name].checkpoints()[-1]) for name in ("undisturbed", "fewer")]
    once = manifests[0].rows_done == manifests[1].rows_done and _counts(runs["fewer"]) == counts
    print(
        f"2 ranks to 1 in the middle: {manifests[1].rows_done:,} rows of {counts['requests']:,} requests, "
        + ("each once" if once else f"NOT equal to the undisturbed run, {manifests[0].rows_done:,}")
        + f"; largest difference of a parameter {_distance(runs['fewer'], runs['undisturbed']):.2g}",
        flush=True,
    )
    del cluster
    return 0 if once and not different and kills >= options.kills else 1


def _reached(run: Run, step: int) -> Callable[[], bool]:
    return lambda: run.step >= step


def _counts(run: Run) -> dict[str, int]:
    counts: dict[str, int] = json.loads((run.run / "metrics.json").read_text())["stream"]["counts"]
    return counts


def _distance(one: Run, other: Run) -> float:
    """Return the largest difference between the parameters of the dense networks."""
    here, there = (dict(model_of(run.checkpoints()[-1])) for run in (one, other))
    return max(
        float((here[name] - there[name]).abs().max())
        for name in here
        if name.startswith("dense") and isinstance(here[name], torch.Tensor) and here[name].numel()
    )


def _brokers() -> tuple[Any, str]:
    import confluent_kafka

    cluster = confluent_kafka.Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "ignored", "log_level": 2})
    # A metadata request creates a topic of the mock cluster.
    known = cluster.list_topics(TOPIC, timeout=20).brokers.values()
    return cluster, ",".join(f"{broker.host}:{broker.port}" for broker in known)


def _limelight(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "launch.cli.main", *arguments], cwd=ROOT, env=_environment(), check=True)


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


if __name__ == "__main__":
    sys.exit(main())
