"""Histories against a brute-force implementation of their definition."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.console.errors import UserError
from trainer.data.format import history as module
from trainer.data.format.history import FOLDER, Histories, HistoryWriter
from trainer.data.format.schema import DOMAINS, DatasetSpec, partition_of

RESULT = ("item_id", "author_id", "request_ms", "play_ms", "bits", "tag")


def make_visits(rng: np.random.Generator, n: int, users: np.ndarray, span: int = 50) -> dict[str, np.ndarray]:
    """Make visits with many ties in time; ``item_id`` numbers them."""
    request = rng.integers(0, span, n)
    return {
        "user_id": users[rng.integers(0, len(users), n)],
        "domain": rng.integers(0, len(DOMAINS), n).astype(np.int8),
        "item_id": np.arange(n),
        "author_id": rng.integers(0, 9, n),
        "request_ms": request,
        "play_ms": rng.integers(0, 10**6, n),
        "bits": rng.integers(0, 8, n).astype(np.int32),
        "tag": rng.integers(0, 5, n).astype(np.int32),
        "known_ms": request + rng.integers(0, 20, n),
    }


def spec(partitions: int = 3) -> DatasetSpec:
    return DatasetSpec("t", "", "", partitions, "UTC", ("a", "b", "c"), {}, ())


def write(path: Path, visits: dict[str, np.ndarray], partitions: int = 3) -> Histories:
    folder = path / FOLDER
    folder.mkdir(parents=True)
    writer = HistoryWriter(folder)
    owner = partition_of(visits["user_id"], partitions)
    for partition in range(partitions):
        writer.append({name: column[owner == partition] for name, column in visits.items()})
    writer.close()
    return Histories(path, spec(partitions))


def by_definition(visits, user, as_of, domain, length, require, limit) -> list[int]:
    """Return the visits that ``latest`` should return, oldest first; visits of one millisecond in written order."""
    known = [row for row in range(len(visits["user_id"])) if visits["user_id"][row] == user]
    known = [row for row in known if visits["known_ms"][row] < as_of]
    known.sort(key=lambda row: visits["known_ms"][row])
    known = [row for row in known[-limit:] if visits["domain"][row] == domain]
    if require:
        known = [row for row in known if visits["bits"][row] & require]
    return known[-length:] if length else []


def check(visits, histories, users, as_of, domain, length, require, limit=module.HISTORY_LIMIT) -> None:
    found = histories.latest(users, as_of, domain=domain, length=length, require=require)
    expected = [
        by_definition(visits, user, moment, domain, length, require, limit)
        for user, moment in zip(users, as_of, strict=True)
    ]
    assert found.lengths.tolist() == [len(rows) for rows in expected]
    rows = np.concatenate([np.empty(0, np.int64), *expected]).astype(np.int64)
    for name in RESULT:
        column = getattr(found, name)
        assert column.dtype == (np.int32 if name in ("bits", "tag") else np.int64)
        np.testing.assert_array_equal(column, visits[name][rows], err_msg=name)
    np.testing.assert_array_equal(found.domain, np.full(len(rows), domain, np.uint8))


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(0, 80),
    users=st.integers(1, 6),
    domain=st.integers(0, 1),
    length=st.integers(0, 12),
    require=st.integers(0, 7),
    limit=st.sampled_from([1, 5, 10_000]),
)
def test_latest_is_the_definition(tmp_path_factory, seed, n, users, domain, length, require, limit):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 2**62, users)
    visits = make_visits(rng, n, ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "HISTORY_LIMIT", limit)
        histories = write(tmp_path_factory.mktemp("history"), visits)
        asked = np.concatenate([ids, rng.integers(0, 2**62, 2), rng.choice(ids, 10)])
        as_of = rng.integers(-5, 75, len(asked))
        check(visits, histories, asked, as_of, domain, length, require, limit)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(0, 80), users=st.integers(1, 6), limit=st.sampled_from([1, 5, 10_000]))
def test_runs_are_the_definition(tmp_path_factory, seed, n, users, limit):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 2**62, users)
    visits = make_visits(rng, n, ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "HISTORY_LIMIT", limit)
        histories = write(tmp_path_factory.mktemp("history"), visits)
        asked = np.concatenate([ids, rng.integers(0, 2**62, 2), rng.choice(ids, 10)])
        as_of = rng.integers(-5, 75, len(asked))
        first, stop = histories.runs(asked, as_of)
    assert first.shape == stop.shape == (len(asked), len(DOMAINS))
    for row, (user, moment) in enumerate(zip(asked, as_of, strict=True)):
        for domain in range(len(DOMAINS)):
            expected = by_definition(visits, user, moment, domain, n + 1, 0, limit)
            run = slice(first[row, domain], stop[row, domain])
            for name in RESULT:
                np.testing.assert_array_equal(histories.column(name)[run], visits[name][expected], err_msg=name)


def test_ordinal_is_the_place_among_the_visits_of_all_domains(tmp_path):
    visits = make_visits(np.random.default_rng(8), 300, np.array([5, 6]))
    histories = write(tmp_path, visits)
    first, stop = histories.runs(np.array([5, 6]), np.array([99, 99]))
    for user in range(2):
        runs = [np.arange(first[user, domain], stop[user, domain]) for domain in range(len(DOMAINS))]
        merged = np.concatenate(runs)[np.argsort(np.concatenate([histories.column("ordinal")[run] for run in runs]))]
        expected = sorted(np.flatnonzero(visits["user_id"] == user + 5), key=lambda row: visits["known_ms"][row])
        assert histories.column("item_id")[merged].tolist() == expected


def test_datasets_without_tags_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMELIGHT_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "old", make_visits(np.random.default_rng(7), 50, np.arange(4)))
    (tmp_path / "old" / FOLDER / "tag.npy").unlink()
    memory, url = fsspec.filesystem("memory"), f"memory://{tmp_path.name}-old"
    memory.put(str(tmp_path / "old"), url, recursive=True)
    for histories in (Histories(tmp_path / "old", spec()), Histories(url, spec())):
        found = histories.latest(np.arange(4), np.full(4, 99), domain=0, length=9)
        assert len(found.tag) == len(found.item_id) > 0
        assert found.tag.dtype == np.int32 and not found.tag.any()


@pytest.mark.parametrize("require", [0, 2])
def test_ties_are_strict_and_stable(tmp_path, require):
    visits = make_visits(np.random.default_rng(1), 400, np.arange(3), span=5)
    histories = write(tmp_path, visits)
    users, as_of = np.repeat(np.arange(3), 25), np.tile(np.arange(25), 3)
    check(visits, histories, users, as_of, 0, 1000, require)
    check(visits, histories, users, as_of, 1, 3, require)


def test_more_visits_than_the_limit(tmp_path):
    """The limit counts both domains: visits of one domain displace those of the other."""
    n = module.HISTORY_LIMIT + 500
    visits = make_visits(np.random.default_rng(2), n, np.array([7]), span=10**6)
    visits["known_ms"] = np.arange(n) * 10
    histories = write(tmp_path, visits)
    as_of = np.array([n * 10, n * 10 - 2005, 10 * module.HISTORY_LIMIT, 10 * module.HISTORY_LIMIT + 1, 50])
    for domain in range(len(DOMAINS)):
        check(visits, histories, np.full(5, 7), as_of, domain, n, 0)
        check(visits, histories, np.full(5, 7), as_of, domain, n, 1)


@pytest.mark.parametrize("seed", range(3))
def test_the_future_can_be_anything(tmp_path, seed):
    """Changing or removing visits that were not known at a moment changes no read as of that moment."""
    rng = np.random.default_rng(seed)
    visits = make_visits(rng, 600, np.arange(10))
    moment = 30
    unknown = np.flatnonzero(visits["known_ms"] >= moment)
    altered = {name: column.copy() for name, column in visits.items()}
    for name in ("item_id", "author_id", "play_ms", "bits", "user_id", "domain"):
        altered[name][unknown] = altered[name][rng.permutation(unknown)]
    altered["known_ms"][unknown] = moment + rng.integers(0, 5, len(unknown))
    kept = np.setdiff1d(np.arange(600), unknown[::2])
    removed = {name: column[kept] for name, column in altered.items()}

    users, as_of = np.repeat(np.arange(10), moment + 1), np.tile(np.arange(moment + 1), 10)
    before = write(tmp_path / "before", visits)
    for name, other in (("altered", altered), ("removed", removed)):
        after = write(tmp_path / name, other)
        for domain in range(len(DOMAINS)):
            for require in (0, 5):
                reads = [
                    each.latest(users, as_of, domain=domain, length=30, require=require) for each in (before, after)
                ]
                for column in ("lengths", *RESULT):
                    np.testing.assert_array_equal(getattr(reads[0], column), getattr(reads[1], column))
        assert after.latest(users, as_of + 99, domain=0, length=30).item_id.tolist() != reads[0].item_id.tolist()


def test_nobody_has_a_history(tmp_path):
    histories = write(tmp_path, make_visits(np.random.default_rng(0), 0, np.arange(1)))
    found = histories.latest(np.array([1, 2]), np.array([5, 5]), domain=0, length=3, require=1)
    assert (found.lengths.tolist(), found.item_id.tolist()) == ([0, 0], [])
    users, entries = histories.lengths()
    assert users.shape == (0,) and entries.shape == (0, len(DOMAINS))
    assert histories.latest(np.empty(0, np.int64), np.empty(0, np.int64), domain=0, length=3).lengths.shape == (0,)


def test_lengths_are_counts_of_entries(tmp_path):
    visits = make_visits(np.random.default_rng(3), 100, np.array([40, 2, 9]))
    users, entries = write(tmp_path, visits).lengths()
    assert users.tolist() == [2, 9, 40]
    expected = [[((visits["user_id"] == user) & (visits["domain"] == d)).sum() for d in range(2)] for user in users]
    np.testing.assert_array_equal(entries, expected)


def _read(histories: Histories, queue) -> None:
    queue.put(histories.latest(np.arange(5), np.full(5, 40), domain=0, length=9, require=1).item_id)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(tmp_path, method):
    histories = write(tmp_path, make_visits(np.random.default_rng(4), 300, np.arange(5)))
    here = histories.latest(np.arange(5), np.full(5, 40), domain=0, length=9, require=1).item_id
    if method == "fork":
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=_read, args=(histories, queue))
        process.start()
        there = queue.get(timeout=600)
        process.join()
    else:
        pickled = pickle.dumps(histories)
        assert len(pickled) < 1000
        there = pickle.loads(pickled).latest(np.arange(5), np.full(5, 40), domain=0, length=9, require=1).item_id
    np.testing.assert_array_equal(there, here)


def test_remote_histories_are_copied_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMELIGHT_CACHE", str(tmp_path / "cache"))
    local = write(tmp_path / "local", make_visits(np.random.default_rng(5), 50, np.arange(4)))
    memory = fsspec.filesystem("memory")
    url = f"memory://{tmp_path.name}-histories"
    memory.put(str(tmp_path / "local"), url, recursive=True)
    for _ in range(2):
        remote = Histories(url, spec())
        asked = (np.arange(4), np.full(4, 40))
        np.testing.assert_array_equal(
            remote.latest(*asked, domain=1, length=5).item_id, local.latest(*asked, domain=1, length=5).item_id
        )
        if memory.exists(url):
            memory.rm(url, recursive=True)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    with pytest.raises(UserError, match="has no histories"):
        Histories(f"memory://{tmp_path.name}-elsewhere", spec())
    monkeypatch.setenv("LIMELIGHT_CACHE", "s3://bucket/cache")
    with pytest.raises(UserError, match="s3://bucket/cache: LIMELIGHT_CACHE must be on a local or shared file system"):
        Histories(url, spec())
    assert [file.name for file in (tmp_path / "cache").glob("*/*")] == [FOLDER]


def test_missing_or_damaged_files_are_named(tmp_path):
    write(tmp_path, make_visits(np.random.default_rng(6), 50, np.arange(4)))
    (tmp_path / FOLDER / "bits.npy").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=FOLDER):
        Histories(tmp_path, spec())
    with pytest.raises(UserError, match="nowhere"):
        Histories(tmp_path / "nowhere", spec())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda offsets: offsets.__setitem__((1, 1), offsets[1, 2] + 1), "user 2 has runs at 3, 7, 6 of 9 entries"),
        (lambda offsets: offsets.__setitem__((1, 1), offsets[1, 0] - 1), "user 2 has runs at 3, 2, 6 of 9 entries"),
        (lambda offsets: offsets.__setitem__((2, 2), 10), "user 3 has runs at 6, 8, 10 of 9 entries"),
        (lambda offsets: offsets.__setitem__((0, 0), -1), "user 1 has runs at -1, 2, 3 of 9 entries"),
        (lambda offsets: offsets.__setitem__((1, 0), 4), "the runs of the users leave gaps or overlap at entry 3"),
        (lambda offsets: offsets.__setitem__((2, 2), 8), "the runs of the users leave gaps or overlap at entry 8"),
    ],
)
def test_runs_that_do_not_follow_each_other_are_refused(tmp_path, change, message):
    visits = make_visits(np.random.default_rng(6), 9, np.arange(4))
    visits |= {"user_id": np.repeat([1, 2, 3], 3), "domain": np.array([0, 0, 1] * 3, np.int8)}
    write(tmp_path, visits, partitions=1)
    file = tmp_path / FOLDER / "offsets.npy"
    offsets = np.load(file)
    assert offsets.tolist() == [[0, 2, 3], [3, 5, 6], [6, 8, 9]]
    change(offsets)
    np.save(file, offsets)
    with pytest.raises(UserError, match=message):
        Histories(tmp_path, spec(1))
