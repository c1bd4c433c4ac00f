"""Tiny model, its samples, and a plain PyTorch training loop: the reference of the engine's tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.config.finetune import AnswerWeight, FinetuneConfig, FinetuneOptimizerConfig, LoraConfig, SmallConfig
from trainer.llm.finetuning.answer_loss import AnswerModel
from trainer.llm.finetuning.packed_batch import TokenBatch
from trainer.llm.finetuning.packing import Schedule, share_of_rank
from trainer.llm.finetuning.samples import Sample
from trainer.llm.finetuning.token_files import Tokens
from trainer.llm.models.base_model import BaseModelFiles, add_adapter
from trainer.llm.models.small_model import write_small_model
from trainer.runtime.preemption import Preemption

LENGTH = 64
BATCH = 8
STEPS = 6
PARTS = 2
CPU = torch.device("cpu")
LORA = LoraConfig(rank=4, alpha=8.0)
OPTIMIZER = FinetuneOptimizerConfig(learning_rate=2e-3, weight_decay=0.01)
SMALL = SmallConfig(vocabulary=300, hidden=64, layers=2, heads=4)


def samples(number: int, seed: int = 0) -> list[Sample]:
    """Make samples whose right answer is "yes" if the word "fire" is in the prompt."""
    generator = np.random.default_rng(seed)
    words = ["river", "stone", "cloud", "fire", "green", "seven"]
    made = []
    for _ in range(number):
        text = " ".join(generator.choice(words, generator.integers(2, 9)))
        answer = "yes" if "fire" in text else "no, not at all"
        popularity = (1.0, 2.0) if generator.random() < 0.5 else (2.0, 1.0)
        made.append(Sample(f"{text} ? ", answer, "fire", ("yes", "no, not at all"), popularity))
    return made


def write_base(directory: Path, seed: int = 1) -> BaseModelFiles:
    """Write a tiny model into a directory."""
    texts = [sample.prompt + sample.answer for sample in samples(200)]
    write_small_model(directory, texts, SMALL, seed=seed, length=LENGTH)
    return BaseModelFiles.open(str(directory))


def adapted(base: BaseModelFiles, *, bf16: bool = False, lora: LoraConfig = LORA) -> Any:
    """Add an adapter whose second matrix is not zero either, so that all gradients are nonzero from the first step."""
    torch.manual_seed(7)
    model = add_adapter(base.load(bf16=bf16), lora, str(base.directory))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


class StopAfter(Preemption):
    """Preemption that asks to stop after a number of steps; a test cannot choose the moment of a real signal."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    @property
    def asked(self) -> bool:  # type: ignore[override]
        self._steps -= 1
        return self._steps <= 0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        yield


def write_samples(directory: Path) -> None:
    """Write the sample files of :func:`job`."""
    for name, number, seed in (("train", 150, 0), ("eval", 20, 1)):
        lines = [json.dumps(asdict(sample)) + "\n" for sample in samples(number, seed)]
        (directory / f"{name}.jsonl").write_text("".join(lines))


def job(data: Path, directory: Path, **changes: dict[str, Any]) -> FinetuneConfig:
    """Build a job on the files of :func:`write_samples`; ``changes`` are by section."""
    (data / "zero2.json").write_text('{"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}')
    raw: dict[str, dict[str, Any]] = {
        "run": {"directory": str(directory)},
        "data": {
            "train": [str(data / "train.jsonl")],
            "evaluate": [str(data / "eval.jsonl")],
            "length": LENGTH,
        },
        "small": SMALL.model_dump(),
        "lora": {"rank": 4, "modules_to_save": ["lm_head"]},
        "optimizer": {"learning_rate": 2e-3},
        "train": {"batch_size": BATCH, "epochs": 4, "deepspeed": str(data / "zero2.json"), "log_every": 1},
    }
    for section, values in changes.items():
        raw.setdefault(section, {}).update(values)
    return FinetuneConfig.model_validate(raw)


def schedule_of(tokens: Tokens) -> Schedule:
    return Schedule.of(tokens.lengths, LENGTH, seed=1, epochs=20, batch_size=BATCH, packing=True)


def batches(
    tokens: Tokens, step: int, rank: int, world: int, parts: int = PARTS, weight: AnswerWeight = "tokens"
) -> list[TokenBatch]:
    packs = schedule_of(tokens).step(step)
    shares = share_of_rank(packs, batch_size=BATCH, rank=rank, world=world, parts=parts)
    return [TokenBatch.of(share, tokens, CPU, weight=weight) for share in shares]


def answers_of(tokens: Tokens, step: int) -> np.ndarray:
    """Return the number of tokens of each answer of a step."""
    return tokens.answers[np.concatenate(schedule_of(tokens).step(step))]


def plain_training(
    base: BaseModelFiles, tokens: Tokens, steps: int, clipping: float, weight: AnswerWeight
) -> tuple[list[float], dict[str, Any]]:
    """Train without DeepSpeed, each sample in its own forward pass. Returns losses and final adapter.

    With ``weight`` "tokens" every token has weight 1, with "one" every answer has weight 1.
    """
    model = adapted(base)
    network = AnswerModel(model).train()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    adam = torch.optim.AdamW(
        trained.values(), lr=OPTIMIZER.learning_rate, betas=OPTIMIZER.betas, weight_decay=OPTIMIZER.weight_decay
    )
    losses = []
    for step in range(steps):
        total, weighted, counted = 0.0, torch.zeros(()), 0
        for samples_ in schedule_of(tokens).step(step):
            for sample in samples_:
                of_sample = network(TokenBatch.of([np.array([sample])], tokens, CPU, multiple=1))
                total += float(of_sample.detach().sum())
                weighted = weighted + (of_sample.sum() if weight == "tokens" else of_sample.mean())
                counted += len(of_sample) if weight == "tokens" else 1
        (weighted / counted).backward()
        nn.utils.clip_grad_norm_(trained.values(), clipping)
        adam.step()
        adam.zero_grad()
        losses.append(total / int(answers_of(tokens, step).sum()))
    return losses, {name: value.detach().clone() for name, value in trained.items()}
