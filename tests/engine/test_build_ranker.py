"""Inputs that describe the candidate, and a network over the features of a dataset."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trainer.config.ranker import parse_config
from trainer.data.format.schema import DenseFeature, SideFeature
from trainer.engine.build_ranker import candidate_dense, candidate_side

SIDE = (
    SideFeature("user_region", "user", 9),
    SideFeature("category", "item", 9),
    SideFeature("hour", "context", 24),
    SideFeature("author_level", "author", 5),
)
NAMES = (
    "user_age",
    "duration",
    "stat:user:click",
    "stat:author:click",
    "stat:author*item:click",
    "stat:user*author:click",
    "stat:author:rows",
    "stat:user:rows",
)


def features(side: tuple[SideFeature, ...] = SIDE) -> Any:
    spec = SimpleNamespace(
        side=side,
        dense=(DenseFeature("user_age", "user"), DenseFeature("duration", "item")),
        statistics=(("user",), ("author",), ("author", "item"), ("user", "author")),
    )
    return SimpleNamespace(spec=spec, dense_names=NAMES)


@pytest.mark.parametrize(
    ("exclude", "expected"), [([], [1, 3]), (["user_region"], [0, 2]), (["category"], [2]), (["author_level"], [1])]
)
def test_side_features_of_the_candidate(exclude: list[str], expected: list[int]) -> None:
    config = parse_config({"data": {"path": "d"}, "features": {"exclude": exclude}}, "test")
    assert candidate_side(config, features()) == expected


def test_dense_features_of_the_candidate() -> None:
    assert [NAMES[place] for place in candidate_dense(features())] == [
        "duration",
        "stat:author:click",
        "stat:author*item:click",
        "stat:author:rows",
    ]
