"""Model of a ranker's job that is planned: the same tables and weights as the job makes."""

from __future__ import annotations

import pytest

from tests.planning.planned_dataset import SPEC
from trainer.config.ranker import JobConfig, parse_config
from trainer.console.errors import UserError
from trainer.engine.build_ranker import build_ranker
from trainer.planning.exchange_traffic import expected_distinct
from trainer.planning.ranker_model import RankerModel


def job(**sections: object) -> JobConfig:
    return parse_config({"data": {"path": "nowhere"}, **sections}, "job.toml")


def test_the_network_is_that_of_the_job() -> None:
    config = job(model={"expert_layers": [[32, 16]], "attention_kind": "multi_head"})
    model = RankerModel.of(config, SPEC, {"item": 1000})
    real = build_ranker(config, model.features, "ple")
    assert model.parameters == sum(parameter.numel() for parameter in real.parameters())
    # The rows of side: the unknown one, 24 + 10 values, 4 sets of behaviours and 64 ages of past visits.
    assert {table.name: table.rows for table in model.tables} == {"user": 101, "author": 11, "item": 1000, "side": 103}
    assert all(parameter.is_meta for parameter in model.network.parameters())


def test_ids_of_a_batch_are_counted_by_table() -> None:
    history = {"seen": {"domain": "video", "length": 10}}
    model = RankerModel.of(job(features={"history": history}), SPEC, {})
    full, half = (model.table_ids(100, fill, None) for fill in (1.0, 0.5))
    # One id of the candidate, ten of its history.
    assert full["item"].ids == 1100 and half["item"].ids == 600 and full["user"].ids == 100
    assert full["item"].distinct == pytest.approx(expected_distinct(1100, 501))
    assert model.table_ids(100, 1.0, 0.1)["item"].distinct == pytest.approx(110)
    # No table has more distinct ids than even draws have.
    assert model.table_ids(100, 1.0, 0.9)["item"].distinct == pytest.approx(expected_distinct(1100, 501))


def test_a_dynamic_table_is_also_asked_for_ids_that_have_no_row() -> None:
    config = job(features={"item": {"ids": "dynamic", "rows": 64}})
    model = RankerModel.of(config, SPEC, {})
    found = model.table_ids(5000, 1.0)["item"]
    # There are 400 items in the dataset.
    assert 64 < found.distinct == pytest.approx(expected_distinct(found.ids, 400))


def test_ids_by_zipfs_law_are_fewer_and_fall_on_the_first_rows_of_ordered_tables() -> None:
    features = {"item": {"ids": "hash", "rows": 5000}, "author": {"ids": "direct"}, "history": {}}
    model = RankerModel.of(job(features=features), SPEC, {"author": 5000})
    even, skewed = (model.table_ids(1000, 1.0, zipf=exponent) for exponent in (None, 1.0))
    for table in ("item", "author", "user"):
        assert skewed[table].distinct < even[table].distinct and skewed[table].ids == even[table].ids
    assert skewed["author"].spread.between(0, 0.1) > 0.2 > skewed["item"].spread.between(0, 0.1)
    assert skewed["side"] == even["side"]
    for distinct in (None, 0.1):
        sent = model.table_ids(1000, 1.0, distinct, deduplicate=False)
        assert all(of_table.distinct == of_table.ids for of_table in sent.values())


def test_micro_batches_need_less_memory_and_bfloat16_too() -> None:
    model = RankerModel.of(job(model={"expert_layers": [[32, 16]]}), SPEC, {})
    whole, parts = (model.network_cost(512, number, 1.0, bf16=False) for number in (1, 4))
    assert parts.peak_bytes < whole.peak_bytes and parts.flops == pytest.approx(whole.flops)
    assert model.network_cost(512, 1, 1.0, bf16=True).peak_bytes < whole.peak_bytes


def test_an_unknown_table_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^--rows room: no such table; the job has user, author, item, side$"):
        RankerModel.of(job(), SPEC, {"room": 5})
