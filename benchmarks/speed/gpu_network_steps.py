"""Steps of ``benchmarks/speed/gpu.py`` for networks: ZeRO, compilation, a checkpoint's copy, and attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.speed.gpu_steps import (
    Missing,
    Parts,
    Step,
    be_the_only_rank,
    device,
    seconds_of,
    synchronize,
    waits_of,
)

if TYPE_CHECKING:
    from trainer.engine.dense_engine import DenseNetwork

Inputs = tuple[Mapping[str, Tensor], Mapping[str, Tensor], Tensor]


def zero(small: bool) -> Parts:
    """Train the ranker under ZeRO 0 in fp32 and ZeRO 1 and 2 in bf16, and count the host's waits in a step.

    Limelight refuses ZeRO 0 in bf16, since the state of its optimizer cannot be saved.
    """
    from trainer.config.deepspeed import complete_settings
    from trainer.engine.dense_engine import DenseNetwork, DenseOptimizer
    from trainer.runtime.distributed import World
    from trainer.runtime.phase_timer import PhaseClock

    be_the_only_rank()
    rows = 64 if small else 8192
    with World.join("auto") as world:
        inputs = random_inputs(rows, world.device)
        label = (torch.rand(rows, 3, device=world.device) < 0.2).float()
        for stage in (0, 1, 2):
            changes = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": stage > 0}}
            network = DenseNetwork(
                make_ranker(),
                DenseOptimizer(1e-3),
                complete_settings(changes, rows, world.size),
                device=world.device,
                clock=PhaseClock(world.device),
            )
            losses: list[Tensor] = []

            def step(network: DenseNetwork = network, losses: list[Tensor] = losses) -> None:
                loss = nn.functional.binary_cross_entropy_with_logits(network(*inputs), label)
                network.backward(loss, last=True)
                network.step()
                losses.append(loss.detach())

            seconds = seconds_of(step, 5)
            yield {
                f"stage {stage}, {'bf16' if stage else 'fp32'}": {
                    "seconds_per_step": seconds,
                    "waits_per_step": waits_of(step),
                    "first_loss": float(losses[0]),
                    "last_loss": float(losses[-1]),
                }
            }
            network.close()


def compilation(small: bool) -> Parts:
    """Train the ranker compiled and not, in fp32 without ZeRO and in bf16 with ZeRO 1, and compare the losses."""
    from trainer.config.deepspeed import complete_settings
    from trainer.engine.dense_engine import INDUCTOR, DenseNetwork, DenseOptimizer
    from trainer.runtime.distributed import World
    from trainer.runtime.phase_timer import PhaseClock

    be_the_only_rank()
    rows, steps = (64, 3) if small else (8192, 20)
    with World.join("auto") as world:
        batches = [random_inputs(rows - number % 3, world.device) for number in range(steps)]
        for stage in (0, 1):
            losses = []
            # On a CPU compilation by a C++ compiler would take minutes.
            for compiler in (None, "aot_eager" if small else INDUCTOR):
                changes = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": stage > 0}}
                network = DenseNetwork(
                    make_ranker(),
                    DenseOptimizer(1e-3),
                    complete_settings({**changes, "gradient_clipping": 1.0}, rows, world.size),
                    device=world.device,
                    clock=PhaseClock(world.device),
                    compiler=compiler,
                )
                begin = time.perf_counter()
                losses.append(_losses_of(network, batches))
                synchronize()
                first = time.perf_counter() - begin
                seconds = seconds_of(partial(_losses_of, network, batches), 1) / steps
                name = f"ZeRO {stage}, {'bf16' if stage else 'fp32'}{', compiled' * (compiler is not None)}"
                yield {name: {"seconds_of_first_steps": first, "seconds_per_step": seconds}}
                network.close()
            plain, compiled = losses
            yield {f"largest difference of losses, ZeRO {stage}": float(((compiled - plain).abs() / plain).max())}


def _losses_of(network: DenseNetwork, batches: Sequence[Inputs]) -> Tensor:
    """Train a network one step on each batch; returns the losses."""
    losses = []
    for embedded, lengths, dense in batches:
        label = (dense[:, :3] > 1).float()
        loss = nn.functional.binary_cross_entropy_with_logits(network(embedded, lengths, dense), label)
        network.backward(loss, last=True)
        network.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def snapshot(small: bool) -> Parts:
    """Copy a table from the device to pageable and to pinned memory, and measure seconds and memory."""
    gigabytes = 0.05 if small else 20.0
    table = torch.ones(int(gigabytes * 1e9 / 4), device=device())
    before = torch.cuda.memory_allocated() if table.is_cuda else 0
    yield {"gigabytes": gigabytes}
    yield {"pageable": {"seconds": seconds_of(lambda: torch.empty_like(table, device="cpu").copy_(table), 1)}}
    begin = time.perf_counter()
    pinned = torch.empty_like(table, device="cpu", pin_memory=table.is_cuda)
    allocation = time.perf_counter() - begin
    seconds = seconds_of(lambda: pinned.copy_(table, non_blocking=True), 2)
    yield {"pinned": {"allocation_seconds": allocation, "seconds": seconds}}
    peak = torch.cuda.max_memory_allocated() - before if table.is_cuda else 0
    yield {"further_device_bytes": peak}


def language_model(small: bool) -> Parts:
    """Fine-tune the shape of Qwen2-7B with random weights, packed or not, beside the Trainer's defaults."""
    from benchmarks.speed import finetune

    shape, length = ("small", 64) if small else ("7b", 2048)
    if not small and (device().type == "cpu" or torch.cuda.get_device_properties(0).total_memory < 75e9):
        raise Missing("no CUDA device of 80 GB or more is here")
    yield from packed_attention(small)
    cells = [
        finetune.FinetuneCell("ours", 4, length, packing=True, checkpointing=False),
        finetune.FinetuneCell("Trainer", finetune.TRAINER_ROWS, length, packing=False, checkpointing=False),
        finetune.FinetuneCell("ours", 4, length, packing=True, checkpointing=True),
        finetune.FinetuneCell("ours", finetune.TRAINER_ROWS, length, packing=False, checkpointing=False),
    ]
    for cell in cells[:1] if small else cells:
        yield {cell.name: finetune.measure(cell, shape)}


