"""Vectors from disk: shares, chunks, the merge of equal vectors."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trainer.semantic_ids import vector_source
from trainer.semantic_ids.vector_source import StoredVectors, chunks, hash_rows, merge_equal

few_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5])
small = arrays.arrays(
    st.sampled_from([np.float16, np.float32]), st.tuples(st.integers(0, 30), st.integers(1, 2)), elements=few_values
)


@given(small, st.booleans())
def test_equal_vectors_are_merged_with_their_weights(vectors: np.ndarray, weighted: bool) -> None:
    weights = np.arange(len(vectors)) % 3 + 1 if weighted else None
    merged = merge_equal(StoredVectors("v", vectors, "hash", weights=weights))
    expected: dict[tuple[float, ...], int] = {}
    first: dict[tuple[float, ...], int] = {}
    for row, vector in enumerate(vectors):
        key = tuple((vector + 0).tolist())
        expected[key] = expected.get(key, 0) + (1 if weights is None else int(weights[row]))
        first.setdefault(key, row)
    found, counts = merged.read(np.arange(merged.count))
    assert {tuple((one + 0).tolist()): int(count) for one, count in zip(found, counts, strict=True)} == expected
    assert merged.count == len(expected)
    rows = np.arange(len(vectors)) if merged.rows is None else merged.rows
    assert rows.tolist() == sorted(first.values())


def test_vectors_with_one_hash_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_source, "hash_rows", lambda vectors: np.zeros(len(vectors), np.uint64))
    vectors = np.array([[1.0], [2.0], [1.0], [3.0], [2.0], [2.0]], np.float32)
    merged = merge_equal(StoredVectors("v", vectors, "hash", rows=np.array([0, 1, 2, 4, 5])))
    assert merged.rows is not None and merged.rows.tolist() == [0, 1]
    assert merged.weights is not None and merged.weights.tolist() == [2, 3]


def test_different_rows_have_different_hashes() -> None:
    rows = np.random.default_rng(0).integers(0, 3, (5000, 8)).astype(np.float16)
    assert len(np.unique(hash_rows(rows))) == len(np.unique(rows, axis=0))


def test_shares_cover_all_vectors_and_chunks_cover_a_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "v.npy", np.arange(40, dtype=np.float32).reshape(20, 2))
    monkeypatch.setattr(vector_source, "CHUNK_VALUES", 6)
    source = StoredVectors("v", np.load(tmp_path / "v.npy", mmap_mode="r"), "hash", np.arange(1, 20, 2), np.arange(10))
    rows, weights = [], []
    for rank in range(3):
        for chunk in chunks(source, *source.share(rank, 3)):
            assert len(chunk.vectors) <= 3 and chunk.first == len(rows)
            rows += (chunk.vectors[:, 0] / 2).tolist()
            weights += chunk.weights.tolist()
    assert rows == list(range(1, 20, 2)) and weights == list(range(10))


def test_the_hash_of_a_source_has_rows_and_weights_but_not_shares() -> None:
    vectors, some = np.ones((4, 2), np.float32), np.array([1, 2])
    sources = [
        StoredVectors("v", vectors, "hash"),
        StoredVectors("v", vectors, "other"),
        StoredVectors("v", vectors, "hash", some),
        StoredVectors("v", vectors, "hash", some, some),
        StoredVectors("v", vectors, "hash", weights=np.array([1, 2, 1, 1])),
    ]
    assert len({source.digest for source in sources}) == 5
    assert StoredVectors("w", vectors, "hash", borders=[0, 0, 4]).digest == sources[0].digest


def mapped_kilobytes() -> int:
    """Return the resident memory of this process that is mapped from files."""
    status = Path("/proc/self/status").read_text()
    return sum(int(size) for size in re.findall(r"Rss(?:File|Shmem):\s+(\d+)", status))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's figures of a process")
def test_a_file_that_was_read_does_not_stay_in_memory(tmp_path: Path) -> None:
    array = np.lib.format.open_memmap(tmp_path / "v.npy", "w+", np.float16, (250_000, 128))
    array[:] = 1
    array.flush()
    del array
    vectors = np.load(tmp_path / "v.npy", mmap_mode="r")
    source, before = StoredVectors("v", vectors, "hash"), mapped_kilobytes()
    scattered = source.read(np.arange(0, 250_000, 50))[0]
    in_chunks = sum(len(chunk.vectors) for chunk in chunks(source, 0, 250_000))
    assert mapped_kilobytes() - before < 10_000 and in_chunks == 250_000 and len(scattered) == 5000
    # Without the release the same reads leave the file of 64 MB mapped.
    assert vectors[::50].sum() == 5000 * 128 and mapped_kilobytes() - before > 15_000
