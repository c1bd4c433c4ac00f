"""Counts of past visits as inputs: against their definition, and the future changes nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.data.features.test_feature_map import batch_of, fitted_by_hand, take
from trainer.config.features import FeatureConfig
from trainer.console.errors import UserError
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import fit_features
from trainer.data.features.past_counts import PastCounts
from trainer.data.format.history import Histories
from trainer.data.format.schema import DOMAINS
from trainer.data.format.time_selection import Selection

MINUTE_MS = 60_000
PAST: dict[str, dict[str, Any]] = {
    "all": {},
    "now": {"half_life_minutes": 40, "domain": "live"},
    "author": {"same": "author", "domain": "video"},
    "item": {"same": "item"},
}


def config(**past: dict[str, Any]) -> FeatureConfig:
    return FeatureConfig.model_validate({"history": {}, "past": past or PAST, "exclude": ("stat:*",)})


def by_definition(dataset: Any, past: dict[str, Any], place: int, as_of: int) -> list[float]:
    """Return the weights of a row's past visits, and of those with each behaviour."""
    rows, visits = dataset.rows, dataset.visits
    counts = [0.0] * (1 + len(dataset.spec.behaviours))
    for at in range(len(visits["user_id"])):
        if visits["user_id"][at] != rows["user_id"][place] or visits["known_ms"][at] >= as_of:
            continue
        if past.get("domain", "both") not in ("both", DOMAINS[visits["domain"][at]]):
            continue
        same = past.get("same", "any")
        if same != "any" and visits[f"{same}_id"][at] != rows[f"{same}_id"][place]:
            continue
        half_life = past.get("half_life_minutes", 0) * MINUTE_MS
        weight = 2 ** (-(as_of - int(visits["known_ms"][at])) / half_life) if half_life else 1.0
        counts[0] += weight
        for k in range(len(dataset.spec.behaviours)):
            counts[1 + k] += weight * (int(visits["bits"][at]) >> k & 1)
    return counts


@pytest.mark.parametrize("seed", range(2))
def test_counts_and_inputs_are_the_definition(write_dataset, seed: int) -> None:
    dataset = write_dataset(seed=seed, rows=300)
    settings = config()
    features = FeatureMap(dataset.spec, settings, fitted_by_hand(dataset, settings, 2 + 4 * 3 + 4))
    assert features.dense_names[2:5] == ("past:all:click", "past:all:like", "past:all:gift")
    assert features.dense_names[-4:] == tuple(f"past:{name}:rows" for name in PAST)
    chosen = np.random.default_rng(seed).permutation(300)[:40]
    rows = take(dataset.rows, chosen)
    # Ages count from the time of the read, which need not be the request.
    as_of = rows["request_ms"] + np.random.default_rng(seed).integers(-5, 5, 40) * MINUTE_MS
    found = PastCounts(dataset.spec, settings).read(rows, dataset.histories(), as_of).reshape(40, 4, 4)
    dense = batch_of(features, rows, dataset.histories(), as_of).dense.numpy()
    seen = np.zeros(4)
    for row, place in enumerate(chosen.tolist()):
        values, sizes = [], []
        for key, past in enumerate(PAST.values()):
            shown, *positives = by_definition(dataset, past, place, int(as_of[row]))
            np.testing.assert_allclose(found[row, key], [shown, *positives], rtol=1e-6, atol=1e-4)
            seen[key] += shown
            for positive, prior in zip(positives, features.fitted.prior, strict=True):
                strength = settings.smoothing / (2 * math.sqrt(prior * (1 - prior)))
                values.append(math.log((positive + strength * prior) / (shown - positive + strength * (1 - prior))))
            sizes.append(math.log1p(shown))
        scaled = (np.array([*values, *sizes]) - features.fitted.mean[2:]) / features.fitted.deviation[2:]
        np.testing.assert_allclose(dense[row, 2:], np.clip(scaled, -settings.clip, settings.clip), atol=2e-4)
    assert (seen > 1).all(), seen


def test_the_future_changes_nothing(write_dataset) -> None:
    dataset = write_dataset(rows=500)
    as_of = int(np.median(dataset.rows["request_ms"]))

    def change(visits: dict[str, np.ndarray]) -> None:
        later = visits["known_ms"] >= as_of
        assert 0.2 < later.mean() < 0.8
        for name, value in (("bits", 0), ("author_id", 1), ("item_id", 2), ("domain", 1)):
            visits[name][later] = value
        visits["known_ms"][later] += 1

    changed = write_dataset(rows=500, name="changed", edit_visits=change)
    rows = take(dataset.rows, np.flatnonzero(dataset.rows["request_ms"] <= as_of))
    times = np.minimum(rows["request_ms"], as_of)
    found = [PastCounts(each.spec, config()).read(rows, each.histories(), times) for each in (dataset, changed)]
    assert np.array_equal(*found) and found[0].any()
    late = np.full(len(times), as_of + 10**9)
    after = [PastCounts(each.spec, config()).read(rows, each.histories(), late) for each in (dataset, changed)]
    assert not np.array_equal(*after)


def test_scales_are_those_of_the_requests_of_the_training_range(write_dataset) -> None:
    dataset = write_dataset(rows=400)
    settings, rows = config(), dataset.rows
    fitted = fit_features(dataset.spec, dataset.store(), dataset.histories(), settings, Selection())
    wide = settings.model_copy(update={"clip": 1e6})
    dense = batch_of(FeatureMap(dataset.spec, wide, fitted), rows, dataset.histories(), rows["request_ms"]).dense
    np.testing.assert_allclose(dense.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(dense.std(0, correction=0), 1, rtol=1e-3)


def test_visits_share_known_tags_only(write_dataset) -> None:
    def add_tags(visits: dict[str, np.ndarray]) -> None:
        visits["tag"] = (visits["item_id"] % 4).astype(np.int32)

    dataset = write_dataset(rows=200, edit_visits=add_tags)
    spec = replace(dataset.spec, tag="tag")
    rows, visits = dataset.rows | {"side": dataset.rows["side"] % 4}, dataset.visits
    found = PastCounts(spec, config(topic={"same": "tag"})).read(
        rows, Histories(dataset.path, spec), rows["request_ms"]
    )
    tag = rows["side"][:, 2]
    for row in range(200):
        same = (visits["user_id"] == rows["user_id"][row]) & (visits["known_ms"] < rows["request_ms"][row])
        same &= (visits["tag"] == tag[row]) & (tag[row] > 0)
        assert found[row].tolist() == [same.sum(), *((visits["bits"][same] >> k & 1).sum() for k in range(3))]
    assert found[tag > 0, 0].any() and (tag == 0).sum() > 20


def test_tags_need_a_dataset_with_tags(write_dataset) -> None:
    dataset = write_dataset(rows=50)
    assert not dataset.spec.tag
    settings = config(topic={"same": "tag"})
    with pytest.raises(UserError, match=r'features\.past\.topic\.same = "tag": histories have no tags'):
        FeatureMap(dataset.spec, settings, fitted_by_hand(dataset, settings, 6))
