"""Histories of a job against their definitions, row by row; later visits must not change them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from modules.search import reference
from tests.data.format.test_history import make_visits, spec, write
from trainer.config.features import FeatureConfig, HistoryConfig
from trainer.data.features.history_sequences import HistoryReader, Space
from trainer.data.features.id_map import IdMap
from trainer.data.format.history import Histories
from trainer.data.format.schema import Rows

USERS, AUTHORS, ITEMS = 6, 9, 600
FIVE = {
    "short": {"domain": "video"},
    "long": {"domain": "video", "search": "top"},
    "author": {"domain": "video", "search": "author"},
    "live_long": {"domain": "live", "search": "top"},
    "mixed": {"domain": "both", "require": ("b",)},
}
COLUMNS = ("lengths", "item_id", "author_id", "request_ms", "play_ms", "bits", "tag", "domain")


def config(length: int = 5, **changes: object) -> FeatureConfig:
    histories = {name: HistoryConfig(length=length, **history) for name, history in FIVE.items()}
    return FeatureConfig.model_validate({"history": histories, **changes})


def id_maps(mapping: str) -> dict[str, IdMap]:
    if mapping == "lookup":
        known = {"item": np.arange(0, ITEMS, 2), "author": np.arange(0, AUTHORS, 2)}
        return {name: IdMap(name, "lookup", len(ids) + 1, ids) for name, ids in known.items()}
    return {name: IdMap(name, mapping, count + 1) for name, count in (("item", ITEMS), ("author", AUTHORS))}  # type: ignore[arg-type]


def make_space(rng: np.random.Generator, maps: Mapping[str, IdMap]) -> Space:
    space = {name: rng.standard_normal((ids.rows, 16)).astype(np.float16) for name, ids in maps.items()}
    for values in space.values():
        values[0] = 0
    return space


def make_rows(rng: np.random.Generator, n: int) -> Rows:
    return {
        "user_id": rng.integers(0, USERS + 1, n),
        "author_id": rng.integers(0, AUTHORS, n),
        "item_id": rng.integers(0, ITEMS, n),
    }


class Growing(Histories):
    """Histories whose columns can change, so that nothing can be computed ahead."""

    def column(self, name: str) -> np.ndarray:
        return super().column(name).copy()


def by_definition(visits, rows, as_of, read, maps, space) -> list[list[int]]:
    """Return the visits of each row, oldest first; all have different ``known_ms``."""
    found = []
    for row in range(len(as_of)):
        known = np.flatnonzero((visits["user_id"] == rows["user_id"][row]) & (visits["known_ms"] < as_of[row]))
        known = known[np.argsort(visits["known_ms"][known])]
        if read.domain != "both":
            known = known[visits["domain"][known] == ("video", "live").index(read.domain)]
        if read.search == "author":
            known = known[visits["author_id"][known] == rows["author_id"][row]]
        if read.require:
            known = known[(visits["bits"][known] & 2) > 0]
        if read.search == "top":
            score = torch.zeros(len(known))
            for name in ("item", "author"):
                here, there = np.empty(len(known), np.int64), np.empty(1, np.int64)
                maps[name](visits[f"{name}_id"][known], here)
                maps[name](rows[f"{name}_id"][row : row + 1], there)
                vectors = torch.from_numpy(space[name])
                score = score + reference.scores(vectors[here], vectors[there[0]])
            known = known[reference.best(score, read.length).numpy()]
        found.append(known[-read.length :].tolist())
    return found


@pytest.mark.parametrize("mapping", ["direct", "hash", "lookup"])
@pytest.mark.parametrize("seed", range(2))
def test_histories_are_their_definitions(tmp_path: Path, mapping: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    visits = make_visits(rng, ITEMS, np.arange(USERS), span=900)
    visits["known_ms"] = rng.permutation(ITEMS) + 300
    histories, maps = write(tmp_path, visits), id_maps(mapping)
    rows, as_of, space = make_rows(rng, 50), rng.integers(250, 950, 50), make_space(rng, maps)
    settings = config()
    sequences = HistoryReader(spec(), settings, maps)
    unprepared = sequences.read(rows, histories, as_of, space)
    sequences.prepare(histories, space)
    prepared = sequences.read(rows, histories, as_of, space)
    growing = HistoryReader(spec(), settings, maps).read(rows, Growing(tmp_path, spec()), as_of, space)
    for name, read in settings.history.items():
        expected = by_definition(visits, rows, as_of, read, maps, space)
        lengths = [len(each) for each in expected]
        assert {0, read.length} <= set(lengths), f"{name}: no empty or no full result"
        for found in (unprepared[name], prepared[name], growing[name]):
            assert found.lengths.tolist() == lengths
            # Items number the visits.
            assert found.item_id.tolist() == [visit for each in expected for visit in each], name
            np.testing.assert_array_equal(found.domain, visits["domain"][found.item_id])
            np.testing.assert_array_equal(found.tag, visits["tag"][found.item_id])


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32), moment=st.integers(0, 60), length=st.sampled_from([1, 4, 1000]))
def test_no_search_sees_the_future(tmp_path_factory, seed, moment, length):
    """Visits known at a moment or later are changed, moved to other users, added or removed."""
    rng = np.random.default_rng(seed)
    visits = make_visits(rng, 300, np.arange(USERS))
    visits["item_id"] = rng.integers(0, ITEMS, 300)
    unknown = np.flatnonzero(visits["known_ms"] >= moment)
    other = {name: column.copy() for name, column in visits.items()}
    for name in ("item_id", "author_id", "play_ms", "bits", "tag", "user_id", "domain"):
        other[name][unknown] = other[name][rng.permutation(unknown)]
    other["known_ms"][unknown] = moment + rng.integers(0, 9, len(unknown))
    kept = np.setdiff1d(np.arange(300), unknown[::3])
    more = {name: column[unknown] for name, column in other.items()}
    other = {name: np.concatenate([column[kept], more[name]]) for name, column in other.items()}

    maps = id_maps("direct")
    space, rows = make_space(rng, maps), make_rows(rng, 40)
    sequences = HistoryReader(spec(), config(length), maps)
    reads = []
    for each in (visits, other):
        histories = write(tmp_path_factory.mktemp("history"), each)
        reads.append(sequences.read(rows, histories, np.full(40, moment), space))
    for name in FIVE:
        for column in COLUMNS:
            np.testing.assert_array_equal(*(getattr(read[name], column) for read in reads), err_msg=name)


def test_the_leak_would_be_seen(tmp_path: Path) -> None:
    """The test above with a later moment than it claims: then the histories differ."""
    rng = np.random.default_rng(0)
    visits = make_visits(rng, 300, np.arange(USERS))
    other = {name: column.copy() for name, column in visits.items()}
    later = np.flatnonzero(visits["known_ms"] >= 30)
    other["item_id"][later] = rng.integers(0, ITEMS, len(later))
    maps = id_maps("direct")
    space, rows = make_space(rng, maps), make_rows(rng, 40)
    sequences = HistoryReader(spec(), config(), maps)
    reads = [
        sequences.read(rows, write(tmp_path / name, each), np.full(40, 60), space)
        for name, each in (("before", visits), ("after", other))
    ]
    for name in FIVE:
        assert reads[0][name].item_id.tolist() != reads[1][name].item_id.tolist(), name


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ({"domain": "both", "search": "top"}, "declare one history for each"),
        ({"domain": "video", "search": "author", "require": ("a",)}, "`require` works only with"),
        ({"domain": "video", "search": "nearest"}, "'latest', 'top' or 'author'"),
    ],
)
def test_histories_that_cannot_be(history, message):
    with pytest.raises(ValidationError, match=message):
        HistoryConfig(**history)


def test_dynamic_tables_are_not_searched_in():
    with pytest.raises(ValidationError, match='ids = "dynamic" rows change their ids'):
        config(item={"ids": "dynamic", "rows": 100})
    assert config(item={"ids": "dynamic", "rows": 100}, search={"tables": ["author"]}).needs_space


def test_a_search_table_is_named_once():
    with pytest.raises(ValidationError, match="names a table twice"):
        config(search={"tables": ["item", "item"]})
