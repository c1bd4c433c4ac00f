"""The engine on one rank: errors for files and settings that do not fit, losses and learning rates.

tests/distributed tests its numbers on several ranks.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modules.embeddings import Lookup
from tests.distributed.engine_ranks import everything, parameters
from tests.distributed.small_model import (
    BEHAVIOURS,
    LOOKUPS,
    ROWS,
    SEED,
    WEIGHTS,
    PlainTraining,
    SmallRanker,
    batches_of,
    make_rows,
    single_engine,
    tables,
)
from trainer.console.errors import UserError
from trainer.engine import hybrid_engine
from trainer.engine.batch_pipeline import BatchPipeline, StepRequest
from trainer.engine.hybrid_engine import DenseOptimizer, HybridEngine, NotFiniteLoss, TableOptimizer
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


@pytest.mark.parametrize("stage", [0, 1])
def test_optimizer_state_that_is_allocated_before_the_first_step_changes_no_bit(world: World, stage: int) -> None:
    runs = []
    for early in (False, True):
        engine = single_engine(world, deepspeed={"zero_optimization": {"stage": stage}})
        weights = sum(parameter.nbytes for parameter in engine._dense.module.parameters())
        assert not early or engine.allocate() == (1 + stage) * weights > 0
        losses = [float(result.loss) for result in engine.steps(batches_of(0, 1))]
        runs.append((losses, everything(engine, world)))
    (losses, plain), (same_losses, same) = runs
    assert losses == same_losses and plain.keys() == same.keys()
    for name, values in plain.items():
        assert torch.equal(values, same[name]), name


def test_all_pipelines_copy_their_batches_on_one_stream(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Search vectors and histories stay on the device from one pipeline to the next."""
    streams: list[Any] = []

    class Pipeline(BatchPipeline):
        def __init__(self, *args: Any, **options: Any) -> None:
            streams.append(options.pop("stream"))
            super().__init__(*args, **options)

    monkeypatch.setattr(hybrid_engine, "BatchPipeline", Pipeline)
    engine = single_engine(world)
    engine.copy_stream = of_engine = object()  # type: ignore[assignment]
    list(engine.predict(batches_of(0, 1)))
    list(engine.steps(batches_of(0, 1)))
    assert streams == [of_engine] * 2


def sgd_engine(world: World, parts: int = 1) -> HybridEngine:
    """Return the engine that ``PlainTraining("sgd", 0.0)`` is the reference of."""
    plain = PlainTraining
    return single_engine(
        world,
        table_optimizer=TableOptimizer("sgd", plain.LEARNING_RATE, plain.EPS),
        dense_optimizer=DenseOptimizer(plain.DENSE_RATE, plain.WEIGHT_DECAY, plain.BETAS),
        deepspeed={"gradient_accumulation_steps": parts},
        seed=SEED,
    )