def packed_attention(small: bool) -> Parts:
    """Measure attention of packed samples both ways: a dense mask, variable lengths, and blocks of a mask."""
    heads, head_dim, rows, length = (2, 16, 1, 128) if small else (28, 128, 2, 4096)
    dtype = torch.float32 if device().type == "cpu" else torch.bfloat16
    lengths = np.minimum(np.exp(np.random.default_rng(1).normal(np.log(150), 0.6, 4 * length)).astype(int) + 1, length)
    ends = np.cumsum(lengths)
    ends = np.append(ends[ends < rows * length], rows * length)
    # A sample ends at the end of its row.
    ends = np.unique(np.concatenate([ends, np.arange(1, rows + 1) * length]))
    starts = torch.tensor(np.concatenate([[0], ends]), dtype=torch.int32, device=device())
    sample = torch.bucketize(torch.arange(rows * length, device=device()), starts[1:].long(), right=True)
    torch.manual_seed(1)
    q, k, v = (
        torch.randn(rows * length, heads, head_dim, device=device(), dtype=dtype, requires_grad=True) for _ in range(3)
    )
    # [rows, heads, length, head_dim]
    q_rows, k_rows, v_rows = (part.view(rows, length, heads, head_dim).transpose(1, 2) for part in (q, k, v))

    def dense() -> Tensor:
        of_row = sample.view(rows, length)
        place = torch.arange(length, device=device())
        mask = (of_row[:, :, None] == of_row[:, None, :]) & (place[:, None] >= place[None, :])
        out = nn.functional.scaled_dot_product_attention(q_rows, k_rows, v_rows, attn_mask=mask[:, None])
        return out.transpose(1, 2).reshape(q.shape)

    def variable_length() -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        longest = int(np.diff(np.concatenate([[0], ends])).max())
        out = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0))
        assert isinstance(out, Tensor)
        return out

    def blocks() -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        of_row = sample.view(rows, length)

        def same_sample(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (of_row[b, i] == of_row[b, j]) & (i >= j)

        mask = create_block_mask(same_sample, rows, None, length, length, device=device().type)
        attention = flex_attention if small else torch.compile(flex_attention)
        out = attention(q_rows, k_rows, v_rows, block_mask=mask)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).reshape(q.shape)

    expected = dense().detach()
    for name, attend in {"dense mask": dense, "variable lengths": variable_length, "blocks": blocks}.items():

        def work(attend: Callable[[], Tensor] = attend) -> None:
            attend().sum().backward()

        try:
            difference = float((attend().detach() - expected).abs().max())
            yield {f"attention, {name}": {"seconds": seconds_of(work, 3), "largest_difference": difference}}
        except Exception as error:
            yield {f"attention, {name}": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"}


def ranker(small: bool) -> Parts:
    """Measure the ranker's forward and backward pass alone, by precision and compilation, and count its launches."""
    from trainer.engine.dense_engine import INDUCTOR, compile_network

    for rows in (64,) if small else (2048, 8192):
        for precision in ("fp32",) if small else ("fp32", "tf32", "bf16"):
            for compiled in (False, True):
                model = make_ranker().to(device(), torch.bfloat16 if precision == "bf16" else torch.float32)
                inputs = random_inputs(rows, device())
                torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
                if compiled:
                    # On a CPU compilation by a C++ compiler would take minutes.
                    compile_network(model, "aot_eager" if small else INDUCTOR, device())

                def step(inputs: Any = inputs, model: nn.Module = model) -> None:
                    model.zero_grad()
                    model(*inputs).square().mean().backward()

                begin = time.perf_counter()
                step()
                synchronize()
                first = time.perf_counter() - begin
                name = f"{rows} rows, {precision}{', compiled' * compiled}"
                figures = {"seconds_of_first_step": first, "seconds": seconds_of(step, 5), "launches": _launches(step)}
                yield {name: figures}


def make_ranker() -> nn.Module:
    """Return the ranker of the throughput benchmark."""
    from benchmarks.speed.limelight_training import WorkloadFeatures
    from benchmarks.speed.workload import BEHAVIOURS, DENSE, DIM
    from modules.ranker import Ranker

    torch.manual_seed(1)
    return Ranker(
        len(BEHAVIOURS),
        WorkloadFeatures.lookups,
        dict.fromkeys(("user", "author", "item", "side"), DIM),
        DENSE,
        WorkloadFeatures.sequences,
        tower=(128, 64),
    )


def random_inputs(rows: int, place: torch.device) -> Inputs:
    """Return embeddings, lengths and dense features of a batch of the throughput benchmark."""
    from benchmarks.speed.limelight_training import WorkloadFeatures
    from benchmarks.speed.workload import DENSE, DIM, LENGTH

    random = torch.Generator().manual_seed(2)
    counts = torch.randint(LENGTH // 2, LENGTH + 1, (rows,), generator=random)
    embedded, lengths = {}, {}
    for lookup in WorkloadFeatures.lookups:
        ids = int(counts.sum()) if lookup.length is None else rows * lookup.length
        embedded[lookup.name] = torch.randn(ids, DIM, generator=random).to(place).requires_grad_()
        if lookup.length is None:
            lengths[lookup.name] = counts.to(place)
    return embedded, lengths, torch.randn(rows, DENSE, generator=random).to(place)


def _launches(step: Callable[[], object]) -> int:
    """Return the number of kernels that one step launches; of operations on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    if torch.cuda.is_available():
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            step()
            synchronize()
        return sum(event.count for event in found.key_averages() if "LaunchKernel" in event.key)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    return sum(event.count for event in found.key_averages() if event.key.startswith("aten::"))


STEPS = {
    "zero": Step(zero, 90),
    "compile": Step(compilation, 150),
    "snapshot": Step(snapshot, 60),
    "language_model": Step(language_model, 240),
    "ranker": Step(ranker, 120),
}
"""Name -> step, in order of value."""
