"""Second stage of LCU: inputs that must change an output, and inputs that must not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.staytime.comment_losses import listmle, touched_bce
from modules.staytime.networks import (
    BackboneShape,
    CommentUnderstanding,
    ReleasedCommentUnderstanding,
    SeparateOpening,
    StaytimeInputs,
    StaytimeNetwork,
)

BATCH, FIELDS, ROWS, DENSE, DIM, ITEM_WIDTH, COMMENT_WIDTH, COMMENTS, IDS = 7, 3, 50, 2, 8, 12, 10, 6, 30
SHAPE = BackboneShape("dcn", (16, 8), depth=2, heads=2, dropout=0.0)


def batch(seed: int = 1, comments: int = COMMENTS) -> StaytimeInputs:
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(BATCH, comments, generator=generator) < 0.7
    present[0] = False
    present[1] = True
    return StaytimeInputs(
        fields=torch.randint(0, ROWS, (BATCH, FIELDS), generator=generator),
        dense=torch.randn(BATCH, DENSE, generator=generator),
        item_text=torch.randn(BATCH, ITEM_WIDTH, generator=generator),
        comment=torch.randint(0, IDS, (BATCH, comments), generator=generator),
        comment_text=torch.randn(BATCH, comments, COMMENT_WIDTH, generator=generator),
        present=present,
    )


def understanding(**changes: int) -> CommentUnderstanding:
    sizes = {"item_width": ITEM_WIDTH, "comment_width": COMMENT_WIDTH, "comment_rows": IDS, "heads": 2, "hidden": 8}
    return CommentUnderstanding(DIM, **{**sizes, **changes})


def network(lcu: nn.Module | None, seed: int = 1, outputs: int = 2) -> StaytimeNetwork:
    torch.manual_seed(seed)
    made = StaytimeNetwork(ROWS, FIELDS, DENSE, DIM, SHAPE, torch.zeros(outputs), lcu)  # type: ignore[arg-type]
    nn.init.normal_(made.logits.weight)
    return made


@pytest.fixture
def lcu() -> StaytimeNetwork:
    torch.manual_seed(3)
    return network(understanding())


def test_the_first_prediction_is_the_given_one_for_every_row() -> None:
    start = torch.tensor([0.3, -2.0])
    made = StaytimeNetwork(ROWS, FIELDS, DENSE, DIM, SHAPE, start, understanding())
    assert torch.equal(made(batch()).logits, start.expand(BATCH, -1))


def test_the_base_alone_sees_nothing_of_the_comments() -> None:
    made, inputs = network(None), batch()
    said = made(inputs)
    assert said.popular is None and said.touched is None
    other = replace(batch(2), fields=inputs.fields, dense=inputs.dense)
    assert torch.equal(made(other).logits, said.logits)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_comments_does_not_matter(lcu: StaytimeNetwork, seed: int) -> None:
    inputs = batch(seed)
    order = torch.randperm(COMMENTS, generator=torch.Generator().manual_seed(seed))
    shuffled = replace(
        inputs,
        comment=inputs.comment[:, order],
        comment_text=inputs.comment_text[:, order],
        present=inputs.present[:, order],
    )
    said, again = lcu(inputs), lcu(shuffled)
    torch.testing.assert_close(again.logits, said.logits)
    torch.testing.assert_close(again.popular, said.popular[:, order])
    torch.testing.assert_close(again.touched, said.touched[:, order])


def test_padding_changes_nothing(lcu: StaytimeNetwork) -> None:
    inputs, junk = batch(), batch(9)
    absent = ~inputs.present
    other = replace(
        inputs,
        comment=torch.where(absent, junk.comment, inputs.comment),
        comment_text=torch.where(absent[..., None], junk.comment_text, inputs.comment_text),
    )
    said, again = lcu(inputs), lcu(other)
    torch.testing.assert_close(again.logits, said.logits)
    torch.testing.assert_close(again.touched[inputs.present], said.touched[inputs.present])
    wider = StaytimeInputs(
        inputs.fields,
        inputs.dense,
        inputs.item_text,
        functional.pad(inputs.comment, (0, 4)),
        functional.pad(inputs.comment_text, (0, 0, 0, 4)),
        functional.pad(inputs.present, (0, 4)),
    )
    torch.testing.assert_close(lcu(wider).logits, said.logits)


def test_rows_do_not_see_each_other(lcu: StaytimeNetwork) -> None:
    inputs = batch()
    alone = StaytimeInputs(*(getattr(inputs, name)[3:4] for name in StaytimeInputs.__dataclass_fields__))
    torch.testing.assert_close(lcu(alone).logits[0], lcu(inputs).logits[3])


def losses() -> dict[str, Callable[[StaytimeNetwork, StaytimeInputs], Tensor]]:
    popularity = torch.arange(COMMENTS).expand(BATCH, -1)
    touched = popularity == 2
    return {
        "logits": lambda made, inputs: made(inputs).logits.square().sum(),
        "popular": lambda made, inputs: listmle(made(inputs).popular, popularity, inputs.present).sum(),
        "touched": lambda made, inputs: touched_bce(made(inputs).touched, touched, inputs.present).sum(),
    }


@pytest.mark.parametrize(
    ("loss", "without"),
    [
        ("logits", ("lcu.popular", "lcu.touched")),
        ("popular", ("lcu.touched", "backbone", "logits")),
        ("touched", ("lcu.popular", "backbone", "logits")),
    ],
)
def test_each_loss_trains_its_head_and_all_that_is_shared(
    lcu: StaytimeNetwork, loss: str, without: tuple[str, ...]
) -> None:
    losses()[loss](lcu, batch()).backward()
    for name, parameter in lcu.named_parameters():
        learnt = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        # The last bias shifts all scores of a list alike, which ListMLE does not see.
        if name != "lcu.popular.3.bias":
            assert learnt != name.startswith(without), name


@pytest.mark.parametrize("missing", [{"item_width": 0}, {"comment_width": 0}, {"comment_rows": 0}])
def test_parts_can_be_left_out(missing: dict[str, int]) -> None:
    said = network(understanding(**missing))(batch())
    assert said.logits.shape == (BATCH, 2) and said.touched.shape == (BATCH, COMMENTS)


def test_comments_without_text_and_id_are_refused() -> None:
    with pytest.raises(ValueError, match="comments need an embedding"):
        understanding(comment_width=0, comment_rows=0)
    with pytest.raises(ValueError, match="3 heads do not divide a dimension of 8"):
        understanding(heads=3)


def released() -> ReleasedCommentUnderstanding:
    return ReleasedCommentUnderstanding(
        FIELDS + 1, DIM, item_width=ITEM_WIDTH, comment_width=COMMENT_WIDTH, comments=COMMENTS, heads=2, hidden=8
    )


def test_the_released_network_gives_places_a_meaning_and_uses_no_comment_ids() -> None:
    made, inputs = network(released()), batch()
    said = made(inputs)
    assert torch.equal(made(replace(inputs, comment=inputs.comment + 1)).logits, said.logits)
    turned = replace(inputs, comment_text=inputs.comment_text.flip(1))
    assert not torch.allclose(made(turned).logits, said.logits)
    assert said.touched.shape == (BATCH, COMMENTS)


def test_a_separate_opening_never_learns_from_the_comments() -> None:
    made, inputs = SeparateOpening(network(released(), 1, 1), network(released(), 2, 1)), batch()
    said = made(inputs)
    assert said.logits.shape == (BATCH, 2)
    (said.touched.sum() + said.popular.sum() + said.logits[:, 0].sum()).backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in made.opening.parameters())


@pytest.mark.parametrize("kind", ["dcn", "autoint"])
@pytest.mark.parametrize("n_dense", [0, 1, 2])
def test_any_number_of_dense_inputs_is_one_token_or_none(kind: Any, n_dense: int) -> None:
    shape = BackboneShape(kind, (8,), depth=1, heads=2, dropout=0.0)
    made = StaytimeNetwork(ROWS, FIELDS, n_dense, DIM, shape, torch.zeros(2))
    inputs = replace(batch(), dense=torch.randn(BATCH, n_dense))
    assert made(inputs).logits.shape == (BATCH, 2)
    assert (made.dense is None) == (n_dense == 0)
