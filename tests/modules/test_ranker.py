"""Ranker against inputs that are joined row by row."""

from __future__ import annotations

from typing import NamedTuple, get_args

import pytest
import torch
from torch import Tensor

from modules.din import TargetAttention
from modules.embeddings import Lookup
from modules.esu import SequenceAttention
from modules.ranker import AttentionKind, Ranker, RankerKind
from trainer.config.ranker import NetworkName


class History(NamedTuple):
    name: str
    keys: tuple[str, ...]
    query: tuple[str, ...]
    max_length: int
    alike: tuple[tuple[str, int, str, int], ...] = ()


DIMS = {"user": 4, "item": 6, "side": 3}
LOOKUPS = (
    Lookup("user", "user", 1),
    Lookup("past_item", "item", None),
    Lookup("item", "item", 1),
    Lookup("past_context", "side", None, ids_per_entry=2),
    Lookup("side", "side", 3),
    Lookup("tags", "side", None, pooling="mean"),
    Lookup("words", "side", None, pooling="sum"),
    Lookup("badges", "side", 2, pooling="mean"),
    Lookup("live_item", "item", None),
)
# A history may have any name, also one that modules use themselves.
HISTORIES = (
    History("items", ("past_item", "past_context"), ("item", "user"), 5),
    History("live", ("live_item",), ("item",), 3),
)
DENSE = 2
KINDS = get_args(NetworkName)


def make_ranker(kind: RankerKind, **settings: float) -> Ranker:
    return Ranker(
        3,
        LOOKUPS,
        DIMS,
        DENSE,
        HISTORIES,
        kind,
        expert_layers=((8, 6), (6, 4)),
        tower=(5,),
        attention=(7, 4),
        **settings,
    )


def make_inputs(batch: int, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    entries = {"past": torch.randint(0, 6, (batch,)), "live": torch.randint(0, 4, (batch,))}
    lengths = {
        "past_item": entries["past"],
        "past_context": 2 * entries["past"],
        "live_item": entries["live"],
        "tags": torch.randint(0, 4, (batch,)),
        "words": torch.randint(0, 4, (batch,)),
    }
    embedded = {}
    for lookup in LOOKUPS:
        ids = batch * lookup.length if lookup.length else int(lengths[lookup.name].sum())
        embedded[lookup.name] = torch.randn(ids, DIMS[lookup.table], dtype=dtype, requires_grad=True)
    return embedded, lengths, torch.randn(batch, DENSE, dtype=dtype)


def row_of(values: Tensor, lengths: Tensor, row: int) -> Tensor:
    first = int(lengths[:row].sum())
    return values[first : first + int(lengths[row])]


def mean_or_zeros(values: Tensor) -> Tensor:
    return values.mean(0) if len(values) else values.new_zeros(values.shape[1])


def looped(ranker: Ranker, embedded: dict[str, Tensor], lengths: dict[str, Tensor], dense: Tensor) -> Tensor:
    """Join the inputs of the network row by row and run the network."""
    inputs = []
    for row in range(len(dense)):
        user, item = embedded["user"][row], embedded["item"][row]
        parts = [
            user,
            item,
            embedded["side"].view(-1, 9)[row],
            mean_or_zeros(row_of(embedded["tags"], lengths["tags"], row)),
            row_of(embedded["words"], lengths["words"], row).sum(0),
            embedded["badges"].view(-1, 2, 3)[row].mean(0),
        ]
        context = row_of(embedded["past_context"], lengths["past_context"], row).view(-1, 6)
        past = torch.cat([row_of(embedded["past_item"], lengths["past_item"], row), context], dim=1)
        live = row_of(embedded["live_item"], lengths["live_item"], row)
        for index, (keys, query) in enumerate([(past, torch.cat([item, user])), (live, item)]):
            if ranker.attention is None:
                parts.append(mean_or_zeros(keys))
            else:
                attention = ranker.attention[index]
                assert isinstance(attention, TargetAttention)
                parts.append(attention(query[None], keys, torch.tensor([len(keys)]), len(keys))[0])
        inputs.append(torch.cat([*parts, dense[row]]))
    return ranker.network(torch.stack(inputs))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_those_of_rows_put_together_one_by_one(kind: RankerKind, seed: int) -> None:
    torch.manual_seed(seed)
    ranker = make_ranker(kind).double()
    embedded, lengths, dense = make_inputs(11, torch.float64)
    results = []
    for function in (ranker, lambda *inputs: looped(ranker, *inputs)):
        leaves = [*embedded.values(), *ranker.parameters()]
        logits = function(embedded, lengths, dense)
        # The embeddings of no lookup and the parameters of no layer are left out.
        gradients = torch.autograd.grad((logits.double() * torch.linspace(-1, 1, 3).double()).sum(), leaves)
        results.append((logits.detach().float(), gradients))
    (mine, my_gradients), (reference, reference_gradients) = results
    torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-6)
    for gradient, expected in zip(my_gradients, reference_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_no_rows_gives_every_parameter_a_gradient_of_zeros(kind: RankerKind) -> None:
    ranker = make_ranker(kind)
    embedded, lengths, dense = make_inputs(0)
    logits = ranker(embedded, lengths, dense)
    assert logits.shape == (0, 3) and logits.dtype == torch.float32
    logits.sum().backward()
    for name, parameter in ranker.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    for name, values in embedded.items():
        assert values.grad is not None and values.grad.shape == values.shape, name


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind: RankerKind) -> None:
    torch.manual_seed(0)
    ranker = make_ranker(kind)
    ranker(*make_inputs(200)).square().sum().backward()
    for name, parameter in ranker.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_follow_the_type_of_the_parameters_and_logits_are_float32(kind: RankerKind) -> None:
    torch.manual_seed(0)
    ranker = make_ranker(kind)
    embedded, lengths, dense = make_inputs(40)
    expected = ranker(embedded, lengths, dense)
    logits = ranker.bfloat16()(embedded, lengths, dense)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)
    logits.sum().backward()
    assert all(values.grad is not None and values.grad.dtype == torch.float32 for values in embedded.values())


