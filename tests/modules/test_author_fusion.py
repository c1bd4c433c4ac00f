"""Two towers and their in-batch softmax against formulas, and the sign of the correction on a known popularity."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modules.author_fusion import (
    SCORE_BYTES,
    AuthorParts,
    HistoryPooling,
    TowerInputs,
    TwoTowers,
    in_batch_softmax,
    take_columns,
)
from tests.device_waits import Waits
from tests.modules.softmax_reference import softmax_loss
from tests.peak_memory import peak_bytes

TEMPERATURE = 0.3
ROWS = 17


def make_pairs(rows: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Vectors, corrections and ids of pairs, with several rows of a user and of an author, and pairs there twice."""
    random = torch.Generator().manual_seed(seed)
    user, author = (torch.randn(rows, 5, dtype=dtype, generator=random) for _ in range(2))
    log_q = torch.randn(rows, dtype=dtype, generator=random)
    user_id, author_id = (torch.randint(-3, 6, (rows,), generator=random) for _ in range(2))
    return user, author, log_q, user_id, author_id


@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradients_equal_the_formula(seed: int) -> None:
    user, author, log_q, user_id, author_id = make_pairs(ROWS, seed)
    loss, of_user, of_author = in_batch_softmax(user, author, log_q, user_id, author_id, slice(0, ROWS), TEMPERATURE)
    leaves = [part.clone().requires_grad_() for part in (user, author)]
    expected = torch.stack(
        softmax_loss(*leaves, log_q.tolist(), user_id.tolist(), author_id.tolist(), TEMPERATURE)  # type: ignore[arg-type]
    ).sum()
    torch.testing.assert_close(loss, expected.detach())
    for found, gradient in zip((of_user, of_author), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("bounds", [(0, 9, ROWS), (0, 0, 5, 16, ROWS, ROWS)])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_parts_of_a_batch_add_up_to_it(chunk: int, bounds: tuple[int, ...], seed: int) -> None:
    pairs = make_pairs(ROWS, seed)
    whole = in_batch_softmax(*pairs, slice(0, ROWS), TEMPERATURE)
    parts = [
        in_batch_softmax(*pairs, slice(start, stop), TEMPERATURE, budget_bytes=chunk * SCORE_BYTES * ROWS)
        for start, stop in pairwise(bounds)
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), whole[0])
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), whole[1])
    torch.testing.assert_close(sum(part[2] for part in parts), whole[2])


def test_positives_of_a_user_are_no_negatives() -> None:
    vectors = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(4)

    def loss_of_first(user_id: list[int], author_id: list[int]) -> float:
        ids = torch.tensor(user_id), torch.tensor(author_id)
        return float(in_batch_softmax(vectors, vectors.flip(0), none, *ids, slice(0, 1), 1.0)[0])

    others = loss_of_first([1, 2, 3, 4], [11, 12, 13, 14])
    same_author = loss_of_first([1, 2, 3, 4], [11, 11, 11, 14])
    assert same_author < others
    assert loss_of_first([1, 1, 1, 4], [11, 12, 13, 14]) == same_author, "rows of the same user"
    assert loss_of_first([1, 1, 3, 4], [11, 12, 12, 14]) == same_author, "another user's row with a positive author"
    assert loss_of_first([1, 1, 1, 1], [11, 12, 13, 14]) == 0, "nothing to compare with"


def test_the_host_would_wait_for_no_gpu() -> None:
    pairs = make_pairs(ROWS, 2)
    with Waits() as waits:
        in_batch_softmax(*pairs, slice(2, 9), TEMPERATURE, budget_bytes=3 * ROWS * SCORE_BYTES)
    assert waits.calls == []


