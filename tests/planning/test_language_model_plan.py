"""Plan of a fine-tuning job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT
from trainer.config.finetune import FinetuneConfig, SmallConfig, load_finetune
from trainer.config.toml import read_toml, validate
from trainer.console.errors import UserError
from trainer.llm.models.base_model import BaseModelFiles, add_adapter
from trainer.llm.models.small_model import write_small_model
from trainer.planning.accelerators import describe_cluster
from trainer.planning.language_model_plan import MODEL_FILE, model_shape, plan_finetune
from trainer.planning.ranker_plan import Assumptions

PAGE = ROOT / "docs/language_model.md"
TEXTS = ["a room with a song", "a comment about the song", "nothing at all"]


def job(path: str = "Qwen/Qwen2-7B", stage: str = "llm_zero2_bf16", **sections: Any) -> FinetuneConfig:
    sections = {"train": {"batch_size": 8, "deepspeed": f"configs/deepspeed/{stage}.json"}, **sections}
    model = {"path": path, **sections.pop("model", {})}
    return validate(FinetuneConfig, {"data": {"train": ["none"], "length": 1024}, "model": model, **sections}, "job")


def planned(config: FinetuneConfig, gpu: str = "h100", gpus: int = 8, answers: float = 0.25) -> dict[str, Any]:
    return plan_finetune(config, describe_cluster(gpu, gpus, 1), Assumptions(), answers)


def test_the_shape_of_a_known_model_has_its_published_number_of_weights() -> None:
    shape = model_shape(job())
    # Qwen2-7B has 7,615,616,512 weights; an adapter of rank 16 on all linear layers has 40,370,176.
    assert shape.parameters - shape.trained == 7_615_616_512 and shape.trained == 40_370_176
    assert shape.adapter_width == 7 * 16 and shape.head == 3584 * 152_064


def test_every_known_model_has_the_keys_of_a_shape() -> None:
    for name, sizes in read_toml(MODEL_FILE, "file of models").items():
        assert sizes["hidden_size"] % sizes["num_attention_heads"] == 0, name
        assert sizes["num_attention_heads"] % sizes["num_key_value_heads"] == 0, name


def test_the_shape_of_the_small_model_is_that_of_its_weights(tmp_path: Path) -> None:
    small = SmallConfig(hidden=32, layers=2, heads=4, vocabulary=300)
    write_small_model(tmp_path / "base", TEXTS, small, seed=1, length=64)
    base = BaseModelFiles.open(str(tmp_path / "base"))
    config = job(str(tmp_path / "base"))
    real = add_adapter(base.load(bf16=False), config.lora, "base")
    shape = model_shape(config)
    assert shape.parameters == sum(value.numel() for value in real.parameters())
    assert shape.trained == sum(value.numel() for value in real.parameters() if value.requires_grad)
    vocabulary = base.config.vocab_size
    same = model_shape(job("", small={"hidden": 32, "layers": 2, "heads": 4, "vocabulary": max(300, vocabulary)}))
    assert (same.hidden, same.layers, same.kv_width) == (shape.hidden, shape.layers, shape.kv_width)


def test_the_parts_of_a_plan_add_up_and_the_largest_batch_fits() -> None:
    config = job()
    plan = planned(config)
    assert plan["memory"]["fullest_total"] == sum(plan["memory"]["fullest"].values())
    assert plan["memory"]["fullest"]["weights"] == 2 * plan["model"]["parameters"] and not plan["problems"]
    largest = plan["largest_rows_per_micro_batch"]
    for rows, fits in ((largest, True), (largest + 1, False)):
        train = {"batch_size": 8 * rows, "deepspeed": config.train.deepspeed}
        assert (not planned(job(train=train))["problems"]) == fits
    assert plan["largest_batch_size"] == 8 * largest
    assert plan["step"]["tokens_per_second"] == pytest.approx(8 * 1024 / plan["step"]["seconds"])


@pytest.mark.parametrize(
    ("file", "gpu"),
    [("qwen2_7b_lora", "h100"), ("qwen2_7b_lora_80gb", "h100"), ("qwen2_7b_lora_141gb", "h200")],
)
def test_a_shipped_job_fits_its_gpu_and_needs_the_memory_of_its_page(file: str, gpu: str) -> None:
    config = load_finetune(ROOT / f"configs/{file}.toml")
    quarter, every = (planned(config, gpu, 1, answers) for answers in (0.25, 1.0))
    assert not quarter["problems"]
    needs = [f"{plan['memory']['fullest_total'] / 1e9:.1f} GB" for plan in (quarter, every)]
    (row,) = (line for line in PAGE.read_text().splitlines() if f"configs/{file}.toml` |" in line)
    cells = [cell.strip() for cell in row.strip(" |").split("|")]
    assert cells[3:] == needs and int(cells[1]) == every["rows_per_micro_batch"]
    assert cells[2] == ("computed again" if every["zero"]["gradient_checkpointing"] else "kept")
    if not every["zero"]["gradient_checkpointing"]:
        assert not every["problems"]
        assert f"{needs[1]} as planned" in (ROOT / f"configs/{file}.toml").read_text()
        again = planned(_with_checkpointing(config), gpu, 1)
        assert 1 - quarter["step"]["seconds"] / again["step"]["seconds"] == pytest.approx(1 / 3, abs=0.01), "a third"
    assert config.train.batch_size == 16 and config.data.length == 2048


def _with_checkpointing(config: FinetuneConfig) -> FinetuneConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"gradient_checkpointing": True})})


def test_dropout_needs_masks_and_inputs_of_every_adapter() -> None:
    none, some = (planned(job(lora={"dropout": share})) for share in (0.0, 0.05))
    h, i, tokens = 3584, 18944, 1024
    # bfloat16; a mask of one byte on a GPU; inputs of seven adapters in place of those that adapters share.
    more = tokens * 28 * (3 * (6 * h + i) - 2 * (3 * h + i))
    assert some["memory"]["fullest"]["activations"] - none["memory"]["fullest"]["activations"] == more
    on_cpu = planned(job(lora={"dropout": 0.05}), "cpu")
    assert on_cpu["memory"]["fullest"]["activations"] - some["memory"]["fullest"]["activations"] == (
        tokens * 28 * (6 * h + i)
    )


def test_stage_3_divides_the_weights_and_sends_them() -> None:
    second, third = planned(job()), planned(job(stage="llm_zero3_bf16"))
    assert third["memory"]["fullest"]["weights"] == pytest.approx(second["memory"]["fullest"]["weights"] / 8, rel=1e-6)
    assert third["memory"]["fullest"]["gathered weights"] > 0
    assert third["step"]["parts"]["network"] > second["step"]["parts"]["network"]


def test_offloaded_bytes_lie_in_host_memory() -> None:
    plan = planned(job(stage="llm_zero3_offload_bf16"))
    assert plan["memory"]["fullest"]["optimizer"] == plan["memory"]["fullest"]["weights"] == 0
    assert plan["host_memory"]["parts"]["offloaded"] > 0
    assert plan["host_memory"]["total"] == sum(plan["host_memory"]["parts"].values())


def test_a_model_that_does_not_fit_is_told_what_would_help() -> None:
    plan = planned(job("Qwen/Qwen2-72B"))
    assert plan["problems"] and plan["largest_rows_per_micro_batch"] == 0
    fits = {change["change"]: change["fits"] for change in plan["remedies"]}
    assert not fits["model.gradient_checkpointing = true"] and fits["the same with ZeRO stage 3"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("Qwen/Qwen9-1B", r"model\.path = 'Qwen/Qwen9-1B': its shape is not known here; name a directory with its"),
        ("none", r"model\.path = 'none': no such directory; name a directory with its config\.json, or one of Qwen/"),
    ],
)
def test_an_unknown_model_is_one_line(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned(job(path))


def test_a_directory_of_another_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model here \(config\.json cannot be read\)$"):
        planned(job(str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"config\.json is not of a model of the Qwen2 family$"):
        planned(job(str(tmp_path)))
