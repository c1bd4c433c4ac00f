"""Pre-trained vectors of a batch against a reference that finds the vector of each id separately."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.config.features import ContentConfig, FeatureConfig, HistoryConfig
from trainer.console.errors import UserError
from trainer.data.features.content_inputs import ContentReader, open_reader
from trainer.data.features.content_tables import (
    TableFacts,
    carried_tables,
    carry_tables,
    check_places,
    check_tables,
    inside_dataset,
    open_segments,
    open_tables,
    segment_files,
)
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import FittedFeatures, fit_features
from trainer.data.format.content_vectors import ContentVectors, Origin
from trainer.data.format.dataset import Dataset
from trainer.data.format.history import HistorySlice
from trainer.data.format.schema import DOMAINS, Rows
from trainer.data.format.segments import DatasetSegments
from trainer.data.format.time_selection import Selection
from trainer.data.loading.batch import RankingBatch, empty_batch, unpack
from trainer.data.loading.loader import Loader

HISTORY = {
    "short": HistoryConfig(domain="video", length=5),
    "live": HistoryConfig(domain="live", length=4),
    "both": HistoryConfig(domain="both", length=6),
}
LIVE = DOMAINS.index("live")


def content(**tables: dict[str, Any]) -> FeatureConfig:
    """Return a section with tables whose places do not matter."""
    return FeatureConfig(
        history=HISTORY, content={name: ContentConfig(table="t", dim=3, **keys) for name, keys in tables.items()}
    )


CONFIG = content(
    title={"of": "item", "histories": True},
    person={"of": "author"},
    air={"of": "segment", "histories": True},
    watched={"of": "segment", "histories": True, "on_air": "longest", "reading": "mean"},
)


def make_tables(path: Path, segments: DatasetSegments, seed: int = 0) -> dict[str, ContentVectors]:
    """Write a table of each kind with vectors of about half of the ids."""
    rng = np.random.default_rng(seed)

    def write(name: str, ids: np.ndarray, width: int, dtype: str) -> ContentVectors:
        some = rng.permutation(ids)[: len(ids) // 2 + 1]
        return ContentVectors.write(path / name, some, rng.standard_normal((len(some), width)), dtype=dtype)

    return {
        "title": write("title", np.arange(200), 5, "float16"),
        "person": write("person", np.arange(30), 3, "float32"),
        "air": write("air", segments.ids, 7, "float16"),
        "watched": write("watched", segments.ids, 2, "float16"),
    }


def make_segments(dataset: Any, seed: int) -> DatasetSegments:
    """Draw segments that begin near the visits to live rooms, some of them known late."""
    rng, n = np.random.default_rng(seed), 3000
    live = np.flatnonzero(dataset.visits["domain"] == LIVE)
    of_visit = rng.choice(live, n)
    start = dataset.visits["request_ms"][of_visit] + rng.integers(-40_000, 40_000, n)
    return DatasetSegments(
        "segments.parquet",
        np.cumsum(rng.integers(1, 4, n)),
        dataset.visits["item_id"][of_visit],
        rng.integers(-1, 22, n),
        start,
        start + 30_000 + rng.integers(0, 10, n) ** 7,
    )


def make_map(dataset: Any, tables: dict[str, ContentVectors], segments: DatasetSegments, config: FeatureConfig) -> Any:
    data = Dataset.open(str(dataset.path))
    fitted = fit_features(data.spec, data.store, data.histories, config, Selection(), tables)
    of = {name: segments for name, own in config.content.items() if own.of == "segment"}
    return FeatureMap(data.spec, config, fitted, content=ContentReader(config.content, tables, of)), data


def values_of(batch: RankingBatch) -> dict[str, list[list[float] | None]]:
    """Return lookup -> vector of each id, None without one."""
    found = {}
    for of_table in batch.content.values():
        vectors = of_table.vectors.float().tolist()
        for name, places in of_table.places.items():
            found[name] = [vectors[place] if place >= 0 else None for place in places.tolist()]
        used = set(torch.cat(list(of_table.places.values())).tolist()) - {-1}
        assert used == set(range(len(vectors))), "each vector is there once and is used"
    return found


def plain_segment(table: ContentVectors, segments: DatasetSegments, chosen: list[int]) -> list[float] | None:
    return table.vectors[table.lookup(segments.ids[chosen[-1:]])[0]].astype(np.float32).tolist() if chosen else None


def reference(
    tables: dict[str, ContentVectors], segments: DatasetSegments, rows: Rows, visits: dict[str, HistorySlice]
) -> dict[str, list[list[float] | None]]:
    """Find the vector of each id by a look at all segments, or at all owners."""

    def owner(table: ContentVectors, ids: np.ndarray) -> list[list[float] | None]:
        by_id = dict(zip(table.ids.tolist(), table.vectors.astype(np.float32).tolist(), strict=True))
        return [by_id.get(each) for each in ids.tolist()]

    found = {"title": owner(tables["title"], rows["item_id"]), "person": owner(tables["person"], rows["author_id"])}
    found |= {f"{name}_title": owner(tables["title"], entries.item_id) for name, entries in visits.items()}
    for name in ("air", "watched"):
        table = tables[name]
        have = table.lookup(segments.ids) >= 0
        found[name] = []
        for author, now in zip(rows["author_id"].tolist(), rows["request_ms"].tolist(), strict=True):
            chosen = np.flatnonzero(have & (segments.author_id == author) & (segments.known_ms <= now))
            # By the time from which they are known; of equal ones the later id is the later segment.
            chosen = chosen[np.argsort(segments.known_ms[chosen], kind="stable")]
            if name == "air" or not len(chosen):
                found[name].append(plain_segment(table, segments, chosen.tolist()))
            else:
                total = np.zeros(table.dim)
                for vector in table.vectors[table.lookup(segments.ids[chosen])]:
                    total += vector.astype(np.float64)
                found[name].append((total / len(chosen)).astype(np.float32).tolist())
        for history, entries in visits.items():
            row = np.repeat(np.arange(len(rows["request_ms"])), entries.lengths)
            values = found.setdefault(f"{history}_{name}", [])
            for entry, now in enumerate(rows["request_ms"][row].tolist()):
                begin = int(entries.request_ms[entry])
                end = begin + max(int(entries.play_ms[entry]), 1)
                of_room = have & (segments.item_id == entries.item_id[entry]) & (segments.known_ms <= now)
                of_room &= entries.domain[entry] == LIVE
                start = segments.start_ms
                if name == "air":
                    chosen = np.flatnonzero(of_room & (start <= begin) & (begin < start + 30_000))
                    chosen = chosen[np.argsort(start[chosen], kind="stable")]
                else:
                    overlap = np.minimum(start + 30_000, end) - np.maximum(start, begin)
                    chosen = np.flatnonzero(of_room & (overlap > 0))
                    # The largest overlap comes last; of equal ones the earliest segment.
                    chosen = chosen[np.lexsort((-chosen, -start[chosen], overlap[chosen]))]
                values.append(plain_segment(table, segments, chosen.tolist()))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_has_the_vectors_of_a_search_through_all_of_them(write_dataset: Any, tmp_path: Path, seed: int) -> None:
    dataset = write_dataset(seed=seed, rows=300)
    segments = make_segments(dataset, seed)
    tables = make_tables(tmp_path, segments, seed)
    features, data = make_map(dataset, tables, segments, CONFIG)
    rows = dataset.rows
    packed = features.pack(rows, data.histories, rows["request_ms"])
    batch = unpack(packed, features.layout, {})
    expected = reference(tables, segments, rows, features.read_histories(rows, data.histories, rows["request_ms"]))
    found = values_of(batch)
    assert found.keys() == expected.keys()
    for name, of_lookup in expected.items():
        assert found[name] == of_lookup, name
        if not name.startswith("short_") or name == "short_title":
            assert 0.02 < sum(value is None for value in of_lookup) / len(of_lookup) < 0.98, f"{name} proves little"
    slices = features.read_histories(rows, data.histories, rows["request_ms"])
    for name, own in CONFIG.content.items():
        # Videos have no segments, so they are not counted for them.
        entries = [
            value
            for history, visits in slices.items()
            for value, domain in zip(expected.get(f"{history}_{name}", []), visits.domain, strict=False)
            if own.of != "segment" or domain == LIVE
        ]
        counts = batch.missing[f"no_vector/{name}"]
        assert counts == (sum(v is None for v in expected[name]), 300, sum(v is None for v in entries), len(entries))
    # The rest of the batch is that of a model without vectors.
    plain = FeatureMap(data.spec, CONFIG.model_copy(update={"content": {}}), features.fitted)
    without = plain.pack(rows, data.histories, rows["request_ms"])
    assert without.vectors is None and without.buffers == [without.integers, without.floats]
    for (_, one, lengths, _), (_, other, other_lengths, _) in zip(
        packed.ids(features.layout), without.ids(plain.layout), strict=True
    ):
        assert torch.equal(one, other) and torch.equal(lengths, other_lengths)
    for name, column in without.columns(plain.layout).items():
        assert torch.equal(packed.columns(features.layout)[name], column), name


@pytest.mark.parametrize("seed", range(3))
def test_segments_that_become_known_later_change_no_feature(write_dataset: Any, tmp_path: Path, seed: int) -> None:
    dataset = write_dataset(seed=seed, rows=200)
    segments, rng = make_segments(dataset, seed), np.random.default_rng(seed)
    now = int(np.median(dataset.rows["request_ms"]))
    rows = {name: column[dataset.rows["request_ms"] <= now] for name, column in dataset.rows.items()}
    config = CONFIG.model_copy(update={"content": {name: CONFIG.content[name] for name in ("air", "watched")}})

    def found(changed: DatasetSegments, draw: int) -> dict[str, list[list[float] | None]]:
        """Read the vectors; those of segments that become known later are drawn anew."""
        tables, place = {}, tmp_path / str(draw)
        for name in config.content:
            vectors = np.random.default_rng(7).standard_normal((1 << 14, 4))[changed.ids]
            late = changed.known_ms > now
            vectors[late] = np.random.default_rng(draw).standard_normal((int(late.sum()), 4))
            tables[name] = ContentVectors.write(place / name, changed.ids, vectors)
        features, data = make_map(dataset, tables, changed, config)
        return values_of(unpack(features.pack(rows, data.histories, rows["request_ms"]), features.layout, {}))

    before = found(segments, 1)
    assert all(any(value is not None for value in before[name]) for name in ("air", "live_watched", "watched"))
    late = np.flatnonzero(segments.known_ms > now)
    assert 300 < len(late) < len(segments) - 300
    # Some are removed, and the others get another room, author, start and time, still after the request.
    removed = np.isin(np.arange(len(segments)), late[::3])
    kept = {name: getattr(segments, name)[~removed].copy() for name in ("ids", "item_id", "author_id", "start_ms")}
    known = segments.known_ms[~removed].copy()
    change = known > now
    for name in ("item_id", "author_id", "start_ms"):
        kept[name][change] = rng.permutation(kept[name][change])
    known[change] = now + 1 + rng.integers(0, 10**9, int(change.sum()))
    assert found(DatasetSegments("s", **kept, known_ms=known), 2) == before


@pytest.fixture
def made(write_dataset: Any, tmp_path: Path) -> Any:
    dataset = write_dataset(rows=500)
    segments = make_segments(dataset, 0)
    return (*make_map(dataset, make_tables(tmp_path, segments), segments, CONFIG), dataset.rows)


def test_vectors_of_a_batch_do_not_depend_on_the_other_rows(made: Any) -> None:
    features, data, rows = made

    def values(part: slice) -> dict[str, Any]:
        chosen = {name: column[part] for name, column in rows.items()}
        return values_of(unpack(features.pack(chosen, data.histories, chosen["request_ms"]), features.layout, {}))

    whole, cut = values(slice(0, 500)), [values(slice(at, at + 77)) for at in range(0, 500, 77)]
    for name, of_lookup in whole.items():
        assert [value for part in cut for value in part[name]] == of_lookup, name


def test_worker_processes_make_the_same_vectors(made: Any) -> None:
    features, data, _ = made
    options: dict[str, Any] = {"rank": 0, "world": 1, "batch_size": 120, "seed": 3}
    batches = [
        [values_of(batch) for batch in Loader(data.store, data.histories, features, workers=workers, **options)]
        for workers in (0, 2)
    ]
    assert batches[0] == batches[1] and len(batches[0]) == 5


def test_a_batch_of_no_rows_has_no_vectors_of_each_table(made: Any) -> None:
    features, data, rows = made
    nobody = {name: column[:0] for name, column in rows.items()}
    features.prepare(data.histories)
    packed = unpack(features.pack(nobody, data.histories, nobody["request_ms"]), features.layout, {})
    for batch in (packed, empty_batch(features.layout)):
        for name, width, dtype in (("title", 5, torch.float16), ("person", 3, torch.float32), ("watched", 2, None)):
            of_table = batch.content[name]
            assert of_table.vectors.shape == (0, width) and of_table.vectors.dtype == (dtype or torch.float32)
            assert all(places.shape == (0,) and places.dtype == torch.int64 for places in of_table.places.values())
        assert batch.content["air"].places.keys() == {"air", "short_air", "live_air", "both_air"}
        moved = batch.to(torch.device("cpu"))
        assert moved.content.keys() == batch.content.keys()


def test_histories_have_the_vectors_before_the_context(made: Any) -> None:
    features, _, _ = made
    assert features.sequences[0].keys == tuple(
        f"short_{key}" for key in ("item", "author", "title", "air", "watched", "context")
    )
    assert features.sequences[0].query == ("item", "author", "title", "air", "watched")


def test_features_without_open_tables_make_no_batch(made: Any) -> None:
    features, data, rows = made
    closed = FeatureMap(data.spec, CONFIG, features.fitted)
    assert closed.layout == features.layout
    with pytest.raises(AssertionError, match="tables are not open"):
        closed.pack(rows, data.histories, rows["request_ms"])


def test_facts_of_the_tables_are_kept_with_the_fitted_features(made: Any, tmp_path: Path) -> None:
    features, _, _ = made
    (tmp_path / "fitted").mkdir()
    features.fitted.save(tmp_path / "fitted")
    loaded = FittedFeatures.load(tmp_path / "fitted").content
    assert loaded == features.fitted.content and loaded["title"].width == 5
    replace(features.fitted, content={}).save(tmp_path / "fitted")
    assert "content" not in (tmp_path / "fitted" / "features.json").read_text()


def test_a_table_of_something_else_is_refused_when_the_features_are_fitted(write_dataset: Any, tmp_path: Path) -> None:
    dataset = write_dataset(rows=200)
    data = Dataset.open(str(dataset.path))
    table = ContentVectors.write(tmp_path / "far", np.arange(200, 400), np.ones((200, 2)))
    with pytest.raises(UserError, match="has a vector of no item of the training rows; it may be of another dataset"):
        fit_features(data.spec, data.store, data.histories, content(title={}), Selection(), {"title": table})


def job(table: object, **keys: Any) -> FeatureConfig:
    return FeatureConfig(content={"title": ContentConfig(table=str(table), **keys)})


def write_table(path: Path, value: float = 1.0, width: int = 3, model: str = "m", dtype: str = "float16") -> Path:
    vectors = np.full((4, width), value)
    ContentVectors.write(path, np.arange(4), vectors, origin=Origin(model=model, hash=f"hash of {model}"), dtype=dtype)
    return path


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("s3://bucket/vectors", "vectors are memory-mapped; copy the table to a local path"),
        ("nowhere", "no embedding table here"),
        ("empty", "has no vectors; at least one is needed"),
    ],
)
def test_tables_that_cannot_be_read_are_refused_in_one_line(
    tmp_path: Path, table: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ContentVectors.write("empty", np.zeros(0, np.int64), np.zeros((0, 3)))
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        open_tables(job(table))
    assert str(refused.value).startswith(f"features.content.title.table = {table}: ")
    assert "\n" not in str(refused.value)
    if table != "empty":
        with pytest.raises(UserError, match=re.escape(message)):
            check_places(job(table))


def test_tables_that_are_open_are_not_opened_again(tmp_path: Path) -> None:
    config = job(write_table(tmp_path / "table"))
    tables = open_tables(config)
    fitted = {"title": TableFacts.of(tables["title"])}
    (tmp_path / "table").rename(tmp_path / "moved")
    assert open_reader(config, str(tmp_path), fitted, tables) is not None
    with pytest.raises(UserError, match="no embedding table here"):
        open_reader(config, str(tmp_path), fitted)
    (tmp_path / "moved").rename(tmp_path / "table")
    assert open_reader(config, str(tmp_path), fitted) is not None
    assert open_reader(FeatureConfig(), str(tmp_path), {}) is None


@pytest.mark.parametrize(
    ("change", "accepted", "message"),
    [
        ({}, (), None),
        ({"value": 2.0}, (), "the table has changed since training (4 vectors with hash"),
        ({"value": 2.0}, ("title",), None),
        ({"value": 2.0}, ("other",), "the command of the run with resume.allow_new_data=true accepts it"),
        ({"width": 4}, ("title",), "the vectors are of another kind (3 x float16"),
        ({"dtype": "float32"}, ("title",), "of another kind"),
        (
            {"model": "n"},
            ("title",),
            "of another kind (3 x float16, m hash of m in training, 3 x float16, n hash of n now)",
        ),
    ],
)
def test_a_table_that_changed_is_refused_unless_it_is_accepted(
    tmp_path: Path, change: dict[str, Any], accepted: tuple[str, ...], message: str | None
) -> None:
    config = job(write_table(tmp_path / "table"))
    fitted = {"title": TableFacts.of(open_tables(config)["title"])}
    write_table(tmp_path / "table", **change)
    tables = open_tables(config)
    if message is None:
        check_tables(config, fitted, tables, accepted, {})
        return
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        check_tables(config, fitted, tables, accepted, {})
    assert str(refused.value).startswith("features.content.title.table = ") and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        ("nothing", True),
        ("a later segment", True),
        ("an earlier segment", False),
        ("a vector", False),
        ("a segment less", False),
        ("item_id", False),
        ("author_id", False),
        ("start_ms", False),
        ("known_ms", False),
    ],
)
def test_a_table_of_segments_may_get_later_ones_and_no_other_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, accepted: bool
) -> None:
    """A dataset whose segments have other times or rooms is another one, although the table is the same."""
    n, rng = 8, np.random.default_rng(3)
    known = np.array([40, 50, 40, 60, 50, 70, 80, 45])
    columns = {name: rng.integers(0, 5, n) for name in ("item_id", "author_id", "start_ms")} | {"known_ms": known}
    vectors = rng.standard_normal((n, 3))
    ids = np.arange(n)
    config = job(tmp_path / "table", of="segment")

    def opened(rows: np.ndarray) -> tuple[Any, Any]:
        ContentVectors.write(tmp_path / "table", rows, vectors[rows])
        segments = DatasetSegments("d/segments.parquet", ids, **{name: c.copy() for name, c in columns.items()})
        monkeypatch.setattr(DatasetSegments, "read", lambda dataset, embedded: segments)
        tables = open_tables(config)
        return tables, open_segments(config, "d", tables)

    # The vectors of the segments 3 (known at 60), 5 and 6 come later.
    rows = np.array([0, 1, 2, 4])
    tables, segments = opened(rows)
    fitted = {"title": TableFacts.of(tables["title"], segments["title"])}
    if change == "a later segment":
        rows = np.array([0, 1, 2, 3, 4, 6])
    elif change == "an earlier segment":
        rows = np.array([0, 1, 2, 4, 7])
    elif change == "a segment less":
        rows = rows[:-1]
    elif change == "a vector":
        vectors[2] += 1
    elif change != "nothing":
        columns[change][4] -= 1
    tables, segments = opened(rows)
    if accepted:
        check_tables(config, fitted, tables, (), segments)
    else:
        message = (
            "the table has changed since training" if change not in columns else "other rooms, authors or times in d/"
        )
        with pytest.raises(UserError, match=f"{message}.*; later segments may be added"):
            check_tables(config, fitted, tables, (), segments)
    check_tables(config, fitted, tables, ("title",), segments)


def test_a_model_that_was_trained_without_the_table_is_refused(tmp_path: Path) -> None:
    config = job(write_table(tmp_path / "table"))
    with pytest.raises(UserError, match="the features of the run were fitted without it"):
        check_tables(config, {}, open_tables(config), ("title",), {})


def test_segments_of_another_dataset_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job(write_table(tmp_path / "table"), of="segment")
    with pytest.raises(UserError, match=r"features.content.title.table = .*segments.parquet: no such file") as refused:
        open_segments(config, str(tmp_path), open_tables(config))
    assert "\n" not in str(refused.value)
    few = DatasetSegments("d/segments.parquet", *(np.arange(3) for _ in range(5)))
    monkeypatch.setattr(DatasetSegments, "read", lambda dataset, embedded: few)
    with pytest.raises(UserError, match=r"has a vector of segment 3, which d/segments.parquet does not have"):
        open_segments(config, str(tmp_path), open_tables(config))


def test_tables_inside_of_a_dataset_are_looked_for_in_the_other_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    config = FeatureConfig(
        content={
            "title": ContentConfig(table=f"{one}/embeddings/items"),
            "other": ContentConfig(table=f"{one}-more/items"),
        }
    )
    one.mkdir()
    two.mkdir()
    monkeypatch.chdir(tmp_path)
    moved, names = inside_dataset(config, str(one), str(two))
    assert names == {"title"} and moved.content["other"] == config.content["other"]
    assert moved.content["title"].table == f"{two}/embeddings/items"
    for same in (str(one), "one", "two/../one", f"{one}/"):
        assert inside_dataset(config, str(one), same) == (config, frozenset()), "its tables must not have changed"


def test_copies_of_tables_take_the_place_of_the_originals(tmp_path: Path) -> None:
    config = job(write_table(tmp_path / "table"), of="segment")
    carry_tables(config, tmp_path / "copies")
    copied = carried_tables(config, tmp_path / "copies")
    assert copied.content["title"].table == str(tmp_path / "copies" / "title")
    before, after = (open_tables(each)["title"] for each in (config, copied))
    assert (before.hash, before.origin) == (after.hash, after.origin)
    np.testing.assert_array_equal(before.vectors, after.vectors)
    assert carried_tables(config, tmp_path / "nowhere") == config
    assert segment_files(config) == {"segments.parquet", "texts/items.parquet"}
    template = Origin(template={"segments": "{text}"})
    ContentVectors.write(tmp_path / "table", np.arange(4), np.ones((4, 3)), origin=template)
    assert segment_files(config) == {"texts/segments.parquet", "texts/items.parquet"}
    assert segment_files(job(tmp_path / "table")) == frozenset()
