"""The benchmark of the instructions: what is read from words by hand, and what its table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import instructions, kept_finetuning
from benchmarks.quality.instruction_word_baseline import accuracy_of_words
from benchmarks.quality.instructions import summarise, table
from tests.paths import ROOT
from trainer.data.simulator.write_dataset import simulate
from trainer.llm.finetuning.samples import ReadCounts, Sample, read_samples
from trainer.llm.instructions.write import InstructionPlan, write_instructions

TEMPLATES = ROOT / "configs/templates"


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Sample]]:
    out = tmp_path_factory.mktemp("instructions")
    simulate(out / "world", 120, 3, 1, 4, texts=True)
    write_instructions(
        out / "world", out / "samples", InstructionPlan("2024-03-06", samples=600, templates=str(TEMPLATES))
    )
    tasks: dict[str, list[Sample]] = {}
    for sample in read_samples([str(out / "samples" / "train.jsonl")], ReadCounts()):
        tasks.setdefault(sample.task, []).append(sample)
    return tasks


@pytest.mark.parametrize(("task", "least"), [("top_comment", 0.5), ("user_comment", 0.35), ("staytime", 0.3)])
def test_every_prompt_is_read_and_says_something(samples: dict[str, list[Sample]], task: str, least: float) -> None:
    half = len(samples[task]) // 2
    # a quarter would be right by chance
    assert accuracy_of_words(samples[task][:half], samples[task][half:]) > least


def test_a_rule_that_words_say_is_found(samples: dict[str, list[Sample]]) -> None:
    praises = ("so much love for", "bravo for", "I never get enough of")

    def is_praise(line: str) -> bool:
        return any(phrase in line for phrase in praises)

    ruled = []
    for sample in samples["user_comment"]:
        if sum(map(is_praise, sample.options)) == 1:
            answer = next(filter(is_praise, sample.options))
            ruled.append(Sample(sample.prompt, answer, sample.task, sample.options))
    half = len(ruled) // 2
    assert half > 20
    assert accuracy_of_words(ruled[:half], ruled[half:]) == 1


def test_gains_are_over_the_better_baseline_of_each_seed() -> None:
    def run(model: float, majority: float) -> dict[str, Any]:
        of_task = {name: {"accuracy": 0.25} for name in ("untuned", "popularity")}
        model_metrics = {"accuracy": model, "log_loss": 1.0, "auc": 0.6}
        return {"staytime": {"samples": 10, "model": model_metrics, "majority": {"accuracy": majority}, **of_task}}

    summary = summarise([run(0.5, 0.2), run(0.6, 0.4)], {"staytime": 0.7})
    assert summary["staytime"]["model"][0] == pytest.approx(0.55)
    assert summary["staytime"]["gain"][0] == pytest.approx((0.25 + 0.2) / 2)
    # Student's t with one degree of freedom: 12.706 times the standard error.
    assert summary["staytime"]["model"][1] == pytest.approx(12.706 * 0.05, rel=1e-3)
    shown = table(summary)
    assert "0.550 ± 0.635" in shown and "0.700" in shown


@pytest.mark.slow
def test_a_small_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = InstructionPlan("2024-03-13", samples=120, templates=str(TEMPLATES), tune_from="2024-03-12")
    monkeypatch.setattr(instructions, "PLAN", plan)
    out = tmp_path / "results" / "instructions.json"
    command = [f"--work={tmp_path / 'work'}", "--users=60", "--seeds=1", "--evaluate-samples=30", f"--out={out}"]
    small = ["train.epochs=1", "small.hidden=16", "small.layers=1", "small.heads=2", "small.vocabulary=600"]
    instructions.main([*command, *small])
    written = json.loads(out.read_text())
    assert set(written["tasks"]) == {"staytime", "top_comment", "user_comment"} and written["seeds"] == 1
    for task in written["tasks"].values():
        assert 0 <= task["model"][0] <= 1 and task["model"][1] is None and 0 <= task["words"] <= 1
        assert task["change"]["log_loss"][0] == pytest.approx(task["calibrated"]["log_loss"][0] - task["log_loss"][0])
        assert task["chance"]["log_loss"] > 0.5 and task["errors"]["calibrated"] > 0
        assert task["change_errors"]["log_loss"] > 0 and task["change_errors"]["accuracy"] >= 0
    fitted = written["tasks"]["user_comment"]["calibration"]
    assert len(fitted) == 1 and fitted[0]["samples"] > 10 and fitted[0]["bare"] != 0
    assert written["tasks"]["staytime"]["calibration"][0]["bare"] == 0
    assert written["settings"]["epochs"] == 1 and written["steps"] > 0
    assert out.with_suffix(".svg").stat().st_size > 1000

    def refuse(*arguments: object) -> None:
        raise AssertionError("a run that is there is not repeated")

    monkeypatch.setattr(kept_finetuning, "run_job", refuse)
    instructions.main([*command, *small])
    assert "gain over the better baseline" in capsys.readouterr().out
