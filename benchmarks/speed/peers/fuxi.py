"""FuxiCTR's layers as PLE and DIN, trained by its own multi-task base class and data loader.

``benchmarks/speed/throughput.py`` starts it in the Python that its user names. Its arguments are the model, the
directory of the data, and the file of the result.

Its package on PyPI has the layers (tables, ``DIN_Attention``, ``MLP_Block``) and the base class, and no model. PLE is
written here from its blocks. Its base class has one process and one optimizer for all parameters, Adam, whose step
touches every row of every table.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.layers import DIN_Attention, FeatureEmbeddingDict, MLP_Block
from fuxictr.pytorch.models import MultiTaskModel
from torch import nn


class FuxiPle(MultiTaskModel):
    """Two attended histories, PLE and towers of FuxiCTR's blocks."""

    def __init__(self, feature_map: Any, facts: dict[str, Any], model_root: str) -> None:
        tasks = len(facts["behaviours"])
        super().__init__(
            feature_map,
            task=["binary_classification"] * tasks,
            num_tasks=tasks,
            model_root=model_root,
            metrics=["AUC"],
            verbose=0,
            gpu=0 if torch.cuda.is_available() else -1,
        )
        dim, own, shared = facts["dim"], facts["task_experts"], facts["shared_experts"]
        self.histories, self.dense, self.own = facts["histories"], facts["dense"], own
        self.tables = FeatureEmbeddingDict(feature_map, dim)
        self.attention = nn.ModuleDict(
            {name: DIN_Attention(dim, facts["attention"], use_softmax=True) for name in self.histories}
        )
        width = dim * (len(facts["tables"]) + len(self.histories)) + self.dense
        self.experts, self.gates = nn.ModuleList(), nn.ModuleList()
        for number, widths in enumerate(facts["expert_layers"]):
            count = tasks * own + shared
            self.experts.append(nn.ModuleList(MLP_Block(width, hidden_units=widths) for _ in range(count)))
            gates = [nn.Linear(width, own + shared) for _ in range(tasks)]
            if number < len(facts["expert_layers"]) - 1:
                gates.append(nn.Linear(width, count))
            self.gates.append(nn.ModuleList(gates))
            width = widths[-1]
        self.towers = nn.ModuleList(MLP_Block(width, hidden_units=facts["tower"], output_dim=1) for _ in range(tasks))
        self.compile("adam", "binary_crossentropy", facts["table_rate"])
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: Any) -> dict[str, Any]:
        """Return a probability for each behaviour."""
        batch = self.get_inputs(inputs)
        dense = torch.stack([batch.pop(f"dense_{number}") for number in range(self.dense)], 1).float()
        found = self.tables(batch)
        for name, table in self.histories.items():
            found[name] = self.attention[name](found[table], found[name])
        x = torch.cat([*found.values(), dense], 1)
        tasks = len(self.towers)
        of_inputs = [x] * (tasks + 1)
        layers: Any = zip(self.experts, self.gates, strict=True)
        for experts, gates in layers:
            # Experts of the first task, of the second, ..., and the shared ones.
            made = [expert(of_inputs[min(at // self.own, tasks)]) for at, expert in enumerate(experts)]
            mixed = []
            for task, (x_of, gate) in enumerate(zip(of_inputs, gates, strict=False)):
                read = made if task == tasks else made[task * self.own :][: self.own] + made[tasks * self.own :]
                mixed.append((gate(x_of).softmax(1)[:, :, None] * torch.stack(read, 1)).sum(1))
            of_inputs = mixed
        return {
            f"{label}_pred": self.output_activation[task](tower(of_inputs[task]))
            for task, (label, tower) in enumerate(zip(self.feature_map.labels, self.towers, strict=True))
        }


def clock() -> float:
    """Return the seconds of a clock when the device has done all that is queued."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def make_feature_map(facts: dict[str, Any], directory: str) -> Any:
    """Return FuxiCTR's description of the columns."""
    feature_map = FeatureMap("throughput", directory)
    specs = {name: {"type": "categorical", "vocab_size": rows} for name, rows in facts["tables"].items()}
    for name, table in facts["histories"].items():
        specs[name] = {
            **{"type": "sequence", "vocab_size": facts["tables"][table], "max_len": facts["length"]},
            **{"share_embedding": table, "feature_encoder": None},
        }
    # Dense values go around the tables: a numeric feature there gets a vector of its own.
    specs |= {f"dense_{number}": {"type": "numeric"} for number in range(facts["dense"])}
    feature_map.features = OrderedDict((name, {"source": "", **spec}) for name, spec in specs.items())
    feature_map.labels = list(facts["behaviours"])
    feature_map.num_fields, feature_map.total_features = len(specs), sum(facts["tables"].values())
    feature_map.set_column_index()
    return feature_map


def run(mode: str, data: Path, out: Path) -> None:
    """Train an epoch, predict the held-out rows, and write the result."""
    facts = json.loads((data / "workload.json").read_text())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as directory:
        feature_map = make_feature_map(facts, directory)
        loaders = {}
        for part in ("train", "held_out"):
            arrays = dict(np.load(data / f"{part}.npz", allow_pickle=False))
            values, label = arrays.pop("dense"), arrays.pop("label")
            arrays |= {f"dense_{number}": values[:, number] for number in range(facts["dense"])}
            arrays |= {name: label[:, number] for number, name in enumerate(facts["behaviours"])}
            file = str(Path(directory) / f"{part}.npz")
            np.savez(file, **arrays)
            options = {"batch_size": facts["batch"], "shuffle": part == "train", "num_workers": 0}
            key = "train_data" if part == "train" else "test_data"
            made = RankDataLoader(feature_map, "train" if part == "train" else "test", **{key: file}, **options)
            loaders[part] = made[0] if part == "train" else made
        model = FuxiPle(feature_map, facts, directory)
        model._max_gradient_norm = 10.0
        model.train()
        rows, started = 0, 0.0
        batches = iter(loaders["train"])
        for step in range(len(loaders["train"])):
            if step == facts["warm_up"]:
                started = clock()
            batch = next(batches)
            model.train_step(batch)
            rows += len(batch["user"]) if step >= facts["warm_up"] else 0
        seconds = clock() - started
        predicted = model.predict(loaders["held_out"])
    np.savez(
        out,
        rows=rows,
        seconds=seconds,
        probability=np.stack([predicted[name] for name in facts["behaviours"]], 1).astype(np.float32),
        behaviours=np.array(facts["behaviours"]),
    )


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
