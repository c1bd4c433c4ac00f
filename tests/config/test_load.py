"""Job files: defaults, overrides, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tests.paths import ROOT
from trainer.config.align import AlignConfig
from trainer.config.diff import changeable_keys, differences
from trainer.config.embed import EmbeddingJob
from trainer.config.finetune import FinetuneConfig
from trainer.config.foresight import ForesightConfig
from trainer.config.load import load_deepspeed, load_job, parse_time
from trainer.config.quantize import QuantizeJob
from trainer.config.ranker import JobConfig, load_config, parse_config
from trainer.config.staytime import StaytimeConfig
from trainer.config.toml import fields, validate, validate_stored
from trainer.console.errors import UserError

OTHER_JOBS: dict[str, type[BaseModel]] = {
    "embed.toml": EmbeddingJob,
    "quantize.toml": QuantizeJob,
    "align.toml": AlignConfig,
    "foresight.toml": ForesightConfig,
    "embed_follow.toml": EmbeddingJob,
    "staytime.toml": StaytimeConfig,
    "finetune_small.toml": FinetuneConfig,
    "qwen2_7b_lora.toml": FinetuneConfig,
    "qwen2_7b_lora_80gb.toml": FinetuneConfig,
    "qwen2_7b_lora_141gb.toml": FinetuneConfig,
}
"""Shipped job file of another job than a ranker's -> its schema."""


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "job.toml"
    file.write_text(text)
    return file


def test_overrides_are_toml_values_and_bare_words_are_strings(tmp_path: Path) -> None:
    file = write(tmp_path, '[data]\npath = "d"\n')
    config = load_config(
        file,
        ["train.epochs=3", "model.kind=mmoe", "data.frozen=true", "tables.learning_rate=1e-2", "model.tower=[8, 4]"],
    )
    assert (config.train.epochs, config.model.kind, config.data.frozen) == (3, "mmoe", True)
    assert config.tables.learning_rate == 0.01
    assert config.model.tower == (8, 4)


def test_dates_need_no_quotes(tmp_path: Path) -> None:
    file = write(tmp_path, "[data]\npath = 'd'\neval_from = 2022-05-04\n")
    config = load_config(file, ["data.eval_until=2022-05-06T12:00:00+08:00"])
    assert (config.data.eval_from, config.data.eval_until) == ("2022-05-04", "2022-05-06T12:00:00+08:00")


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("[data]\npath = 'd'\n[train]\nepoch = 2\n", [], "unknown key train.epoch; did you mean train.epochs?"),
        ("[data]\npath = 'd'\n[trian]\nepochs = 2\n", [], "unknown key trian; did you mean train?"),
        ("[data]\npath = 'd'\n", ["model.kinds=ple"], "unknown key model.kinds; did you mean model.kind?"),
        ("[data]\npath = 'd'\n", ["model.kind=plee"], "model.kind = 'plee': input should be 'ple', 'cgc'"),
        ("[data]\npath = 'd'\n", ["train.epochs=0"], "train.epochs = 0: input should be greater than or equal to 1"),
        ("[data]\npath = 'd'\n", ["features.item.dim=6"], "features.item.dim = 6: input should be a multiple of 4"),
        ("[data]\npath = 'd'\n", ["train.epochs=many"], "train.epochs = 'many': input should be a valid integer"),
        ("[data]\npath = 'd'\n", ["tables.learning_rate=-1"], "tables.learning_rate = -1: input should be greater"),
        ("[data]\npath = 'd'\n", ["data.behaviours=click"], "data.behaviours = 'click': input should be a list"),
        ("[data]\npath = 'd'\n", ["train.weights=2"], "train.weights = 2: input should be a table of keys and values"),
        ("[data]\npath = 'd'\n", ["model=ple"], "model = 'ple': input should be a section of keys and values"),
        ("[data]\npath = 'd'\n", ["epochs"], "override 'epochs': write section.key=value, such as data.path=d"),
        ("[data]\npath = 'd'\n", ["data.path.x=1"], "data.path is a value, not a section"),
        ("[train]\nepochs = 2\n", [], "data is missing"),
        ("[data]\n", [], "data.path is missing"),
        ("[data\n", [], "not valid TOML"),
    ],
)
def test_mistakes_are_one_line_with_file_key_and_value(
    tmp_path: Path, text: str, overrides: list[str], expected: str
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_config(file, overrides)
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    if not expected.startswith("override") and "not a section" not in expected:
        assert str(file) in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.toml: no such job file"):
        load_config(tmp_path / "nowhere.toml")


def test_the_config_is_frozen(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "[data]\npath = 'd'\n"))
    with pytest.raises(Exception, match="frozen"):
        config.train.epochs = 2  # type: ignore[misc]