@pytest.mark.parametrize("places", [(), (3,), (0, 1, 2), (4, 1, 2, 0), (2, 1, 0), (1, 3, 4)])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3), (0, 5)])
def test_columns_and_their_gradients_are_those_of_an_index(places: tuple[int, ...], shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3), requires_grad=True)
    with Waits() as waits:
        found = take_columns(values, places)
    expected = values[:, list(places)]
    assert torch.equal(found, expected) and not waits.calls
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    gradients = [torch.autograd.grad((part * weights).sum(), values)[0] for part in (found, expected)]
    assert torch.equal(*gradients)


def test_no_rows_give_no_loss() -> None:
    empty, ids = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    loss, of_user, of_author = in_batch_softmax(empty, empty, torch.zeros(0), ids, ids, slice(0, 0), TEMPERATURE)
    assert not loss and of_user.shape == of_author.shape == (0, 4)
    pairs = make_pairs(ROWS, 1)
    loss, of_user, of_author = in_batch_softmax(*pairs, slice(5, 5), TEMPERATURE)
    assert not loss and not len(of_user) and not of_author.any(), "a rank without rows"


def test_chunks_stay_within_their_budget() -> None:
    pairs = make_pairs(1024, 2, torch.float32)
    budget = 64 * SCORE_BYTES * 1024
    alone = peak_bytes(lambda: in_batch_softmax(*pairs, slice(0, 1), TEMPERATURE, budget_bytes=1))
    assert peak_bytes(lambda: in_batch_softmax(*pairs, slice(0, 1024), TEMPERATURE, budget_bytes=budget)) < (
        budget + alone + 4 * 1024 * 5 * 4
    )


@pytest.mark.parametrize(("sign", "slope"), [(1, 1), (0, 0), (-1, -1)])
def test_with_the_correction_scores_are_the_popularity_and_without_it_they_lose_it(sign: int, slope: int) -> None:
    """Popularity alone explains the pairs, so ``log P(a | u)`` is ``log Q(a)``; the corrected score is a constant."""
    random = np.random.default_rng(3)
    popularity = np.arange(1, 41) ** -1.0
    popularity /= popularity.sum()
    log_q = torch.from_numpy(np.log(popularity)).float()
    score = torch.zeros(len(popularity), 1)
    squares = torch.zeros_like(score)
    user_id, one = torch.arange(512), torch.ones(512, 1)
    for _ in range(300):
        author_id = torch.from_numpy(random.choice(len(popularity), 512, p=popularity))
        _, _, gradient = in_batch_softmax(
            one, score[author_id], sign * log_q[author_id], user_id, author_id, slice(0, 512), 1.0
        )
        summed = torch.zeros_like(score).index_add_(0, author_id, gradient) / 512
        squares += summed**2
        score -= 0.3 * summed / (squares.sqrt() + 1e-8)
    found = np.polyfit(log_q.numpy(), score[:, 0].numpy(), 1)[0]
    assert abs(found - slope) < 0.2


INPUTS = TowerInputs(
    user_lookups=("user",),
    user_ids={"side": (0, 2)},
    user_dense=(1,),
    histories=(("live_author", "live_context"), ("short_author", "short_context")),
    author_id="author",
    author_ids={"side": (1,)},
    author_dense=(0, 2),
    content=3,
    vector_dim=2,
)
DIMS = {"user": 4, "side": 3, "author": 5}
ENTRIES = {"live_author": 5, "live_context": 6, "short_author": 5, "short_context": 6}
COUNTS = {"live_author": [2, 0, 1, 3], "short_author": [0, 0, 2, 1]}


def make_towers(parts: AuthorParts = "fused", pooling: HistoryPooling = "mean") -> TwoTowers:
    torch.manual_seed(4)
    return TwoTowers(
        INPUTS,
        DIMS,
        ENTRIES,
        {"user": 1, "side": 3, "author": 1},
        dim=6,
        user_widths=(8,),
        author_widths=(7,),
        gate_widths=(),
        parts=parts,
        pooling=pooling,
    )