@pytest.mark.parametrize("kind", ["ple", "logistic"])
def test_attention_weights_of_each_history_sum_to_one(kind: RankerKind) -> None:
    torch.manual_seed(1)
    embedded, lengths, dense = make_inputs(9)
    ranker = make_ranker(kind)
    shares = ranker.attention_weights(embedded, lengths, dense)
    assert list(shares) == ["items", "live"]
    for name, key in (("items", "past_item"), ("live", "live_item")):
        count = lengths[key]
        summed = torch.zeros(9, 1).index_add(0, torch.repeat_interleave(count), shares[name])
        torch.testing.assert_close(summed, (count > 0)[:, None].float())
        equal = torch.allclose(shares[name][:, 0], 1 / torch.repeat_interleave(count, count))
        assert equal == (kind == "logistic")


def test_dropout_is_random_in_training_only() -> None:
    ranker = make_ranker("ple", dropout=0.5)
    inputs = make_inputs(40)
    assert not torch.equal(ranker(*inputs), ranker(*inputs))
    ranker.eval()
    assert torch.equal(ranker(*inputs), ranker(*inputs))


def test_a_model_of_dense_features_only() -> None:
    ranker = Ranker(2, (), {}, 4, (), "shared_bottom")
    assert ranker({}, {}, torch.randn(3, 4)).shape == (3, 2)


