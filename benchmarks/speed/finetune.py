"""How many tokens a second does fine-tuning learn from, and at what share of what the machine can?

    python -m benchmarks.speed.finetune --out benchmarks/results/finetune.json
    python -m benchmarks.speed.finetune --shape 7b --rows 1,2,4 --lengths 2048,4096

LoRA (r 16 on all linear layers) with AdamW on samples of random tokens, whose lengths are as uneven as those of
instructions. ``--shape small`` is for a CPU, in float32; ``7b`` is the true shape of Qwen2-7B with random weights in
bfloat16, for a GPU of 80 GB or more; by default whichever the machine can take. Nothing is downloaded.

* ``ours``: ``trainer.llm`` under DeepSpeed ZeRO 2, packed or not, with and without gradient checkpointing, over numbers
  of sequences in a forward pass and their lengths;
* ``Trainer``: the same job with the Hugging Face Trainer and its defaults: eight samples a step, padded to the longest,
  logits of all tokens.

Tokens are those of the samples, without padding. Model FLOP utilisation is the model FLOPs of these tokens a second,
over the rate of a product of large matrices measured in the same run:

    FLOPs = 2 * 2 * N_linear * tokens            forward, and backward to activations: frozen weights get none
          + 3 * 2 * N_lora * tokens              forward, and backward to activations and weights
          + 3 * 2 * layers * hidden * sum n^2    attention of samples of n tokens: two products of 2 * hidden * n^2 / 2
          + 2 * 2 * hidden * vocabulary * answers    the head, where the loss counts

What is computed again by gradient checkpointing, for padding, or of logits without a loss does not count. Every cell is
a process of its own; peak memory is the accelerator's, on a CPU the process's above what it had before the first step.
On a CPU a cell has one thread, and seconds are those for which it had a core: other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.config.deepspeed import LANGUAGE_MODEL, complete_settings
from trainer.config.finetune import FinetuneOptimizerConfig, LoraConfig
from trainer.console.text_table import text_table
from trainer.llm.finetuning.adapter_engine import AdapterEngine
from trainer.llm.finetuning.packed_batch import IGNORED, TokenBatch
from trainer.llm.finetuning.packing import Packs, Schedule
from trainer.llm.finetuning.token_files import TokenCounts, Tokens
from trainer.llm.models.base_model import add_adapter, empty_model, quiet_libraries
from trainer.runtime.distributed import World
from trainer.runtime.environment import environment
from trainer.runtime.files import write_json

SHAPES: dict[str, dict[str, int]] = {
    "small": {
        "vocab_size": 16_384,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "7b": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}
SWEEP = {"small": ("1,4", "512"), "7b": ("1,2,4,8", "2048,4096")}
"""Sequences of a forward pass, and their lengths."""
LORA = LoraConfig(rank=16)
SAMPLES, ANSWER = 20_000, 4
MEDIAN_TOKENS, SPREAD = 150, 0.6
"""Of the lengths of samples, which are log-normal; what is longer than a sequence is cut to it."""
TRAINER_ROWS = 8
WARM_UP_STEPS, STEPS = 2, 6


@dataclass(frozen=True)
class Cell:
    """One way to train; ``rows`` are sequences of a forward pass, for the Trainer samples."""

    who: str
    rows: int
    length: int
    packing: bool
    checkpointing: bool

    @property
    def name(self) -> str:
        """For the table."""
        words = [self.who, f"{self.rows} x {self.length}", "packed" if self.packing else "padded"]
        return ", ".join([*words, "checkpointing"] if self.checkpointing else words)


def make_tokens(length: int, vocabulary: int) -> Tokens:
    """Random samples."""
    generator = np.random.default_rng(1)
    lengths = np.exp(generator.normal(np.log(MEDIAN_TOKENS), SPREAD, SAMPLES)).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths.clip(2 * ANSWER, length))])
    ids = generator.integers(1, vocabulary, starts[-1], dtype=np.int32)
    return Tokens(ids, starts, np.full(SAMPLES, ANSWER, np.int32), TokenCounts(SAMPLES, int(starts[-1])))


def make_model(shape: str, length: int, device: torch.device) -> Any:
    """The shape with random weights, made where it is used, and an adapter."""
    from transformers import Qwen2Config

    quiet_libraries()
    config = Qwen2Config(**SHAPES[shape], tie_word_embeddings=False, max_position_embeddings=length)
    torch.manual_seed(1)
    dtype = torch.bfloat16 if shape == "7b" else torch.float32
    model = empty_model(config).to(dtype).to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    # Buffers are not filled by that: the frequencies of the positions.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return add_adapter(model, LORA, shape)


def model_flops(model: Any, lengths: np.ndarray, answers: int) -> float:
    """FLOPs that learning from samples takes, as written down above; ``answers`` tokens of them have a loss."""
    config = model.config
    lora = sum(value.numel() for value in model.parameters() if value.requires_grad)
    head = config.hidden_size * config.vocab_size
    linear = sum(value.numel() for value in model.parameters()) - lora - 2 * head
    attention = 2 * config.num_hidden_layers * config.hidden_size * float((lengths.astype(np.float64) ** 2).sum())
    return (4 * linear + 6 * lora) * float(lengths.sum()) + 3 * attention + 4 * head * answers


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a product of large matrices, the best of a few."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        started = seconds(device)
        for _ in range(5):
            a @ b
        best = min(best, (seconds(device) - started) / 5)
    return 2 * size**3 / best


def seconds(device: torch.device) -> float:
    """A clock: of the world, once an accelerator has done what it still had to do; on a CPU, of this process."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def peak_bytes(device: torch.device) -> int:
    """Most memory so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def run_ours(cell: Cell, shape: str, tokens: Tokens, world: World) -> dict[str, Any]:
    """Steps of our engine."""
    given = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": shape == "7b"}, "gradient_clipping": 1.0}
    settings = complete_settings(given, cell.rows, world.size, LANGUAGE_MODEL)
    model = make_model(shape, cell.length, world.device)
    engine = AdapterEngine(
        model, FinetuneOptimizerConfig(), settings, device=world.device, checkpointing=cell.checkpointing
    )
    schedule = Schedule.of(tokens.lengths, cell.length, seed=1, epochs=1, batch_size=cell.rows, packing=cell.packing)
    before = peak_bytes(world.device)
    times, packs, places = [seconds(world.device)], [], 0
    for step in range(WARM_UP_STEPS + STEPS):
        packs.append(schedule.step(step))
        batch = TokenBatch.of(packs[-1], tokens, world.device)
        engine.backward([batch], int(batch.answered.sum()))
        engine.step()
        times.append(seconds(world.device))
        places += batch.ids.numel() if step >= WARM_UP_STEPS else 0
    samples = [np.concatenate(of_step) for of_step in packs[WARM_UP_STEPS:]]
    return outcome(model, tokens, samples, times[WARM_UP_STEPS:], places, peak_bytes(world.device), before)


def run_trainer(cell: Cell, shape: str, tokens: Tokens, world: World) -> dict[str, Any]:
    """Steps of the Hugging Face Trainer, with its defaults wherever they are not about files."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = make_model(shape, cell.length, world.device)
    seen: list[tuple[np.ndarray, int]] = []
    times: list[float] = []

    def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        packs: Packs = [np.array([row["sample"]]) for row in rows]
        batch = TokenBatch.of(packs, tokens, torch.device("cpu"), multiple=1)
        labels = torch.full_like(batch.ids, IGNORED)
        # The model shifts labels by itself.
        labels[:, 1:] = batch.labels[:, :-1]
        mask = (batch.segments >= 0).long()
        seen.append((batch.samples, batch.ids.numel()))
        return {"input_ids": batch.ids, "attention_mask": mask, "labels": labels}

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(seconds(world.device))

    before = peak_bytes(world.device)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=WARM_UP_STEPS + STEPS,
            use_cpu=world.device.type == "cpu",
            bf16=shape == "7b",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            # Columns are looked up among the model's arguments otherwise.
            remove_unused_columns=False,
        )
        data: Any = [{"sample": number} for number in range(len(tokens.lengths))]
        Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[Clock()]).train()
    done = seen[WARM_UP_STEPS : WARM_UP_STEPS + STEPS]
    places = sum(size for _, size in done)
    return outcome(
        model,
        tokens,
        [samples for samples, _ in done],
        times[WARM_UP_STEPS - 1 :],
        places,
        peak_bytes(world.device),
        before,
    )


