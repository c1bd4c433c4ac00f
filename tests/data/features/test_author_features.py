"""Side features of past visits' authors: read, saved with the model, and present in every history."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.small_visits import SPEC, build_dataset, make_visits
from trainer.config.features import FeatureConfig, HistoryConfig
from trainer.console.errors import UserError
from trainer.data.features.author_features import AuthorSide, read_author_side
from trainer.data.features.dataset_checks import check_names
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import FittedFeatures, fit_features
from trainer.data.format.dataset import Dataset
from trainer.data.format.shards import read_rows
from trainer.data.format.time_selection import Selection
from trainer.data.loading.batch import unpack
from trainer.runtime.checksums import CHECKSUMS

CONFIG = FeatureConfig(
    history={
        "short": HistoryConfig(domain="video", length=4),
        "both": HistoryConfig(domain="both", length=3),
        "author": HistoryConfig(domain="live", search="author", length=3),
    },
    tags=True,
    author_side=("style",),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    build_dataset(tmp_path / "dataset", make_visits(3), spec=replace(SPEC, tag="topic"))
    # Tests change its tables.
    (tmp_path / "dataset" / CHECKSUMS).unlink()
    return tmp_path / "dataset"


def test_unknown_authors_have_unknown_values() -> None:
    side = AuthorSide(np.array([90, 7, 1 << 40]), np.array([[1, 5], [2, 6], [3, 7]]))
    found = side.lookup(np.array([1 << 40, 8, 7, 90, 7, -3]))
    assert found.tolist() == [[3, 7], [0, 0], [2, 6], [1, 5], [2, 6], [0, 0]]
    assert side.lookup(np.zeros(0, np.int64)).shape == (0, 2)


def test_every_entry_carries_its_authors_features_and_its_tag(path: Path, tmp_path: Path) -> None:
    data = Dataset.open(str(path))
    fitted = fit_features(data.spec, data.store, data.histories, CONFIG, Selection())
    (tmp_path / "kept").mkdir()
    fitted.save(tmp_path / "kept")
    # A model goes on with what it was fitted on.
    (path / "authors.parquet").unlink()
    features = FeatureMap(data.spec, CONFIG, FittedFeatures.load(tmp_path / "kept"))

    rows = read_rows(str(path), data.spec)
    rows = {name: column[-200:] for name, column in rows.items()}
    batch = unpack(features.pack(rows, data.histories, rows["request_ms"]), features.layout, {})
    entries = features.read_histories(rows, data.histories, rows["request_ms"])
    style = dict(zip(*(fitted.author_side.author_id, fitted.author_side.values[:, 0]), strict=True))  # type: ignore[union-attr]
    ids = {key: jagged.values().numpy() for keyed in batch.ids for key, jagged in keyed.to_dict().items()}
    of_row = ids["side"].reshape(len(rows["user_id"]), -1)
    names = [side.name for side in data.spec.side]
    first_style = of_row[0, names.index("style")] - rows["side"][0, names.index("style")]
    first_topic = of_row[0, names.index("topic")] - rows["side"][0, names.index("topic")]
    for sequence in features.sequences:
        found = entries[sequence.name]
        context = ids[f"{sequence.name}_context"].reshape(len(found.item_id), -1)
        assert len(context) > 20
        expected = [first_style + style.get(author, 0) for author in found.author_id.tolist()]
        assert context[:, -1].tolist() == expected and len(set(expected)) > 2
        np.testing.assert_array_equal(context[:, -2], first_topic + found.tag)
        # What is alike has the same row of the same table: where entry and candidate are of the same author, or item.
        row = np.repeat(np.arange(len(of_row)), found.lengths)
        for same, pair in ((found.item_id == rows["item_id"][row], 0), (found.author_id == rows["author_id"][row], 1)):
            lookup, own, key, other = sequence.alike[pair]
            assert (lookup, key) == ("side", f"{sequence.name}_context") and same.any()
            np.testing.assert_array_equal(of_row[row[same], own], context[same, other])


def test_without_the_option_nothing_is_read(path: Path) -> None:
    (path / "authors.parquet").unlink()
    data = Dataset.open(str(path))
    config = CONFIG.model_copy(update={"author_side": ()})
    assert fit_features(data.spec, data.store, data.histories, config, Selection()).author_side is None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "no table of authors"),
        ({"author_id": [1, 2]}, "column 'style' is missing"),
        ({"author_id": [1, 2], "style": [1, 5]}, r"'style' is 5 in row 1; it must be in \[0, 5\)"),
        ({"author_id": [1, 2], "style": [1, None]}, "'style' has no value in row 1"),
    ],
)
def test_a_bad_table_of_authors_is_refused(path: Path, table: dict[str, list[int]] | None, message: str) -> None:
    (path / "authors.parquet").unlink()
    if table is not None:
        pq.write_table(pa.table(table), path / "authors.parquet")
    with pytest.raises(UserError, match=message):
        read_author_side(str(path), SPEC, ["style"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"author_side": ("topic",)}, "'topic' is not a side feature of the dataset's authors; they have style"),
        ({"exclude": ("style",)}, "'style' is also in features.exclude"),
    ],
)
def test_features_that_authors_do_not_have_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_names(replace(SPEC, tag="topic"), CONFIG.model_copy(update=changes), ())
