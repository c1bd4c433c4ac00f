"""DeepSpeed settings that are accepted, and the messages about all others."""

from typing import Any

import pytest

from trainer.config.deepspeed import complete_settings
from trainer.console.errors import UserError


def test_batch_sizes_are_filled_in() -> None:
    settings = complete_settings({"gradient_accumulation_steps": 4}, batch_size=96, world=2)
    assert settings["train_batch_size"] == 192
    assert settings["train_micro_batch_size_per_gpu"] == 24
    assert settings["gradient_accumulation_steps"] == 4


def test_batch_sizes_that_agree_are_accepted() -> None:
    accepted = {"train_batch_size": 192, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 4}
    assert complete_settings(accepted, batch_size=96, world=2)["train_micro_batch_size_per_gpu"] == 24


def test_what_the_user_sets_stays() -> None:
    accepted = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "none"}},
        "bf16": {"enabled": True},
        "gradient_clipping": 1.5,
        "fp16": {"enabled": False},
    }
    settings = complete_settings(accepted, batch_size=8, world=1)
    for key in ("zero_optimization", "bf16", "gradient_clipping"):
        assert settings[key] == accepted[key]
    assert "fp16" not in settings


@pytest.mark.parametrize("stage", [0, 1])
def test_without_the_key_deepspeed_clips_no_gradient(stage: int) -> None:
    """DeepSpeed's own default is a norm of 1, by which the tables' gradients would not be scaled."""
    settings = complete_settings({"zero_optimization": {"stage": stage}}, batch_size=8, world=1)
    assert settings["gradient_clipping"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "stage = 3: use 0, 1 or 2"),
        ({"zero_optimization": {"stage": "2"}}, "stage = '2': use 0, 1 or 2"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 1, "cpu_offload": True}}, "cpu_offload"),
        ({"zero_optimization": {"stage": True}}, "stage = True: use 0, 1 or 2"),
        ({"zero_optimization": {"stage": [1]}}, "stage = [1]: use 0, 1 or 2"),
        ({"zero_optimization": 1}, "zero_optimization = 1"),
        ({"zero_optimization": None}, "zero_optimization = None"),
        ({"bf16": True}, "bf16 = True: use an object"),
        ({"data_types": "fp32"}, "data_types = 'fp32': use an object"),
        ({"comms_logger": []}, "comms_logger = []: use an object"),
        ({"bf16": {"enabled": True}}, "use stage 1 or 2"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype = 'bf16' without bf16"),
        ({"fp16": {"enabled": True}}, "'fp16' is not supported"),
        ({"optimizer": {"type": "Adam"}}, "'optimizer' is not supported"),
        ({"scheduler": {"type": "WarmupLR"}}, "'scheduler' is not supported"),
        ({"gradient_cliping": 1.0}, "did you mean 'gradient_clipping'"),
        ({"gradient_clipping": -1}, "gradient_clipping = -1"),
        ({"gradient_clipping": "1"}, "gradient_clipping = '1'"),
        ({"gradient_clipping": True}, "gradient_clipping = True"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping = nan"),
        ({"gradient_accumulation_steps": 5}, "gradient_accumulation_steps = 5 does not divide the 8 rows"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps = 0"),
        ({"gradient_accumulation_steps": "auto"}, "gradient_accumulation_steps = 'auto'"),
        ({"train_batch_size": 8}, "train_batch_size = 8 contradicts the job, which needs 16"),
        ({"train_micro_batch_size_per_gpu": 4}, "which needs 8"),
    ],
)
def test_mistakes_are_named_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        complete_settings(settings, batch_size=8, world=2, origin="configs/mine.json")
    assert str(refused.value).startswith("configs/mine.json: ") and message in str(refused.value)
    assert "\n" not in str(refused.value)
