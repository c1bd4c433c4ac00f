"""Sizes of features that are known without a row of the dataset."""

from __future__ import annotations

import pytest

from tests.planning.planned_dataset import SPEC
from trainer.config.features import FeatureConfig, TableConfig
from trainer.console.errors import UserError
from trainer.data.features.declared_sizes import declared_features
from trainer.data.features.feature_map import FeatureMap


def test_tables_have_the_rows_that_the_mapping_of_ids_needs() -> None:
    config = FeatureConfig(item=TableConfig(ids="hash", rows=77), author=TableConfig(ids="lookup"))
    fitted = declared_features(SPEC, config)
    # direct: the largest id + 2; hash: as declared; lookup: every id of the dataset, and the unknown one.
    assert fitted.table_rows == {"user": 101, "item": 77, "author": 10}
    features = FeatureMap(SPEC, config, fitted)
    assert {table.name: table.rows for table in features.tables}["item"] == 77
    assert features.n_dense == len(fitted.mean) == len(fitted.deviation)


def test_other_rows_replace_those_of_the_dataset() -> None:
    assert declared_features(SPEC, FeatureConfig(), {"user": 400_000_000}).table_rows["user"] == 400_000_000


def test_a_name_that_the_dataset_does_not_have_is_one_line() -> None:
    with pytest.raises(UserError, match=r"features\.rates: the dataset has no behaviour 'gift'"):
        declared_features(SPEC, FeatureConfig(rates=("gift",)))
    with pytest.raises(UserError, match=r"features\.item\.rows = 9: the largest item id"):
        declared_features(SPEC, FeatureConfig(item=TableConfig(rows=9)))
