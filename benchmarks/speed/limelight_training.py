"""Limelight's own training on the rows of ``benchmarks/speed/workload.py``: features, network, engine, and one rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed.loader import HOUR_MS
from benchmarks.speed.machine_rates import clock
from benchmarks.speed.workload import (
    ATTENTION,
    BEHAVIOURS,
    DENSE,
    DENSE_RATE,
    DIM,
    EXPERT_LAYERS,
    LENGTH,
    SHARED_EXPERTS,
    SIDE,
    TABLE_RATE,
    TASK_EXPERTS,
    TOWER,
)
from modules.embeddings import Lookup, Table
from modules.ranker import Ranker
from trainer.data.features.feature_map import HistorySequence
from trainer.data.features.history_sequences import Searched
from trainer.data.features.packed_batch import BatchLayout, PackedBatch
from trainer.data.format.history import Histories
from trainer.data.format.schema import DatasetSpec, Rows
from trainer.data.format.shards import RowStore
from trainer.data.loading.loader import Loader
from trainer.engine.hybrid_engine import DenseOptimizer, HybridEngine, StepResult, TableOptimizer
from trainer.engine.step_loss import BehaviourLoss
from trainer.ranking.training_state import TrainingState
from trainer.runtime.distributed import World
from trainer.runtime.files import write_json
from trainer.runtime.phase_timer import PHASES, PhaseSeconds

WARM_UP_STEPS = 4
DEEPSPEED = {
    "fp32": "configs/deepspeed/zero0.json",
    "tf32": "configs/deepspeed/zero0.json",
    "bf16": "configs/deepspeed/zero1_bf16.json",
}
"""The peers replicate their dense networks, as ZeRO 0 does; bf16 needs ZeRO's fp32 master copy."""


class WorkloadFeatures:
    """The peers' inputs: ids as they are, and the two sequences without contexts.

    A loader takes it in place of a :class:`trainer.data.features.feature_map.FeatureMap`. The project's own cannot give
    the inputs of the peers, which train the same network on the same rows:

    * The peers attend to the past authors and to the past items separately: two sequences, each with one id an entry.
      A history of a FeatureMap is one sequence, whose entries join item, author and context. No key of the
      configuration selects the parts of an entry, so two histories would read both tables twice.
    * The context, which every entry has, is two more ids: the behaviours and the age of the visit. The peers have no
      table for them.
    * Dense values are standardised by a fit on the training range; the peers read them as they are.

    Limelight would do more work than its peers, for another network: neither rows a second nor AUC could be compared.
    Shards, histories, loader, packed batches, engine and network are the project's own.
    """

    lookups = (
        Lookup("user", "user", 1),
        Lookup("author", "author", 1),
        Lookup("item", "item", 1),
        Lookup("side", "side", len(SIDE)),
        Lookup("past_author", "author", None),
        Lookup("past_item", "item", None),
    )
    sequences = (
        HistorySequence("authors", ("past_author",), ("author",), LENGTH),
        HistorySequence("items", ("past_item",), ("item",), LENGTH),
    )

    def __init__(self, spec: DatasetSpec) -> None:
        self.spec = spec
        rows = {name: space.count for name, space in spec.ids.items()} | {"side": sum(rows for _, rows in SIDE)}
        self.tables = tuple(Table(name, count, DIM) for name, count in rows.items())
        self.layout = BatchLayout((tuple(lookup.name for lookup in self.lookups),), DENSE, len(BEHAVIOURS))
        self._offsets = np.cumsum([0] + [rows for _, rows in SIDE[:-1]])

    def prepare(self, histories: Histories, space: Searched | None = None) -> None:
        """Do nothing: there is nothing to compile or to look up before workers are forked."""

    def pack(
        self, rows: Rows, histories: Histories, as_of_ms: np.ndarray, space: Searched | None = None
    ) -> PackedBatch:
        """Return the batch of some rows, see ``trainer.data.features.feature_map.FeatureMap.pack``."""
        n = len(rows["visit_id"])
        past = histories.latest(rows["user_id"], as_of_ms, domain=0, length=LENGTH)
        one = np.ones(n, np.int64)
        parts = [rows["user_id"], rows["author_id"], rows["item_id"], (rows["side"] + self._offsets).reshape(-1)]
        parts += [past.author_id, past.item_id, one, one, one, one * len(SIDE), past.lengths, past.lengths]
        parts += [rows["user_id"], rows["visit_id"], rows["request_ms"]]
        floats = [rows["dense"].reshape(-1), rows["label"].reshape(-1), rows["mask"].reshape(-1)]
        counts = {key: len(part) for key, part in zip(self.layout.keys[0], parts, strict=False)}
        return PackedBatch(
            torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False)),
            torch.from_numpy(np.concatenate(floats).astype(np.float32, copy=False)),
            n,
            counts,
        )


