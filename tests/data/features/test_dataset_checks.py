"""Tests of what is refused: names that a dataset does not have, and a dataset of another kind than the fitted one."""

from __future__ import annotations

import pytest

from tests.data.features.test_feature_map import fitted_by_hand
from trainer.config.features import FeatureConfig, HistoryConfig
from trainer.console.errors import UserError
from trainer.data.features.feature_map import FeatureMap


@pytest.mark.parametrize(
    ("settings", "behaviours", "message"),
    [
        ({}, ("clicks",), "data.behaviours: the dataset has no behaviour 'clicks'; it has click, like, gift"),
        (
            {"history": {"live": HistoryConfig(domain="live", require=("share",))}},
            (),
            "features.history.live.require: the dataset has no behaviour 'share'",
        ),
        ({"exclude": ("citi",)}, (), "features.exclude: .* no feature 'citi'; did you mean 'city'"),
    ],
)
def test_unknown_names_are_refused(write_dataset, settings, behaviours, message):
    dataset = write_dataset(rows=50)
    config = FeatureConfig(**settings)
    with pytest.raises(UserError, match=message):
        FeatureMap(dataset.spec, config, fitted_by_hand(dataset, config, 14), behaviours)


def test_another_kind_of_dataset_is_refused(write_dataset):
    dataset = write_dataset(rows=50)
    config = FeatureConfig()
    fitted = fitted_by_hand(dataset, config, 14)
    fitted.layout["side"][1] = ["city", 12]
    with pytest.raises(
        UserError, match=r"dataset 'small' does not fit .* side are .*'city', 9.* trained with .*'city', 12"
    ):
        FeatureMap(dataset.spec, config, fitted)