def make_inputs(rows: int) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    random = torch.Generator().manual_seed(1)
    lengths = {name: torch.tensor(count[:rows], dtype=torch.int64) for name, count in COUNTS.items()}
    entries = {name: int(count.sum()) for name, count in lengths.items()}
    shapes = {"user": (rows, 4), "side": (3 * rows, 3), "author": (rows, 5)}
    shapes |= {name: (entries[name], 5) for name in COUNTS}
    shapes |= {name.replace("author", "context"): (2 * entries[name], 3) for name in COUNTS}
    embedded = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    dense = torch.randn(rows, 3 + 4 + 2, generator=random)
    # Columns 7 and 8: an author with a segment, and an author that the model knows.
    dense[:, 7:] = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])[:rows]
    return embedded, lengths, dense


def mlp(network: nn.Module | None, x: Tensor) -> Tensor:
    """Return linear layers with a ReLU between them, and none before the first or after the last."""
    assert network is not None
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    for number, layer in enumerate(linear):
        x = layer.weight @ (x if number == 0 else x.clamp(min=0)) + layer.bias
    return x


@pytest.mark.parametrize("pooling", ["mean", "latest"])
def test_the_towers_equal_their_formulas(pooling: HistoryPooling) -> None:
    towers, (embedded, lengths, dense) = make_towers(pooling=pooling), make_inputs(4)
    found = towers(embedded, lengths, dense)
    assert found.shape == (4, 13) and found.dtype == torch.float32
    for row in range(4):
        side = embedded["side"].view(4, 3, 3)[row]
        history = []
        for name, count in COUNTS.items():
            entries = slice(sum(count[:row]), sum(count[: row + 1]))
            for values in (embedded[name], embedded[name.replace("author", "context")].view(-1, 6)):
                own = values[entries]
                pooled = own.mean(0) if pooling == "mean" else own[-1:].sum(0)
                history.append(pooled if count[row] else torch.zeros_like(values[:1]).view(-1))
        user = mlp(towers.user, torch.cat([embedded["user"][row], side[0], side[2], *history, dense[row, [1]]]))
        author_id = embedded["author"][row]
        features = mlp(towers.author.features, torch.cat([author_id, side[1], dense[row, [0, 2]]]))
        content = mlp(towers.author.content, dense[row, 3:8])
        share = float(torch.sigmoid(mlp(towers.author.gate, author_id)))
        share = [share, 0.0, 1.0, 1.0][row]
        fused = share * content + (1 - share) * features
        expected = torch.cat([user / user.norm(), fused / fused.norm(), torch.tensor([share])])
        torch.testing.assert_close(found[row], expected)
    for parameter in towers.parameters():
        (gradient,) = torch.autograd.grad(towers(embedded, lengths, dense).square()[:, ::2].sum(), parameter)
        assert gradient.any()


@pytest.mark.parametrize(("parts", "share"), [("features", 0.0), ("content", 1.0)])
def test_one_part_alone_reads_nothing_of_the_other(parts: AuthorParts, share: float) -> None:
    towers, (embedded, lengths, dense) = make_towers(parts), make_inputs(4)
    before = towers(embedded, lengths, dense)
    assert (before[:, -1] == share).all()
    if parts == "features":
        dense[:, 3:] = torch.randn(4, 6)
    else:
        embedded["author"] = torch.randn(4, 5)
        dense[:, [0, 2]] = 3.0
    assert torch.equal(towers(embedded, lengths, dense)[:, 6:12], before[:, 6:12])


def test_the_unknown_id_changes_no_vector_of_an_author_that_was_not_trained_on() -> None:
    towers, (embedded, lengths, dense) = make_towers(), make_inputs(4)
    before = towers(embedded, lengths, dense)
    embedded["author"] = embedded["author"] + 1
    after = towers(embedded, lengths, dense)
    assert torch.equal(after[2:], before[2:]) and not torch.equal(after[0], before[0])


def test_an_empty_batch_gives_gradients_of_zeros() -> None:
    towers = make_towers()
    found = towers(*make_inputs(0))
    assert found.shape == (0, 13)
    found.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in towers.parameters())
