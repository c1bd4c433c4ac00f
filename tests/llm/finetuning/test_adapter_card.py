"""Tests of the sections of an adapter's model card: data, training and evaluation of the job, none of them empty."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config.finetune import FinetuneConfig
from trainer.llm.finetuning.adapter_card import training_sections

SOURCES = {
    "a/train.jsonl": {"bytes": 12_345, "crc32": 255, "manifest": None},
    "a/general.jsonl": {"bytes": 1, "crc32": 1, "manifest": None},
    "a/later.jsonl": {"bytes": 2, "crc32": 2, "manifest": None},
}


def metrics(**changes: Any) -> dict[str, Any]:
    counts = {"trained_on": 1_500, "tokens": 16_050, "answer_tokens": 5_400, "truncated": 3, "left_out": 2}
    return {
        "tasks": {"staytime": 1_000, "top_comment": 500},
        "samples": counts,
        "training": {"steps": 160, "loss": [6.28669, 3.0, 0.25]},
        "engine": {"zero_stage": 2},
        "evaluation": {"staytime": {"samples": 20, "model": {"accuracy": 0.9}, "untuned": {"accuracy": 0.6}}},
        **changes,
    }


def job(path: str = "") -> FinetuneConfig:
    data = {
        "train": ["a/train.jsonl"],
        "general": ["a/general.jsonl"],
        "general_share": 0.1,
        "evaluate": ["a/later.jsonl"],
    }
    return FinetuneConfig.model_validate({"data": data, "model": {"path": path}})


def test_the_card_has_the_data_the_training_and_the_evaluation() -> None:
    sections = training_sections(job("Qwen/Qwen2-7B"), metrics(), SOURCES)
    assert list(sections) == ["Data", "Training", "Evaluation"]
    assert "1,500 samples" in sections["Data"] and "staytime (1,000), top_comment (500)" in sections["Data"]
    assert "| `a/train.jsonl` | training | 12,345 | 000000ff |" in sections["Data"]
    assert "| `a/general.jsonl` | general samples, mixed in |" in sections["Data"]
    assert "| `a/later.jsonl` | evaluation |" in sections["Data"]
    assert "160 optimizer steps of 32 sequences" in sections["Training"]
    assert "learning rate 0.0002 (cosine, warm-up over 3% of the steps)" in sections["Training"]
    assert "from 6.2867 to 0.2500" in sections["Training"] and "random weights" not in sections["Training"]
    assert "0.9000" in sections["Evaluation"]


@pytest.mark.parametrize("empty", [{"evaluation": {}}, {"training": {"steps": 0, "loss": []}}])
def test_a_job_without_evaluation_or_steps_has_a_card_too(empty: dict[str, Any]) -> None:
    sections = training_sections(job(), metrics(**empty), SOURCES)
    assert ("Evaluation" in sections) == bool(metrics(**empty)["evaluation"])
    assert all(text.strip() for text in sections.values())
    assert "random weights" in sections["Training"]
