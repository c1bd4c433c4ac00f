"""Dynamic tables on one and two ranks, against plain PyTorch with a reference id map; their checkpoints."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.dynamic_model import (
    ALL_CASES,
    CASES,
    CHECKPOINTED,
    NO_OVERLAP,
    ON_DEVICE,
    SIZES,
    STEPS,
    Case,
    DynamicTraining,
    dynamic_steps,
)
from tests.distributed.test_engine import TOLERANCE, relative_error
from trainer.sparse.dynamic_ids import CANDIDATES, SERVED


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dynamic")


@pytest.fixture(scope="module")
def outcomes(run_ranks: Any, out: Path) -> dict[str, dict[str, Any]]:
    """Results that dynamic_ranks.py wrote with two ranks and then with one."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("2", "1"):
        run_ranks("tests.distributed.dynamic_ranks", out, ranks=int(name), timeout=600)
        found[name] = torch.load(out / f"{name}.pt")
    return found


@cache
def plain(case: Case) -> tuple[list[float], DynamicTraining, list[Tensor]]:
    """Return losses, the training at its end, and its predictions for every step."""
    training = DynamicTraining(case)
    losses = [training.step(rows) for rows in dynamic_steps()]
    return losses, training, [training.predict(training.mapped(rows)).detach() for rows in dynamic_steps()]


def reference(case: Case) -> tuple[list[float], DynamicTraining, list[Tensor]]:
    return plain(Case(case.optimizer, "auto", case.evict, case.admit_after, clipping=case.clipping))


@pytest.mark.parametrize("world", ["1", "2"])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_agrees_with_plain_training(case: Case, world: str, outcomes: dict[str, dict[str, Any]]) -> None:
    outcome, (losses, training, logits) = outcomes[world][str(case)], reference(case)
    assert relative_error(torch.tensor(outcome["losses"]), torch.tensor(losses)) <= TOLERANCE
    for name, expected in training.parameters().items():
        assert relative_error(outcome["parameters"][name], expected) <= TOLERANCE, name
    for name, moment in training.accumulated.items():
        if case.optimizer != "sgd":
            got = outcome["tensors"][f"{name.split('.')[-2]}/accumulated"]
            assert relative_error(got.view_as(moment), moment) <= TOLERANCE, name
    for step, expected in enumerate(logits):
        parts = [of_rank[step] for of_rank in outcome["logits"]]
        assert relative_error(torch.cat(parts), expected) <= TOLERANCE


@pytest.mark.parametrize("world", ["1", "2"])
def test_ids_and_counts_are_those_of_the_reference(world: str, outcomes: dict[str, dict[str, Any]]) -> None:
    for case in ALL_CASES:
        outcome, (_, training, _) = outcomes[world][str(case)], reference(case)
        for name, ids in training.maps.items():
            assert outcome["counts"][name] == ids.counts, f"{case}: {name}"
            rows = {row: slot for bucket in ids.buckets.values() for row, slot in bucket.served.items()}
            for column in ("id", "seen", "sightings"):
                held = outcome["tensors"][f"{name}/{column}"]
                assert {row: int(held[row]) for row in rows} == {row: vars(slot)[column] for row, slot in rows.items()}
            assert set(torch.nonzero(outcome["tensors"][f"{name}/seen"]).flatten().tolist()) == set(rows)


def test_the_reference_admits_evicts_and_leaves_unserved() -> None:
    """Without this the tests above would prove little."""
    for case in CASES:
        _, training, _ = reference(case)
        total = {key: sum(ids.counts[key] for ids in training.maps.values()) for key in ("evicted", "unserved")}
        assert total["evicted"] > 20
        assert total["unserved"] > 20 or case.admit_after == 1
        assert training.renewed > 5, "rows had been trained before they were given to another id"


def test_one_rank_and_two_hold_the_same_ids(outcomes: dict[str, dict[str, Any]]) -> None:
    for case in ALL_CASES:
        one, two = (outcomes[world][str(case)] for world in "12")
        for name, column in one["tensors"].items():
            if name.split("/")[0] in SIZES and "/" in name and not name.endswith("/accumulated"):
                assert torch.equal(column, two["tensors"][name]), f"{case}: {name}"


