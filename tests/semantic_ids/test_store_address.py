"""Stores of recent codes as a source of the ranker's candidates: equal to a code file, and refused in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.semantic_ids.conftest import OpenStore
from tests.semantic_ids.segment_world import SEGMENT_MS, START_MS, assigned, make_version, write_world
from trainer.config.features import CodesConfig, FeatureConfig
from trainer.console.errors import UserError
from trainer.data.features.code_inputs import CodeFileReader, CodeStoreReader, check_codes, open_codes
from trainer.data.features.code_sets import CodeSet
from trainer.data.features.fitted_codes import FittedCodes
from trainer.data.format.segment_codes import CodeFile
from trainer.semantic_ids.code_files import append_codes
from trainer.semantic_ids.code_store import CodeStore, RecentRuns, SegmentCodes, StoreSettings
from trainer.semantic_ids.store_address import open_existing_store, open_store


def test_candidates_have_the_same_codes_from_a_store_as_from_a_file(tmp_path: Path, new_store: OpenStore) -> None:
    """The file ends early, and the store is live: at each time it has only what became known until then."""
    version = make_version(tmp_path / "v", 4, 3, 2)
    world = write_world(tmp_path / "world", segments=24)
    whole, early = assigned(version, world), assigned(version, world, START_MS + 8 * SEGMENT_MS + 1)
    config = CodesConfig(file="f", levels=2, prefix_rows=9)
    code_set, live = CodeSet("raw", config, whole.levels), new_store(version.name)
    expected_reader, asked = CodeFileReader(code_set, whole), 0
    reader = CodeStoreReader(code_set, early, lambda: live)
    authors = np.array([104, 100, 999, 103, -1, 102])
    for step in range(0, 25, 4):
        as_of_ms = np.full(len(authors), START_MS + step * SEGMENT_MS) - np.arange(len(authors)) * SEGMENT_MS
        append_codes(assigned(version, world, int(as_of_ms[0]) + 1), live, version, quiet=True)
        found, expected = reader.candidate_rows(authors, as_of_ms), expected_reader.candidate_rows(authors, as_of_ms)
        assert [rows.tolist() for rows in found] == [rows.tolist() for rows in expected]
        asked += int((as_of_ms > early.known_ms.max()).sum())
    assert (found[0] > 0).tolist() == [True, True, False, True, False, True] and asked > 10
    none = np.zeros(0, np.int64)
    assert [len(rows) for rows in reader.candidate_rows(none, none)] == [0, 0, 0]


def test_the_newer_code_counts_whichever_of_file_and_store_has_it(tmp_path: Path, new_store: OpenStore) -> None:
    """A store that was begun later than the file ends does not hide the codes of the file."""
    version = make_version(tmp_path / "v", 5)
    code = np.array([[1], [2]], np.int32)
    columns = (np.array([1, 2]), np.array([7, 8]), np.arange(2), np.array([100, 200]))
    codes = CodeFile(Path("f"), version.name, (5,), *columns, code, start_ms=np.array([70, 170]))
    store = new_store(version.name)
    store.append(SegmentCodes(np.array([7]), np.array([9]), np.array([4], np.int32), np.array([300])))
    reader = CodeStoreReader(CodeSet("raw", CodesConfig(file="f"), (5,)), codes, lambda: store)
    authors, as_of_ms = np.array([7, 7, 8, 8, 7]), np.array([250, 300, 300, 150, 90])
    assert reader.candidate_rows(authors, as_of_ms)[0].tolist() == [2, 5, 3, 0, 0]


def test_requests_that_the_file_answers_do_not_ask_the_store(tmp_path: Path) -> None:
    """A store may have removed their segments long ago, or may be down."""
    version = make_version(tmp_path / "v", 4, 3)
    codes = assigned(version, write_world(tmp_path / "world", segments=4))

    class Down:
        def recent(self, authors: np.ndarray, as_of_ms: np.ndarray, runs: int) -> RecentRuns:
            raise UserError("redis://host/0: no answer in 30 s")

        def close(self) -> None: ...

    reader = CodeStoreReader(CodeSet("raw", CodesConfig(file="f"), codes.levels), codes, Down)
    end_ms = int(codes.known_ms.max())
    assert reader.candidate_rows(np.array([100]), np.array([end_ms]))[0][0] > 0
    with pytest.raises(UserError, match="no answer in 30 s"):
        reader.candidate_rows(np.array([100]), np.array([end_ms + 1]))


def test_a_forked_process_opens_the_store_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = make_version(tmp_path / "v", 4)
    codes = assigned(version, write_world(tmp_path / "world", segments=2))
    place, opened = str(tmp_path / "codes.sqlite"), list[CodeStore]()
    store = open_store(place, StoreSettings(version.name))
    append_codes(codes, store, version, quiet=True)
    store.close()

    def open_again() -> CodeStore:
        opened.append(open_existing_store(place, version.name))
        return opened[-1]

    code_set = CodeSet("raw", CodesConfig(file="f"), codes.levels)
    reader = CodeStoreReader(code_set, codes, open_again)
    author, now = np.array([100]), np.array([START_MS + 9 * SEGMENT_MS])
    first = reader.candidate_rows(author, now)[0].tolist()
    assert len(opened) == 1 and first[0] > 0
    process = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: process + 1)
    assert reader.candidate_rows(author, now)[0].tolist() == first and len(opened) == 2
    for each in opened:
        each.close()


def test_a_store_that_is_not_there_is_refused_and_not_made(new_place: Callable[[], str]) -> None:
    place = new_place()
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"no such store of codes; `limelight|has no store of codes under \S+; append"
        ):
            open_existing_store(place, "v1")
    open_store(place, StoreSettings("v1")).close()
    open_existing_store(place, "v1").close()


def test_a_store_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    version, other = make_version(tmp_path / "v", 4, 3), make_version(tmp_path / "w", 5)
    world = write_world(tmp_path / "world", segments=2)
    codes = assigned(version, world)
    place = tmp_path / "codes.sqlite"
    config = FeatureConfig(codes={"raw": CodesConfig(file=str(world / "codes.parquet"), store=str(place))})
    fitted = {"raw": FittedCodes.of(codes)}
    open_store(str(place), StoreSettings(other.name)).close()
    with pytest.raises(UserError, match=rf"has codes of the codebook '{other.name}', not '{version.name}'"):
        open_codes(config, fitted, open_existing_store)
    with pytest.raises(UserError, match=rf"has codes of the codebook '{other.name}', not '{version.name}'"):
        check_codes(config.codes, open_existing_store)
    with pytest.raises(UserError, match=r"127.0.0.1:1/0: no answer in 0 s"):
        open_existing_store("redis://127.0.0.1:1/0", version.name, 0.0)
    with pytest.raises(ValueError, match=r"`store` has a user or a password, which a run would keep"):
        CodesConfig(file="f", store="redis://:secret@host/0")
