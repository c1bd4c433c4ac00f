"""Precision of a job: what ``auto`` means, and DeepSpeed's settings that go with it or contradict it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.config.deepspeed import complete_settings
from trainer.config.precision import Precision, dense_settings, describe_precision, resolve_precision
from trainer.config.ranker import TrainConfig
from trainer.console.errors import UserError

ON, OFF = {"bf16": {"enabled": True}}, {"bf16": {"enabled": False}}


def loop(tmp_path: Path, precision: str, **settings: Any) -> TrainConfig:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(settings))
    return TrainConfig(precision=precision, deepspeed=str(file))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stage", "settings", "gpu", "cpu"),
    [
        (1, {}, "bf16", "fp32"),
        (2, {}, "bf16", "fp32"),
        (0, {}, "tf32", "fp32"),
        (1, ON, "bf16", "bf16"),
        (1, OFF, "fp32", "fp32"),
    ],
)
def test_auto_is_bf16_on_a_gpu_and_the_deepspeed_settings_come_first(
    tmp_path: Path, stage: int, settings: dict[str, Any], gpu: str, cpu: str
) -> None:
    train = loop(tmp_path, "auto", zero_optimization={"stage": stage}, **settings)
    assert (resolve_precision(train, "cuda"), resolve_precision(train, "cpu")) == (gpu, cpu)
    for device in ("cuda", "cpu"):
        # The engine accepts the precision with the same settings.
        chosen = train.model_copy(update={"precision": resolve_precision(train, device)})
        assert complete_settings(dense_settings(chosen), 8, 1)["zero_optimization"] == {"stage": stage}


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
def test_a_precision_that_is_set_is_that_of_every_device(tmp_path: Path, precision: Precision) -> None:
    train = loop(tmp_path, precision, zero_optimization={"stage": 1}, gradient_clipping=0.5)
    assert {resolve_precision(train, device) for device in ("cuda", "cpu")} == {precision}
    settings = dense_settings(train)
    assert settings.pop("gradient_clipping") == 0.5 and settings.pop("zero_optimization") == {"stage": 1}
    assert settings == ({**ON, "data_types": {"grad_accum_dtype": "fp32"}} if precision == "bf16" else {})


def test_settings_of_the_file_stay_as_they_are(tmp_path: Path) -> None:
    for settings in (ON, {**ON, "data_types": {"grad_accum_dtype": "bf16"}}):
        assert dense_settings(loop(tmp_path, "bf16", **settings)) == settings
        assert dense_settings(loop(tmp_path, "auto", **settings)) == settings
    types = {"grad_accum_dtype": "bf16"}
    assert dense_settings(loop(tmp_path, "bf16", data_types=types)) == {**ON, "data_types": types}


@pytest.mark.parametrize(
    ("precision", "settings", "message"),
    [
        ("fp32", ON, "train.precision = 'fp32': .* enables bf16; use 'bf16' or other settings"),
        ("tf32", ON, "train.precision = 'tf32': .* enables bf16"),
        ("bf16", OFF, "train.precision = 'bf16': .* turns bf16 off; remove the key there"),
    ],
)
def test_settings_that_contradict_the_precision_are_refused(
    tmp_path: Path, precision: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        dense_settings(loop(tmp_path, precision, **settings))


def test_bf16_without_zero_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use stage 1 or 2"):
        complete_settings(dense_settings(loop(tmp_path, "bf16", zero_optimization={"stage": 0})), 8, 1)


def test_the_line_of_a_run_names_the_precision_of_both_parts() -> None:
    assert describe_precision("bf16", "cuda") == (
        "precision bf16: the dense network is bfloat16, its optimizer float32; the tables are float32"
    )
    assert "TF32 products" in describe_precision("tf32", "cuda")
    assert "since TF32 is for GPUs only" in describe_precision("tf32", "cpu")