def test_tables_are_cut_between_buckets(outcomes: dict[str, dict[str, Any]]) -> None:
    planned = {entry["table"]: entry for entry in outcomes["2"][str(CASES[0])]["plan"]}
    assert planned["item"]["shards"] == [[64, 8], [6, 8]]
    assert planned["room"]["shards"] == [[64, 16], [6, 16]]
    assert planned["user"]["shards"] == [[31, 8], [30, 8]]


@pytest.mark.parametrize("world", ["1", "2"])
def test_the_forms_of_a_cpu_and_of_a_gpu_hold_the_same_ids(world: str, outcomes: dict[str, dict[str, Any]]) -> None:
    for case, on_device in zip(CASES, ON_DEVICE, strict=False):
        cpu, device = (outcomes[world][str(each)] for each in (case, on_device))
        assert cpu["counts"] == device["counts"]
        columns = [f"{name}/{column}" for name in SIZES for column in (*SERVED, *CANDIDATES)]
        for name in columns:
            assert torch.equal(cpu["tensors"][name], device["tensors"][name]), f"{case}: {name}"


@pytest.mark.parametrize("world", ["1", "2"])
def test_overlap_changes_nothing(world: str, outcomes: dict[str, dict[str, Any]]) -> None:
    for overlapped, case in zip(CASES[::3], NO_OVERLAP, strict=True):
        assert outcomes[world][str(overlapped)]["losses"] == outcomes[world][str(case)]["losses"]
        assert_same(outcomes[world][str(overlapped)], outcomes[world][str(case)], str(case))


@pytest.mark.parametrize("world", ["1", "2"])
def test_predicting_changes_nothing(world: str, outcomes: dict[str, dict[str, Any]]) -> None:
    for case in ALL_CASES:
        outcome = outcomes[world][str(case)]
        assert_same(outcome, outcome["after_prediction"], str(case))


@pytest.mark.parametrize("world", ["1", "2"])
def test_resuming_on_the_same_ranks_is_bitwise(world: str, outcomes: dict[str, dict[str, Any]]) -> None:
    for case in CHECKPOINTED:
        resumed, through = outcomes[world][f"resumed {case}"], outcomes[world][str(case)]
        assert resumed["losses"] == through["losses"]
        assert_same(through, resumed, str(case))
        assert_same(resumed["saved"], resumed["loaded"], str(case))
        assert resumed["saved"]["counts"] != resumed["counts"]


def test_one_rank_takes_ids_and_rows_of_two(outcomes: dict[str, dict[str, Any]]) -> None:
    assert_taken_over(outcomes["2"], outcomes["1"])


@pytest.mark.slow
def test_two_ranks_take_ids_and_rows_of_one(outcomes: dict[str, dict[str, Any]], run_ranks: Any, out: Path) -> None:
    run_ranks("tests.distributed.dynamic_ranks", out, ranks=2, timeout=600)
    assert_taken_over(outcomes["1"], torch.load(out / "2-again.pt"))


def assert_taken_over(there: dict[str, Any], here: dict[str, Any]) -> None:
    for case in CHECKPOINTED:
        saved, loaded = there[f"resumed {case}"], here[f"elsewhere {case}"]
        assert_same(saved["saved"], loaded["loaded"], str(case))
        expected = torch.tensor(saved["losses"][STEPS // 2 :])
        assert relative_error(torch.tensor(loaded["losses"]), expected) <= TOLERANCE
        assert loaded["counts"] == saved["counts"]
        for name, rows in SIZES.items():
            seen, ids = (loaded["tensors"][f"{name}/{column}"] for column in ("seen", "id"))
            held = ids[seen > 0].tolist()
            assert len(held) == len(set(held)) > rows // 2
            assert torch.equal(ids, saved["tensors"][f"{name}/id"])


def assert_same(expected: dict[str, Any], got: dict[str, Any], what: str) -> None:
    assert got["counts"] == expected["counts"], what
    assert got["tensors"].keys() == expected["tensors"].keys(), what
    for name, tensor in expected["tensors"].items():
        assert not tensor.isnan().any(), f"{what}: {name}: no rank has a part of it"
        assert torch.equal(tensor, got["tensors"][name]), f"{what}: {name}"
