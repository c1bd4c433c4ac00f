"""The job of a run as TOML."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from trainer.config.ranker import parse_config
from trainer.report.job_text import job_lines


def test_the_text_is_the_job_and_marks_what_is_no_default() -> None:
    settings: dict[str, Any] = {
        "run": {"name": 'a "b" \\ é\n'},
        "data": {"path": "d"},
        "features": {"history": {"short list": {"domain": "video", "length": 7}}},
        "train": {"weights": {"like": 2.0}, "batch_size": 64},
        "score": {"exponents": {"gift": 4.0}},
    }
    config = parse_config(settings, "test").model_dump(mode="json")
    lines = job_lines(config, "ranker")
    raw = tomllib.loads("\n".join(line.text for line in lines))
    assert parse_config(raw, "test").model_dump(mode="json") == config
    changed = {line.text.partition(" =")[0]: line.text for line in lines if line.changed}
    assert set(changed) == {"name", "path", "domain", "length", "like", "batch_size", "gift"}
    assert changed["batch_size"] == "batch_size = 64  # default: 2048"
    assert changed["like"].endswith("# default: unset") and "#" not in changed["path"]


@pytest.mark.parametrize("config", [{}, {"a": None}, {"a": 1, "b": {"c": []}}, {"train": "x", "data": {"path": {}}}])
def test_settings_of_another_version_are_texts(config: dict[str, Any]) -> None:
    for kind in (None, "ranker", "staytime"):
        lines = job_lines(config, kind)  # type: ignore[arg-type]
        tomllib.loads("\n".join(line.text for line in lines))
        assert kind is not None or not any(line.changed for line in lines)


def test_values_of_another_run_are_comments() -> None:
    config = {"run": {"name": "a"}, "train": {"rows": 1, "weights": {}, "only": 3}, "x": {"y": {"z": 1}}, "same": 4}
    other = {"run": {"name": "b"}, "train": {"rows": 2, "gone": "t"}, "x": {"q": {"w": 1}}, "same": 4, "past": {"k": 5}}
    lines = job_lines(config, None, other)
    assert tomllib.loads("\n".join(line.text for line in lines)) == config
    assert [line.text for line in lines if line.differs] == [
        "# past = {k = 5}  # in the other run only",
        "rows = 1  # other run: 2",
        "only = 3  # other run: unset",
        '# gone = "t"  # in the other run only',
        "# q = {w = 1}  # in the other run only",
        "z = 1  # other run: unset",
    ]
    assert not any(line.differs for line in job_lines(config, None, config))
    assert job_lines(config, None, {"x": 3, "train": [1]})[-2].differs
