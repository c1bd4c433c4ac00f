"""Plan of a ranker's job: what fits, what does not, and what would make it fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.code_files import codes_around, write_codes
from tests.planning.planned_dataset import SPEC
from trainer.config.ranker import parse_config
from trainer.console.errors import UserError
from trainer.data.format.content_vectors import ContentVectors
from trainer.planning.accelerators import describe_cluster
from trainer.planning.ranker_plan import Assumptions, plan_ranker


def planned(
    gpu: str = "h200",
    gpus: int = 2,
    rows: dict[str, int] | None = None,
    exposures: int = 0,
    zipf: float | None = None,
    **sections: Any,
) -> dict[str, Any]:
    sections = {
        "data": {"path": "nowhere"},
        "train": {"batch_size": 1024},
        "model": {"expert_layers": [[32, 16]]},
        **sections,
    }
    config = parse_config(sections, "job.toml")
    spec = replace(SPEC, exposures=exposures)
    return plan_ranker(config, spec, describe_cluster(gpu, gpus, 1), Assumptions(zipf=zipf), rows or {})


@pytest.fixture(scope="module")
def large() -> dict[str, Any]:
    """Return the plan of tables that are too large for two GPUs and their host."""
    return planned(rows={"item": 20_000_000_000})


def test_the_parts_of_a_plan_add_up() -> None:
    plan = planned()
    assert plan["memory"]["fullest_total"] == sum(plan["memory"]["fullest"].values())
    assert plan["host_memory"]["total"] == sum(plan["host_memory"]["parts"].values())
    assert plan["step"]["seconds"] == pytest.approx(sum(plan["step"]["parts"].values()))
    assert plan["step"]["rows_per_second"] == pytest.approx(1024 / plan["step"]["seconds"])
    assert plan["step"]["bottleneck"] == max(plan["step"]["parts"], key=plan["step"]["parts"].__getitem__)
    assert plan["problems"] == plan["remedies"] == [] and plan["rows_per_rank"] == 512
    tables = sum(4 * table["rows"] * table["dim"] for table in plan["tables"])
    assert plan["memory"]["fullest"]["tables"] <= tables <= 2 * plan["memory"]["fullest"]["tables"]


def test_a_cpu_has_one_memory() -> None:
    plan = planned("cpu")
    assert plan["memory"]["fullest"]["checkpoint snapshot"] > 0 and plan["host_memory"]["parts"] == {}


def test_what_does_not_fit_is_named_with_what_would_help(large: dict[str, Any]) -> None:
    assert any(problem.startswith("no sharding of 1,280.0 GB of tables on 2 ranks") for problem in large["problems"])
    assert any("item: 20,000,000,000 rows; a job accepts 2,147,483,648" in problem for problem in large["problems"])
    fits = {change["change"]: change["fits"] for change in large["remedies"]}
    assert fits["--hosts 6 --gpus 12"] and not fits["features.*.sharding = 'row_wise' for all tables"]
    assert all(change["fits"] == (change["needs"] <= change["has"]) for change in large["remedies"])


def test_the_hosts_that_a_plan_asks_for_are_enough_and_one_fewer_is_not(large: dict[str, Any]) -> None:
    (change,) = (change for change in large["remedies"] if "--hosts" in change["change"])
    assert change["needs"] <= change["has"] < change["needs"] * 12 / 10


def test_fewer_rows_a_step_are_proposed_where_activations_do_not_fit() -> None:
    plan = planned("l40s", 1, train={"batch_size": 1 << 21})
    assert any("needs" in problem for problem in plan["problems"])
    (change,) = (change for change in plan["remedies"] if "train.batch_size" in change["change"])
    rows = int(change["change"].split(" = ")[1].split()[0])
    assert not planned("l40s", 1, train={"batch_size": rows})["problems"]


def test_a_table_whose_ids_meet_at_one_rank_is_named() -> None:
    plan = planned(
        "h200", 8, {"item": 10**8}, features={"item": {"sharding": "table_wise"}}, train={"batch_size": 1 << 19}
    )
    assert plan["step"]["busiest_rank"] == next(t for t in plan["tables"] if t["table"] == "item")["ranks"][0]
    assert plan["faster"][0]["change"] == "features.item.sharding = 'row_wise'"
    assert plan["faster"][0]["seconds"] < plan["step"]["seconds"]


def test_a_skew_makes_the_owner_of_popular_rows_busier_and_a_plan_says_what_it_assumes() -> None:
    sections = {"features": {"item": {"sharding": "row_wise"}}, "train": {"batch_size": 1 << 16}}
    even, skewed = (planned("h200", 8, {"item": 10**8}, zipf=zipf, **sections) for zipf in (None, 1.0))
    shares, seconds, distinct = [], [], []
    for plan in (even, skewed):
        (item,) = (table for table in plan["tables"] if table["table"] == "item")
        shares.append(item["share_of_busiest_rank"])
        distinct.append(item["distinct_ids_per_step"])
        seconds.append(plan["step"]["parts"]["rows"])
    assert shares[0] == pytest.approx(1 / 8, rel=1e-3) and shares[1] > 2 * shares[0]
    assert distinct[1] < distinct[0]
    assert "the busiest owner may have more" in even["assumptions"]["ids"]
    assert skewed["assumptions"]["ids"].startswith("Zipf's law with exponent 1")
    assert skewed["step"]["busiest_rank"] == 0 and seconds[1] != seconds[0]


def test_limits_of_the_dataset_are_problems_and_dynamic_ids_are_none() -> None:
    plan = planned(gpus=128, features={"item": {"ids": "dynamic", "rows": 64, "sharding": "row_wise"}})
    assert any(problem.startswith("128 ranks, and the dataset has 64 partitions") for problem in plan["problems"])
    assert not any("dynamic" in problem for problem in plan["problems"])
    # The first rank has the only bucket.
    assert plan["memory"]["fullest_rank"] == 0 and plan["memory"]["fullest"]["dynamic ids"] == 32 * 64


def test_rows_that_the_ranks_cannot_share_are_one_line() -> None:
    with pytest.raises(UserError, match=r"^train\.batch_size = 1024 is not a multiple of the 3 ranks$"):
        planned(gpus=3)


def test_the_host_of_a_gpu_keeps_snapshot_search_vectors_and_batches() -> None:
    def parts(**sections: Any) -> dict[str, int]:
        found: dict[str, int] = planned(data={"path": "nowhere", "workers": 3, "prefetch": 2}, **sections)[
            "host_memory"
        ]["parts"]
        return found

    plain, searched = parts(), parts(features=with_searches("cpu"))
    rows = {table["table"]: table["rows"] for table in planned(features=with_searches("cpu"))["tables"]}
    assert "search vectors" not in plain
    # All rows of the items and of the authors, float16, of width 32 and 16.
    once = 2 * (32 * rows["item"] + 16 * rows["author"])
    assert searched["search vectors"] == 2 * once
    fixed = parts(features=with_searches("cpu", refresh_steps=0, embedding="vectors.npz"))
    assert fixed["search vectors"] == once
    plan = planned(data={"path": "nowhere", "workers": 3, "prefetch": 2})
    ids = sum(table["ids_per_step"] for table in plan["tables"])
    # Two of each of three workers and two that are fetched ahead; beside the ids labels, masks and dense values.
    assert 8 * (8 * ids + 8 * 2 * 512) < plan["host_memory"]["parts"]["batches ahead"] < 8 * 10 * ids


CONSTANT = {"optimizer": {"decay": "constant", "warmup": 0}}
"""The learning rate of a stream."""

HISTORIES = {
    "long": {"domain": "video", "search": "top"},
    "author": {"domain": "video", "search": "author"},
    "live_author": {"domain": "live", "search": "author"},
    "mixed": {"domain": "both", "require": ["like"]},
}


def with_searches(device: str, **search: Any) -> dict[str, Any]:
    return {"history": {"long": HISTORIES["long"]}, "search": {"device": device, **search}, "item": {"dim": 24}}


def test_histories_that_the_device_searches_are_in_its_memory() -> None:
    def searched(gpu: str = "h200", rows: dict[str, int] | None = None, **features: Any) -> int:
        plan = planned(gpu, rows=rows, exposures=7_001, features=features)
        assert plan["memory"]["fullest_total"] == sum(plan["memory"]["fullest"].values())
        found: int = plan["memory"]["fullest"].get("searched histories", 0)
        return found

    tables = {table["table"]: table["rows"] for table in planned(features=with_searches("cpu"))["tables"]}
    # An entry has its item, its author, its behaviours and an age in 4 bytes each, and its time in 8.
    visits = 24 * 3_501
    vectors = 32 * tables["item"] + 16 * tables["author"]
    assert searched(**with_searches("cpu")) == 0
    assert searched(**with_searches("device")) == searched(**with_searches("auto")) == visits + 2 * vectors
    # A CPU searches the vectors that are in host memory anyway.
    assert searched("cpu", **with_searches("device")) == visits
    assert searched(**with_searches("device", dtype="int8", tables=["author"])) == visits + 16 * tables["author"]
    # Histories of a stream move to places of their own when they grow.
    stream = {"data": {"path": "nowhere", "train_until": "2024-01-02"}, "stream": {}, **CONSTANT}
    growing = planned(exposures=7_001, features=with_searches("device"), **stream)["memory"]["fullest"]
    assert growing["searched histories"] == 24 * (6 * 3_501 + 6 * 3_501 // 8) + 2 * vectors
    # The loader searches where there is no GPU, and where there is no room.
    many = {"item": 1_500_000_000}
    assert searched("cpu", **with_searches("auto")) == searched(rows=many, **with_searches("auto")) == 0
    assert searched(rows=many, **with_searches("device")) > 64 * many["item"]


def test_orders_and_codes_of_histories_are_in_memory_too(tmp_path: Path) -> None:
    visits = {name: np.arange(30) for name in ("item_id", "author_id", "request_ms")}
    codes = codes_around({**visits, "domain": np.ones(30)}, share=1)
    file = str(write_codes(tmp_path / "codes.parquet", codes))

    def planned_with(*names: str, gpu: str = "h200", **features: Any) -> dict[str, Any]:
        history = {name: HISTORIES[name] for name in ("long", *names)}
        return planned(gpu, exposures=7_001, features={**with_searches("device"), "history": history, **features})

    def parts(plan: dict[str, Any]) -> tuple[int, int]:
        return plan["memory"]["fullest"]["searched histories"], plan["host_memory"]["parts"]["orders of histories"]

    alone = planned_with()
    assert "orders of histories" not in alone["host_memory"]["parts"]
    device = alone["memory"]["fullest"]["searched histories"]
    # Two histories of authors share their order; "mixed" also gives each visit its domain.
    assert parts(planned_with("author", "live_author")) == (device + 4 * 3_501, 12 * 3_501)
    assert parts(planned_with("mixed")) == (device + 8 * 3_501, 16 * 3_501)
    shown = {"shown": {"file": file, "history": "entry", "tables": "levels", "levels": 2}}
    with_codes = planned_with("author", codes=shown)
    assert parts(with_codes)[0] == device + (4 + 21) * 3_501 + 2 * 4 * (len(codes) + 1)
    vectors = np.ones((7, 5), np.float16)
    ContentVectors.write(tmp_path / "items", np.arange(7), vectors)
    of_items = {"title": {"table": str(tmp_path / "items"), "dim": 4, "histories": True}}
    assert parts(planned_with("author", content=of_items))[0] == device + (4 + 4) * 3_501 + vectors.nbytes
    on_cpu = planned_with("author", gpu="cpu")["memory"]["fullest"]
    assert on_cpu["orders of histories"] == 12 * 3_501
