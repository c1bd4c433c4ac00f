"""Declarations, lookups, and initial values that do not depend on the sharding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from modules.embeddings import Lookup, Table, group_lookups, initial_rows
from modules.table_set import TableSet
from tests.modules.whole_tables import fill_tables

TABLES = (Table("user", 7, 4), Table("item", 5, 4), Table("side", 9, 8))
LOOKUPS = (
    Lookup("user", "user", 1),
    Lookup("side", "side", 2),
    Lookup("item", "item", 1),
    Lookup("past", "item", None),
)


def test_lookups_are_grouped_by_dimension_in_order_of_appearance() -> None:
    user, side, item, past = LOOKUPS
    assert group_lookups(TABLES, LOOKUPS) == ((4, (user, item, past)), (8, (side,)))


@pytest.mark.parametrize(
    ("tables", "lookups", "message"),
    [
        ([*TABLES, Table("item", 3, 2)], LOOKUPS, "table 'item' is declared more than once"),
        (TABLES, [*LOOKUPS, Lookup("past", "user", 1)], "lookup 'past' is declared more than once"),
        (TABLES, [*LOOKUPS, Lookup("past_2", "items", 1)], "reads table 'items'; there are .*'item'"),
        (TABLES, LOOKUPS[:1], "table 'item' is read by no lookup"),
        ([Table("user", 0, 4)], LOOKUPS[:1], r"table 'user' is \[0, 4\]"),
        ([Table("user", 3, 0)], LOOKUPS[:1], r"table 'user' is \[3, 0\]"),
        (TABLES[:1], [Lookup("user", "user", 0)], "lookup 'user' has length 0"),
    ],
)
def test_wrong_declarations_are_refused(tables: list[Table], lookups: list[Lookup], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableSet(tables, lookups)


def test_tables_take_no_memory_until_they_are_sharded() -> None:
    tables = TableSet([Table("user", 10**12, 64)], [Lookup("user", "user", 1)])
    assert [(tuple(p.shape), p.device.type) for p in tables.parameters()] == [((10**12, 64), "meta")]


@pytest.mark.parametrize("seed", range(3))
def test_values_are_rows_of_the_tables_in_order_of_the_ids(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tables = TableSet(TABLES, LOOKUPS, device="cpu")
    fill_tables(tables, seed)
    batch = 6
    lengths = {
        "user": torch.ones(batch, dtype=torch.int64),
        "item": torch.ones(batch, dtype=torch.int64),
        "past": torch.randint(0, 4, (batch,), generator=generator),
        "side": torch.full((batch,), 2),
    }
    sources = {lookup.name: table for lookup in LOOKUPS for table in TABLES if table.name == lookup.table}
    ids = {
        name: torch.randint(0, sources[name].rows, (int(count.sum()),), generator=generator)
        for name, count in lengths.items()
    }
    found = tables(
        [
            KeyedJaggedTensor(
                keys=[member.name for member in members],
                values=torch.cat([ids[member.name] for member in members]),
                lengths=torch.cat([lengths[member.name] for member in members]),
            )
            for _, members in tables.groups
        ]
    )
    assert set(found) == set(ids)
    for name, jagged in found.items():
        table = sources[name]
        assert torch.equal(jagged.lengths(), lengths[name])
        assert torch.equal(jagged.values(), initial_rows(table, seed, 0, table.rows)[ids[name]])


@given(data=st.data(), init=st.sampled_from(["uniform", "normal", "zeros"]), seed=st.integers(0, 2**40))
def test_a_shard_has_the_values_of_the_whole_table(data: st.DataObject, init: str, seed: int) -> None:
    table = Table("t", data.draw(st.integers(1, 5000)), data.draw(st.integers(1, 40)), init=init)  # type: ignore[arg-type]
    first = data.draw(st.integers(0, table.rows))
    rows = data.draw(st.integers(0, table.rows - first))
    left = data.draw(st.integers(0, table.dim))
    columns = data.draw(st.integers(0, table.dim - left))
    whole = initial_rows(table, seed, 0, table.rows)
    part = initial_rows(table, seed, first, rows, left, columns)
    assert part.dtype == torch.float32
    assert torch.equal(part, whole[first : first + rows, left : left + columns])


def test_values_are_pinned() -> None:
    # A change here changes every run that was started with a seed.
    table = Table("item", 10**9, 4, init_scale=1.0)
    expected = torch.tensor(
        [[-0.70062172, -0.16154969, 0.44918394, 0.32490897], [0.41803551, -0.78172839, 0.80834901, -0.57304764]]
    )
    torch.testing.assert_close(initial_rows(table, 7, 10**9 - 2, 2), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_distributions(scale: float | None) -> None:
    table = Table("t", 50_000, 16, init_scale=scale)
    expected = 0.1 / 4 if scale is None else scale
    uniform = initial_rows(table, 1, 0, table.rows) / expected
    assert uniform.min() >= -1 and uniform.max() < 1
    counts = torch.histc(uniform, bins=100, min=-1, max=1)
    values = uniform.numel()
    # Pearson's chi-squared over 100 bins has mean 99 and standard deviation 14.1.
    assert ((counts - values / 100) ** 2 / (values / 100)).sum() < 99 + 6 * 14.1

    normal = initial_rows(Table("t", 50_000, 16, init="normal", init_scale=scale), 1, 0, table.rows) / expected
    for moment, value, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((normal.double() ** moment).mean()) - value) < 6 * math.sqrt(variance / values), moment


def test_rows_columns_seeds_and_names_are_independent() -> None:
    base = initial_rows(Table("a", 4000, 16), 1, 0, 4000).double()
    others = {
        "seed": initial_rows(Table("a", 4000, 16), 2, 0, 4000).double(),
        "name": initial_rows(Table("b", 4000, 16), 1, 0, 4000).double(),
        "next row": base.roll(1, 0),
        "next column": base.roll(1, 1),
    }
    for what, other in others.items():
        correlation = float(torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1])
        assert abs(correlation) < 6 / math.sqrt(base.numel()), what


@pytest.mark.parametrize("part", [(0, 6, 0, None), (5, 1, 0, None), (0, 5, 2, 3), (-1, 2, 0, None), (0, 1, 5, None)])
def test_values_outside_a_table_are_refused(part: tuple[int, int, int, int | None]) -> None:
    with pytest.raises(ValueError, match="table 't'"):
        initial_rows(Table("t", 5, 4), 0, *part)
