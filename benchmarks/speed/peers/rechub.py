"""torch-rechub's PLE, or its DIN, trained by its own trainer and data loader.

``benchmarks/speed/throughput.py`` starts it in the Python that its user names. Its arguments are the model, the
directory of the data, and the file of the result.

It has no model with both. ``ple`` averages the histories, has the same experts in every layer and normalises batches;
``din`` attends to them and learns the first behaviour only. Its trainers have one process and one optimizer for all
parameters, Adam, whose step touches every row of every table.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
from torch_rechub.models.multi_task import PLE
from torch_rechub.models.ranking import DIN
from torch_rechub.trainers import CTRTrainer, MTLTrainer
from torch_rechub.utils.data import DataGenerator, PredictDataset


def clock() -> float:
    """Return the seconds of a clock when the device has done all that is queued."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class TimedLoader:
    """A data loader that notes when the first batch after the warm-up is asked for."""

    def __init__(self, loader: Any, warm_up: int) -> None:
        self.loader, self.warm_up, self.started, self.rows = loader, warm_up, 0.0, 0

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches."""
        batches = iter(self.loader)
        for step in range(len(self.loader)):
            if step == self.warm_up:
                self.started = clock()
            batch = next(batches)
            self.rows += len(batch[1]) if step >= self.warm_up else 0
            yield batch

    def __len__(self) -> int:
        return len(self.loader)


def run(mode: str, data: Path, out: Path) -> None:
    """Train an epoch, predict the held-out rows, and write the result."""
    facts = json.loads((data / "workload.json").read_text())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(1)
    dim, behaviours = facts["dim"], facts["behaviours"]
    ids = [SparseFeature(name, rows, dim) for name, rows in facts["tables"].items()]
    pooling = "mean" if mode == "ple" else "concat"
    histories = [
        SequenceFeature(name, facts["tables"][table], dim, pooling, shared_with=table)
        for name, table in facts["histories"].items()
    ]
    dense = [DenseFeature(f"dense_{number}") for number in range(facts["dense"])]
    parts = {}
    for part in ("train", "held_out"):
        arrays = dict(np.load(data / f"{part}.npz", allow_pickle=False))
        values, label = arrays.pop("dense"), arrays.pop("label")
        arrays |= {f"dense_{number}": values[:, number] for number in range(facts["dense"])}
        parts[part] = (arrays, label if mode == "ple" else label[:, 0])
    loader, _, held_out = DataGenerator(*parts["train"]).generate_dataloader(
        *parts["held_out"], *parts["held_out"], batch_size=facts["batch"]
    )
    timed = TimedLoader(loader, facts["warm_up"])
    common: dict[str, Any] = {"optimizer_params": {"lr": facts["table_rate"]}, "n_epoch": 1}
    common["device"] = "cuda:0" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as models:
        common["model_path"] = models
        if mode == "ple":
            types = ["classification"] * len(behaviours)
            towers = [{"dims": facts["tower"]}] * len(behaviours)
            network = PLE(
                [*ids, *histories, *dense],
                types,
                len(facts["expert_layers"]),
                facts["task_experts"],
                facts["shared_experts"],
                {"dims": facts["expert_layers"][0]},
                towers,
            )
            trainer = MTLTrainer(network, types, **common)
        else:
            learnt = set(facts["histories"].values())
            network = DIN(
                [feature for feature in ids if feature.name not in learnt],
                histories,
                [feature for feature in ids if feature.name in learnt],
                {"dims": facts["expert_layers"][0]},
                {"dims": facts["attention"], "use_softmax": True},
            )
            trainer = CTRTrainer(network, **common)
        trainer.train_one_epoch(timed)
        seconds = clock() - timed.started
        if mode == "ple":
            # This trainer predicts batches without labels, the other one batches with them.
            held_out = DataLoader(PredictDataset(parts["held_out"][0]), batch_size=facts["batch"])
        probability = np.array(trainer.predict(network, held_out), np.float32).reshape(len(parts["held_out"][1]), -1)
    np.savez(
        out,
        rows=timed.rows,
        seconds=seconds,
        probability=probability,
        behaviours=np.array(behaviours if mode == "ple" else behaviours[:1]),
    )


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
