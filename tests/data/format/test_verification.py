"""A damaged file of a dataset is refused or found, whatever the damage; nothing else is ever read silently."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.format.damage import ANY_FILE, HISTORY, INDEX, content, flipped
from trainer.console.errors import UserError
from trainer.data.format.content_vectors import ContentVectors
from trainer.data.format.dataset_files import list_files
from trainer.data.format.verification import Verification, record_dataset, verify_dataset
from trainer.data.simulator.write_dataset import simulate
from trainer.runtime.checksums import CHECKSUMS

FAST = ("zeros", "flipped", "shortened", "fifo")
"""Damages that the fast test tries on every file."""


def ignore(what: str, done: int, total: int) -> None:
    """Report no progress."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated dataset with all kinds of files."""
    path = tmp_path_factory.mktemp("verification") / "dataset"
    simulate(path, 30, 2, 2, 1, texts=True)
    return path


@pytest.fixture(scope="module")
def before(world: Path) -> str:
    """Digest of the undamaged content."""
    return content(world)


@pytest.fixture
def dataset(world: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(world, tmp_path / "dataset"))


@pytest.fixture
def earlier(dataset: Path) -> Path:
    """A copy in the form of an earlier version."""
    (dataset / CHECKSUMS).unlink()
    return dataset


def check_refused(path: Path, name: str) -> None:
    """Check that reading refuses a dataset, and that verification finds one damage; both name the file."""
    with pytest.raises(UserError) as refused:
        content(path)
    assert name in str(refused.value) and "\n" not in str(refused.value)
    (problem,) = verify_dataset(str(path), ignore).problems
    assert name in problem and "\n" not in problem


def restore(world: Path, path: Path, name: str) -> None:
    """Undo the damage of a file."""
    file = path / name
    if file.is_dir():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)
    shutil.copy(world / name, file)


@pytest.mark.parametrize("damages", [FAST, pytest.param(tuple(ANY_FILE), marks=pytest.mark.slow)])
def test_no_damage_of_any_file_is_read_silently(world, before, dataset, damages):
    names = [*list_files(world), CHECKSUMS]
    assert len(names) > 25
    for name in names:
        for damage in damages:
            if (name, damage) == (CHECKSUMS, "removed"):
                continue
            ANY_FILE[damage](dataset / name)
            check_refused(dataset, name)
            restore(world, dataset, name)
    assert content(dataset) == before
    assert not verify_dataset(str(dataset), ignore).problems


@pytest.mark.slow
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), place=st.floats(0, 1), bit=st.integers(0, 7))
def test_one_bit_anywhere_is_found(world, before, dataset, data, place, bit):
    name = data.draw(st.sampled_from([*list_files(world), CHECKSUMS]))
    flipped(dataset / name, place, bit)
    try:
        try:
            # The headers in a tar are for other readers; a record behind a damaged one is read as it was written.
            assert content(dataset) == before and name.endswith(".tar")
        except UserError as refused:
            assert name in str(refused) and "\n" not in str(refused)
        (problem,) = verify_dataset(str(dataset), ignore).problems
        assert name in problem and "\n" not in problem
    finally:
        restore(world, dataset, name)


def test_two_files_that_are_swapped_are_found(world, dataset):
    pairs = [
        ("rows/part-00000.index.json", "rows/part-00001.index.json"),
        ("history/item_id.npy", "history/author_id.npy"),
        ("history/bits.npy", "history/tag.npy"),
        ("events/part-00000.parquet", "events/part-00001.parquet"),
        ("texts/items.parquet", "items.parquet"),
    ]
    for first, second in pairs:
        shutil.copy(world / first, dataset / second)
        shutil.copy(world / second, dataset / first)
        with pytest.raises(UserError, match=f"({first}|{second}): damaged"):
            content(dataset)
        assert len(verify_dataset(str(dataset), ignore).problems) == 2
        restore(world, dataset, first)
        restore(world, dataset, second)


def test_every_damaged_file_has_a_line_of_its_own(dataset):
    for name in ("history/bits.npy", "rows/part-00001-000000.tar", "users.parquet"):
        flipped(dataset / name)
    (dataset / "texts/items.parquet").unlink()
    problems = verify_dataset(str(dataset), ignore).problems
    names = ("texts/items.parquet", "history/bits.npy", "rows/part-00001-000000.tar", "users.parquet")
    assert len(problems) == len(names)
    assert all(any(name in problem for problem in problems) for name in names)


@pytest.mark.parametrize("damage", INDEX)
def test_an_index_that_differs_from_the_shards_is_refused_without_checksums(earlier, damage):
    name = "rows/part-00001.index.json"
    INDEX[damage](earlier / name)
    with pytest.raises(UserError, match=r"index\.json|part-00001-000000\.tar") as refused:
        content(earlier)
    assert "\n" not in str(refused.value)
    (problem,) = verify_dataset(str(earlier), ignore).problems
    assert "rows/" in problem and "\n" not in problem


