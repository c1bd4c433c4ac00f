"""Resuming a stopped job: bit for bit on the same ranks; the same model and each row once on other numbers of ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.code_files import write_codes_of
from tests.data.vector_tables import write_vectors_of
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.shards import read_rows
from trainer.data.simulator.write_dataset import simulate

STARTS = {"2a": (), "1a": ("2a",), "3a": ("2a",), "2b": ("1a", "3a")}
"""Starts in order, with their number of ranks and the earlier starts whose checkpoints they load."""


@pytest.fixture(scope="module")
def outcomes(
    run_ranks: Any, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Any]:
    """Results of resume_ranks.py; with ``--slow`` every start loads all pairs of layouts."""
    pairs = "all" if request.config.getoption("--slow") else "half"
    out = tmp_path_factory.mktemp("resume")
    simulate(out / "world", users=250, days=3, partitions=4, seed=3)
    codes = write_codes_of(out / "world", out / "codes.parquet")
    write_vectors_of(out / "world", codes, out / "vectors")
    found: dict[str, Any] = {"dataset": out / "world"}
    for start, earlier in STARTS.items():
        ranks = int(start[0])
        arguments = (start, out, out / "world", pairs, *earlier)
        run_ranks("tests.distributed.resume_ranks", *arguments, ranks=ranks, timeout=600)
        found[start] = torch.load(out / f"{start}.pt")
    return found


def trained(outcome: dict[str, Any]) -> Counter[int]:
    """Count how often each visit was trained on, over all ranks."""
    return Counter(visit for of_rank in outcome["visits"] for visit in of_rank)


def test_a_resumed_run_equals_an_undisturbed_one_bitwise(outcomes: dict[str, Any]) -> None:
    through, stopped, resumed = (
        outcomes["2a"]["through"],
        outcomes["2a"]["stopped"],
        outcomes["2a"]["resumed"]["2a"],
    )
    assert stopped["report"] is None and 0 < stopped["step"] < through["step"]
    assert stopped["losses"] + resumed["losses"] == through["losses"]
    assert resumed["trace"] == through["trace"] and resumed["report"] == through["report"]
    assert through["report"]["ple"]["click"]["rows"] > 0
    for before, after in ((stopped["saved"], resumed["loaded"]), (through["saved"], resumed["saved"])):
        assert before.keys() == after.keys()
        for name in before:
            assert torch.equal(before[name], after[name]), name
    assert all(map(torch.equal, resumed["random"], through["random"]))
    assert not torch.equal(*through["random"]), "each rank draws its own dropout"


@pytest.mark.parametrize(("start", "earlier"), [(start, name) for start, names in STARTS.items() for name in names])
def test_any_number_of_ranks_loads_any_layout_of_any_other(outcomes: dict[str, Any], start: str, earlier: str) -> None:
    assert outcomes[start]["wrong"][earlier] == []


@pytest.mark.parametrize(("start", "earlier"), [(start, name) for start, names in STARTS.items() for name in names])
def test_a_job_resumes_on_another_number_of_ranks(outcomes: dict[str, Any], start: str, earlier: str) -> None:
    stopped, resumed = outcomes[earlier]["stopped"], outcomes[start]["resumed"][earlier]
    assert stopped["saved"].keys() == resumed["loaded"].keys()
    for name, tensor in stopped["saved"].items():
        assert torch.equal(tensor, resumed["loaded"][name]), name
    whole = outcomes["2a"]["through"]
    assert trained(stopped) + trained(resumed) == trained(whole)
    assert all(of_visit == 2 for of_visit in trained(whole).values()), "two epochs"
    spec = DatasetSpec.load(outcomes["dataset"])
    visits = read_rows(outcomes["dataset"], spec)["visit_id"]
    assert 0 < len(trained(whole)) < len(visits), "the rest is held out"
    assert resumed["trace"][-1]["rows"] > 0 and resumed["trace"][0] == stopped["trace"][0]
    assert resumed["report"]["ple"].keys() == whole["report"]["ple"].keys()


def test_progressive_metrics_count_each_row_once_whatever_ranks_saw_it(outcomes: dict[str, Any]) -> None:
    """Histograms are sums over ranks, so the last AUC differs only by the predictions of the models."""
    whole = outcomes["2a"]["through"]["trace"][-1]
    for start, earlier in (("1a", "2a"), ("3a", "2a"), ("2b", "1a"), ("2b", "3a")):
        last = outcomes[start]["resumed"][earlier]["trace"][-1]
        assert last["auc"]["click"] == pytest.approx(whole["auc"]["click"], abs=0.05)


def test_a_directory_leaves_only_the_newest_checkpoints(outcomes: dict[str, Any]) -> None:
    directory: Path = outcomes["dataset"].parent / "2a" / "through" / "checkpoints"
    names = sorted(entry.name for entry in directory.iterdir())
    last = outcomes["2a"]["through"]["step"]
    assert names == [f"step-{(last - 1) // 4 * 4:08d}", f"step-{last:08d}"]
