"""Tests of Limelight's own settings and templates, which defaults name and every working directory finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.paths import ROOT
from trainer.config.embed import EmbedConfig
from trainer.config.finetune import FinetuneConfig
from trainer.config.load import load_deepspeed, read_job
from trainer.config.own_files import configs_directory, find_settings
from trainer.config.ranker import TrainConfig
from trainer.console.errors import UserError
from trainer.llm.instructions.tasks import PLACEHOLDERS
from trainer.llm.instructions.write import InstructionPlan
from trainer.llm.models.prompt_templates import Template

DEFAULTS = (TrainConfig().deepspeed, FinetuneConfig.model_fields["train"].get_default(call_default_factory=True))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_default_is_found_from_an_empty_directory(elsewhere: Path) -> None:
    for file in (TrainConfig().deepspeed, DEFAULTS[1].deepspeed):
        assert load_deepspeed(file), file
    template = EmbedConfig.model_fields["template"].default
    texts = dict.fromkeys(("items", "comments", "segments", "authors"), frozenset({"text"}))
    assert Template.read(template, texts).file == Path(template)
    for task, places in PLACEHOLDERS.items():
        Template.read(Path(InstructionPlan.templates) / f"{task}.txt", places)


def test_a_file_in_the_working_directory_comes_first(elsewhere: Path) -> None:
    file = elsewhere / "configs" / "deepspeed" / "zero1.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"gradient_clipping": 0.25}')
    assert load_deepspeed("configs/deepspeed/zero1.json") == {"gradient_clipping": 0.25}
    # Another file of the same directory is still Limelight's own.
    assert "zero_optimization" in load_deepspeed("configs/deepspeed/zero2.json")


@pytest.mark.parametrize(
    "path", ["deepspeed/zero1.json", "./other/zero1.json", "configs/deepspeed/none.json", "configs/../README.md", "/x"]
)
def test_other_paths_stay_as_they_are(elsewhere: Path, path: str) -> None:
    assert find_settings(path) == Path(path)


def test_a_job_file_is_never_taken_from_elsewhere(elsewhere: Path) -> None:
    with pytest.raises(UserError, match=r"no such job file; `limelight configs configs` copies Limelight's own job"):
        read_job("configs/simulated.toml")
    with pytest.raises(UserError, match=r"mine.toml: no such job file"):
        read_job("mine.toml")


def test_the_own_files_of_a_checkout_are_its_configs() -> None:
    assert configs_directory() == ROOT / "configs"
