"""Batches against a reference that builds each row separately in Python."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.config.features import FeatureConfig, HistoryConfig, TableConfig
from trainer.console.errors import UserError
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import FittedFeatures, feature_layout
from trainer.data.features.id_map import IdMap
from trainer.data.features.packed_side import GAP_BUCKETS, gap_bucket
from trainer.data.format.history import Histories
from trainer.data.format.schema import DOMAINS, Rows
from trainer.data.loading.batch import RankingBatch, empty_batch, unpack

HISTORY = {
    "short": HistoryConfig(domain="video", length=5),
    "given_live": HistoryConfig(domain="live", length=3, require=("like", "gift")),
}
MAPPINGS = {
    "direct": {"item": TableConfig(), "author": TableConfig(rows=50)},
    "hash": {"item": TableConfig(ids="hash", rows=64), "author": TableConfig(ids="hash", rows=20)},
    "lookup": {"item": TableConfig(ids="lookup"), "author": TableConfig(ids="lookup")},
}


def fitted_by_hand(dataset, config: FeatureConfig, inputs: int) -> FittedFeatures:
    """Return fitted features with arbitrary numbers that differ for every input."""
    known = {
        name: np.arange(0, largest, 2)
        for name, largest in (("user", 60), ("author", 30), ("item", 200))
        if getattr(config, name).ids == "lookup"
    }
    spec = dataset.spec
    rows = {}
    for name in ("user", "author", "item"):
        table = getattr(config, name)
        rows[name] = len(known[name]) + 1 if name in known else table.rows or spec.ids[name].max + 2
    return FittedFeatures(
        layout=feature_layout(spec),
        table_rows=rows,
        prior=np.array([0.4, 0.2, 0.05]),
        mean=np.linspace(-1, 2, inputs).astype(np.float32),
        deviation=np.linspace(0.5, 3, inputs).astype(np.float32),
        vocabularies=known,
    )


def batch_of(features: FeatureMap, rows: Rows, histories: Histories, as_of_ms: np.ndarray) -> RankingBatch:
    return unpack(features.pack(rows, histories, as_of_ms), features.layout, {})


def table_row(config: FeatureConfig, fitted: FittedFeatures, name: str, value: int) -> int:
    """Return the row of an id; tests/data/features/test_id_map.py tests the hash itself."""
    mapping = getattr(config, name).ids
    if mapping == "direct":
        return value + 1
    if mapping == "lookup":
        known = fitted.vocabularies[name].tolist()
        return known.index(value) + 1 if value in known else 0
    out = np.empty(1, np.int64)
    IdMap(name, "hash", fitted.table_rows[name])(np.array([value]), out)
    return int(out[0])


def history_of(dataset, user: int, as_of: int, history: HistoryConfig) -> list[int]:
    """Return the positions in ``dataset.visits`` of the visits in a history, oldest first."""
    visits = dataset.visits
    wanted = sum(1 << dataset.spec.behaviours.index(name) for name in history.require)
    found = [
        place
        for place in range(len(visits["user_id"]))
        if visits["user_id"][place] == user
        and visits["known_ms"][place] < as_of
        and DOMAINS[visits["domain"][place]] == history.domain
        and (not wanted or visits["bits"][place] & wanted)
    ]
    return sorted(found, key=lambda place: visits["known_ms"][place])[-history.length :]


def reference_row(dataset, config: FeatureConfig, fitted: FittedFeatures, place: int, as_of: int) -> dict[str, list]:
    rows, spec, visits = dataset.rows, dataset.spec, dataset.visits
    ids = {
        name: [table_row(config, fitted, name, int(rows[f"{name}_id"][place]))] for name in ("user", "author", "item")
    }
    base, ids["side"] = 1, []
    for column, side in enumerate(spec.side):
        ids["side"].append(base + int(rows["side"][place, column]))
        base += side.rows
    ids["side"].append(base + int(rows["domain"][place]))
    base += 2
    for name, history in config.history.items():
        entries = history_of(dataset, int(rows["user_id"][place]), as_of, history)
        for key in ("item", "author"):
            ids[f"{name}_{key}"] = [
                table_row(config, fitted, key, int(visits[f"{key}_id"][entry])) for entry in entries
            ]
        ids[f"{name}_context"] = []
        for entry in entries:
            age = as_of - int(visits["request_ms"][entry])
            ids[f"{name}_context"] += [
                base + int(visits["bits"][entry]),
                base + 8 + int(gap_bucket(np.array([age]))[0]),
            ]

    counts = rows["stat"][place].reshape(len(spec.statistics), 4).astype(float)
    dense = [*rows["dense"][place].tolist()]
    for shown, *positives in counts:
        for positive, prior in zip(positives, fitted.prior, strict=True):
            strength = config.smoothing / (2 * math.sqrt(prior * (1 - prior)))
            rate = (positive + strength * prior) / (shown + strength)
            dense.append(math.log(rate / (1 - rate)))
    dense += [math.log(1 + shown) for shown, *_ in counts]
    scaled = (np.array(dense) - fitted.mean) / fitted.deviation
    return {"ids": ids, "dense": np.clip(scaled, -config.clip, config.clip)}


def unpack_ids(batch: RankingBatch) -> dict[str, list[list[int]]]:
    """Return lookup -> ids of each row."""
    found = {}
    for keyed in batch.ids:
        assert keyed.stride() == batch.rows
        for key, jagged in keyed.to_dict().items():
            found[key] = [part.tolist() for part in jagged.to_dense()]
    return found


def take(rows: Rows, chosen: np.ndarray) -> Rows:
    return {name: column[chosen] for name, column in rows.items()}


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("seed", range(3))
def test_a_batch_equals_the_row_by_row_reference(write_dataset, mapping, seed):
    dataset = write_dataset(seed=seed, rows=400)
    rng = np.random.default_rng(seed)
    config = FeatureConfig(**MAPPINGS[mapping], history=HISTORY, clip=2.0)
    fitted = fitted_by_hand(dataset, config, 2 + 9 + 3)
    features = FeatureMap(dataset.spec, config, fitted, ("gift", "click"))
    chosen = rng.permutation(400)[:60]
    rows = take(dataset.rows, chosen)
    as_of = rows["request_ms"] - rng.integers(0, 2, 60) * 3_600_000
    batch = batch_of(features, rows, dataset.histories(), as_of)

    expected = [
        reference_row(dataset, config, fitted, int(place), int(time)) for place, time in zip(chosen, as_of, strict=True)
    ]
    found = unpack_ids(batch)
    assert set(found) == set(expected[0]["ids"]) == {lookup.name for lookup in features.lookups}
    for name, ids in found.items():
        assert ids == [row["ids"][name] for row in expected], name
    assert sum(map(len, found["given_live_item"])) > 20
    np.testing.assert_allclose(batch.dense, np.stack([row["dense"] for row in expected]), rtol=1e-4, atol=1e-5)
    assert ((np.abs(batch.dense.numpy()) == 2).any(), (np.abs(batch.dense.numpy()) < 2).any()) == (True, True)
    np.testing.assert_array_equal(batch.label, rows["label"][:, [2, 0]])
    np.testing.assert_array_equal(batch.mask, rows["mask"][:, [2, 0]])
    for name in ("user_id", "visit_id", "request_ms"):
        np.testing.assert_array_equal(getattr(batch, name), rows[name])
    for keyed in batch.ids:
        for key, jagged in keyed.to_dict().items():
            limit = {table.name: table.rows for table in features.tables}[
                {lookup.name: lookup.table for lookup in features.lookups}[key]
            ]
            assert not len(jagged.values()) or 0 <= jagged.values().min() <= jagged.values().max() < limit


def test_nothing_known_later_than_as_of_changes_a_batch(write_dataset):
    dataset = write_dataset(rows=300)
    config = FeatureConfig(history=HISTORY)
    features = FeatureMap(dataset.spec, config, fitted_by_hand(dataset, config, 14))
    now = int(np.median(dataset.rows["request_ms"]))

    def shuffle_from(time: int):
        def shuffle(visits: Rows) -> None:
            later = np.flatnonzero(visits["known_ms"] >= time)
            assert 100 < len(later) < len(visits["known_ms"]) - 100
            for name in ("user_id", "item_id", "author_id", "bits", "request_ms"):
                visits[name][later] = visits[name][np.random.default_rng(1).permutation(later)]

        return shuffle

    before, after, earlier = (
        batch_of(features, dataset.rows, changed.histories(), np.full(300, now))
        for changed in (
            dataset,
            write_dataset(rows=300, name="later", edit_visits=shuffle_from(now)),
            write_dataset(rows=300, name="earlier", edit_visits=shuffle_from(now - 3_600_000)),
        )
    )
    assert unpack_ids(after) == unpack_ids(before)
    assert unpack_ids(earlier) != unpack_ids(before)


def test_tables_lookups_and_sequences_are_declared(write_dataset):
    dataset = write_dataset(rows=50)
    config = FeatureConfig(
        user=TableConfig(ids="hash", rows=32, dim=8, sharding="row_wise"), history={"short": HISTORY["short"]}
    )
    features = FeatureMap(dataset.spec, config, fitted_by_hand(dataset, config, 14))
    assert {table.name: (table.rows, table.dim) for table in features.tables} == {
        "user": (32, 8),
        "author": (31, 16),
        "item": (201, 16),
        "side": (1 + 25 + 9 + 40 + 2 + 8 + GAP_BUCKETS, 16),
    }
    assert features.tables[0].sharding == "row_wise"
    assert {lookup.name: (lookup.table, lookup.length) for lookup in features.lookups} == {
        "user": ("user", 1),
        "author": ("author", 1),
        "item": ("item", 1),
        "side": ("side", 4),
        "short_item": ("item", None),
        "short_author": ("author", None),
        "short_context": ("side", None),
    }
    (short,) = features.sequences
    assert short == ("short", ("short_item", "short_author", "short_context"), ("item", "author"), 5, ())
    assert features.layout.keys == (("user",), tuple(lookup.name for lookup in features.lookups[1:]))
    assert features.dense_names[:3] == ("age", "price", "stat:user:click")
    assert features.dense_names[-1] == "stat:tag:rows"
    assert features.n_dense == len(features.dense_names) == 14


def test_excluded_features_are_not_in_a_batch(write_dataset):
    dataset = write_dataset(rows=50)
    everything = FeatureConfig(history=HISTORY)
    config = FeatureConfig(history=HISTORY, exclude=("user_id", "city", "domain", "age", "stat:user*author"))
    fitted = fitted_by_hand(dataset, everything, 14)
    whole = FeatureMap(dataset.spec, everything, fitted)
    kept = [k for k, name in enumerate(whole.dense_names) if name != "age" and "user*author" not in name]
    less = FeatureMap(
        dataset.spec,
        config,
        FittedFeatures(fitted.layout, fitted.table_rows, fitted.prior, fitted.mean[kept], fitted.deviation[kept], {}),
    )
    assert less.dense_names == tuple(whole.dense_names[k] for k in kept)
    assert "user" not in [table.name for table in less.tables]
    as_of = dataset.rows["request_ms"]
    first, second = (batch_of(features, dataset.rows, dataset.histories(), as_of) for features in (whole, less))
    np.testing.assert_array_equal(first.dense[:, kept], second.dense)
    first_ids, second_ids = unpack_ids(first), unpack_ids(second)
    assert "user" not in second_ids
    assert second_ids["item"] == first_ids["item"]
    # `hour` and `tag` stay; without `city` between them the range of `tag` begins 9 rows earlier.
    assert second_ids["side"] == [[hour, tag - 9] for hour, _, tag, _ in first_ids["side"]]
    none = FeatureConfig(exclude=("stat:*",), history={})
    assert FeatureMap(dataset.spec, none, fitted).dense_names == ("age", "price")


def test_no_rows_make_an_empty_batch(write_dataset):
    dataset = write_dataset(rows=50)
    config = FeatureConfig(history=HISTORY)
    features = FeatureMap(dataset.spec, config, fitted_by_hand(dataset, config, 14))
    none = take(dataset.rows, np.arange(0))
    for batch in (batch_of(features, none, dataset.histories(), none["request_ms"]), empty_batch(features.layout)):
        assert batch.rows == 0
        assert batch.dense.shape == (0, 14)
        assert batch.label.shape == batch.mask.shape == (0, 3)
        assert tuple(tuple(keyed.keys()) for keyed in batch.ids) == features.layout.keys
        for keyed in batch.ids:
            assert (keyed.stride(), keyed.values().numel(), keyed.lengths().numel()) == (0, 0, 0)
            assert all(keyed[key].values().shape == (0,) for key in keyed.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda rows: rows["dense"].__setitem__((7, 1), np.nan), "dense feature 'price' is nan in visit 1007 "),
        (lambda rows: rows["dense"].__setitem__((7, 0), -np.inf), "dense feature 'age' is -inf in visit 1007 "),
        (
            lambda rows: rows["stat"].__setitem__((7, 4), np.nan),
            r"dense feature 'stat:user\*author:click' is nan .* 1007",
        ),
        (lambda rows: rows["side"].__setitem__((7, 1), 9), "side feature 'city' is 9 in visit 1007; .* values 0 to 8"),
        (lambda rows: rows["side"].__setitem__((7, 2), -1), "side feature 'tag' is -1 in visit 1007"),
        (lambda rows: rows["item_id"].__setitem__(7, -4), "item id -4 is negative"),
    ],
)
def test_bad_values_are_named(write_dataset, edit, message):
    dataset = write_dataset(rows=50)
    config = FeatureConfig(history=HISTORY)
    features = FeatureMap(dataset.spec, config, fitted_by_hand(dataset, config, 14))
    rows = {name: column.copy() for name, column in dataset.rows.items()}
    rows["visit_id"] = np.arange(50) + 1000
    edit(rows)
    with pytest.raises(UserError, match=message):
        batch_of(features, rows, dataset.histories(), rows["request_ms"])


def test_new_ids_read_row_0_and_change_no_other_row(write_dataset):
    dataset = write_dataset(rows=50)
    config = FeatureConfig(history=HISTORY)
    features = FeatureMap(dataset.spec, config, fitted_by_hand(dataset, config, 14))
    expected = unpack_ids(batch_of(features, dataset.rows, dataset.histories(), dataset.rows["request_ms"]))
    rows = {name: column.copy() for name, column in dataset.rows.items()}
    rows["item_id"][7], rows["author_id"][7], rows["author_id"][9] = 4321, 2**63 - 1, 77
    batch = batch_of(features, rows, dataset.histories(), rows["request_ms"])
    assert batch.beyond == {"item": 1, "author": 2}
    found = unpack_ids(batch)
    assert (found["item"][7], found["author"][7], found["author"][9]) == ([0], [0], [0])
    for key, ids in found.items():
        same = [place for place in range(50) if place not in (7, 9)]
        assert [ids[place] for place in same] == [expected[key][place] for place in same]


def test_new_ids_of_histories_read_row_0(write_dataset):
    def later(visits):
        visits["item_id"][:] = 10_000

    dataset = write_dataset(rows=50, edit_visits=later)
    config = FeatureConfig(history={"live": HistoryConfig(domain="live", length=5)})
    features = FeatureMap(dataset.spec, config, fitted_by_hand(dataset, config, 14))
    batch = batch_of(features, dataset.rows, dataset.histories(), dataset.rows["request_ms"])
    ids = [each for row in unpack_ids(batch)["live_item"] for each in row]
    assert ids and set(ids) == {0} and batch.beyond == {"histories": len(ids)}