@pytest.mark.parametrize("damage", HISTORY)
def test_histories_that_do_not_fit_together_are_refused_without_checksums(earlier, damage):
    column, harm = HISTORY[damage]
    harm(earlier / f"history/{column}.npy")
    check_refused(earlier, "history/")


def test_a_dataset_of_an_earlier_version_is_read_and_verified_as_far_as_it_goes(earlier, before, caplog):
    assert content(earlier) == before
    result = verify_dataset(str(earlier), ignore)
    assert not result.problems and not result.has_checksums
    assert "there are no checksums to compare" in str(result) and "--record" in str(result)


def test_values_that_no_writer_makes_are_found_without_checksums(earlier):
    harms = {
        "bits": lambda column: column | 1 << 30,
        "tag": lambda column: column + 10_000,
        "ordinal": lambda column: column - 5,
        "item_id": lambda column: -column - 1,
        "request_ms": lambda column: column + (1 << 50),
    }
    for name, harm in harms.items():
        file = earlier / f"history/{name}.npy"
        column = np.load(file)
        np.save(file, harm(column))
        (problem,) = verify_dataset(str(earlier), ignore).problems
        assert f"history/{name}.npy: damaged, entry " in problem
        np.save(file, column)
    shutil.copy(earlier / "events/part-00000.parquet", earlier / "events/part-00001.parquet")
    (problem,) = verify_dataset(str(earlier), ignore).problems
    assert "events/part-00001.parquet: damaged, user_id of an event" in problem


def test_changed_files_can_be_recorded_if_they_fit_together(dataset):
    (dataset / "run").mkdir()
    (dataset / "run/notes.txt").write_text("of another program")
    shutil.copy(dataset / "texts/items.parquet", dataset / "texts/more.parquet")
    result = verify_dataset(str(dataset), ignore)
    assert "without a checksum, so not compared: texts/more.parquet" in str(result)
    assert result.unlisted == ("texts/more.parquet",)
    described = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps({**described, "source": "another source"}))
    with pytest.raises(UserError, match=r"dataset\.json: damaged.* --record"):
        content(dataset)
    assert not record_dataset(str(dataset), ignore).unlisted
    content(dataset)

    recorded = (dataset / CHECKSUMS).read_bytes()
    (dataset / "dataset.json").write_text(json.dumps({**described, "rows": described["rows"] + 1}))
    with pytest.raises(UserError, match=r"index\.json: damaged, they list .* \(nothing was recorded\)"):
        record_dataset(str(dataset), ignore)
    assert (dataset / CHECKSUMS).read_bytes() == recorded
    with pytest.raises(UserError, match="no dataset here"):
        record_dataset(str(dataset / "rows"), ignore)
    assert not (dataset / "rows" / CHECKSUMS).exists()


def test_embedding_tables_have_checksums_of_their_own(dataset):
    folder = dataset / "embeddings" / "items"
    ContentVectors.write(folder, np.arange(9), np.eye(9, 4))
    result = verify_dataset(str(dataset), ignore)
    assert not result.problems and not result.unlisted
    table = ContentVectors.write(folder, np.arange(9), np.eye(9, 5))
    assert not verify_dataset(str(dataset), ignore).problems
    for file in sorted(table.path.glob("*.npy")):
        whole = file.read_bytes()
        flipped(file, 0.99)
        (problem,) = verify_dataset(str(dataset), ignore).problems
        assert file.name in problem and "\n" not in problem
        file.write_bytes(whole)


def test_a_dataset_on_a_url_is_verified(world, tmp_path):
    memory = fsspec.filesystem("memory")
    url = f"memory://{tmp_path.name}-verified"
    memory.put(str(world), url, recursive=True)
    assert not verify_dataset(url, ignore).problems
    bits = memory.cat_file(f"{url}/history/bits.npy")
    memory.pipe_file(f"{url}/history/bits.npy", bits[:-1] + bytes([bits[-1] ^ 1]))
    memory.rm_file(f"{url}/users.parquet")
    problems = verify_dataset(url, ignore).problems
    assert [problem.split()[0] for problem in problems] == [f"{url}/users.parquet", f"{url}/history/bits.npy:"]


@pytest.mark.parametrize(
    ("count", "text"), [(1, "0.npy"), (3, "0.npy, 1.npy, 2.npy"), (4, "0.npy, 1.npy, 2.npy and 1 more")]
)
def test_three_files_without_a_checksum_are_named_and_all_others_counted(count: int, text: str) -> None:
    result = Verification("world", 2, 20, True, tuple(f"{number}.npy" for number in range(count)), ())
    assert str(result).splitlines()[-1] == f"without a checksum, so not compared: {text}"
