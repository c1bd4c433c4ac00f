"""Every id is sent once: unique ids against Python sets, and an exchange with and without deduplication."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.sparse.dedup_exchange import DeduplicatedExchange, unique_ids
from trainer.sparse.exchange import Gradients
from trainer.sparse.flat_exchange import Copies

LARGEST = 2**63 - 1
IDS = st.lists(st.integers(0, 9) | st.sampled_from([LARGEST, -LARGEST - 1, -1, 1 << 40]), max_size=30)
TABLE_OF = {"item": "item", "user": "user", "seen": "item", "mixed": "item"}


@settings(max_examples=60, deadline=None)
@given(st.lists(IDS, min_size=1, max_size=4))
def test_unique_ids_contain_each_id_once_and_places_lead_back(lists: list[list[int]]) -> None:
    unique, places = unique_ids([torch.tensor(ids, dtype=torch.int64) for ids in lists])
    assert unique.tolist() == list(dict.fromkeys(id_ for ids in lists for id_ in ids))
    assert [unique[place.long()].tolist() for place in places] == lists


def test_many_ids_that_the_hash_puts_near_each_other() -> None:
    ids = np.random.default_rng(0).integers(0, 1 << 12, 20_000) << 48
    unique, (places,) = unique_ids([torch.from_numpy(ids)])
    assert len(set(unique.tolist())) == len(unique) == len(np.unique(ids))
    assert torch.equal(unique[places.long()], torch.from_numpy(ids))


class WholeTables:
    """Exchange with its own tables that records its calls and the gradients that it gets."""

    def __init__(self, tables: Mapping[str, Tensor], ids: KeyedJaggedTensor) -> None:
        self.tables = tables
        self.ids = dict(zip(ids.keys(), ids.values().split(ids.length_per_key()), strict=True))
        self.calls: list[str] = []
        self.gradient = {name: torch.zeros_like(table) for name, table in tables.items()}

    def start(self) -> None:
        self.calls.append("start")

    def send(self) -> None:
        self.calls.append("send")

    @property
    def keys(self) -> list[str]:
        return [*self.ids]

    def rows(self, step: int | None = None, copies: Copies | None = None) -> dict[str, Tensor]:
        self.calls.append(f"rows {step}")
        found = {key: self.tables[TABLE_OF[key]][ids] for key, ids in self.ids.items()}
        return found if copies is None else {key: found[of][places.long()] for key, (of, places) in copies.items()}

    def update(self, gradients: Gradients, scale: float | Tensor) -> None:
        self.calls.append(f"update {scale}")
        for key, ids in self.ids.items():
            self.gradient[TABLE_OF[key]].index_add_(0, ids, torch.cat(list(gradients[key])))

    def update_joined(self, gradients: Tensor, scale: float | Tensor) -> None:
        parts = gradients.split([len(ids) for ids in self.ids.values()])
        self.update({key: [part] for key, part in zip(self.ids, parts, strict=True)}, scale)

    def drain(self) -> None:
        self.calls.append("drain")


def keyed(ids: Mapping[str, Sequence[int]]) -> KeyedJaggedTensor:
    sizes = [len(of_key) for of_key in ids.values()]
    values = torch.tensor([id_ for of_key in ids.values() for id_ in of_key], dtype=torch.int64)
    return KeyedJaggedTensor(list(ids), values, lengths=torch.tensor(sizes), stride=1, length_per_key=sizes)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("parts", [1, 3])
def test_deduplication_changes_neither_rows_nor_gradients_and_sends_each_id_once(parts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = {"item": torch.randn(30, 4), "user": torch.randn(9, 4)}
    sizes = {"item": 6, "user": 6, "seen": 40, "mixed": 0 if seed == 0 else 25}
    ids = {key: rng.integers(0, len(tables[TABLE_OF[key]]), size).tolist() for key, size in sizes.items()}
    plain = WholeTables(tables, keyed(ids))
    inner: list[WholeTables] = []

    def make_exchanges(unique: KeyedJaggedTensor) -> list[WholeTables]:
        inner.append(WholeTables(tables, unique))
        return inner

    exchange = DeduplicatedExchange(keyed(ids), TABLE_OF, make_exchanges)
    assert not inner
    exchange.start()
    sent = [(TABLE_OF[key], id_) for key, of_key in inner[0].ids.items() for id_ in of_key.tolist()]
    assert len(sent) == len(set(sent))
    assert set(sent) == {(TABLE_OF[key], id_) for key, of_key in ids.items() for id_ in of_key}

    exchange.send()
    found, expected = exchange.rows(7), plain.rows(7)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    gradients = {key: torch.randn(len(of_key), 4).tensor_split(parts) for key, of_key in ids.items()}
    exchange.update(gradients, 0.5)
    plain.update(gradients, 0.5)
    for name, gradient in plain.gradient.items():
        torch.testing.assert_close(inner[0].gradient[name], gradient, rtol=1e-5, atol=1e-6)
    exchange.drain()
    assert inner[0].calls == ["start", "send", "rows 7", "update 0.5", "drain"]
