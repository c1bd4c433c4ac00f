"""Foresight's predictor beside a slow loop in float64; padding, authors without codes, and the sampled softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modules.foresight import (
    CodeSample,
    CodeTable,
    ForesightPredictor,
    ForesightSize,
    Softmax,
    TableStart,
    length_bounds,
    sampled_softmax,
)

CODES, RUNS, DIM = 11, 7, 8


def predictor(
    seed: int = 0, table: TableStart = "learnt", copy: bool = True, **changes: int | str
) -> ForesightPredictor:
    """Return a predictor in which nothing is zero by its initialisation."""
    torch.manual_seed(seed)
    size = ForesightSize(CODES, runs=RUNS, dim=DIM, heads=2, feed_forward=12, table=table, copy=copy, **changes)  # type: ignore[arg-type]
    model = ForesightPredictor(size, 3 + 5 * torch.randn(CODES, 6)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def contexts(counts: list[int], seed: int = 0, runs: int = RUNS) -> tuple[Tensor, Tensor]:
    """Return codes and lengths ``[rows, runs]`` with ``counts`` runs in each row, padded at the front."""
    generator = torch.Generator().manual_seed(seed)
    code = torch.randint(0, CODES, (len(counts), runs), generator=generator, dtype=torch.int32)
    length = torch.randint(1, 40, (len(counts), runs), generator=generator, dtype=torch.int32)
    padded = torch.arange(runs) < runs - torch.tensor(counts, dtype=torch.int64)[:, None]
    return code.masked_fill(padded, -1), length.masked_fill(padded, 0)


def reference(model: ForesightPredictor, code: list[int], length: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the history of the runs that are there, the future and the probabilities of one author, run by run."""
    value = {name: tensor.double() for name, tensor in {**model.state_dict()}.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return value[f"{name}.weight"] @ x + value[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        spread = ((x - x.mean()) ** 2).mean()
        return (x - x.mean()) / torch.sqrt(spread + 1e-5) * value[f"{name}.weight"] + value[f"{name}.bias"]

    def layer(x: Tensor, memory: list[Tensor], name: str) -> Tensor:
        size = DIM // 2
        query = linear(norm(x, f"{name}.attention_norm"), f"{name}.query")
        pairs = [value[f"{name}.key_value.weight"] @ entry for entry in memory]
        mixed = torch.zeros(DIM, dtype=torch.float64)
        for head in range(2 if memory else 0):
            part = slice(head * size, (head + 1) * size)
            scores = torch.stack([query[part] @ pair[:DIM][part] / math.sqrt(size) for pair in pairs])
            weights = scores.exp() / scores.exp().sum()
            for weight, pair in zip(weights, pairs, strict=True):
                mixed[part] += weight * pair[DIM:][part]
        if memory:
            x = x + linear(mixed, f"{name}.out")
        inner = linear(norm(x, f"{name}.feed_forward_norm"), f"{name}.feed_forward.0")
        gelu = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        return x + linear(gelu, f"{name}.feed_forward.3")

    table = [value["table.project.weight"] @ vector for vector in value["table.vectors"]]
    states = []
    for place, (of_code, of_length) in enumerate(zip(reversed(code), reversed(length), strict=True)):
        bucket = sum(bound <= of_length for bound in length_bounds())
        states.append(table[of_code] + value["lengths.weight"][bucket] + value["places.weight"][place])
    states.reverse()
    older = max(len(states) - (model.size.encoded_runs or RUNS), 0)
    for number in range(len(model.encoder)):
        name = f"encoder.{number}"
        normed = [norm(state, f"{name}.attention_norm") for state in states[older:]]
        states[older:] = [layer(state, normed, name) for state in states[older:]]
    states = [norm(state, "encoder_norm") for state in states]
    future = value["first"]
    for number in range(len(model.decoder)):
        future = layer(future, states, f"decoder.{number}")
    future = norm(future, "decoder_norm")
    logits = torch.stack([vector @ future for vector in table]) + value["table.bias"]
    if model.size.softmax == "distance":
        logits = torch.stack([-((vector - future) ** 2).sum() / 2 for vector in table]) + value["table.bias"]
    p = logits.exp() / logits.exp().sum()
    if model.size.copy and states:
        gate = torch.sigmoid(linear(future, "gate"))[0]
        scores = torch.stack([state @ value["point.weight"] @ future / math.sqrt(DIM) for state in states])
        weights = scores.exp() / scores.exp().sum()
        p = (1 - gate) * p
        for weight, of_code in zip(weights, code, strict=True):
            p[of_code] += gate * weight
    return torch.stack(states) if states else torch.zeros(0, DIM).double(), future, p


@settings(max_examples=40)
@given(
    counts=st.lists(st.integers(0, RUNS), max_size=4),
    seed=st.integers(0, 1000),
    layers=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    table=st.sampled_from(["frozen", "learnt", "random"]),
    copy=st.booleans(),
    softmax=st.sampled_from(["product", "distance"]),
    encoded_runs=st.integers(0, RUNS + 1),
)
def test_outputs_are_those_of_a_slow_loop(
    counts: list[int],
    seed: int,
    layers: tuple[int, int],
    table: TableStart,
    copy: bool,
    softmax: Softmax,
    encoded_runs: int,
) -> None:
    changes = {"softmax": softmax, "encoded_runs": encoded_runs}
    model = predictor(seed, table, copy, encoder_layers=layers[0], decoder_layers=layers[1], **changes)
    code, length = contexts(counts, seed)
    with torch.no_grad():
        found = model(code, length)
        log_p = model.log_p(code, found)
        again = model(code, length, model.table())
        target = torch.arange(len(counts)) % CODES
        losses = model.losses(code, found, target)
    assert found.history.shape == (len(counts), RUNS, DIM) and log_p.shape == (len(counts), CODES)
    torch.testing.assert_close(losses, -log_p.gather(1, target[:, None])[:, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again, found, atol=1e-5, rtol=1e-4)
    for row, count in enumerate(counts):
        runs = slice(RUNS - count, RUNS)
        history, future, expected = reference(model, code[row, runs].tolist(), length[row, runs].tolist())
        torch.testing.assert_close(found.history[row, runs].double(), history, atol=2e-5, rtol=1e-4)
        assert not found.history[row, : RUNS - count].any()
        torch.testing.assert_close(found.future[row].double(), future, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(log_p[row].double().exp(), expected, atol=1e-5, rtol=2e-4)


def test_what_stands_at_a_padded_place_changes_no_bit() -> None:
    model = predictor()
    code, length = contexts([0, 1, 4, 7])
    found = model(code, length)
    rubbish = model(torch.where(code < 0, -5, code), torch.where(code < 0, 77, length))
    assert torch.equal(found.history, rubbish.history) and torch.equal(found.future, rubbish.future)
    # Nor does code 0, which a padded place looks up.
    with torch.no_grad():
        model.table.vectors[0] += 100
    without = ~(code == 0).any(1)
    assert without[0] and without[1:].any()
    assert torch.equal(model(code, length).future[without], found.future[without])


def test_more_padding_changes_nothing_but_rounding() -> None:
    model = predictor()
    code, length = contexts([0, 1, 3])
    found, short = model(code, length), model(code[:, -3:], length[:, -3:])
    torch.testing.assert_close(short.future, found.future)
    torch.testing.assert_close(short.history, found.history[:, -3:])


def test_no_gradient_comes_from_or_goes_to_padded_places() -> None:
    model = predictor()
    code, length = contexts([0, 2])
    found = model(code, length)
    (found.history.sum() + found.future.sum()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients.values())
    places = gradients["places.weight"]
    assert places is not None and places[:2].any() and not places[2:].any()


def test_an_empty_batch_has_a_gradient_of_zero() -> None:
    model = predictor()
    code, length = contexts([])
    sample = CodeSample.draw(torch.full((CODES,), 1 / CODES), 4, torch.Generator().manual_seed(0))
    for given_sample in (None, sample):
        found = model(code, length)
        losses = model.losses(code, found, torch.zeros(0, dtype=torch.int64), given_sample)
        assert losses.shape == (0,)
        losses.sum().backward()
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_a_frozen_table_is_no_parameter_and_a_learnt_one_moves() -> None:
    frozen, learnt = predictor(table="frozen"), predictor(table="learnt")
    assert "table.vectors" not in dict(frozen.named_parameters()) and "table.vectors" in frozen.state_dict()
    assert "table.vectors" in dict(learnt.named_parameters())


@pytest.mark.parametrize("start", ["frozen", "learnt"])
def test_the_table_starts_from_the_centroids_at_one_scale(start: TableStart) -> None:
    centroids = torch.randn(50, 6) * torch.arange(1, 7) + 9
    table, larger = CodeTable(centroids, DIM, start), CodeTable(1000 * centroids, DIM, start)
    torch.testing.assert_close(table.vectors, larger.vectors)
    assert float(table.vectors.mean().detach().abs()) < 1e-6 and float(table.vectors.std().detach()) == pytest.approx(
        1, abs=0.01
    )
    relative = (table.vectors - table.vectors[0]) / (centroids - centroids[0])
    torch.testing.assert_close(relative[1:], relative[1, 0].expand(49, 6))
    assert float(table().detach().std()) == pytest.approx(CodeTable.SCALE, rel=0.3)


def test_the_bias_starts_as_the_logarithm_of_the_frequency() -> None:
    counts = torch.tensor([0, 1, 3, 0, 7])
    table = CodeTable(torch.randn(5, 6), DIM, "frozen", counts)
    p = torch.softmax(table.bias.detach(), 0)
    torch.testing.assert_close(p, (counts + 1) / 16)
    assert not CodeTable(torch.randn(5, 6), DIM, "frozen").bias.any()


def test_a_random_table_does_not_know_the_centroids() -> None:
    made = []
    for seed in (0, 1):
        torch.manual_seed(4)
        centroids = torch.full((50, 6), float(seed)) + torch.arange(50)[:, None]
        made.append(CodeTable(centroids, DIM, "random"))
    assert torch.equal(made[0].vectors, made[1].vectors)


def test_lengths_have_four_buckets_for_each_doubling() -> None:
    bounds = length_bounds()
    assert bounds[:12] == [2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20] and bounds[-1] == 1 << 17
    assert all(1.1 < later / earlier < 1.34 for earlier, later in pairwise(bounds[2:]))


@pytest.mark.parametrize("gate", [0.0, 100.0, -200.0])
def test_what_is_not_among_the_runs_has_a_gradient(gate: float) -> None:
    """A code that no run has, an author without runs, and a gate that is shut or open: each gradient is finite."""
    model = predictor()
    with torch.no_grad():
        model.gate.bias += gate
    code, length = contexts([0, 2, 5])
    absent = [next(number for number in range(CODES) if number not in row) for row in code.tolist()]
    model.losses(code, model(code, length), torch.tensor(absent)).sum().backward()
    if gate == 0:
        assert all(p.grad is not None and p.grad.any() for p in model.gate.parameters())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def softmax_case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits ``[rows, codes]``, targets, and the probabilities of the draws, none of them equal."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, CODES, generator=generator)
    probability = torch.rand(CODES, generator=generator) + 0.05
    return logits, torch.randint(0, CODES, (3,), generator=generator), probability / probability.sum()


def loss_of(logits: Tensor, target: Tensor, sample: CodeSample) -> Tensor:
    own = logits.gather(1, target[:, None])[:, 0]
    return sampled_softmax(own, logits[:, sample.code], target, sample)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_the_sum_of_a_sampled_softmax_is_unbiased(seed: int) -> None:
    logits, target, probability = softmax_case(seed)
    # With one draw all outcomes can be listed: the expectation is exact.
    expected = torch.zeros(3, dtype=torch.float64)
    for code in range(CODES):
        sample = CodeSample(torch.tensor([code]), probability[code : code + 1].log())
        loss = loss_of(logits, target, sample).double()
        own = logits.gather(1, target[:, None])[:, 0].double()
        expected += probability[code].double() * (loss + own).exp()
    torch.testing.assert_close(expected, logits.double().exp().sum(1), rtol=1e-5, atol=1e-5)


def test_each_code_drawn_as_often_as_expected_gives_the_full_softmax() -> None:
    logits, target, _ = softmax_case(1)
    code = torch.arange(CODES).repeat_interleave(torch.arange(1, CODES + 1))
    sample = CodeSample(code, (code + 1).float().log())
    torch.testing.assert_close(
        loss_of(logits, target, sample), nn.functional.cross_entropy(logits, target, reduction="none")
    )


@pytest.mark.parametrize("softmax", ["product", "distance"])
def test_the_gradient_of_a_sampled_softmax_tends_to_the_full_one(softmax: Softmax) -> None:
    model = predictor(softmax=softmax)
    code, length = contexts([1, 3, 5, 7])
    found = model(code, length)
    target = torch.tensor([3, 0, 10, 3])
    probability = softmax_case(2)[2]

    def gradient(loss: Callable[[], Tensor]) -> Tensor:
        parts = torch.autograd.grad(loss().sum(), list(model.table.parameters()), retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    full = gradient(lambda: model.losses(code, found, target))
    errors = []
    for size in (16, 256, 4096, 65_536):
        draws = [CodeSample.draw(probability, size, torch.Generator().manual_seed(seed)) for seed in range(8)]
        found_gradients = [gradient(lambda sample=draw: model.losses(code, found, target, sample)) for draw in draws]  # type: ignore[misc]
        errors.append(sum(float((one - full).norm()) for one in found_gradients) / len(draws) / float(full.norm()))
    # The error of an estimate from S draws falls with the root of S: by 4 for each of these steps.
    assert all(2.5 < earlier / later < 8 for earlier, later in pairwise(errors[1:])), errors
    assert errors[-1] < 0.03
