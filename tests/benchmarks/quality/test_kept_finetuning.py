"""A kept fine-tuning belongs to its whole job and to the content of its samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import instructions, kept_finetuning, segment_probe
from benchmarks.quality.kept_finetuning import finetune_once, is_finished
from trainer.config.finetune import FinetuneConfig
from trainer.llm.instructions.write import InstructionPlan
from trainer.runtime.files import write_json


def job_of(benchmark: str, work: Path, overrides: list[str]) -> FinetuneConfig:
    samples = work / "samples"
    if benchmark == "instructions":
        return instructions.job_of(work, samples, 60, 1, overrides)
    return segment_probe.job_of(work, samples, 1, overrides)


@pytest.mark.parametrize("benchmark", ["instructions", "segment_probe"])
def test_another_job_and_other_samples_are_tuned_again(
    benchmark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned: list[str] = []

    def tune(config: FinetuneConfig, *others: Any) -> None:
        tuned.append(config.run.directory)
        Path(config.run.directory).mkdir()
        write_json(Path(config.run.directory) / "metrics.json", {"rate": config.optimizer.learning_rate})

    monkeypatch.setattr(kept_finetuning, "run_job", tune)
    samples = tmp_path / "samples"
    samples.mkdir()
    for name in ("train", "tune", "evaluate", "general"):
        (samples / f"{name}.jsonl").write_text("first")
    first = finetune_once(job_of(benchmark, tmp_path, []))
    other = finetune_once(job_of(benchmark, tmp_path, ["optimizer.learning_rate=0.5"]))
    assert other == {"rate": 0.5} and first != other
    assert finetune_once(job_of(benchmark, tmp_path, [])) == first and len(tuned) == 2, "nothing twice"
    (samples / "evaluate.jsonl").write_text("second")
    again = job_of(benchmark, tmp_path, [])
    assert not is_finished(again)
    finetune_once(again)
    assert len(set(tuned)) == 3


def test_samples_of_another_plan_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def write(world: Path, samples: Path, plan: InstructionPlan) -> None:
        made.append(plan.evaluate_samples)
        samples.mkdir()

    monkeypatch.setattr(instructions, "simulate", lambda world, *size, texts: world.mkdir())
    monkeypatch.setattr(instructions, "write_instructions", write)
    plans = [InstructionPlan("2024-03-13", evaluate_samples=count) for count in (30, 40, 30)]
    first, other, again = (instructions.prepare(tmp_path, 60, plan) for plan in plans)
    assert made == [30, 40] and first == again != other
