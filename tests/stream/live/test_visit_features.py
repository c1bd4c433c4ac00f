"""Tests of the visit feature store: its content survives a checkpoint with any kind of features."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.format.schema import DatasetSpec, DenseFeature, SideFeature
from trainer.stream.labels.assembled_rows import EXPOSURE, no_events
from trainer.stream.live.visit_features import VisitFeatureStore
from trainer.stream.sources.logged_features import FEATURES, RequestFeatures
from trainer.stream.sources.source import PartitionEvents


def dataset(side: int, dense: int, keys: int) -> DatasetSpec:
    return DatasetSpec(
        name="features",
        source="",
        licence="",
        partitions=1,
        timezone="UTC",
        behaviours=("click",),
        applies={"click": ("live",)},
        candidates=("live",),
        side=tuple(SideFeature(f"side_{k}", "context", 10) for k in range(side)),
        dense=tuple(DenseFeature(f"dense_{k}", "context") for k in range(dense)),
        statistics=(("user",), ("item",))[:keys],
    )


@pytest.mark.parametrize(("side", "dense", "keys"), [(2, 3, 2), (1, 0, 1), (0, 0, 0)])
@pytest.mark.parametrize("visits", [0, 4])
def test_features_are_the_same_after_a_checkpoint(side: int, dense: int, keys: int, visits: int) -> None:
    spec, rng = dataset(side, dense, keys), np.random.default_rng(visits)
    events = {name: np.zeros(visits, column.dtype) for name, column in no_events().items()}
    events |= {"visit_id": np.arange(visits), "event": np.full(visits, EXPOSURE, np.int8)}
    logged = RequestFeatures(
        np.arange(visits),
        rng.integers(0, 10, (visits, side)).astype(np.int32),
        rng.random((visits, dense)).astype(np.float32),
        rng.random((visits, 2 * keys)).astype(np.float32),
    )
    store, restored = VisitFeatureStore(spec, True), VisitFeatureStore(spec, True)
    store.add(PartitionEvents(events, logged, np.zeros(visits, np.int64)))
    restored.load_state_dict(store.state_dict())
    rows = {name: events[name] for name in ("user_id", "visit_id")} | {"request_ms": events["time_ms"]}
    for found in (store, restored):
        features, missing = found.features(rows)
        assert missing == 0
        for name in FEATURES:
            np.testing.assert_array_equal(features[name], getattr(logged, name))
