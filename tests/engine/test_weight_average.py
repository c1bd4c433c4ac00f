"""Mean of a network's parameters over time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trainer.engine.weight_average import WeightAverage

ELAPSED = (0.1, 0.5, 0.0, 2.0, 0.01, 30.0, 0.3, 0.2)


def added(module: nn.Linear, average: WeightAverage, times: tuple[float, ...], seed: int) -> list[np.ndarray]:
    """Change a module and add it to its mean several times, and return its weights."""
    draws, weights = torch.Generator().manual_seed(seed), []
    for elapsed in times:
        with torch.no_grad():
            module.weight.copy_(torch.randn(2, 3, generator=draws))
        average.add(elapsed)
        weights.append(module.weight.detach().double().numpy().copy())
    return weights


@pytest.mark.parametrize("steps", range(1, len(ELAPSED) + 1))
def test_the_mean_is_that_of_its_definition(steps: int) -> None:
    module = nn.Linear(3, 2)
    average = WeightAverage(module)
    times = ELAPSED[:steps]
    weights = added(module, average, times, seed=1)
    later = np.append(np.cumsum(times[::-1])[::-1][1:], 0)
    shares = -np.expm1(-np.array(times)) * np.exp(-later)
    expected = np.tensordot(shares / shares.sum(), np.stack(weights), 1)
    np.testing.assert_allclose(average.values["weight"].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert float(average.weight) == pytest.approx(shares.sum())


def test_a_mean_that_is_loaded_goes_on_bit_for_bit() -> None:
    module = nn.Linear(3, 2)
    average = WeightAverage(module)
    added(module, average, ELAPSED[:4], seed=1)
    again = WeightAverage(nn.Linear(3, 2))
    again.load({name: value.clone() for name, value in average.values.items()}, average.weight.clone())
    again._module = module
    for elapsed in ELAPSED:
        added(module, average, (elapsed,), seed=2)
        again.add(elapsed)
    assert all(torch.equal(value, again.values[name]) for name, value in average.values.items())


def test_without_a_step_the_mean_is_the_parameters_also_after_they_were_set() -> None:
    module = nn.Linear(3, 2).to(torch.bfloat16)
    average = WeightAverage(module)
    average.add(0.0)
    assert torch.equal(average.values["weight"], module.weight.float())
    with torch.no_grad():
        module.weight.fill_(3)
    average.restart()
    assert average.values["weight"].dtype == torch.float32 and bool((average.values["weight"] == 3).all())
    average.add(1.0)
    with torch.no_grad():
        module.weight.fill_(5)
    average.restart()
    assert bool((average.values["weight"] == 3).all())
