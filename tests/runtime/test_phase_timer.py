"""Split of time into phases without gaps or overlaps."""

import time

import pytest
import torch

from trainer.runtime.phase_timer import PHASES, PhaseClock


def test_a_phase_inside_another_interrupts_it() -> None:
    clock = PhaseClock(torch.device("cpu"))
    with clock.phase("tables"):
        time.sleep(0.02)
        with clock.phase("communication"):
            time.sleep(0.05)
        time.sleep(0.01)
    time.sleep(0.03)
    with clock.phase("dense"):
        time.sleep(0.01)
    seconds = clock.lap().total()
    assert seconds.keys() == set(PHASES)
    # A sleep may take longer than its argument, but never less.
    assert seconds["tables"] >= 0.03
    assert seconds["communication"] >= 0.05
    assert seconds["dense"] >= 0.01
    assert seconds["data"] == 0


def test_a_lap_inside_a_phase_splits_it() -> None:
    clock = PhaseClock(torch.device("cpu"))
    started = time.perf_counter()
    with clock.phase("dense"):
        time.sleep(0.01)
        first = clock.lap().total()
        time.sleep(0.02)
    second = clock.lap().total()
    wall = time.perf_counter() - started
    assert first["dense"] >= 0.01
    assert second["dense"] >= 0.02
    assert first["dense"] + second["dense"] <= wall


def test_an_exception_ends_the_phase() -> None:
    clock = PhaseClock(torch.device("cpu"))
    with pytest.raises(RuntimeError), clock.phase("data"):
        raise RuntimeError
    clock.lap()
    time.sleep(0.01)
    assert clock.lap().total() == dict.fromkeys(PHASES, 0.0)
