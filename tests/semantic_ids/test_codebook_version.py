"""Codebook versions: whole or not there, named by their content, and refused in one line when damaged."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modules.codebook import Codebook
from trainer.console.errors import UserError
from trainer.data.format.content_vectors import Origin
from trainer.runtime.checksums import write_checksums
from trainer.semantic_ids import codebook_version
from trainer.semantic_ids.codebook_version import CodebookVersion, FittedVectors, write_version

ORIGIN = Origin(model="small", pooling="mean", hash="abcd")
FITTED = FittedVectors(dataset="world", table="world/vectors", count=90, hash="00", from_ms=0, until_ms=1000)


def book(*sizes: int, dim: int = 4, seed: int = 0, normalize: bool = False) -> Codebook:
    generator = torch.Generator().manual_seed(seed)
    levels = tuple(torch.randn(size, dim, generator=generator) for size in sizes)
    return Codebook(levels, normalize, (1.0,) * len(sizes) if normalize else ())


def written(path: Path, codebook: Codebook | None = None, **changes: Any) -> CodebookVersion:
    settings = {"origin": ORIGIN, "vectors": FITTED, "settings": {"seed": 1}, **changes}
    return write_version(path, book(5, 3) if codebook is None else codebook, **settings)


def test_a_version_is_read_as_it_was_written(tmp_path: Path) -> None:
    codebook = book(5, 3, normalize=True)
    version = written(tmp_path / "v", codebook, matched_from="5x3-00000000", report={"segments": 3})
    opened = CodebookVersion.open(tmp_path / "v")
    assert opened.manifest == version.manifest and opened.name == version.name
    assert (opened.levels, opened.dim, opened.manifest.matched_from) == ((5, 3), 4, "5x3-00000000")
    assert all(torch.equal(a, b) for a, b in zip(opened.codebook.levels, codebook.levels, strict=True))
    assert opened.report() == {"segments": 3} and written(tmp_path / "w").report() is None
    vectors = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    codes, error = opened.encode(vectors)
    expected_codes, expected_error = codebook.encode(torch.from_numpy(vectors))
    assert (codes == expected_codes.numpy()).all() and (error == expected_error.numpy()).all()


def test_the_name_follows_from_everything_that_a_code_depends_on(tmp_path: Path) -> None:
    def name(codebook: Codebook, origin: Origin = ORIGIN, **changes: Any) -> str:
        shutil.rmtree(tmp_path / "v", ignore_errors=True)
        return written(tmp_path / "v", codebook, origin=origin, **changes).name

    names = [
        name(book(5, 3)),
        name(book(5, 3, seed=1)),
        name(book(3, 5)),
        name(book(5, 3, normalize=True)),
        name(replace(book(5, 3, normalize=True), scales=(1.0, 0.5))),
        name(book(5, 3), replace(ORIGIN, hash="ef")),
    ]
    assert len(set(names)) == len(names) and names[0].startswith("5x3-") and names[2].startswith("3x5-")
    # What only describes the fit changes no code, and the counts of a table that grows are not those of the model.
    assert name(book(5, 3), replace(ORIGIN, counts={"embedded": 9}), settings={"seed": 2}) == names[0]


def test_a_version_is_never_replaced(tmp_path: Path) -> None:
    name = written(tmp_path / "v").name
    with pytest.raises(UserError, match=r"v: exists already; a version never changes"):
        written(tmp_path / "v", book(5, 3, seed=9))
    assert CodebookVersion.open(tmp_path / "v").name == name


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(codebook_version, "write_checksums", full)
    with pytest.raises(UserError, match=r"v: cannot be written \(No space left on device\)"):
        written(tmp_path / "v")
    assert list(tmp_path.iterdir()) == []


def test_centroids_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    codebook = book(5, 3)
    codebook.levels[1][2, 0] = torch.nan
    with pytest.raises(UserError, match=r"not finite"):
        written(tmp_path / "v", codebook)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["codebook.json", "centroids-1.npy", "centroids-2.npy", "checksums.json"])
@pytest.mark.parametrize("damage", ["removed", "empty", "cut", "flipped", "longer", "directory"])
def test_every_damage_is_one_line(file: str, damage: str, tmp_path: Path) -> None:
    written(tmp_path / "v")
    path = tmp_path / "v" / file
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage != "removed":
        content[len(content) // 2] ^= 4 if damage == "flipped" else 0
        changed = {"empty": b"", "cut": content[:-3], "flipped": content, "longer": content + b"x"}[damage]
        path.write_bytes(changed)
    with pytest.raises(UserError) as error:
        CodebookVersion.open(tmp_path / "v")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 2, "format is 2; this release reads format 1"),
        ("name", "5x3-00000000", "its content has the name 5x3-"),
        ("levels", [4, 3], "has the shape"),
        ("levels", [5], "its content has the name 5-"),
        ("levels", [0, 3], "levels.0"),
        ("levels", [], "levels"),
        ("dim", 5, "has the shape"),
        ("dim", "x", "dim"),
        ("normalize", True, "it has 0 scales"),
        ("scales", [1.0], "it has 1 scales"),
        ("origin", {"hash": "other"}, "its content has the name"),
        ("vectors", None, "vectors"),
        ("unknown", 1, "unknown"),
    ],
)
def test_a_manifest_that_does_not_fit_the_files_is_refused(
    key: str, value: object, message: str, tmp_path: Path
) -> None:
    """Even if the checksums were recorded again."""
    written(tmp_path / "v")
    path = tmp_path / "v" / "codebook.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    write_checksums(tmp_path / "v")
    with pytest.raises(UserError) as error:
        CodebookVersion.open(tmp_path / "v")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_no_version_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(UserError, match=r"no codebook version here \(codebook.json is missing\)"):
            CodebookVersion.open(place)


def test_vectors_of_another_kind_are_refused(tmp_path: Path) -> None:
    version = written(tmp_path / "v")
    version.check_vectors("table", 4, replace(ORIGIN, counts={"kept": 1}))
    with pytest.raises(UserError, match=r"^table: vectors have 5 elements, the codebook .*v takes 4"):
        version.check_vectors("table", 5, ORIGIN)
    with pytest.raises(UserError, match=r"^table: vectors are from another model \(small, mean, hash ef\) than .*abcd"):
        version.check_vectors("table", 4, replace(ORIGIN, hash="ef"))
    with pytest.raises(UserError, match=r"takes vectors of shape \(n, 4\), these have \(2, 5\)"):
        version.encode(np.ones((2, 5)))
    vectors = np.ones((5, 4), np.float32)
    vectors[1], vectors[2, 3], vectors[3, 0], vectors[4, 2] = 0, np.nan, np.inf, -1e16
    with pytest.raises(UserError, match=r"(^| )4 of 5 vectors are not finite, above 1e\+15, or zero"):
        version.encode(vectors)
    with pytest.raises(UserError, match=r"codes.parquet: is of the codebook version '5x3-1', .* is 5x3-"):
        version.check_name("codes.parquet", "5x3-1")


def test_a_number_stands_for_each_tuple(tmp_path: Path) -> None:
    version = written(tmp_path / "v")
    codes = np.stack(np.meshgrid(np.arange(5), np.arange(3), indexing="ij"), -1).reshape(-1, 2).astype(np.int32)
    assert version.numbers(codes).tolist() == list(range(15)) and version.tuples == 15
    many = written(tmp_path / "many", book(2000, 2000, 2000, dim=1))
    with pytest.raises(UserError, match=r"has 8,000,000,000 tuples of codes, and the store of recent codes numbers at"):
        many.numbers(codes)
    exact = written(tmp_path / "exact", book(1 << 16, 1 << 15, dim=1))
    assert exact.numbers(np.array([[(1 << 16) - 1, (1 << 15) - 1]])).tolist() == [(1 << 31) - 1]
