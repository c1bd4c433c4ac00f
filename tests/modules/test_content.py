"""Projection of pre-trained vectors against a definition for each id, and parts of a batch."""

from __future__ import annotations

import keyword

import pytest
import torch
from torch import Tensor, nn

from modules.content import BatchVectors, VectorProjection, VectorProjections


def make_vectors(seed: int, dtype: torch.dtype, ids: tuple[int, ...] = (30, 70)) -> BatchVectors:
    """Return 9 vectors, one of zeros, and places with ids that have none."""
    draw = torch.Generator().manual_seed(seed)
    vectors = torch.randn(9, 5, generator=draw) * torch.logspace(-3, 3, 9)[:, None]
    vectors[4] = 0
    places = {f"lookup{k}": torch.randint(-1, 9, (count,), generator=draw) for k, count in enumerate(ids)}
    return BatchVectors(vectors.to(dtype), places, {"lookup1": "entries"})


def plain(projection: VectorProjection, vector: Tensor | None) -> Tensor:
    """Project one vector by the definition."""
    if vector is None:
        return projection.missing
    x = vector.float()
    length = x.square().mean().sqrt()
    x = x / length if length > 0 else x
    return projection.linear.weight @ x + projection.linear.bias


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients_equal_those_of_each_id_alone(seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    projection, vectors = VectorProjection(5, 3), make_vectors(seed, dtype)
    with torch.no_grad():
        projection.missing.normal_()
    results = []
    for found in (
        projection(vectors),
        {
            name: torch.stack(
                [plain(projection, vectors.vectors[place] if place >= 0 else None) for place in places.tolist()]
            )
            for name, places in vectors.places.items()
        },
    ):
        total = sum((values * torch.linspace(-1, 1, values.numel()).view_as(values)).sum() for values in found.values())
        assert isinstance(total, Tensor)
        results.append((found, torch.autograd.grad(total, list(projection.parameters()))))
    (mine, my_gradients), (reference, gradients) = results
    assert mine.keys() == reference.keys()
    for name, values in reference.items():
        torch.testing.assert_close(mine[name], values, rtol=1e-5, atol=1e-6)
    for gradient, expected in zip(my_gradients, gradients, strict=True):
        assert expected.any()
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


def test_the_first_results_are_about_as_long_as_a_unit_vector_whatever_the_vectors_lengths() -> None:
    torch.manual_seed(1)
    projection = VectorProjection(256, 16)
    vectors = torch.randn(400, 256) * torch.logspace(-2, 2, 400)[:, None]
    lengths = projection(BatchVectors(vectors, {"a": torch.arange(400)}))["a"].norm(dim=1)
    assert 0.9 < lengths.mean() < 1.1 and lengths.min() > 0.3


def test_vectors_of_any_finite_length_give_what_their_direction_gives() -> None:
    torch.manual_seed(1)
    projection = VectorProjection(8, 4)
    direction = torch.randn(1, 8)
    lengths = torch.tensor([1.0, 1e14, 1e16, 1e19, 1e25, 1e37])[:, None]
    found = projection(BatchVectors(lengths * direction, {"a": torch.arange(6)}))["a"]
    assert found.abs().min() > 0
    torch.testing.assert_close(found, found[:1].expand(6, -1), rtol=1e-5, atol=1e-6)


def test_a_batch_without_ids_or_without_vectors_gives_gradients_of_zeros() -> None:
    projection = VectorProjection(5, 3)
    none = torch.zeros(0, dtype=torch.int64)
    sum(
        values.sum() for values in projection(BatchVectors(torch.zeros(0, 5), {"a": none, "b": none})).values()
    ).backward()  # type: ignore[union-attr]
    for parameter in projection.parameters():
        assert parameter.grad is not None and not parameter.grad.any()
    found = projection(BatchVectors(torch.zeros(0, 5), {"a": torch.tensor([-1, -1])}))["a"]
    assert torch.equal(found, torch.zeros(2, 3))


@pytest.mark.parametrize("seed", range(5))
def test_a_part_has_the_vectors_of_its_ids_and_no_others(seed: int) -> None:
    whole = make_vectors(seed, torch.float16)
    bounds = {"lookup0": (3, 8), "lookup1": (50, 50 + seed)}
    part = whole.part(bounds)
    used = set()
    for name, (start, stop) in bounds.items():
        for before, after in zip(whole.places[name][start:stop].tolist(), part.places[name].tolist(), strict=True):
            assert (before < 0) == (after < 0)
            if after >= 0:
                assert torch.equal(whole.vectors[before], part.vectors[after])
                used.add(after)
    assert used == set(range(len(part.vectors))) and part.vectors.dtype == torch.float16
    assert part.entries == whole.entries


def test_a_part_of_nothing_is_empty() -> None:
    part = make_vectors(0, torch.float32).part({"lookup0": (5, 5), "lookup1": (0, 0)})
    assert part.vectors.shape == (0, 5) and all(len(places) == 0 for places in part.places.values())


def test_a_table_may_have_the_name_of_a_method_of_a_network() -> None:
    names = [name for name in dir(nn.ModuleDict()) if name[0].isalpha() and not keyword.iskeyword(name)]
    assert {"items", "type", "values", "keys", "train"} <= set(names)
    projections = VectorProjections({name: (3, 2) for name in names})
    assert {name for name, _ in projections.items()} == set(names)
    assert projections.state_dict().keys() == {
        f"{name}.{part}" for name in names for part in ("linear.weight", "linear.bias", "missing")
    }
    assert sum(1 for _ in projections.parameters()) == 3 * len(names)
    # Loading, changes of the type and of the mode reach all of them.
    loaded = VectorProjections({name: (3, 2) for name in names}).to(torch.float64).eval()
    assert projections.training and not loaded.training
    loaded.load_state_dict(projections.state_dict())
    for name in names:
        assert torch.equal(loaded[name].linear.weight, projections[name].linear.weight.double())
        assert projections[name].training and not loaded[name].training
