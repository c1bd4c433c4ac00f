"""Compare PLE with CGC, MMoE and a shared network of the same size, by conflict, number of behaviours and of rows.

    python -m benchmarks.quality.multitask --out benchmarks/results/multitask.json

PLE has two layers of experts, CGC one. In a world with a conflict (``limelight data simulate --conflict``) what draws
clicks repels likes, comments, gifts and follows, so that one representation of all behaviours serves none. The rankers
(``configs/recipe.toml``) differ in the network only: the widths of CGC, MMoE and the shared network are chosen so that
they have as many parameters as PLE. Each is trained on worlds with and without a conflict, of two sizes, with all
behaviours and with clicks and likes only.

All settings are those of the job; nothing is chosen here. Values are of the last two days. Differences to CGC are in
points, with 95 % intervals over users (paired bootstrap, the mean over the seeds inside each draw).

Worlds and trainings are kept under ``--work`` and are not repeated, so the same command continues a benchmark that was
stopped; the report has all trainings that are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import make_parser, slug, write_result
from benchmarks.quality.kept_runs import KeptRun, read_runs, run_file, train_once
from benchmarks.quality.larm_report import cell
from benchmarks.quality.paired_users import DRAWS
from benchmarks.quality.ranker_runs import opened
from benchmarks.quality.recipe import COMMON, DAYS, HELD_OUT, RECIPE_JOB
from benchmarks.quality.recipe_report import METRICS, summarise
from modules.ranker import RankerKind
from trainer.config.ranker import JobConfig, load_config
from trainer.console.outputs import local_argument
from trainer.console.text_table import text_table
from trainer.data.simulator.write_dataset import simulate
from trainer.engine.build_ranker import build_ranker
from trainer.runtime.distributed import World

USERS, WORLD_DAYS, PARTITIONS, WORLD_SEED = (2000, 8000), 10, 8, 1
CONFLICTS = (0.0, 0.5, 1.0)
PLE: RankerKind = "ple"
CGC: RankerKind = "cgc"
NETWORKS: tuple[RankerKind, ...] = (CGC, PLE, "mmoe", "shared_bottom")
TWO = "click, like"
TASKS: dict[str, tuple[str, ...]] = {"all": (), TWO: ('data.behaviours=["click", "like"]', "score.exponents={}")}
"""Behaviours that are predicted -> settings."""

WIDTH, WIDEST = 48, 1024
"""Width of PLE's experts, and the limit of those of the other networks."""


@dataclass(frozen=True)
class NetworkSetting:
    """A world and the behaviours that are predicted in it."""

    users: int
    conflict: float
    tasks: str

    @property
    def name(self) -> str:
        """Name in tables and, with ``slug``, of folders."""
        return f"{self.users} users, conflict {self.conflict:g}, {self.tasks}"


def job_of(
    network: str, width: int, setting: NetworkSetting, seed: int, data: Path, overrides: Sequence[str]
) -> JobConfig:
    """Return the job of a training; ``width`` is that of the experts."""
    size = [f'model.kind="{network}"', f"model.expert_layers=[[{2 * width}, {width}], [{width}, {width}]]"]
    own = [f"data.path={data}", f"run.seed={seed}", *COMMON, *DAYS[HELD_OUT], *TASKS[setting.tasks], *size, *overrides]
    return load_config(RECIPE_JOB, own)


def sizes(setting: NetworkSetting, data: Path, overrides: Sequence[str], world: World) -> dict[str, tuple[int, int]]:
    """Return by network the width with which it has about as many parameters as PLE, and its parameters."""
    _, _, features = opened(job_of(PLE, WIDTH, setting, 1, data, overrides), world)

    def parameters(network: RankerKind, width: int) -> int:
        ranker = build_ranker(job_of(network, width, setting, 1, data, overrides), features, network)
        return sum(values.numel() for values in ranker.parameters())

    wanted = parameters(PLE, WIDTH)
    found: dict[str, tuple[int, int]] = {}
    for network in NETWORKS:
        low, high = 1, WIDEST
        while network != PLE and high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if parameters(network, middle) <= wanted else (low, middle)
        nearest = (WIDTH,) if network == PLE else (low, high)
        width = min(nearest, key=lambda one: abs(parameters(network, one) - wanted))
        found[network] = width, parameters(network, width)
    return found