def outcome(
    model: Any,
    tokens: Tokens,
    samples: Sequence[np.ndarray],
    times: Sequence[float],
    places: int,
    peak: int,
    before: int,
) -> dict[str, Any]:
    """What the measured steps came to; ``times`` are of the end of each, and of the one before the first."""
    took = times[-1] - times[0]
    lengths = tokens.lengths[np.concatenate(samples)]
    answers = int(tokens.answers[np.concatenate(samples)].sum())
    on_gpu = torch.cuda.is_available()
    return {
        "tokens_per_second": float(lengths.sum()) / took,
        "flops_per_second": model_flops(model, lengths, answers) / took,
        "padding_share": 1 - float(lengths.sum()) / places,
        "peak_bytes": peak if on_gpu else peak - before,
        "seconds_per_step": took / len(samples),
    }


def measure(cell: Cell, shape: str) -> dict[str, Any]:
    """A cell, in a process of its own: its figures, or why there are none."""
    command = [sys.executable, "-m", "benchmarks.speed.finetune", "--cell", json.dumps(asdict(cell)), "--shape", shape]
    one_thread = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800, env={**os.environ, **one_thread})
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode or not lines:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        return {"failed": "out of memory" if "out of memory" in result.stderr else last[:200]}
    figures: dict[str, Any] = json.loads(lines[-1])
    return figures


