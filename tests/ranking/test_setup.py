"""Split of a dataset in time: training range and held-out range of a job."""

from __future__ import annotations

import pytest

from trainer.config.ranker import JobConfig, parse_config
from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec
from trainer.ranking.setup import split_in_time

DAY_MS = 86_400_000
MAY_4 = 1_651_593_600_000
"""2022-05-04, 00:00 in Shanghai."""


def spec() -> DatasetSpec:
    return DatasetSpec(
        name="x",
        source="",
        licence="",
        partitions=1,
        timezone="Asia/Shanghai",
        behaviours=("click",),
        applies={"click": ("video",)},
        candidates=("video",),
        span_ms=(MAY_4 - 9 * DAY_MS, MAY_4 + 2 * DAY_MS - 1),
    )


def job(**data: str) -> JobConfig:
    return parse_config({"data": {"path": "x", **data}}, "test")


def test_training_ends_where_evaluation_begins() -> None:
    split = split_in_time(job(eval_from="2022-05-04", eval_until="2022-05-05"), spec())
    assert (split.train_until, split.eval_from, split.eval_until) == (MAY_4, MAY_4, MAY_4 + DAY_MS)
    assert split.training.emit_until == MAY_4
    assert (split.held_out.request_from, split.held_out.request_until) == (MAY_4, MAY_4 + DAY_MS)


def test_training_may_end_earlier_and_begin_later() -> None:
    split = split_in_time(job(train_from="2022-04-26", train_until="2022-05-02", eval_from="2022-05-04"), spec())
    assert (split.train_from, split.train_until) == (MAY_4 - 8 * DAY_MS, MAY_4 - 2 * DAY_MS)


def test_without_a_held_out_range_all_is_trained_on() -> None:
    split = split_in_time(job(), spec())
    assert split.eval_from is None
    assert split.train_until > spec().span_ms[1] + 365 * DAY_MS
    with pytest.raises(ValueError, match="no held-out range"):
        _ = split.held_out


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            {"train_until": "2022-05-05", "eval_from": "2022-05-04"},
            "eval_from = '2022-05-04' is before data.train_until",
        ),
        ({"train_from": "2022-05-04", "eval_from": "2022-05-04"}, "train_from = '2022-05-04' is not before the end"),
        ({"eval_from": "2022-05-04", "eval_until": "2022-05-04"}, "eval_until = '2022-05-04' is not after"),
        ({"eval_from": "2022-06-04"}, "is after the dataset's last request"),
        ({"eval_from": "May"}, "data.eval_from = 'May': not a time"),
    ],
)
def test_ranges_that_cannot_be_are_refused(data: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        split_in_time(job(**data), spec())