def test_a_resolved_config_reads_back(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, "[data]\npath = 'd'\n"), ["model.expert_layers=[[8,4]]", "score.exponents.gift=2"]
    )
    assert JobConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_job_is_valid(file: Path) -> None:
    config = load_job(OTHER_JOBS.get(file.name, JobConfig), file)
    if isinstance(config, JobConfig | FinetuneConfig):
        load_deepspeed(str(ROOT / config.train.deepspeed))


def test_times_are_taken_in_the_datasets_time_zone() -> None:
    assert parse_time("2022-05-04", "Asia/Shanghai", "data.eval_from") == 1_651_593_600_000
    assert parse_time("2022-05-04T00:00+00:00", "Asia/Shanghai", "data.eval_from") == 1_651_622_400_000
    with pytest.raises(UserError, match=r"data\.eval_from = 'noon': not a time"):
        parse_time("noon", "UTC", "data.eval_from")


@pytest.mark.parametrize(
    ("text", "expected"), [("[1]", "a JSON object is expected, this is a list"), ("{", "not valid JSON")]
)
def test_deepspeed_settings_must_be_an_object(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(text)
    with pytest.raises(UserError, match=expected):
        load_deepspeed(str(file))
    with pytest.raises(UserError, match="no such file"):
        load_deepspeed(str(tmp_path / "none.json"))


@pytest.mark.parametrize("job", [JobConfig, FinetuneConfig])
def test_a_key_may_change_on_resume_only_if_it_is_marked(job: type[JobConfig] | type[FinetuneConfig]) -> None:
    free = tuple(changeable_keys(job))
    for key, _ in fields(job):
        changed = differences({key: 1}, {key: 2}, free)
        assert bool(changed) != any(f"{key}.".startswith(f"{name}.") for name in free), key
    assert {"run.directory", "train.device", "train.deepspeed", "checkpoint", "resume"} <= set(free)
    assert not {"run.seed", "train.batch_size", "optimizer.learning_rate", "data.train_from", "lora.rank"} & set(free)


def test_keys_that_may_change_are_those_that_change_no_result() -> None:
    """Fails for every key that gets or loses its mark: compare it with what the key changes, then list it here."""
    free = set(changeable_keys(JobConfig))
    assert {key for key in free if key.startswith(("features", "tables", "model", "labels", "alignment"))} == {
        *(f"features.{table}.sharding" for table in ("user", "author", "item", "side")),
        # A table of vectors and a file of codes are compared by their hashes, as the dataset is.
        *("features.content.NAME.table", "features.codes.NAME.file", "features.codes.NAME.sharding"),
        # A store has codes of the file's version, and the code of a segment never changes.
        "features.codes.NAME.store",
        # Searches find the same entries on either device.
        "features.search.device",
        "tables.deduplicate",
    }
    assert {key for key in free if key.startswith("data.")} == {
        *("data.path", "data.workers", "data.prefetch", "data.on_corrupt"),
    }


def test_a_mark_below_free_keys_holds_for_each_of_them_and_for_no_other_key() -> None:
    free = tuple(changeable_keys(JobConfig))
    then = {"features.content.topic.table": "a", "features.content.topic.dim": 1}
    assert differences(then, {**then, "features.content.topic.table": "b"}, free) == []
    for key in ("features.content.topic.dim", "features.content.topic", "features.content.table"):
        assert len(differences(then, {**then, key: 5}, free)) == 1, key


def test_a_stored_job_from_before_a_key_means_what_the_model_did_then() -> None:
    raw: dict[str, Any] = {"data": {"path": "d", "train_until": "2024-03-05"}, "towers": {"dim": 8}}
    then = validate_stored(AlignConfig, raw, "config.json").towers
    assert (then.dim, then.log_q_hours, then.unseen) == (8, 0.0, "content")
    stated = validate_stored(AlignConfig, raw | {"towers": {"log_q_hours": 2.0}}, "config.json").towers
    assert (stated.log_q_hours, stated.unseen) == (2.0, "content")
    now = validate(AlignConfig, raw, "job.toml").towers
    assert (now.log_q_hours, now.unseen) == (1.0, "unknown_id"), "a job that a user writes has the defaults"


def test_a_renamed_key_is_answered_with_its_new_name_and_read_where_it_is_stored() -> None:
    raw = {
        "data": {"path": "d", "train_until": "2024-03-05"},
        "stream": {},
        "labels": {"disorder_seconds": 4.0},
    }
    with pytest.raises(UserError) as refused:
        parse_config(raw, "job.toml")
    assert str(refused.value) == ("job.toml: labels.disorder_seconds is called labels.max_out_of_orderness_seconds now")
    assert validate_stored(JobConfig, raw, "config.json").labels.max_out_of_orderness_seconds == 4.0
