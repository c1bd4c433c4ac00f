"""Opening and verifying a dataset: what is read, by which rank, and what may be damaged if records are skipped."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, cast

import pytest

from tests.data.format.damage import emptied, flipped, shortened
from tests.data.small_visits import build_dataset, make_visits
from trainer.console.errors import UserError
from trainer.data.format.dataset import Dataset
from trainer.data.format.history import Histories
from trainer.runtime import checksums
from trainer.runtime.checksums import CHECKSUMS, FileChecksum
from trainer.runtime.distributed import World


@pytest.fixture
def path(tmp_path: Path) -> Path:
    build_dataset(tmp_path / "dataset", make_visits(3))
    return tmp_path / "dataset"


class Rank:
    """One rank of several on a machine, which sees what the others found."""

    def __init__(self, rank: int, size: int, others: list[str | None]) -> None:
        self.rank, self._size, self._others = rank, size, others

    def place_on_machine(self) -> tuple[int, int]:
        return self.rank, self._size

    def gather(self, value: str | None) -> list[str | None]:
        return [value, *self._others]

    def agree(self, value: Any) -> Any:
        return value


def verify(path: Path, rank: int, size: int, others: list[str | None]) -> None:
    Dataset.open(str(path)).verify(cast(World, Rank(rank, size, others)))


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_the_ranks_of_a_machine_read_each_file_of_the_histories_once(
    path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(file: Path, *arguments: Any) -> FileChecksum:
        read.append(file.name)
        return checksums.size_and_crc32(file, *arguments)

    monkeypatch.setattr("trainer.data.format.dataset_files.size_and_crc32", counted)
    for rank in range(size):
        verify(path, rank, size, [])
    assert sorted(read) == sorted(file.name for file in (path / "history").iterdir())


def test_damage_that_one_rank_finds_is_an_error_on_every_rank(path: Path) -> None:
    verify(path, 1, 2, [None])
    with pytest.raises(UserError, match=r"^history/bits\.npy: damaged$"):
        verify(path, 1, 2, ["history/bits.npy: damaged"])
    for file in sorted((path / "history").iterdir()):
        whole = file.read_bytes()
        flipped(file, 0.99, 0)
        refused = 0
        for rank in range(2):
            try:
                verify(path, rank, 2, [None])
            except UserError as error:
                assert file.name in str(error)
                refused += 1
        # Opening may find it before, and then on both.
        assert refused >= 1
        file.write_bytes(whole)


def test_opening_reads_no_column_of_the_histories_that_it_need_not(path: Path) -> None:
    for name in ("item_id", "author_id", "request_ms", "play_ms", "bits", "ordinal"):
        flipped(path / f"history/{name}.npy", 0.9)
    data = Dataset.open(str(path))
    with pytest.raises(UserError, match=r"history/.*\.npy: damaged, it has another content"):
        data.verify()


def test_damaged_shards_may_be_skipped_and_nothing_else(path: Path) -> None:
    shard = next((path / "rows").glob("*.tar"))
    shortened(shard)
    with pytest.raises(UserError, match=rf"{shard.name}: damaged, it has .* bytes"):
        Dataset.open(str(path))
    Dataset.open(str(path), "skip")
    shard.unlink()
    Dataset.open(str(path), "skip").verify()
    emptied(next((path / "rows").glob("*.json")))
    with pytest.raises(UserError, match=r"index\.json: damaged, it has 0 bytes"):
        Dataset.open(str(path), "skip")


def test_a_dataset_without_checksums_is_said_to_have_none(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (path / CHECKSUMS).unlink()
    with caplog.at_level(logging.INFO):
        verify(path, 1, 2, [])
        assert not caplog.messages
        verify(path, 0, 2, [])
    assert [message for message in caplog.messages if "only its structure is checked" in message]


def test_a_description_or_index_of_gigabytes_is_refused_before_it_is_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("schema", "shards"):
        monkeypatch.setattr(f"trainer.data.format.{module}.MAX_JSON_BYTES", 100_000)
    for checked in (True, False):
        if not checked:
            (path / CHECKSUMS).unlink()
        for name in ("dataset.json", next((path / "rows").glob("*.json")).name):
            file = next(path.rglob(name))
            whole = file.read_bytes()
            # A sparse file: it takes no place, and reading it would take all memory.
            with file.open("r+b") as opened:
                opened.truncate(1 << 40)
            with pytest.raises(UserError, match=rf"{name}: (damaged, it has 1,099,511,627,776 bytes|too large)"):
                Dataset.open(str(path))
            file.write_bytes(whole)


def test_copies_of_histories_on_a_url_are_verified(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setenv("LIMELIGHT_CACHE", str(tmp_path / "cache"))
    memory, url = fsspec.filesystem("memory"), f"memory://{tmp_path.name}-copied"
    memory.put(str(path), url, recursive=True)
    Dataset.open(url).verify()
    (copy,) = (tmp_path / "cache").glob("*/history/bits.npy")
    flipped(copy, 0.99)
    with pytest.raises(UserError, match=rf"{copy}: damaged, it differs from {url}/history/bits\.npy.*; remove "):
        Dataset.open(url).verify()
    shutil.rmtree(tmp_path / "cache")
    bits = memory.cat_file(f"{url}/history/bits.npy")
    memory.pipe_file(f"{url}/history/bits.npy", bits[:-1] + b"\7")
    with pytest.raises(UserError, match=r"bits\.npy: damaged"):
        Histories(url, Dataset.open(str(path)).spec)
    assert not list((tmp_path / "cache").rglob("*.npy"))
