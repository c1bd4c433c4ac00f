"""Figures of docs/scaling.md: those of plans are those of its command, the others stand in the file that is named."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from launch.cli.plan import plan as plan_command
from launch.plan_job import plan_job
from tests.examples import of_page
from tests.paths import ROOT
from trainer.config.features import MAX_TABLE_ROWS
from trainer.data.format.schema import IdSpace
from trainer.data.simulator.config import WorldConfig
from trainer.data.simulator.description import dataset_spec
from trainer.planning.accelerators import describe_cluster
from trainer.planning.ranker_plan import LOADER_IDS_PER_S
from trainer.planning.table_memory import optimizer_bytes, table_bytes

PAGE = ROOT / "docs/scaling.md"
TEXT = " ".join(PAGE.read_text().split())
BY_ROWS = "features.author.sharding=row_wise"
ROWS_A_DAY = 400_000_000 * 10
GB = 1e9


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the description of the dataset of configs/simulated.toml, without its rows."""
    path = tmp_path_factory.mktemp("scaling")
    ids = {name: IdSpace(1, 1) for name in ("user", "author", "item")}
    (path / "dataset.json").write_text(replace(dataset_spec(WorldConfig(1, 1, 1), 1000), ids=ids).to_json())
    return path


@cache
def planned(dataset: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    """Return the plan of the page's command with 10^10 rows, with other options and overrides."""
    (line,) = (example.text for example in of_page(PAGE) if "item=9_500_000_000" in example.text)
    read = plan_command.make_context("plan", shlex.split(line)[2:]).params | options
    return plan_job(
        read["config"],
        [*read["overrides"], f"data.path={dataset}", *overrides],
        describe_cluster(read["gpu"], read["gpus"], read["hosts"], read["gpu_file"]),
        rows=dict(read["rows"]),
        count=read["count_ids"],
        **{name: read[name] for name in ("fill", "distinct", "zipf", "answers", "mfu")},
    )


def result(name: str) -> Any:
    """Return a file of benchmarks/results."""
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def check(*sentences: str) -> None:
    """Check that the page has all sentences."""
    missing = [sentence for sentence in sentences if sentence not in TEXT]
    assert not missing, f"docs/scaling.md does not say: {missing}"


def test_the_plan_of_10_to_the_10_rows_is_that_of_the_pages_command(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    plan = planned(dataset)
    step, memory = plan["step"], plan["memory"]
    tables = {table["table"]: table for table in plan["tables"]}
    user, author, item = (tables[name] for name in ("user", "author", "item"))
    assert user["rows"] + author["rows"] + item["rows"] == 10**10
    assert len(item["ranks"]) == 64 and len(user["ranks"]) == len(author["ranks"]) == 1
    assert step["busiest_rank"] == author["ranks"][0] and user["ranks"][0] == memory["fullest_rank"]
    sizes = [4 * table["shards"][0][0] * table["dim"] / GB for table in (item, user)]
    check(
        f"cuts `item` by rows ({sizes[0]:.1f} GB a rank) and puts `user` ({sizes[1]:.1f} GB) and `author` on one rank",
        f"needs {memory['fullest_total'] / GB:.1f} of {memory['capacity'] / GB:.0f} GB, and "
        f"{plan['host_memory']['total'] / GB:.1f} GB of host memory for the snapshot",
        f"A step takes {1000 * step['seconds']:.1f} ms",
        f"At {step['rows_per_second'] / 1e6:.1f} million rows/s a host needs {step['loader_cores_per_host']} cores",
        f"The network takes {1000 * step['parts']['dense']:.1f} ms",
        f"about {round(step['operations'], -1)} operations a step",
        f"{ROWS_A_DAY / step['rows_per_second']:.0f} s of this plan",
    )
    exchange = [step["parts"][name] for name in ("rows", "gradients")]
    assert f"{1000 * exchange[0]:.1f}" == f"{1000 * exchange[1]:.1f}"
    check(f"gradients take {1000 * exchange[0]:.1f} ms each, {sum(exchange) / step['seconds']:.0%}".replace("%", " %"))
    assert any(f"a job accepts {MAX_TABLE_ROWS:,}" in problem for problem in plan["problems"])
    assert plan["faster"][0]["change"] == "features.author.sharding = 'row_wise'" and MAX_TABLE_ROWS == 1 << 31


def test_the_changed_plans_are_those_of_the_pages_command(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    by_rows = planned(dataset, BY_ROWS, "features.user.sharding=row_wise")
    milliseconds = {1000 * plan["step"]["seconds"] for plan in (planned(dataset, BY_ROWS), by_rows)}
    one_host = planned(dataset, gpus=8, hosts=1)
    check(
        f"The plan then has {milliseconds.pop():.1f} ms a step, and {by_rows['memory']['fullest_total'] / GB:.1f} GB",
        f"8 GPUs of one host would hold these tables ({one_host['memory']['fullest_total'] / GB:.0f} GB on the fullest",
        f"with {one_host['step']['rows_per_second'] / 1e6:.1f} million rows/s by its plan",
    )
    # Both changed plans have the step time of the page.
    check(f"The plan then has {milliseconds.pop():.1f} ms a step")


def test_figures_of_benchmarks_are_those_of_their_files() -> None:
    (distinct,) = {
        round(way["different_ids"] / way["ids"], 4) for way in result("dedup")["results"] if way["ranks"] == 1
    }
    rows_per_second = max(run["rows_per_second"]["median"] for run in result("throughput")["results"])
    slowest = result("assembler")["slowest"]["incremental"]
    check(
        f"has for skewed ids ({distinct})",
        f"at the {LOADER_IDS_PER_S / 1e6:.1f} million ids a core and second of `benchmarks/results/loader.json`",
        f"{ROWS_A_DAY / rows_per_second / 86_400:.1f} days at the {rows_per_second:,.0f} rows/s of two cores",
        f"makes {round(slowest, -3):,.0f} events a second and core in its slowest streaming case",
        f"10^11 events a day need {1e11 / 86_400 / slowest:.0f} cores on average",
        f"{optimizer_bytes('rowwise_adagrad', 1, 16) + table_bytes(1, 16)} bytes a row of width 16",
        f"a checkpoint of {1e10 * 68 / GB:.0f} GB",
    )
    loader = next(run for run in result("loader")["best"] if run["workers"] == 1)
    assert pytest.approx(loader["rows_per_cpu_second"] * loader["ids_per_row"], rel=0.005) == LOADER_IDS_PER_S
    written = [save["bytes"] / save["stopping"]["seconds"] / GB for save in result("checkpoint")["saves"]]
    assert min(written[:2]) <= 0.45 <= max(written[:2]), "0.45 GB/s of two ranks"
    check("which two cores write at 0.45 GB/s")
