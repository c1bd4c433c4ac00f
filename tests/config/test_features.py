"""Keys of pre-trained vectors that do not fit together, each refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config.ranker import parse_config
from trainer.console.errors import UserError

TABLE = {"table": "t"}


def parse(**content: dict[str, Any]) -> None:
    parse_config({"data": {"path": "d"}, "features": {"content": content}}, "job.toml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"topic": {}}, "features.content.topic.table"),
        ({"topic": {"table": ""}}, "features.content.topic.table"),
        ({"topic": {**TABLE, "of": "user"}}, "features.content.topic.of"),
        ({"topic": {**TABLE, "dim": 0}}, "features.content.topic.dim"),
        ({"topic": {**TABLE, "reading": "mean"}}, '`reading` works only with of = "segment", not "item"'),
        ({"topic": {**TABLE, "of": "author", "histories": True, "on_air": "longest"}}, "`on_air` works only with"),
        ({"topic": {**TABLE, "of": "segment", "on_air": "longest"}}, "and histories = true"),
        ({"item": TABLE}, "cannot be named 'item': 'item' is another input"),
        ({"short_item": TABLE}, "'short_item' is another input"),
        ({"context": {**TABLE, "histories": True}}, "cannot be named 'context': 'short_context' is another input"),
        ({"a": {**TABLE, "histories": True}, "live_a": TABLE}, "cannot be named 'live_a': 'live_a' is another input"),
        ({"a.b": TABLE}, "letters, digits and underscores"),
        ({"": TABLE}, "letters, digits and underscores"),
    ],
)
def test_vectors_that_no_model_can_read_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        parse(**content)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_vectors_may_have_names_that_only_tables_without_histories_use() -> None:
    parse(context=TABLE, topic={**TABLE, "of": "segment", "reading": "mean", "histories": True, "on_air": "longest"})
