"""PLE and DIN in plain PyTorch, as a tutorial writes them: ``nn.Embedding`` and ``DistributedDataParallel``.

``benchmarks/speed/throughput.py`` starts it, with ``torchrun`` for several ranks. Its arguments are the mode, the
directory of the data, and the file of the result.

The mode ``dense`` is the default of ``nn.Embedding``: every step touches every row of every table. ``sparse`` sets
``sparse=True``, which a reader of the documentation finds; ``sparse-tf32`` also allows products in TF32, which a GPU
has. Batches are cut from tensors in memory, without a ``DataLoader`` that would collect rows one by one; with a GPU,
all of them are in its memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel


def mlp(in_features: int, widths: Sequence[int]) -> nn.Sequential:
    """Return linear layers with ReLU."""
    layers: list[nn.Module] = []
    for before, after in pairwise([in_features, *widths]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers)


class TutorialDin(nn.Module):
    """Weighted sum of the entries of a history, by a network on candidate, entry, difference and product."""

    def __init__(self, dim: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.score = nn.Sequential(mlp(4 * dim, widths), nn.Linear(widths[-1], 1))

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """Attend from ``[batch, dim]`` to ``[batch, length, dim]``."""
        queries = query[:, None].expand_as(keys)
        share = self.score(torch.cat([queries, keys, queries - keys, queries * keys], 2)).softmax(1)
        return (share * keys).sum(1)


class TutorialPle(nn.Module):
    """Layer of progressive layered extraction: experts of each task, shared experts, and gates that mix them."""

    def __init__(self, in_features: int, tasks: int, own: int, shared: int, widths: Sequence[int], last: bool) -> None:
        super().__init__()
        self.own = nn.ModuleList(nn.ModuleList(mlp(in_features, widths) for _ in range(own)) for _ in range(tasks))
        self.shared = nn.ModuleList(mlp(in_features, widths) for _ in range(shared))
        self.gates = nn.ModuleList(nn.Linear(in_features, own + shared) for _ in range(tasks))
        self.shared_gate = None if last else nn.Linear(in_features, tasks * own + shared)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the inputs of the next layer: one of each task and, unless it is the last layer, the shared one."""
        *of_tasks, common = inputs
        shared = [expert(common) for expert in self.shared]
        groups: Any = self.own
        own = [[expert(x) for expert in experts] for x, experts in zip(of_tasks, groups, strict=True)]
        found = [
            self._mix(gate(x), experts + shared) for x, gate, experts in zip(of_tasks, self.gates, own, strict=True)
        ]
        if self.shared_gate is not None:
            found.append(
                self._mix(self.shared_gate(common), [expert for experts in own for expert in experts] + shared)
            )
        return found

    @staticmethod
    def _mix(logits: Tensor, experts: list[Tensor]) -> Tensor:
        return (logits.softmax(1)[:, :, None] * torch.stack(experts, 1)).sum(1)


class TutorialRanker(nn.Module):
    """Tables, attention over both histories, PLE and towers; a logit for each behaviour."""

    def __init__(self, facts: dict[str, Any], sparse: bool) -> None:
        super().__init__()
        dim, tasks = facts["dim"], len(facts["behaviours"])
        self.histories = facts["histories"]
        self.tables = nn.ModuleDict(
            {name: nn.Embedding(rows, dim, sparse=sparse) for name, rows in facts["tables"].items()}
        )
        self.attention = nn.ModuleDict({name: TutorialDin(dim, facts["attention"]) for name in self.histories})
        width = dim * (len(self.tables) + len(self.histories)) + facts["dense"]
        self.layers = nn.ModuleList()
        for number, widths in enumerate(facts["expert_layers"]):
            last = number == len(facts["expert_layers"]) - 1
            self.layers.append(TutorialPle(width, tasks, facts["task_experts"], facts["shared_experts"], widths, last))
            width = widths[-1]
        self.towers = nn.ModuleList(
            nn.Sequential(mlp(width, facts["tower"]), nn.Linear(facts["tower"][-1], 1)) for _ in range(tasks)
        )

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return ``[batch, behaviours]`` logits."""
        found = {name: table(batch[name]) for name, table in self.tables.items()}
        for name, table in self.histories.items():
            found[name] = self.attention[name](found[table], self.tables[table](batch[name]))
        x = torch.cat([*found.values(), batch["dense"]], 1)
        inputs = [x] * (len(self.towers) + 1)
        for layer in self.layers:
            inputs = layer(inputs)
        return torch.cat([tower(of_task) for tower, of_task in zip(self.towers, inputs, strict=True)], 1)


def clock(device: torch.device) -> float:
    """Return the seconds of a clock when the device has done all that is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def run(mode: str, data: Path, out: Path) -> None:
    """Train an epoch on one rank, predict the held-out rows, and write the result from the first rank."""
    facts = json.loads((data / "workload.json").read_text())
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if mode.endswith("tf32"):
        torch.set_float32_matmul_precision("high")
    parts = {
        part: {
            name: torch.from_numpy(array).to(device)
            for name, array in np.load(data / f"{part}.npz", allow_pickle=False).items()
        }
        for part in ("train", "held_out")
    }
    model = TutorialRanker(facts, sparse=mode.startswith("sparse")).to(device)
    trained: nn.Module = model
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        trained = DistributedDataParallel(model)
    dense = [value for name, value in model.named_parameters() if not name.startswith("tables.")]
    optimizers = [
        torch.optim.Adagrad(model.tables.parameters(), facts["table_rate"]),
        torch.optim.Adam(dense, facts["dense_rate"]),
    ]
    rows, own = len(parts["train"]["label"]), facts["batch"] // ranks
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).to(device)
    steps, started = rows // facts["batch"], 0.0
    for step in range(steps):
        if step == facts["warm_up"]:
            started = clock(device)
        first = step * facts["batch"] + rank * own
        batch = {name: values[order[first : first + own]] for name, values in parts["train"].items()}
        loss = (
            functional.binary_cross_entropy_with_logits(trained(batch), batch["label"], reduction="none").sum(1).mean()
        )
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    seconds = clock(device) - started
    if rank == 0:
        held = parts["held_out"]
        with torch.inference_mode():
            probability = torch.cat(
                [
                    torch.sigmoid(model({name: values[first : first + own] for name, values in held.items()}))
                    for first in range(0, len(held["label"]), own)
                ]
            )
        np.savez(
            out,
            rows=(steps - facts["warm_up"]) * facts["batch"],
            seconds=seconds,
            probability=probability.cpu().numpy(),
            behaviours=np.array(facts["behaviours"]),
        )
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