def world_path(work: Path, setting: NetworkSetting) -> Path:
    """Return the dataset of a setting; settings that differ in the behaviours only share it."""
    return work / slug(f"world {setting.users} {setting.conflict:g}")


def train_missing(options: argparse.Namespace, settings: Sequence[NetworkSetting], world: World) -> dict[str, Any]:
    """Simulate and train what is missing in ``options.work``, seed by seed; return the sizes of the networks."""
    found: dict[str, Any] = {}
    for setting in settings:
        path = world_path(options.work, setting)
        if not path.exists():
            options.work.mkdir(parents=True, exist_ok=True)
            simulate(path, setting.users, WORLD_DAYS, PARTITIONS, WORLD_SEED, conflict=setting.conflict)
        found[setting.name] = sizes(setting, path, options.overrides, world)
    for seed, setting, network in ((s, w, n) for s in options.seeds for w in settings for n in NETWORKS):
        width, path = found[setting.name][network][0], world_path(options.work, setting)
        job = job_of(network, width, setting, seed, path, options.overrides)
        file = run_file(options.work / slug(setting.name), seed, network)
        train_once(file, job, world, f"{network}, {setting.name}, seed {seed}")
    return found


def kept(
    options: argparse.Namespace, setting: NetworkSetting, found: Mapping[str, tuple[int, int]]
) -> dict[str, dict[int, KeptRun]]:
    """Return the finished trainings of a setting: network -> seed -> run; ``found`` has the sizes of the networks."""
    path = world_path(options.work, setting)

    def job(network: str, seed: int) -> JobConfig:
        return job_of(network, found[network][0], setting, seed, path, options.overrides)

    return read_runs(options.work / slug(setting.name), NETWORKS, job)


def tables(result: dict[str, Any]) -> str:
    """Return the differences to CGC as text: a table for each behaviour and metric."""
    names = dict.fromkeys(name for found in result["settings"].values() for name in found["behaviours"])
    blocks = []
    for behaviour in names:
        for metric in METRICS:
            lines = []
            for setting, found in result["settings"].items():
                if of := found["behaviours"].get(behaviour):
                    cells = [cell(of["recipes"][name][f"{metric}_difference"]) for name in NETWORKS if name != CGC]
                    lines.append([setting, f"{of['recipes'][CGC][metric][0] or 0:.4f}", *cells])
            header = [f"{behaviour}, {metric.upper()}", CGC, *(name for name in NETWORKS if name != CGC)]
            blocks.append(text_table(header, lines))
    return "\n\n".join(blocks)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("quality.multitask", __doc__)
    parser.add_argument(
        "--work", type=local_argument, default=Path("runs/multitask"), help="keeps all (default: %(default)s)"
    )
    parser.add_argument("--users", type=int, nargs="+", default=list(USERS), help="of the worlds (default: both sizes)")
    parser.add_argument("--conflicts", type=float, nargs="+", default=list(CONFLICTS), help="default: 0, 0.5 and 1")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: both")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the rankers (default: 1 to 3)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of all rankers")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = [NetworkSetting(u, c, t) for u in options.users for c in options.conflicts for t in options.tasks]
    with World.join("cpu") as world:
        found = train_missing(options, settings, world)
    result: dict[str, Any] = {"settings": {}}
    for setting in settings:
        runs = kept(options, setting, found[setting.name])
        result["settings"][setting.name] = {
            **vars(setting),
            "width": {name: width for name, (width, _) in found[setting.name].items()},
            "parameters": {name: count for name, (_, count) in found[setting.name].items()},
            **summarise(runs, dict.fromkeys(NETWORKS, CGC), CGC, None, {}),
        }
    print(tables(result))
    facts = {
        "question": "PLE against networks of the same size, by conflict, behaviours and rows",
        "world": {"days": WORLD_DAYS, "seed": WORLD_SEED},
        "draws": DRAWS,
        "overrides": options.overrides,
    }
    write_result(options.out, {**facts, **result})


if __name__ == "__main__":
    main()
