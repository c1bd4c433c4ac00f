"""Adapter engine compared with a plain PyTorch loop: ZeRO 1, 2 and 3 on one and two ranks, checkpoints between them.

The same start of two ranks also begins a job that one rank finishes, because starting ranks takes most of the time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import RunRanks
from tests.llm.finetuning.engine_ranks import CASES, HALF, JOB_STOPS, RESUMED, run_cases, weight_of
from tests.llm.tiny import LORA, SMALL, STEPS, job, plain_training, samples, write_samples
from trainer.checkpoint.describe import describe_checkpoint, format_checkpoint
from trainer.checkpoint.manifest import list_checkpoints, read_manifest
from trainer.config.finetune import AnswerWeight
from trainer.console.errors import UserError
from trainer.finetune import run_job
from trainer.llm.finetuning.token_files import Tokens
from trainer.llm.models.base_model import BaseModelFiles
from trainer.report.run_report import make_report
from trainer.runtime.distributed import World
from trainer.runtime.preemption import Preemption
from trainer.serving.export import export_checkpoint

QUICK = ("1", "2", "3", "2-one")
SLOW = tuple(case for case in CASES if case not in QUICK)

QUIET = {"TORCHDYNAMO_DISABLE": "1"}
"""Turns torch.compile off: DeepSpeed compiles an optimizer on import, which takes as long as one of these tests."""

Outcome = dict[str, Any]


@dataclass(frozen=True)
class Plain:
    """Result of the plain loop."""

    losses: list[float]
    adapter: dict[str, torch.Tensor]


Plains = dict[AnswerWeight, Plain]


@pytest.fixture(scope="module")
def plains(base: BaseModelFiles) -> Plains:
    tokens = Tokens.of(samples(150), base.tokenizer, 64)
    assert len(set(tokens.answers)) > 1, "or answers would weigh the same"
    weights: tuple[AnswerWeight, ...] = ("tokens", "one")
    return {weight: Plain(*plain_training(base, tokens, STEPS, 1.0, weight)) for weight in weights}


def check(outcomes: dict[str, Outcome], case: str, plains: Plains) -> None:
    """Compare a case, and the runs resumed from its checkpoints, with the plain loop."""
    outcome, plain = outcomes[case], plains[weight_of(case)]
    assert outcome["names"][0] == "DeepSpeedEngine"
    assert outcome["names"][1] == ("DeepSpeedZeroOptimizer_Stage3" if case[0] == "3" else "DeepSpeedZeroOptimizer")
    check_what_is_held(outcome, plain.adapter)
    for name in (case, *(f"{case} from {saved}" for saved in (1, 2))):
        if name in outcomes:
            check_outcome(outcomes[name], plain, bf16="bf16" in case)


def check_what_is_held(outcome: Outcome, adapter: dict[str, torch.Tensor]) -> None:
    assert outcome["in state"] == sorted(adapter)
    assert all("lora_" in name for name in adapter)
    assert len(adapter) == 2 * len(LORA.targets) * SMALL.layers
    # One moment for each element of the adapter over all ranks, and for nothing else; ZeRO pads the last rank's share.
    elements = sum(value.numel() for value in adapter.values())
    assert elements <= outcome["moments"] <= elements + 8
    assert outcome["frozen with a gradient"] == []


def check_outcome(outcome: Outcome, plain: Plain, *, bf16: bool) -> None:
    expected = plain.losses[-len(outcome["losses"]) :]
    # bfloat16 has three digits, and losses begin near 6.
    torch.testing.assert_close(outcome["losses"], expected, atol=1e-2 if bf16 else 1e-5, rtol=0)
    if not bf16:
        torch.testing.assert_close(outcome["adapter"], plain.adapter, atol=1e-5, rtol=0)


def same(first: Outcome, second: Outcome) -> bool:
    return first["losses"][-HALF:] == second["losses"][-HALF:] and all(
        torch.equal(first["adapter"][name], value) for name, value in second["adapter"].items()
    )


def check_all(outcomes: dict[str, Outcome], cases: tuple[str, ...], plains: Plains, ranks: int) -> None:
    for case in cases:
        check(outcomes, case, plains)
        if case in RESUMED:
            assert same(outcomes[case], outcomes[f"{case} from {ranks}"]), case


def check_shown(run: Path, steps: int) -> None:
    """Check what ``limelight checkpoint`` shows of a run."""
    values = sum(value.numel() for value in load_file(run / "adapter" / "adapter_model.safetensors").values())
    found = describe_checkpoint(run)
    assert (found["step"], found["dense_values"]) == (steps, values)
    # float32, and two moments
    assert found["dense_bytes"] == 3 * 4 * values
    shown = format_checkpoint(found, everything=True)
    assert "adapter of a language model" in shown and f"of {values:,} values" in shown
    with pytest.raises(UserError, match="a checkpoint of an adapter; `limelight export RUN OUT` exports the model"):
        export_checkpoint(run, run / "exported")


def test_zero_is_plain_training_and_two_ranks_are_gone_on_with_by_one(
    base: BaseModelFiles, plains: Plains, tmp_path: Path, run_ranks: RunRanks
) -> None:
    assert all(plain.losses[0] - plain.losses[-1] > 0.3 for plain in plains.values())
    assert abs(plains["one"].losses[-1] - plains["tokens"].losses[-1]) > 1e-3, "weights make a difference"
    write_samples(tmp_path)
    (tmp_path / "manifest.json").write_text('{"templates": "v1"}')
    run_ranks(
        "tests.llm.finetuning.engine_ranks", base.directory, tmp_path, *QUICK, ranks=2, timeout=600, environment=QUIET
    )
    check_all(torch.load(tmp_path / "2.pt"), QUICK, plains, 2)
    with World.join("cpu") as world:
        outcomes = run_cases(base, tmp_path, QUICK, world)
        check_all(outcomes, QUICK, plains, 1)
        assert {"2 from 2", "3 from 2"} < outcomes.keys()

        stopped = read_manifest(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
        assert (stopped.step, stopped.ranks, stopped.finished) == (JOB_STOPS, 2, False)
        gone_on = run_job(job(tmp_path, tmp_path / "run"), world, Preemption())
        through = run_job(job(tmp_path, tmp_path / "undisturbed"), world, Preemption())
    assert gone_on["training"]["steps"] == through["training"]["steps"] > 2 * JOB_STOPS
    torch.testing.assert_close(gone_on["training"]["loss"], through["training"]["loss"], atol=1e-5, rtol=0)
    log = (tmp_path / "run" / "logs" / "rank-00000.log").read_text()
    assert f"resuming from {tmp_path / 'run' / 'checkpoints' / 'step-00000005'}" in log
    assert "saved by 2 ranks, now 1" in log
    assert log.count("attention sdpa: a dense mask; ") == 2, "each start states the attention"
    sources = json.loads((tmp_path / "run" / "tokens" / "sources.json").read_text())
    assert sources[str(tmp_path / "train.jsonl")]["manifest"] == {"templates": "v1"}
    check_shown(tmp_path / "run", gone_on["training"]["steps"])
    for run in ("run", "undisturbed"):
        metrics = json.loads((tmp_path / run / "metrics.json").read_text())
        assert metrics["evaluation"]["fire"]["samples"] == 20
    assert 0 < metrics["parameters"]["trainable"] < metrics["parameters"]["all"]
    page = make_report(tmp_path / "run")
    for words in ("Held-out choices", "Loss of an answer token", "trainable parameters", "tokens per second"):
        assert words in page, words


@pytest.mark.slow
def test_every_case_on_two_ranks_goes_on_from_one(
    base: BaseModelFiles, plains: Plains, tmp_path: Path, run_ranks: RunRanks
) -> None:
    write_samples(tmp_path)
    cases = QUICK + SLOW
    for ranks in (1, 2):
        run_ranks(
            "tests.llm.finetuning.engine_ranks",
            base.directory,
            tmp_path,
            *cases,
            ranks=ranks,
            timeout=600,
            environment=QUIET,
        )
        outcomes = torch.load(tmp_path / f"{ranks}.pt")
        check_all(outcomes, cases, plains, ranks)
    assert all(f"{case} from 1" in outcomes for case in RESUMED)
