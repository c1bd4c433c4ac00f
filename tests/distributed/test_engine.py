"""Training on one and two ranks against one process with plain PyTorch, in every combination of settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.embeddings import initial_rows
from tests.distributed.combinations import BFLOAT16, CHECKPOINTED, DCN, FLOAT32, NO_OVERLAP, REST, SHARDED, Combination
from tests.distributed.small_model import SEED, STEPS, PlainTraining, share_of_first_rank, steps, tables

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def outcomes(
    run_ranks: Any, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[int, dict[str, Any]]:
    """Number of ranks -> results of engine_ranks.py; the ranks are started once for all tests."""
    out = tmp_path_factory.mktemp("engine")
    extent = "slow" if request.config.getoption("--slow") else "fast"
    found: dict[int, dict[str, Any]] = {}
    # Two ranks start first, because the single rank reads their checkpoints.
    for world in (2, 1):
        run_ranks("tests.distributed.engine_ranks", out, extent, ranks=world, timeout=600)
        found[world] = torch.load(out / f"{world}.pt")
    return found


@cache
def plain(optimizer: str, clipping: float, network: str = "small") -> tuple[list[float], dict[str, Tensor], int]:
    """Return losses, parameters and number of clipped steps of one process with plain PyTorch."""
    training = PlainTraining(optimizer, clipping, network=network)
    losses = [training.step(rows) for rows in steps()]
    return losses, training.parameters(), training.clipped


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference in units of the largest value, as small values are differences of large ones."""
    return float((got.double() - expected.double()).abs().max() / expected.abs().max())


def errors(outcome: dict[str, Any], combination: Combination) -> dict[str, float]:
    losses, parameters, _ = plain(combination.optimizer, combination.clipping, combination.network)
    assert outcome["parameters"].keys() == parameters.keys()
    found = {name: relative_error(outcome["parameters"][name], parameters[name]) for name in parameters}
    return found | {"losses": relative_error(torch.tensor(outcome["losses"]), torch.tensor(losses))}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "combinations", [(*FLOAT32, *NO_OVERLAP, *DCN), pytest.param(REST, marks=pytest.mark.slow)], ids=["half", "rest"]
)
def test_float32_agrees_with_plain_training(
    combinations: Sequence[Combination], world: int, outcomes: dict[int, dict[str, Any]]
) -> None:
    wrong = {}
    for combination in combinations:
        outcome = outcomes[world]["trained"][str(combination)]
        assert outcome["rows"] == [len(rows) for rows in steps()]
        for name, error in errors(outcome, combination).items():
            if not error <= TOLERANCE:
                wrong[f"{combination}: {name}"] = error
    assert not wrong


def test_some_steps_were_clipped_and_some_were_not() -> None:
    for combination in FLOAT32:
        if combination.clipping:
            assert 0 < plain(combination.optimizer, combination.clipping)[2] < STEPS


def test_ranks_had_unequal_shares(outcomes: dict[int, dict[str, Any]]) -> None:
    first, second = outcomes[2]["own_rows"]
    for own_first, own_second in zip(first, second, strict=True):
        assert own_first == [share_of_first_rank(step, len(rows)) for step, rows in enumerate(steps())]
        assert [a + b for a, b in zip(own_first, own_second, strict=True)] == [len(rows) for rows in steps()]


@pytest.mark.parametrize("world", [1, 2])
def test_overlap_changes_no_number(world: int, outcomes: dict[int, dict[str, Any]]) -> None:
    for combination in NO_OVERLAP:
        trained = outcomes[world]["trained"]
        without, overlapped = trained[str(combination)], trained[str(replace(combination, overlap=True))]
        assert without["losses"] == overlapped["losses"]
        for name, parameter in without["parameters"].items():
            assert torch.equal(parameter, overlapped["parameters"][name]), f"{combination}: {name}"


@pytest.mark.parametrize("world", [1, 2])
def test_every_table_has_a_fused_kernel_and_learns(world: int, outcomes: dict[int, dict[str, Any]]) -> None:
    read = {name: set[int]() for name in ("user", "item", "side", "room")}
    for rows in steps():
        for lookup, table in (("user", "user"), ("item", "item"), ("seen", "item"), ("side", "side"), ("room", "room")):
            read[table].update(torch.cat(rows.ids[lookup]).tolist())
    for combination in FLOAT32:
        outcome = outcomes[world]["trained"][str(combination)]
        for table in tables(combination.sharding):
            before, after = initial_rows(table, SEED, 0, table.rows), outcome["parameters"][table.name]
            changed = (before != after).any(1).nonzero().flatten().tolist()
            assert set(changed) == read[table.name], f"{combination}: {table.name}"
        for planned in outcome["plan"]:
            assert planned["kernel"] == "fused"
            assert sum(rows * columns for rows, columns in planned["shards"]) == planned["rows"] * planned["dim"]
            if combination.sharding.endswith("_wise"):
                assert planned["sharding"] == combination.sharding
                assert len(planned["ranks"]) == (1 if combination.sharding == "table_wise" else world)


