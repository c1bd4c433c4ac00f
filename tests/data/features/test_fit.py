"""Features fitted on a training range, against numpy over all rows at once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from trainer.config.features import FeatureConfig, TableConfig
from trainer.console.errors import UserError
from trainer.data.features import fit as fit_module
from trainer.data.features.dense_inputs import DenseInputs
from trainer.data.features.fit import FittedFeatures, fit_features
from trainer.data.format.time_selection import Selection

HOUR_MS = 3_600_000


def middle(dataset) -> Selection:
    """Return a range whose edges lie inside records."""
    start = int(dataset.rows["request_ms"].min())
    return Selection(emit_from=start + 10 * HOUR_MS, emit_until=start + 30 * HOUR_MS)


def fit(dataset, config: FeatureConfig, selection: Selection) -> FittedFeatures:
    return fit_features(dataset.spec, dataset.store(), dataset.histories(), config, selection)


@pytest.mark.parametrize("seed", range(3))
def test_base_rates_and_scales_are_those_of_the_range(write_dataset, seed):
    dataset = write_dataset(seed=seed)
    config = FeatureConfig()
    selection = middle(dataset)
    inside = selection.mask(dataset.rows)
    assert 500 < inside.sum() < 2000
    fitted = fit(dataset, config, selection)

    rows = {name: column[inside] for name, column in dataset.rows.items()}
    shown, positive = rows["mask"].sum(axis=0), (rows["label"] & rows["mask"]).sum(axis=0)
    np.testing.assert_allclose(fitted.prior, (positive + 0.5) / (shown + 1))
    values = DenseInputs(dataset.spec, config).raw(rows, fitted.prior).astype(np.float64)
    np.testing.assert_allclose(fitted.mean, values.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(fitted.deviation, values.std(axis=0), rtol=1e-5)


def test_rows_outside_the_range_change_nothing(write_dataset):
    dataset = write_dataset()
    selection = middle(dataset)
    config = FeatureConfig(**{name: TableConfig(ids="lookup") for name in ("user", "author", "item")})

    def scramble(rows):
        outside = ~selection.mask(rows)
        rows["label"][outside] = rows["mask"][outside]
        rows["dense"][outside] = 1e6
        rows["stat"][outside] = 0
        rows["item_id"][outside] = 199

    def scramble_visits(visits):
        visits["item_id"][visits["known_ms"] >= selection.emit_until] = 198

    changed = write_dataset(name="changed", edit=scramble, edit_visits=scramble_visits)
    first, second = fit(dataset, config, selection), fit(changed, config, selection)
    np.testing.assert_array_equal(first.prior, second.prior)
    np.testing.assert_array_equal(first.mean, second.mean)
    np.testing.assert_array_equal(first.deviation, second.deviation)
    for name, vocabulary in first.vocabularies.items():
        np.testing.assert_array_equal(vocabulary, second.vocabularies[name])


def test_a_behaviour_that_never_happens_and_an_input_that_never_varies(write_dataset):
    def edit(rows):
        rows["label"][:, 1] = 0
        rows["dense"][:, 0] = 1e9

    fitted = fit(write_dataset(edit=edit), FeatureConfig(), Selection())
    assert 0 < fitted.prior[1] < 1e-3
    assert fitted.deviation[0] == 1
    assert (fitted.deviation > 0).all()


def test_a_large_mean_does_not_swallow_the_deviation(write_dataset):
    noise = np.random.default_rng(0).choice([-64.0, 64.0], 3000)

    def edit(rows):
        rows["dense"][:, 0] = 1e9 + noise

    fitted = fit(write_dataset(edit=edit), FeatureConfig(), Selection())
    assert fitted.deviation[0] == pytest.approx(noise.std(), rel=1e-4)


@pytest.mark.parametrize("min_count", [1, 4])
def test_vocabulary_is_what_training_rows_and_their_users_histories_hold(write_dataset, min_count, monkeypatch):
    monkeypatch.setattr(fit_module, "_USERS_AT_ONCE", min_count)
    dataset = write_dataset(rows=120, users=10)
    selection = middle(dataset)
    config = FeatureConfig(**{name: TableConfig(ids="lookup", min_count=min_count) for name in ("user", "item")})
    fitted = fit(dataset, config, selection)
    inside = selection.mask(dataset.rows)
    users = set(dataset.rows["user_id"][inside].tolist())
    visits = dataset.visits
    seen = np.isin(visits["user_id"], list(users)) & (visits["known_ms"] < selection.emit_until)

    def frequent(ids):
        return {value for value, count in Counter(ids.tolist()).items() if count >= min_count}

    items = frequent(dataset.rows["item_id"][inside]) | frequent(visits["item_id"][seen])
    assert fitted.vocabularies["item"].tolist() == sorted(items)
    assert fitted.vocabularies["user"].tolist() == sorted(frequent(dataset.rows["user_id"][inside]))
    assert set(fitted.vocabularies) == {"user", "item"}
    assert fitted.table_rows == {"user": len(fitted.vocabularies["user"]) + 1, "author": 31, "item": len(items) + 1}
    assert len(items) < 200


def test_a_sample_of_records_is_near_the_whole_and_always_the_same(write_dataset, monkeypatch):
    dataset = write_dataset(rows=6000)
    whole = fit(dataset, FeatureConfig(), Selection())
    monkeypatch.setattr(fit_module, "SAMPLE_ROWS", 2000)
    store = dataset.store()
    reads = []
    read = store.read
    monkeypatch.setattr(store, "read", lambda *where: reads.append(where) or read(*where))
    first, second = (
        fit_features(dataset.spec, store, dataset.histories(), FeatureConfig(), Selection()) for _ in range(2)
    )
    sampled = sum(int(store.records(partition).rows[record]) for partition, record in reads)
    assert 4 * 1500 < sampled < 4 * 2500  # two passes of two fits
    np.testing.assert_array_equal(first.mean, second.mean)
    assert (first.mean != whole.mean).any()
    np.testing.assert_allclose(first.prior, whole.prior, atol=0.03)
    assert (np.abs(first.mean - whole.mean) < 0.15 * whole.deviation).all()


def test_saved_and_loaded_it_is_the_same(write_dataset, tmp_path):
    dataset = write_dataset(rows=300)
    config = FeatureConfig(item=TableConfig(ids="lookup"))
    fitted = fit(dataset, config, Selection())
    fitted.save(tmp_path)
    loaded = FittedFeatures.load(tmp_path)
    assert (loaded.layout, loaded.table_rows) == (fitted.layout, fitted.table_rows)
    for name in ("prior", "mean", "deviation"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(fitted, name))
        assert getattr(loaded, name).dtype == getattr(fitted, name).dtype
    np.testing.assert_array_equal(loaded.vocabularies["item"], fitted.vocabularies["item"])


def test_mistakes_are_told(write_dataset, tmp_path):
    dataset = write_dataset(rows=100)
    with pytest.raises(UserError, match=r"no training rows emitted before 1970-01-01T00:00:00\.005\+00:00; those of"):
        fit(dataset, FeatureConfig(), Selection(emit_until=5))
    with pytest.raises(UserError, match=r"features\.item\.rows = 7"):
        fit(dataset, FeatureConfig(item=TableConfig(rows=7)), Selection())
    with pytest.raises(UserError, match="not a run of `limelight train`"):
        FittedFeatures.load(tmp_path)

    def edit(rows):
        rows["visit_id"] = np.arange(100)
        rows["dense"][41, 0] = np.nan

    with pytest.raises(UserError, match="dense feature 'age' is nan in visit 41 "):
        fit(write_dataset(rows=100, name="nan", edit=edit), FeatureConfig(), Selection())
