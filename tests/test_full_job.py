"""The commands of `make full` and its job file: accepted, in an order that makes every input, and fitted in time."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.examples import Example, check
from tests.full_chain import commands
from tests.paths import ROOT
from trainer.config.ranker import load_config


@pytest.fixture(autouse=True)
def without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)


def test_every_command_of_make_full_is_accepted() -> None:
    found = commands()
    assert len(found) == 9
    for line in found:
        check(Example("make full", "command", line))


def test_make_full_passes_its_variables_on() -> None:
    simulate, *others = (shlex.split(line) for line in commands("USERS=77", "SEED=5", "RANKS=3"))
    assert simulate[simulate.index("--users") + 1] == "77" and simulate[simulate.index("--seed") + 1] == "5"
    assert [words[words.index("--ranks") + 1] for words in others if "--ranks" in words] == ["3"] * 6


def test_every_input_is_the_output_of_an_earlier_command() -> None:
    made: set[str] = set()
    for line in commands():
        words = shlex.split(line)
        places = {word.rpartition("=")[2] for word in words if re.search(r"(^|=)(data|runs)/full/", word)}
        if words[1:3] == ["train", "configs/full.toml"]:
            config = load_config("configs/full.toml")
            places = {config.data.path, *(codes.file for codes in config.features.codes.values())}
            places |= {content.table for content in config.features.content.values()}
        # Each command makes one place, a new one; all others must be there, or lie in what is there.
        new = {place for place in places if not any(place == done or place.startswith(f"{done}/") for done in made)}
        assert len(new) == (words[1] != "train"), (line, new)
        made |= new


def test_all_is_fitted_before_the_stream_begins() -> None:
    """The last days take no part in a fit; the forecasts begin where the range of the predictor's training ends."""
    begin = load_config("configs/full.toml").data.train_until
    lines = [line for line in commands() if re.search(r"configs/(align|quantize|foresight)\.toml", line)]
    assert len(lines) == 5
    for line in lines:
        ends = re.findall(r"data\.(?:train|fit)_until=(\S+)", line)
        assert ends == ([] if " follow " in line else [begin]), line
    assert "follow.init_from=runs/full/foresight" in lines[-1] and "follow.since" not in lines[-1]


def test_the_job_has_all_systems() -> None:
    config = load_config("configs/full.toml")
    assert config.stream is not None and config.labels.policy == "realtime" and config.labels.tick_seconds == 30
    searches = {(history.search, history.domain) for history in config.features.history.values()}
    assert searches >= {("latest", "video"), ("top", "video"), ("author", "video"), ("top", "live"), ("latest", "both")}
    assert config.features.search.refresh_steps and config.alignment.anchor in config.features.history
    assert len(config.features.codes) == 2 and len(config.features.content) == 4
