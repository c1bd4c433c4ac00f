"""Versions of the search vectors: written before a batch uses them, and the same after a resume."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.console.errors import UserError
from trainer.data.features.id_map import IdMap
from trainer.data.features.search_vectors import SearchSpace, SpaceTable, stored_space
from trainer.data.format.content_vectors import ContentVectors
from trainer.ranking.search_refresh import write_content_version

TABLES = {"item": SpaceTable(5, 20), "author": SpaceTable(3, 16)}


def make_space(refresh_steps: int = 4, dtype: str = "float16") -> SearchSpace:
    return SearchSpace(TABLES, TABLES, dtype, refresh_steps)


def put(space: SearchSpace, version: int) -> None:
    """Return a version whose values are its number."""
    for values in space.at(version).values():
        values[:] = version + 1
    space.newest = version


@given(
    refresh_steps=st.integers(1, 9),
    steps=st.integers(1, 60),
    stop=st.integers(0, 60),
    data=st.data(),
)
def test_batches_made_ahead_find_their_version_and_a_resume_the_same(refresh_steps, steps, stop, data):
    """Batches are made in order, each at any moment up to ``refresh_steps`` steps before its own."""
    ahead = data.draw(st.integers(1, refresh_steps))
    used: list[dict[int, float]] = []
    for stops in ([], [min(stop, steps)]):
        space, seen = make_space(refresh_steps), {}
        space.check_prefetch(ahead)
        put(space, 0)
        made = done = 0
        for end in (*stops, steps):
            while done < end:
                most = min(end, done + ahead)
                made = data.draw(st.integers(max(made, done + 1), most)) if made < most else made
                for step in range(len(seen), made):
                    seen[step] = float(space.at(space.version_of(step))["item"][1, 0])
                done += 1
                if space.is_due(done):
                    put(space, done // refresh_steps)
            # What was made ahead is forgotten, and made again after the resume.
            seen = {step: value for step, value in seen.items() if step < end}
            made = done
            state, space = space.state_dict(), make_space(refresh_steps)
            space.load_state_dict(state)
        used.append(seen)
    expected = {step: max(step // refresh_steps - 1, 0) + 1 for step in range(steps)}
    assert used == [expected, expected]


def test_too_many_batches_made_ahead_are_refused():
    with pytest.raises(UserError, match="refresh_steps = 4 is less than the 5 batches"):
        make_space().check_prefetch(5)
    make_space().check_prefetch(4)
    make_space(0).check_prefetch(5)


def test_processes_see_what_is_put_later():
    space, context = make_space(), multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        theirs.recv()
        theirs.send(float(space.at(1)["author"].sum()))

    process = context.Process(target=child)
    process.start()
    put(space, 1)
    ours.send("put")
    assert ours.poll(60) and ours.recv() == 3 * 16 * 2
    process.join(600)


def test_the_newest_version_is_opened_again():
    space = make_space()
    for version in range(4):
        put(space, version)
    opened = stored_space(space.state_dict())
    for name, values in space.at(3).items():
        np.testing.assert_array_equal(opened.at(opened.newest)[name], values)


def test_the_first_version_may_have_other_tables_than_all_later_ones():
    first = {"item": SpaceTable(5, 48)}
    space = SearchSpace(first, TABLES, "float16", 4)
    assert [space.tables(version) for version in (0, 1, 2)] == [first, TABLES, TABLES]
    put(space, 0)
    assert {name: values.shape for name, values in space.at(0).items()} == {"item": (5, 48)}
    put(space, 1)
    assert {name: values.shape for name, values in space.at(1).items()} == {"item": (5, 32), "author": (3, 16)}
    assert [set(space.state_dict()[version]) for version in ("0", "1")] == [{"item"}, {"item", "author"}]


def test_a_state_of_other_tables_is_refused():
    space = make_space()
    put(space, 0)
    with pytest.raises(UserError, match=r"this job needs \{'item'"):
        SearchSpace({"item": SpaceTable(5, 20)}, TABLES, "float16", 4).load_state_dict(space.state_dict())


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_values_keep_their_proportions(dtype):
    values = np.random.default_rng(0).standard_normal((4, 20)).astype(np.float32)
    largest = float(np.abs(values).max())
    stored = make_space(dtype=dtype).quantised(values, largest).astype(np.float32)
    scale = largest / 127 if dtype == "int8" else 1.0
    np.testing.assert_allclose(stored * scale, values, atol=0.51 * scale if dtype == "int8" else 2e-3)
    assert make_space(dtype="int8").quantised(np.zeros((2, 20), np.float32), 0.0).sum() == 0
    assert np.isfinite(make_space().quantised(np.full((1, 20), 1e6, np.float32), 1e6)).all()


def content(path: Path, ids: list[int], dim: int = 20, **write: object) -> ContentVectors:
    vectors = np.random.default_rng(1).standard_normal((len(ids), dim)).astype(np.float32)
    return ContentVectors.write(path / "table", np.array(ids), vectors, **write)


@pytest.mark.parametrize("mapping", ["direct", "lookup"])
def test_content_embeddings_are_the_first_space(tmp_path, mapping):
    """Ids 1 and 3 have no vector; 9 is not an item of the dataset."""
    space = make_space()
    space.at(0)["item"][:] = 7
    item = IdMap("item", mapping, 5, np.arange(4) if mapping == "lookup" else None)
    table = content(tmp_path, [0, 2, 9])
    assert write_content_version(space, table, item) == 2
    values = space.at(0)["item"]
    np.testing.assert_array_equal(values[[1, 3], :20], table.vectors[:2].astype(np.float16))
    assert not values[[0, 2, 4]].any() and not values[:, 20:].any() and not space.at(0)["author"].any()
    assert space.newest == 0


def test_content_that_cannot_be_used_is_told_in_a_line(tmp_path):
    item = IdMap("item", "direct", 5)
    for mapping in (item, IdMap("item", "lookup", 5, np.arange(4))):
        with pytest.raises(UserError, match="no embedding of any item of the dataset"):
            write_content_version(make_space(), content(tmp_path / mapping.mapping, [8, 9]), mapping)
    table = content(tmp_path, [0, 2])
    broken = np.array(table.vectors)
    broken[1, 3] = np.nan
    with pytest.raises(UserError, match="the embedding of item 2 is not finite"):
        write_content_version(make_space(), replace(table, vectors=broken), item)