@pytest.mark.parametrize("world", [1, 2])
def test_bfloat16_stays_near_float32(world: int, outcomes: dict[int, dict[str, Any]]) -> None:
    for combination in BFLOAT16:
        found = errors(outcomes[world]["trained"][str(combination)], combination)
        assert found["losses"] < 5e-3, f"{combination}: {found}"
        assert max(found.values()) < 0.1, f"{combination}: {found}"
        assert max(found.values()) > TOLERANCE, "this cannot have been bfloat16"


@pytest.mark.parametrize("world", [1, 2])
def test_seconds_of_a_step(world: int, outcomes: dict[int, dict[str, Any]]) -> None:
    for seconds in outcomes[world]["trained"][str(SHARDED[0])]["seconds"]:
        assert seconds.keys() == {"data", "tables", "dense", "communication"}
        assert all(value >= 0 for value in seconds.values())
        assert seconds["tables"] > 0 and seconds["dense"] > 0
        assert world == 1 or seconds["communication"] > 0


def test_resuming_on_the_same_ranks_is_bitwise(outcomes: dict[int, dict[str, Any]]) -> None:
    for combination in CHECKPOINTED:
        outcome = outcomes[2]["saved"][str(combination)]
        assert outcome["steps_done"] == STEPS // 2
        assert outcome["resumed"] == outcome["through"], str(combination)
        for before, after in (("saved", "loaded"), ("end", "end_resumed")):
            assert_equal(outcome[before], outcome[after], f"{combination}: {after}")
        assert not torch.equal(outcome["saved"]["item"], outcome["end"]["item"])


def test_loading_on_other_ranks_layouts_and_stages(outcomes: dict[int, dict[str, Any]]) -> None:
    for combination in CHECKPOINTED:
        saved, loaded = outcomes[2]["saved"][str(combination)], outcomes[1]["loaded"][str(combination)]
        assert_equal(saved["saved"], loaded["loaded"], str(combination))
        if not combination.bf16:
            expected = torch.tensor(saved["through"][STEPS // 2 :])
            assert relative_error(torch.tensor(loaded["losses"]), expected) <= TOLERANCE, str(combination)


def assert_equal(expected: dict[str, Tensor], got: dict[str, Tensor], what: str) -> None:
    assert got.keys() == expected.keys(), what
    for name, tensor in expected.items():
        assert not tensor.isnan().any(), f"{what}: {name}: no rank has a part of it"
        assert torch.equal(tensor, got[name]), f"{what}: {name}"


@pytest.mark.parametrize("world", [1, 2])
def test_predictions_are_those_of_the_plain_model(world: int, outcomes: dict[int, dict[str, Any]]) -> None:
    outcome, combination = outcomes[world]["predicted"], SHARDED[-1]
    training = PlainTraining(combination.optimizer, combination.clipping)
    losses = [training.step(rows) for rows in steps()[: STEPS // 2]]
    expected = [training.predict(rows).detach() for rows in steps()]
    losses += [training.step(rows) for rows in steps()[STEPS // 2 :]]
    assert outcome["unchanged"], "predicting must not train"
    assert outcome["steps"] == STEPS, "all ranks go on until all are out"
    for step, logits in enumerate(expected):
        parts = [of_rank[step] for of_rank in outcome["logits"]]
        assert relative_error(torch.cat(parts), logits) <= TOLERANCE
    # The predictions are made after a training that was stopped early, and training continues after them.
    assert relative_error(torch.tensor(outcome["losses"]), torch.tensor(losses)) <= TOLERANCE


@pytest.mark.parametrize("world", [1, 2])
def test_learning_rates_reach_both_optimizers(world: int, outcomes: dict[int, dict[str, Any]]) -> None:
    outcome = outcomes[world]["learning_rates"]
    assert_equal(outcome["initial"], outcome["frozen"], "at a learning rate of zero nothing moves")
