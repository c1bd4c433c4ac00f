"""The dense network compiled by torch.compile, under DeepSpeed: the same training, in one program, and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modules import blocks
from modules.ranker import Ranker
from tests.distributed.engine_ranks import everything, losses_of
from tests.distributed.small_model import (
    BEHAVIOURS,
    LOOKUPS,
    MAX_LENGTH,
    N_DENSE,
    batches_of,
    make_rows,
    single_engine,
    tables,
)
from trainer.console.errors import UserError
from trainer.data.features.feature_map import HistorySequence
from trainer.data.loading.batch import RankingBatch
from trainer.engine import dense_engine
from trainer.engine.dense_engine import INDUCTOR, compile_network
from trainer.engine.hybrid_engine import HybridEngine
from trainer.runtime.distributed import World

SETTINGS: dict[str, Any] = {
    **{"zero_optimization": {"stage": 1}, "gradient_clipping": 0.1},
    **{"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}


@pytest.fixture
def world() -> Iterator[World]:
    with World.join("cpu") as alone:
        yield alone


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the attention take a whole batch as one block, which needs no lengths of the host."""
    monkeypatch.setattr(blocks, "reads_lengths", lambda device: False)


def make_engine(
    world: World, kind: str, settings: dict[str, Any], compiler: str | None, *, loops: bool
) -> HybridEngine:
    """Return the engine of a ranker; ``loops`` lets loops for CPUs compute parts of it, unless it is compiled."""
    lookups = [replace(lookup, pooling="sum") if lookup.name == "room" else lookup for lookup in LOOKUPS]
    dims = {table.name: table.dim for table in tables("auto")}
    history = HistorySequence("seen", ("seen",), ("item",), MAX_LENGTH)
    torch.manual_seed(1)
    ranker = Ranker(
        BEHAVIOURS,
        lookups,
        dims,
        N_DENSE,
        [history],
        kind="shared_bottom",
        expert_layers=((8,),),
        tower=(5,),
        attention_kind=kind,  # type: ignore[arg-type]
        attention=(8, 4),
        compiled_attention=loops,
        compiled_experts=loops,
    )
    return single_engine(world, lookups=lookups, ranker=ranker, deepspeed=settings, compiler=compiler)


def batches() -> list[RankingBatch]:
    """Return batches of several sizes; one has a single row, which is computed without the compiler."""
    whole = list(batches_of(0, 1))
    return [*whole[:4], make_rows(0, 1).batch(0, 1), *whole[4:]]


@pytest.mark.parametrize(
    ("compiler", "kind", "settings", "tolerance"),
    [
        ("aot_eager", "din", SETTINGS, 1e-6),
        pytest.param("aot_eager", "multi_head", {}, 1e-6, marks=pytest.mark.slow),
        pytest.param(INDUCTOR, "din", {}, 1e-5, marks=pytest.mark.slow),
        pytest.param(INDUCTOR, "multi_head", {}, 1e-5, marks=pytest.mark.slow),
        # Between two operations, compiled programs do not round to bfloat16; parameters then differ as much as those in
        # bfloat16 do from those in float32, so the losses alone are compared.
        pytest.param(INDUCTOR, "din", SETTINGS, 2e-2, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_network_is_one_program_for_all_batches_and_trains_alike(
    as_on_a_gpu: None,
    world: World,
    tmp_path: Path,
    compiler: str,
    kind: str,
    settings: dict[str, Any],
    tolerance: float,
) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    plain, compiled = (
        make_engine(world, kind, settings, chosen, loops=chosen is not None) for chosen in (None, compiler)
    )
    losses = {engine: losses_of(engine.steps(iter(batches()))) for engine in (plain, compiled)}
    assert losses[compiled] == pytest.approx(losses[plain], rel=tolerance)
    # The multi-head attention makes its index of columns in the first program.
    assert counters["stats"]["unique_graphs"] == {"din": 1, "multi_head": 2}[kind]
    assert not counters["graph_break"]
    if tolerance < 1e-3:
        assert_alike(everything(compiled, world), everything(plain, world), tolerance)

    # Either is resumed by the other, from files of the same names.
    assert compiled.dense_shapes == plain.dense_shapes
    compiled.save(tmp_path / "compiled")
    plain.load(tmp_path / "compiled")
    assert_alike(everything(plain, world), everything(compiled, world), 0)
    here, expected = (next(iter(engine.predict(iter(batches()[:1]))))[1] for engine in (compiled, plain))
    assert torch.equal(here, expected), "predictions are not compiled"
    assert losses_of(compiled.steps(iter(batches()[:2]))) == pytest.approx(
        losses_of(plain.steps(iter(batches()[:2]))), rel=tolerance
    )


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        difference = (found[name] - values).abs() - tolerance * values.abs()
        assert difference.max() <= tolerance, name


@pytest.mark.slow
def test_on_a_cpu_the_attention_stays_outside_of_the_programs(world: World) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    plain, compiled = (make_engine(world, "din", {}, chosen, loops=True) for chosen in (None, "aot_eager"))
    losses = [losses_of(engine.steps(iter(batches()))) for engine in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    # The history, the shared network and the towers; nothing else breaks a program.
    kinds = [reason.partition("\n")[0] for reason in counters["graph_break"]]
    assert kinds == ["Skip calling `torch.compiler.disable()`d function"] * len(kinds) and len(kinds) >= 2


@pytest.mark.parametrize(("device", "others"), [("cpu", {"gcc", "clang"}), ("cuda", set())])
def test_a_machine_without_a_compiler_is_refused_in_one_line(
    device: str, others: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU a C compiler does not help."""
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dense_engine.shutil, "which", lambda name: name if name in others else None)
    with pytest.raises(
        UserError, match=r"^train\.compile = true: no C\+\+ compiler is here .* set train\.compile=false$"
    ):
        compile_network(torch.nn.Linear(1, 1), INDUCTOR, torch.device(device))