def assert_equal_to(plain: PlainTraining, engine: HybridEngine, world: World) -> None:
    trained = parameters(engine, world)
    expected = plain.parameters()
    assert trained.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(trained[name], values, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("parts", [1, 3])
def test_slow_rows_train_by_equation_3_of_moment_and_cross(world: World, parts: int) -> None:
    engine, plain = sgd_engine(world, parts), PlainTraining("sgd", 0.0)
    random = torch.Generator().manual_seed(8)
    rows = [make_rows(step, ROWS + step % 2) for step in range(5)]
    # No row of the first batch is slow, all of the second are, and any of the others.
    slow = [
        torch.rand(len(each), generator=random) < share for each, share in zip(rows, (0, 1, 0.5, 0.3, 0.5), strict=True)
    ]
    batches = [replace(each.batch(0, len(each)), slow=late) for each, late in zip(rows, slow, strict=True)]
    for result, each, late in zip(engine.steps(iter(batches)), rows, slow, strict=True):
        assert float(result.loss) == pytest.approx(plain.step(each, late), rel=1e-5)
    assert_equal_to(plain, engine, world)


def test_tables_and_network_have_learning_rates_of_their_own(world: World) -> None:
    engine, plain = sgd_engine(world), PlainTraining("sgd", 0.0)
    for step, rates in enumerate([(0.3, 0.0), (0.0, 0.02), (0.05, 0.004), (0.0, 0.0)]):
        engine.set_learning_rate(*rates)
        plain.rates = rates
        rows = make_rows(step, ROWS)
        (result,) = engine.steps(iter([rows.batch(0, len(rows))]))
        assert float(result.loss) == pytest.approx(plain.step(rows), rel=1e-5)
        assert_equal_to(plain, engine, world)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
@pytest.mark.parametrize(
    "deepspeed",
    [
        {},
        {"gradient_clipping": 0.1},
        {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 2},
        {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.1},
        {"zero_optimization": {"stage": 1}, "gradient_clipping": 0.1, "bf16": {"enabled": True}},
    ],
)
def test_a_loss_that_is_read_later_and_is_not_finite_has_changed_nothing(
    world: World, deepspeed: dict[str, Any], optimizer: str
) -> None:
    """The engine is that of the last good step, and goes on like one that never saw the bad batch."""
    good = list(batches_of(0, 1))[:6]
    bad = replace(good[2], dense=torch.full_like(good[2].dense, float("nan")))
    settings = {"deepspeed": deepspeed, "table_optimizer": TableOptimizer(optimizer, 0.1)}  # type: ignore[arg-type]
    engine = single_engine(world, **settings, read_later=True)
    undisturbed = single_engine(world, **settings)
    numbers = []
    with pytest.raises(NotFiniteLoss, match="the loss of step 4 is nan") as raised:
        for result in engine.steps(iter([*good[:3], bad, *good[3:]])):
            numbers.append(result.number)
    # The device had the next step as well when the host read the loss.
    assert numbers == [1, 2, 3, 4]
    assert raised.value.step == 4 and raised.value.batch is bad and raised.value.logits.isnan().any()
    assert len(list(undisturbed.steps(iter(good[:3])))) == engine.steps_done == 3
    assert_same_state(everything(engine, world), everything(undisturbed, world), deepspeed)
    later = [float(result.loss) for result in engine.steps(iter(good[3:]))]
    at_once = [float(result.loss) for result in undisturbed.steps(iter(good[3:]))]
    assert later == pytest.approx(at_once, rel=1e-6)
    assert_same_state(everything(engine, world), everything(undisturbed, world), deepspeed)


def assert_same_state(later: dict[str, Tensor], at_once: dict[str, Tensor], deepspeed: dict[str, Any]) -> None:
    # Without ZeRO, DeepSpeed sums the squares of the gradient in another order than PyTorch.
    exact = "zero_optimization" in deepspeed or "gradient_clipping" not in deepspeed
    assert later.keys() == at_once.keys()
    for name, values in at_once.items():
        torch.testing.assert_close(later[name], values, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-7)


@pytest.mark.parametrize("when", ["last", "saved", "state", "predict"])
def test_a_loss_is_read_before_anything_uses_the_model(world: World, when: str) -> None:
    batch = next(batches_of(0, 1))
    bad = replace(batch, dense=torch.full_like(batch.dense, float("inf")))
    engine = single_engine(world, read_later=True)
    requests = StepRequest(save=when == "saved")
    steps = engine.steps(iter([bad] if when == "last" else [bad, batch]), lambda step: requests)
    if when in ("last", "saved"):
        with pytest.raises(NotFiniteLoss, match="step 1"):
            seen = [next(steps)]
            assert when == "last" and seen
            next(steps)
    else:
        next(steps)
        with pytest.raises(NotFiniteLoss, match="step 1"):
            engine.state(copy=True) if when == "state" else list(engine.predict(iter([batch])))
    assert engine.steps_done == 0