@pytest.mark.parametrize(
    ("lookups", "histories", "message"),
    [
        (LOOKUPS, (History("short", ("past_items",), ("item",), 5),), "'short' reads 'past_items'"),
        (LOOKUPS, (History("short", ("past_item",), ("items",), 5),), "'short' reads 'items'"),
        (LOOKUPS, (History("short", ("side",), ("item",), 5),), "'side', which is not a sequence"),
        (LOOKUPS, (History("short", ("tags",), ("item",), 5),), "'tags', which is not a sequence"),
        (LOOKUPS, (History("short", ("past_context",), ("item",), 5),), "'past_context' must have one id an entry"),
        (LOOKUPS, (HISTORIES[0], History("live", ("live_item",), ("past_item",), 5)), "'past_item' is itself an entry"),
        (LOOKUPS, HISTORIES[:1], "'live_item' varies in length"),
        ((Lookup("user", "users", 1),), (), "'user' reads table 'users'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    lookups: tuple[Lookup, ...], histories: tuple[History, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Ranker(3, lookups, DIMS, DENSE, histories)


# Histories of one layout, as they are read together.
ALIKE = (
    Lookup("user", "user", 1),
    Lookup("item", "item", 1),
    Lookup("side", "side", 3),
    *(
        lookup
        for name in ("far", "near")
        for lookup in (Lookup(f"{name}_item", "item", None), Lookup(f"{name}_context", "side", None, ids_per_entry=2))
    ),
)
TOGETHER = (
    History("far", ("far_item", "far_context"), ("item",), 5, (("side", 2, "far_context", 1),)),
    History("near", ("near_item", "near_context"), ("item",), 4, (("side", 2, "near_context", 1),)),
)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["multi_head", "twin"])
def test_all_histories_are_read_together_with_all_features_of_the_candidate(kind: AttentionKind, seed: int) -> None:
    torch.manual_seed(seed)
    ranker = Ranker(
        3,
        ALIKE,
        DIMS,
        DENSE,
        TOGETHER,
        "shared_bottom",
        expert_layers=((8,),),
        tower=(),
        attention_kind=kind,
        heads=2,
        head_dim=3,
        query_ids={"side": (2, 0)},
        query_dense=(1,),
    ).double()
    attention = ranker.attention
    assert isinstance(attention, SequenceAttention)
    assert (attention.cross is not None) == (kind == "twin")
    # The query is item, side 2, side 0 and a dense feature. An entry is its item and two ids of the context, from
    # column 6 on, which are TWIN's cross features.
    pairs = [*zip(range(6), range(6), strict=True), *([] if kind == "twin" else [(6, 9), (7, 10), (8, 11)])]
    assert list(zip(attention.of_query.tolist(), attention.of_key.tolist(), strict=True)) == pairs
    entries = {"far": torch.randint(0, 6, (7,)), "near": torch.randint(0, 5, (7,))}
    lengths = {f"{name}_item": count for name, count in entries.items()}
    lengths |= {f"{name}_context": 2 * count for name, count in entries.items()}
    embedded = {}
    for lookup in ALIKE:
        ids = 7 * lookup.length if lookup.length else int(lengths[lookup.name].sum())
        embedded[lookup.name] = torch.randn(ids, DIMS[lookup.table], dtype=torch.float64)
    dense = torch.randn(7, DENSE, dtype=torch.float64)
    side = embedded["side"].view(7, 3, 3)
    query = torch.cat([embedded["item"], side[:, 2], side[:, 0], dense[:, 1:]], 1)
    read = attention(
        query,
        [[embedded[f"{name}_item"], embedded[f"{name}_context"].view(-1, 6)] for name in ("far", "near")],
        list(entries.values()),
    )
    expected = ranker.network(torch.cat([embedded["user"], embedded["item"], side.flatten(1), read, dense], 1))
    torch.testing.assert_close(ranker(embedded, lengths, dense), expected.float())
    shares = ranker.attention_weights(embedded, lengths, dense)
    for name, count in entries.items():
        assert shares[name].shape == (int(count.sum()), 2)
        summed = torch.zeros(7, 2).index_add(0, torch.repeat_interleave(count), shares[name])
        torch.testing.assert_close(summed, (count > 0)[:, None].expand(-1, 2).float())


def test_histories_of_different_widths_cannot_be_read_together() -> None:
    with pytest.raises(ValueError, match=r"entries of the same widths, not \[6, 6\] and \[6\]"):
        Ranker(3, LOOKUPS, DIMS, DENSE, HISTORIES, attention_kind="multi_head")


def test_without_histories_the_kind_of_attention_does_not_matter() -> None:
    assert Ranker(2, (), {}, 4, (), "shared_bottom", attention_kind="twin")({}, {}, torch.randn(3, 4)).shape == (3, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_predictions_of_a_network_that_reads_nothing_are_the_base_rates(kind: RankerKind) -> None:
    ranker = make_ranker(kind)
    with torch.no_grad():
        for parameter in ranker.parameters():
            parameter.zero_()
    rates = torch.tensor([0.3, 0.02, 0.5])
    ranker.init_output_bias(rates)
    torch.testing.assert_close(torch.sigmoid(ranker(*make_inputs(4))), rates.expand(4, -1))
