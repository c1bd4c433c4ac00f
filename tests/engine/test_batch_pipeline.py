"""Batches in flight: construction sends nothing, and the stages reach the exchanges in order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.small_model import batches_of
from trainer.engine.batch_pipeline import InFlightBatch, StepRequest, StepTotals
from trainer.runtime.distributed import World
from trainer.runtime.phase_timer import PhaseClock
from trainer.sparse.exchange import Gradients


@pytest.fixture
def world() -> Iterator[World]:
    with World.join("cpu") as alone:
        yield alone


class RecordingExchange:
    """Exchange that appends its name and stage to a list."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def start(self) -> None:
        self.calls.append(f"start {self.name}")

    def send(self) -> None:
        self.calls.append(f"send {self.name}")

    def rows(self, step: int | None = None) -> dict[str, Tensor]:
        self.calls.append(f"rows {self.name} {step}")
        return {self.name: torch.zeros(1, 2)}

    def update(self, gradients: Gradients, scale: float | Tensor) -> None:
        self.calls.append(f"update {self.name} {scale}")

    def drain(self) -> None:
        self.calls.append(f"drain {self.name}")


def test_construction_sends_nothing_and_stages_are_in_order(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    collectives: list[str] = []
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda *arguments, **options: collectives.append("all_reduce"))
    calls: list[str] = []
    batch = next(batches_of(0, 1))
    in_flight = InFlightBatch(
        batch,
        [RecordingExchange("a", calls), RecordingExchange("b", calls)],
        None,
        PhaseClock(world.device),
        world.control,
        exhausted=False,
        request=StepRequest(stop=True),
    )
    assert not calls and not collectives
    in_flight.start()
    assert collectives == ["all_reduce"] and calls == ["start a", "start b"]
    in_flight.send()
    assert in_flight.totals() == StepTotals(batch.rows, 0, 1, 0, 1)
    assert in_flight.rows(7).keys() == {"a", "b"}
    in_flight.update({}, 0.5)
    assert calls[2:] == ["send a", "send b", "rows a 7", "rows b 7", "update a 0.5", "update b 0.5"]
