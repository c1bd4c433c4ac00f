"""Work of the ranks in test_adapter_engine.py, all cases in one start of the processes.

    torchrun --nproc-per-node N -m tests.llm.finetuning.engine_ranks BASE OUT CASE ...

trains the tiny model in every case, and writes losses, adapters and sizes of optimizer states to OUT/N.pt. Checkpoints
are written to OUT/N-CASE; existing ones, of any number of ranks, are resumed from. More than one rank also start the
job of OUT/train.jsonl in OUT/run, and stop in the middle of it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.llm.tiny import (
    BATCH,
    OPTIMIZER,
    PARTS,
    STEPS,
    StopAfter,
    adapted,
    answers_of,
    batches,
    job,
    samples,
)
from trainer.checkpoint.model_state import write_state
from trainer.config.deepspeed import LANGUAGE_MODEL, complete_settings
from trainer.config.finetune import AnswerWeight
from trainer.finetune import run_job
from trainer.llm.finetuning.adapter_engine import AdapterEngine, partitioned_loading
from trainer.llm.finetuning.packed_batch import answer_weights
from trainer.llm.finetuning.token_files import Tokens
from trainer.llm.models.base_model import BaseModelFiles
from trainer.runtime.distributed import World
from trainer.runtime.preemption import Preempted

CASES: dict[str, dict[str, Any]] = {
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "1-offload": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
    "2-offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "3-offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    "2-bf16": {"stage": 2},
    "3-bf16": {"stage": 3},
    "2-checkpointing": {"stage": 2},
    "3-checkpointing": {"stage": 3},
    "3-whole": {"stage": 3},
    "2-one": {"stage": 2},
}
RESUMED = ("2", "3", "2-bf16", "3-bf16")
HALF = STEPS // 2
JOB_STOPS = 5


def weight_of(case: str) -> AnswerWeight:
    return "one" if case.endswith("-one") else "tokens"


def make_engine(base: BaseModelFiles, case: str, world: World) -> AdapterEngine:
    bf16 = "bf16" in case
    options = {
        "zero_optimization": CASES[case],
        "gradient_accumulation_steps": PARTS,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": bf16},
    }
    settings = complete_settings(options, BATCH // world.size, world.size, LANGUAGE_MODEL)
    # The job loads a model partitioned under ZeRO 3; a model that was loaded whole must train the same way.
    with nullcontext() if "whole" in case else partitioned_loading(settings):
        model = adapted(base, bf16=bf16)
    return AdapterEngine(model, OPTIMIZER, settings, device=world.device, checkpointing="checkpointing" in case)


def train(
    engine: AdapterEngine, tokens: Tokens, world: World, start: int, stop: int, weight: AnswerWeight
) -> list[float]:
    losses = []
    for step in range(start, stop):
        answers = answers_of(tokens, step)
        rank_batches = batches(tokens, step, world.rank, world.size, weight=weight)
        loss = torch.tensor(engine.backward(rank_batches, float(answer_weights(answers, weight).sum())))
        dist.all_reduce(loss)
        engine.step()
        losses.append(float(loss) / int(answers.sum()))
    return losses


def clone(engine: AdapterEngine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.adapter().items()}


def run_case(base: BaseModelFiles, tokens: Tokens, case: str, world: World, out: Path) -> dict[str, Any]:
    engine = make_engine(base, case, world)
    frozen = {name for name, value in engine.network.named_parameters() if not value.requires_grad}
    outcome: dict[str, Any] = {"names": engine.names}
    outcome["losses"] = train(engine, tokens, world, 0, HALF, weight_of(case))
    if case in RESUMED:
        write_state(engine.state(), out / f"{world.size}-{case}", dist.group.WORLD)
    outcome["losses"] += train(engine, tokens, world, HALF, STEPS, weight_of(case))
    outcome["adapter"] = clone(engine)
    state = engine.state()
    outcome["in state"] = sorted(state["adapter"])
    held = torch.tensor(sum(moments["exp_avg"].numel() for moments in engine._adam.state.values()))
    dist.all_reduce(held)
    outcome["moments"] = int(held)
    outcome["frozen with a gradient"] = [
        name for name, value in engine.network.named_parameters() if name in frozen and value.grad is not None
    ]
    engine.close()
    return outcome


def resume(base: BaseModelFiles, tokens: Tokens, case: str, world: World, path: Path) -> dict[str, Any]:
    engine = make_engine(base, case, world)
    engine.load(path, HALF, world.control)
    losses = train(engine, tokens, world, HALF, STEPS, weight_of(case))
    outcome = {"losses": losses, "adapter": clone(engine)}
    engine.close()
    return outcome


def run_cases(base: BaseModelFiles, out: Path, cases: Sequence[str], world: World) -> dict[str, Any]:
    """Run the cases, and resume each from the checkpoints that exist. Returns their outcomes."""
    tokens = Tokens.of(samples(150), base.tokenizer, 64)
    outcomes: dict[str, Any] = {}
    for case in cases:
        outcomes[case] = run_case(base, tokens, case, world, out)
        for saved_by in (1, 2):
            saved = out / f"{saved_by}-{case}"
            if saved.exists():
                outcomes[f"{case} from {saved_by}"] = resume(base, tokens, case, world, saved)
    return outcomes


def main(base: str, out: Path, cases: list[str]) -> None:
    with World.join("cpu") as world:
        outcomes = run_cases(BaseModelFiles.open(base), out, cases, world)
        if world.rank == 0:
            torch.save(outcomes, out / f"{world.size}.pt")
        if world.size > 1:
            with suppress(Preempted):
                run_job(job(out, out / "run"), world, StopAfter(JOB_STOPS))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