def make_ranker(features: WorkloadFeatures) -> Ranker:
    """Return the dense network of the workload."""
    torch.manual_seed(1)
    return Ranker(
        behaviours=len(BEHAVIOURS),
        lookups=features.lookups,
        dims={table.name: table.dim for table in features.tables},
        n_dense=DENSE,
        sequences=features.sequences,
        kind="ple",
        task_experts=TASK_EXPERTS,
        shared_experts=SHARED_EXPERTS,
        expert_layers=EXPERT_LAYERS,
        tower=TOWER,
        attention=ATTENTION,
    )


def make_engine(
    features: WorkloadFeatures, ranker: Ranker, precision: str, batch_size: int, device: torch.device
) -> HybridEngine:
    """Return the engine of the workload.

    Args:
        features: its inputs.
        ranker: its dense network.
        precision: a key of :data:`DEEPSPEED`.
        batch_size: rows of a rank in a step.
        device: device of the rank.
    """
    return HybridEngine(
        features.tables,
        features.lookups,
        ranker,
        table_optimizer=TableOptimizer("adagrad", TABLE_RATE, 1e-8),
        dense_optimizer=DenseOptimizer(DENSE_RATE, 0.0, (0.9, 0.999)),
        deepspeed=json.loads(Path(DEEPSPEED[precision]).read_text()) | {"gradient_clipping": 0.0},
        loss=BehaviourLoss(torch.ones(len(BEHAVIOURS))),
        batch_size=batch_size,
        device=device,
        seed=1,
        overlap=True,
    )


def make_loader(path: Path, features: WorkloadFeatures, world: World, batch_size: int, workers: int = 0) -> Loader:
    """Return a loader of a dataset's rows on one rank, ``batch_size`` at a time, by ``workers`` processes."""
    return Loader(
        RowStore(path, features.spec),
        Histories(path, features.spec),
        features,
        rank=world.rank,
        world=world.size,
        batch_size=batch_size,
        seed=1,
        shuffle_ms=HOUR_MS // 8,
        workers=workers,
        pin_memory=world.device.type == "cuda",
    )


def train_rank(path: Path, precision: str, batch_size: int, workers: int, out: Path) -> None:
    """Train on one rank and predict the held-out rows; the first rank writes the result."""
    with World.join("auto") as world:
        own = batch_size // world.size
        if precision == "tf32":
            torch.set_float32_matmul_precision("high")
        features = WorkloadFeatures(DatasetSpec.load(path / "train"))
        engine = make_engine(features, make_ranker(features), precision, own, world.device)
        loader = make_loader(path / "train", features, world, own, workers)
        state = TrainingState.at_start(BEHAVIOURS)
        laps: list[PhaseSeconds] = []
        rows, started = 0, 0.0
        with state.recording(engine, world):
            for step, result in enumerate(engine.steps(iter(loader))):
                state.advance(result)
                state.when_read(partial(_predicted, state, result))
                if step >= WARM_UP_STEPS:
                    rows += result.rows_global
                    laps.append(result.laps)
                elif step == WARM_UP_STEPS - 1:
                    started = clock(world.device)
            state.settle()
        state.progressive.compute()
        elapsed = clock(world.device) - started
        seconds = {phase: sum(of_step[phase] for of_step in map(PhaseSeconds.total, laps)) for phase in PHASES}
        held_out = WorkloadFeatures(DatasetSpec.load(path / "held_out"))
        predicted = engine.predict(iter(make_loader(path / "held_out", held_out, world, own)))
        probability = _in_order([(batch.visit_id, torch.sigmoid(logits)) for batch, logits in predicted], world)
        if world.rank == 0:
            np.savez(out, rows=rows, seconds=elapsed, probability=probability, behaviours=np.array(BEHAVIOURS))
            total = sum(seconds.values())
            shares = {phase: value / total for phase, value in seconds.items()}
            write_json(out.with_suffix(".json"), {"shares": shares, "plan": engine.plan})
        engine.close()


def _predicted(state: TrainingState, result: StepResult) -> None:
    """Add the rows of a step to the progressive metrics."""
    values = result.values
    state.predicted(values.user_id, values.logits, values.label, values.mask)


def _in_order(parts: Sequence[tuple[Tensor, Tensor]], world: World) -> np.ndarray:
    """Return the probabilities of all ranks in the order of the rows, whose numbers are their visits' ids."""
    row = torch.cat([rows for rows, _ in parts]).cpu()
    value = torch.cat([values for _, values in parts]).float().cpu()
    found: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(found, (row, value))
    order = torch.cat([rows for rows, _ in found]).argsort()
    return torch.cat([values for _, values in found])[order].numpy()
