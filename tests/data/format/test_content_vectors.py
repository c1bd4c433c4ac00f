"""Tables of content vectors: compared with a dictionary, replaced atomically, and refused if damaged."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.console.errors import UserError
from trainer.data.format.content_vectors import MANIFEST, ContentVectors, Origin, finite_rows, write_parts


def some(seed: int, n: int = 50, dim: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.permutation(np.unique(rng.integers(0, 1 << 62, n))), rng.standard_normal((n, dim)).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.integers(0, 40), st.floats(-100, 100, width=16), max_size=20), st.integers(1, 4))
def test_lookup_is_that_of_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, known: dict[int, float], dim: int
) -> None:
    path = tmp_path_factory.mktemp("table")
    vectors = np.array(list(known.values()), np.float32).reshape(-1, 1).repeat(dim, axis=1)
    table = ContentVectors.write(path, np.array(list(known), np.int64), vectors)
    asked = np.arange(-2, 43).reshape(9, 5)
    rows = table.lookup(asked)
    assert rows.shape == asked.shape and len(table) == len(known) and table.dim == dim
    for one, row in zip(asked.ravel().tolist(), rows.ravel().tolist(), strict=True):
        if one in known:
            assert table.ids[row] == one and table.vectors[row].tolist() == [known[one]] * dim
        else:
            assert row == -1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_was_written_is_opened(tmp_path: Path, dtype: str) -> None:
    ids, vectors = some(1)
    texts = np.arange(50, dtype=np.uint64)
    origin = Origin("qwen", "lora", {"item": "Video: {text}"}, "last", "abc", {"empty": 2})
    ContentVectors.write(tmp_path / "t", ids, vectors, texts=texts, origin=origin, dtype=dtype)
    table = ContentVectors.open(tmp_path / "t")
    rows = table.lookup(ids)
    assert isinstance(table.vectors, np.memmap) and table.vectors.dtype == dtype and table.origin == origin
    np.testing.assert_array_equal(table.vectors[rows], vectors.astype(dtype))
    np.testing.assert_array_equal(table.texts[rows], texts)


def test_parts_in_any_order_give_the_same_table(tmp_path: Path) -> None:
    ids, vectors = some(2)
    texts = np.zeros(50, np.uint64)
    cuts = [(ids[order], vectors[order]) for order in np.array_split(np.random.default_rng(0).permutation(50), 4)]
    whole = ContentVectors.write(tmp_path / "a", ids, vectors)
    parts = write_parts(tmp_path / "b", ids, texts, cuts, 3)
    assert whole.hash == parts.hash
    again = [(part.copy(), rows.copy()) for part, rows in whole.parts(whole.lookup(ids))]
    assert write_parts(tmp_path / "c", ids, texts, again, 3).hash == whole.hash


def test_a_table_is_replaced_as_a_whole_and_an_open_one_stays(tmp_path: Path) -> None:
    ids, vectors = some(3)
    old = ContentVectors.write(tmp_path, ids, vectors)
    before = old.vectors[:].copy()
    new = ContentVectors.write(tmp_path, ids[:9], -vectors[:9])
    np.testing.assert_array_equal(old.vectors, before)
    assert len(new) == 9 and len(ContentVectors.open(tmp_path)) == 9
    assert len(list(tmp_path.iterdir())) == 4


def test_a_write_that_fails_leaves_the_old_table_and_nothing_else(tmp_path: Path) -> None:
    ids, vectors = some(4)
    old = ContentVectors.write(tmp_path, ids, vectors)
    files = sorted(tmp_path.iterdir())

    def breaks() -> object:
        yield ids[:10], vectors[:10]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_parts(tmp_path, ids, np.zeros(50, np.uint64), breaks(), 3)
    assert sorted(tmp_path.iterdir()) == files and ContentVectors.open(tmp_path).hash == old.hash


def test_a_full_disk_is_refused_before_the_vectors_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, offset: int, size: int) -> None:
        # A write into the mapping would end the process with SIGBUS.
        assert offset == 0 and size == os.fstat(descriptor).st_size > 3 * 2 * 4
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)$"):
        ContentVectors.write(tmp_path, np.arange(3), np.ones((3, 2)), dtype="float32")
    assert not list(tmp_path.iterdir())


def test_vectors_that_are_not_finite_are_counted_and_refused(tmp_path: Path) -> None:
    ids, vectors = some(5)
    vectors[7, 1], vectors[9, 0], vectors[11, 2] = np.nan, np.inf, 1e6
    assert np.flatnonzero(~finite_rows(vectors, "float32")).tolist() == [7, 9]
    with pytest.raises(
        UserError, match=rf"(^| )3 of 50 vectors are not finite in float16, the first is that of id {ids[7]};"
    ):
        ContentVectors.write(tmp_path, ids, vectors)
    assert not (tmp_path / MANIFEST).exists() and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ids", "width", "message"),
    [
        ([3, 3], 2, "id 3 comes twice"),
        ([-1, 3], 2, "id -1 is negative"),
    ],
)
def test_bad_ids_are_refused(tmp_path: Path, ids: list[int], width: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ContentVectors.write(tmp_path, np.array(ids), np.zeros((2, width)))


def test_bad_parts_are_refused(tmp_path: Path) -> None:
    ids, texts = np.array([1, 2]), np.zeros(2, np.uint64)
    for part, message in [
        ((np.array([1]), np.zeros((1, 2))), "id 2 has no vector"),
        ((np.array([1, 5]), np.zeros((2, 2))), "an id that is not in the list of ids"),
        ((ids, np.zeros((2, 3))), r"vectors of shape \(2, 3\); for its 2 ids it must be \(2, 2\)"),
    ]:
        with pytest.raises(UserError, match=message):
            write_parts(tmp_path, ids, texts, [part], 2)
    with pytest.raises(UserError, match="cannot be stored as float64"):
        write_parts(tmp_path, ids, texts, [(ids, np.zeros((2, 2)))], 2, dtype="float64")


def test_what_is_no_table_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no embedding table here"):
        ContentVectors.open(tmp_path / "none")
    table = ContentVectors.write(tmp_path / "t", *some(6))
    manifest = json.loads((tmp_path / "t" / MANIFEST).read_text())
    for changed, message in [({"version": 9}, "version is 9"), ({"count": 3}, "lists 3 vectors with 3 elements")]:
        (tmp_path / "t" / MANIFEST).write_text(json.dumps({**manifest, **changed}))
        with pytest.raises(UserError, match=message):
            ContentVectors.open(table.path)
    (tmp_path / "t" / MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / "t" / manifest["files"]["vectors"]).unlink()
    with pytest.raises(UserError, match=r"files named in manifest\.json are missing"):
        ContentVectors.open(table.path)
