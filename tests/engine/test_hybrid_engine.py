"""Errors of the engine for files and settings that do not fit; tests/distributed tests its numbers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modules.embeddings import Lookup
from tests.distributed.small_model import (
    BEHAVIOURS,
    LOOKUPS,
    WEIGHTS,
    SmallRanker,
    batches_of,
    single_engine,
    tables,
)
from trainer.console.errors import UserError
from trainer.engine.hybrid_engine import TableOptimizer
from trainer.runtime.distributed import World


@pytest.fixture
def world() -> Iterator[World]:
    with World.join("cpu") as alone:
        yield alone


class WiderRanker(SmallRanker):
    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(BEHAVIOURS, BEHAVIOURS)


def test_loading_a_model_that_does_not_fit(world: World, tmp_path: Path) -> None:
    model = tmp_path / "model"
    single_engine(world).save(model)
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="no model here"):
            single_engine(world).load(path)
    *same, room = tables("auto")
    others: list[tuple[dict[str, Any], str]] = [
        ({"tables": [*same, replace(room, rows=18)]}, "room.weight 17 x 16 there, 18 x 16 here"),
        (
            {"tables": [*same, replace(room, name="lobby")], "lookups": [*LOOKUPS[:-1], Lookup("room", "lobby", None)]},
            "room.weight 17 x 16 only there",
        ),
        ({"ranker": WiderRanker()}, "third.weight.parameter 3 x 3 only here"),
        ({"table_optimizer": TableOptimizer("adagrad", 0.1)}, "item.momentum1 40 there, 40 x 8 here"),
        ({"table_optimizer": TableOptimizer("sgd", 0.1)}, "item.momentum1 40 only there"),
    ]
    for changes, named in others:
        with pytest.raises(UserError, match="a checkpoint of another model") as raised:
            single_engine(world, **changes).load(model)
        assert named in str(raised.value) and "\n" not in str(raised.value)
    (shards,) = model.glob("*.distcp")
    shards.write_bytes(shards.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged, it ends before a tensor"):
        single_engine(world).load(model)


def test_saving_where_nothing_can_be_written(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the model"):
        single_engine(world).save(tmp_path / "file" / "model")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 1, "reduce_bukcet_size": 5}}, "reduce_bukcet_size = 5"),
        ({"communication_data_type": "fp99"}, "fp99"),
        ({"zero_optimization": {"stage": 3}}, "use 0, 1 or 2"),
    ],
)
def test_settings_that_deepspeed_or_the_engine_refuses(world: World, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        single_engine(world, deepspeed=settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_no_batches_are_no_steps(world: World) -> None:
    engine = single_engine(world)
    assert list(engine.steps(iter([]))) == []
    assert list(engine.predict(iter([]))) == []
    assert engine.steps_done == 0


def test_the_result_of_a_step(world: World) -> None:
    engine = single_engine(world)
    batches = list(batches_of(0, 1))
    before = [predicted.clone() for _, predicted in engine.predict(iter(batches[:1]))]
    results = list(engine.steps(iter(batches)))
    assert [result.batch for result in results] == batches
    torch.testing.assert_close(results[0].logits, before[0])
    losses = nn.functional.binary_cross_entropy_with_logits(before[0], batches[0].label, reduction="none")
    torch.testing.assert_close(results[0].loss, (losses * batches[0].mask * WEIGHTS).sum() / batches[0].rows)
    assert engine.steps_done == len(batches)
    assert not any(result.logits.requires_grad or result.loss.requires_grad for result in results)
