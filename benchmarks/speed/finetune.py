"""Measure the tokens a second that fine-tuning learns from, and its share of the machine's rate.

    python -m benchmarks.speed.finetune --out benchmarks/results/finetune.json
    python -m benchmarks.speed.finetune --shape 7b --rows 1,2,4 --lengths 2048,4096

LoRA (r 16 on all linear layers) with AdamW on samples of random tokens, whose lengths are as uneven as those of
instructions. ``--shape small`` is for a CPU, in float32; ``7b`` is the true shape of Qwen2-7B with random weights in
bfloat16, for a GPU of 80 GB or more; by default whichever the machine can take. Nothing is downloaded.

* ``ours``: ``trainer.llm`` under DeepSpeed ZeRO 2, packed or not, with and without gradient checkpointing, by number
  and length of the sequences in a forward pass; with the attention that ``model.attention = "auto"`` means here, and
  the pairs of tokens that it needs and computes;
* ``Trainer``: the same job with the Hugging Face Trainer and its defaults: eight samples a step, padded to the longest,
  logits of all tokens.

Tokens are those of the samples, without padding. Model FLOP utilisation is the model FLOPs of these tokens a second
divided by the rate of a product of large matrices, measured in the same run:

    FLOPs = 2 * 2 * N_linear * tokens            forward, and backward to activations: frozen weights get none
          + 3 * 2 * N_lora * tokens              forward, and backward to activations and weights
          + 3 * 2 * layers * hidden * sum n^2    attention of samples of n tokens: two products of 2 * hidden * n^2 / 2
          + 2 * 2 * hidden * vocabulary * answers    the head, where the loss counts

FLOPs of a second forward pass by gradient checkpointing, of padding, and of logits without a loss do not count. Every
cell is a process of its own, and all cells run one after another, ``--repeats`` times around: the median counts, and
the least and the largest show the spread. Peak memory is the accelerator's. On a CPU it is the process's peak above its
memory before the first step; there a cell has one thread, and seconds are processor time, which other work hardly
changes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import busy_seconds, make_parser, median_and_range, median_of, write_result
from launch.python_path import safe_environment
from trainer.config.deepspeed import LANGUAGE_MODEL, complete_settings
from trainer.config.finetune import AttentionKind, FinetuneOptimizerConfig, LoraConfig
from trainer.console.text_table import text_table
from trainer.llm.finetuning.adapter_engine import AdapterEngine
from trainer.llm.finetuning.attention_choice import machine_problem
from trainer.llm.finetuning.packed_attention import IMPLEMENTATIONS, count_pairs
from trainer.llm.finetuning.packed_batch import IGNORED, TokenBatch
from trainer.llm.finetuning.packing import Packs, Schedule
from trainer.llm.finetuning.token_files import TokenCounts, Tokens
from trainer.llm.models.base_model import add_adapter, empty_model, quiet_libraries
from trainer.runtime.distributed import World

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
"""Lengths of samples are log-normal; longer ones than a sequence are cut to it."""
TRAINER_ROWS = 8
WARM_UP_STEPS, STEPS = 2, 6


@dataclass(frozen=True)
class FinetuneCell:
    """One way to train; ``rows`` are sequences of a forward pass, for the Trainer samples of a step."""

    who: str
    rows: int
    length: int
    packing: bool
    checkpointing: bool

    @property
    def name(self) -> str:
        """Name of the cell in the table."""
        words = [self.who, f"{self.rows} x {self.length}", "packed" if self.packing else "padded"]
        return ", ".join([*words, "checkpointing"] if self.checkpointing else words)


def make_tokens(length: int, vocabulary: int) -> Tokens:
    """Return random samples."""
    generator = np.random.default_rng(1)
    lengths = np.exp(generator.normal(np.log(MEDIAN_TOKENS), SPREAD, SAMPLES)).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths.clip(2 * ANSWER, length))])
    ids = generator.integers(1, vocabulary, starts[-1], dtype=np.int32)
    return Tokens(ids, starts, np.full(SAMPLES, ANSWER, np.int32), TokenCounts(SAMPLES, int(starts[-1])))


def make_model(shape: str, length: int, device: torch.device, attention: AttentionKind = "sdpa") -> Any:
    """Return a model of a shape with random weights, made on its device, with an adapter."""
    from transformers import Qwen2Config

    quiet_libraries()
    config = Qwen2Config(**SHAPES[shape], tie_word_embeddings=False, max_position_embeddings=length)
    torch.manual_seed(1)
    dtype = torch.bfloat16 if shape == "7b" else torch.float32
    model = empty_model(config).to(dtype).to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    # Buffers are not filled by that; here they are the frequencies of the positions.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.set_attn_implementation(IMPLEMENTATIONS[attention])
    return add_adapter(model, LORA, shape)


def model_flops(model: Any, lengths: np.ndarray, answers: int) -> float:
    """Return the FLOPs of learning from samples, by the formula above; ``answers`` tokens of them have a loss."""
    config = model.config
    lora = sum(value.numel() for value in model.parameters() if value.requires_grad)
    head = config.hidden_size * config.vocab_size
    linear = sum(value.numel() for value in model.parameters()) - lora - 2 * head
    attention = 2 * config.num_hidden_layers * config.hidden_size * float((lengths.astype(np.float64) ** 2).sum())
    return (4 * linear + 6 * lora) * float(lengths.sum()) + 3 * attention + 4 * head * answers


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs a second of a product of large matrices, the best of six tries."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        started = busy_seconds(device)
        for _ in range(5):
            a @ b
        best = min(best, (busy_seconds(device) - started) / 5)
    return 2 * size**3 / best


def peak_bytes(device: torch.device) -> int:
    """Return the peak of memory so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def run_ours(cell: FinetuneCell, shape: str, tokens: Tokens, world: World) -> dict[str, Any]:
    """Train some steps with our engine."""
    changes = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": shape == "7b"}, "gradient_clipping": 1.0}
    settings = complete_settings(changes, cell.rows, world.size, LANGUAGE_MODEL)
    flex = cell.packing and machine_problem("flex", world.device.type) is None
    attention: AttentionKind = "flex" if flex else "sdpa"
    model = make_model(shape, cell.length, world.device, attention)
    engine = AdapterEngine(
        model, FinetuneOptimizerConfig(), settings, device=world.device, checkpointing=cell.checkpointing
    )
    schedule = Schedule.of(tokens.lengths, cell.length, seed=1, epochs=1, batch_size=cell.rows, packing=cell.packing)
    before = peak_bytes(world.device)
    times, packs, places = [busy_seconds(world.device)], [], 0
    for step in range(WARM_UP_STEPS + STEPS):
        packs.append(schedule.step(step))
        batch = TokenBatch.of(packs[-1], tokens, world.device, multiple=engine.row_multiple)
        engine.backward([batch], len(batch.answered))
        engine.step()
        times.append(busy_seconds(world.device))
        places += batch.ids.numel() if step >= WARM_UP_STEPS else 0
    samples = [np.concatenate(of_step) for of_step in packs[WARM_UP_STEPS:]]
    figures = outcome(model, tokens, samples, times[WARM_UP_STEPS:], places, peak_bytes(world.device), before)
    counted = [count_pairs([tokens.lengths[row].tolist() for row in of_step], attention) for of_step in packs]
    pairs = {"needed": sum(one.needed for one in counted), "computed": sum(one.computed for one in counted)}
    return {**figures, "attention": attention, "pairs": pairs}