def run_cell(cell: Cell, shape: str) -> None:
    """Measure in this process, and print."""
    with World.join() as world:
        dtype = torch.bfloat16 if shape == "7b" else torch.float32
        rate = matrix_rate(world.device, dtype)
        tokens = make_tokens(cell.length, SHAPES[shape]["vocab_size"])
        figures = (run_ours if cell.who == "ours" else run_trainer)(cell, shape, tokens, world)
        utilisation = figures["flops_per_second"] / rate
        print(json.dumps({**figures, "matrix_flops_per_second": rate, "utilisation": utilisation}), flush=True)


def cells(rows: Sequence[int], lengths: Sequence[int]) -> Iterator[Cell]:
    """The sweep; the Trainer's job first."""
    for length in lengths:
        yield Cell("Trainer", TRAINER_ROWS, length, packing=False, checkpointing=False)
        yield Cell("ours", TRAINER_ROWS, length, packing=False, checkpointing=False)
        for count, checkpointing in product(rows, (False, True)):
            yield Cell("ours", count, length, packing=True, checkpointing=checkpointing)


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as text."""
    header = ["cell", "tokens/s", "utilisation", "padding", "peak GB", "s/step"]
    lines = []
    for result in results:
        if "failed" in result:
            lines.append([result["name"], result["failed"], "", "", "", ""])
            continue
        lines.append(
            [
                result["name"],
                f"{result['tokens_per_second']:,.0f}",
                f"{result['utilisation']:.1%}",
                f"{result['padding_share']:.1%}",
                f"{result['peak_bytes'] / 1e9:.2f}",
                f"{result['seconds_per_step']:.2f}",
            ]
        )
    return text_table(header, lines)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Tokens a second of every cell as bars."""
    from matplotlib.figure import Figure

    done = [result for result in results if "failed" not in result][::-1]
    figure = Figure(figsize=(8, 1 + 0.4 * len(done)), layout="constrained")
    axes = figure.subplots()
    axes.barh([result["name"] for result in done], [result["tokens_per_second"] for result in done])
    axes.set_xlabel("tokens a second, without padding")
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.finetune", description=(__doc__ or "").split("\n")[0]
    )
    large = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 75e9
    parser.add_argument("--shape", choices=SHAPES, default="7b" if large else "small")
    parser.add_argument("--rows", help="sequences of a forward pass, such as 1,4")
    parser.add_argument("--lengths", help="tokens of a sequence, such as 2048")
    parser.add_argument("--cells", type=int, help="measure the first N cells only")
    parser.add_argument("--out", metavar="FILE.json", type=Path, help="file to write; the picture goes beside it")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.cell:
        run_cell(Cell(**json.loads(given.cell)), given.shape)
        return
    rows, lengths = SWEEP[given.shape]
    results = []
    sweep = cells(*([int(item) for item in text.split(",")] for text in (given.rows or rows, given.lengths or lengths)))
    for cell in islice(sweep, given.cells):
        results.append({"name": cell.name, **asdict(cell), **measure(cell, given.shape)})
        print(table(results[-1:]).splitlines()[-1], flush=True)
    print(table(results))
    if given.out:
        # Of a cell's process; this one only waits.
        threads = {} if torch.cuda.is_available() else {"threads": 1}
        document = {
            "shape": {"name": given.shape, **SHAPES[given.shape]},
            "cells": results,
            **environment(1),
            **threads,
        }
        write_json(given.out, document)
        draw(results, given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