def run_trainer(cell: FinetuneCell, shape: str, tokens: Tokens, world: World) -> dict[str, Any]:
    """Train some steps with the Hugging Face Trainer, with its defaults wherever they are not about files."""
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
            times.append(busy_seconds(world.device))

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
    """Return the figures of the measured steps; ``times`` are the end of each, and of the one before the first."""
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


def measure(cell: FinetuneCell, shape: str) -> dict[str, Any]:
    """Measure a cell in a process of its own; return its figures, or under ``failed`` the reason of a failure."""
    command = [sys.executable, "-m", "benchmarks.speed.finetune", "--cell", json.dumps(asdict(cell)), "--shape", shape]
    one_thread = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
    environment = {**safe_environment(os.environ), **one_thread}
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode or not lines:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        return {"failed": "out of memory" if "out of memory" in result.stderr else last[:200]}
    figures: dict[str, Any] = json.loads(lines[-1])
    return figures


def run_cell(cell: FinetuneCell, shape: str) -> None:
    """Measure a cell in this process, and print its figures as JSON."""
    with World.join() as world:
        dtype = torch.bfloat16 if shape == "7b" else torch.float32
        rate = matrix_rate(world.device, dtype)
        tokens = make_tokens(cell.length, SHAPES[shape]["vocab_size"])
        figures = (run_ours if cell.who == "ours" else run_trainer)(cell, shape, tokens, world)
        utilisation = figures["flops_per_second"] / rate
        print(json.dumps({**figures, "matrix_flops_per_second": rate, "utilisation": utilisation}), flush=True)


def whole(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of the runs of a cell with these runs, or the reason for which one of them failed."""
    failed = [run["failed"] for run in runs if "failed" in run]
    return {"failed": failed[0]} if failed else median_of(runs)


def cells(rows: Sequence[int], lengths: Sequence[int]) -> Iterator[FinetuneCell]:
    """Yield the cells of the sweep, the Trainer's first."""
    for length in lengths:
        yield FinetuneCell("Trainer", TRAINER_ROWS, length, packing=False, checkpointing=False)
        yield FinetuneCell("ours", TRAINER_ROWS, length, packing=False, checkpointing=False)
        for count, checkpointing in product(rows, (False, True)):
            yield FinetuneCell("ours", count, length, packing=True, checkpointing=checkpointing)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the results as a table."""
    header = ["cell", "tokens/s", "spread", "utilisation", "padding", "peak GB", "s/step"]
    lines = []
    for result in results:
        if "failed" in result:
            lines.append([result["name"], result["failed"], "", "", "", "", ""])
            continue
        rate = median_and_range([run["tokens_per_second"] for run in result["runs"]])
        lines.append(
            [
                result["name"],
                f"{rate['median']:,.0f}",
                f"{rate['least']:,.0f} to {rate['most']:,.0f}",
                f"{result['utilisation']:.1%}",
                f"{result['padding_share']:.1%}",
                f"{result['peak_bytes'] / 1e9:.2f}",
                f"{result['seconds_per_step']:.2f}",
            ]
        )
    return text_table(header, lines)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the tokens a second of every cell as bars."""
    from matplotlib.figure import Figure

    done = [result for result in results if "failed" not in result][::-1]
    figure = Figure(figsize=(8, 1 + 0.4 * len(done)), layout="constrained")
    axes = figure.subplots()
    axes.barh([result["name"] for result in done], [result["tokens_per_second"] for result in done])
    axes.set_xlabel("tokens a second, without padding")
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("speed.finetune", __doc__)
    large = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 75e9
    parser.add_argument(
        "--shape", choices=SHAPES, default="7b" if large else "small", help="of the model (default: %(default)s)"
    )
    parser.add_argument("--rows", help="sequences of a forward pass, such as 1,4 (default: by shape)")
    parser.add_argument("--lengths", help="tokens of a sequence, such as 2048 (default: by shape)")
    parser.add_argument("--cells", type=int, metavar="N", help="measure the first N cells only")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved runs of each (default: %(default)s)")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.cell:
        run_cell(FinetuneCell(**json.loads(options.cell)), options.shape)
        return
    rows, lengths = SWEEP[options.shape]
    sweep = cells(
        *([int(item) for item in text.split(",")] for text in (options.rows or rows, options.lengths or lengths))
    )
    chosen = list(islice(sweep, options.cells))
    runs: list[list[dict[str, Any]]] = [[] for _ in chosen]
    for turn in range(options.repeats):
        for cell, of_cell in zip(chosen, runs, strict=True):
            of_cell.append(measure(cell, options.shape))
            speed = of_cell[-1].get("failed") or f"{of_cell[-1]['tokens_per_second']:,.0f} tokens/s"
            print(f"run {turn + 1} of {options.repeats}, {cell.name}: {speed}", flush=True)
    results = [
        {"name": cell.name, **asdict(cell), **whole(of_cell)} for cell, of_cell in zip(chosen, runs, strict=True)
    ]
    print(table(results))
    if not torch.cuda.is_available():
        # As the processes of the cells, so that the environment tells their threads.
        torch.set_num_threads(1)
    write_result(options.out, {"shape": {"name": options.shape, **SHAPES[options.shape]}, "cells": results})
    if options.out:
        draw(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
