"""Builds the hybrid engine of a job from its configuration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from modules.embeddings import Lookup, Table
from trainer.config.align import EngineJob
from trainer.config.precision import dense_settings
from trainer.console.errors import UserError
from trainer.data.features.packed_batch import ContentLayout
from trainer.engine.dense_engine import INDUCTOR
from trainer.engine.history_alignment import Alignment
from trainer.engine.hybrid_engine import DenseOptimizer, HybridEngine, TableOptimizer
from trainer.engine.step_loss import StepLoss
from trainer.runtime.distributed import World


def rows_per_rank(config: EngineJob, ranks: int) -> int:
    """Return the rows of one rank in an optimizer step.

    Raises:
        UserError: the batch size is not a multiple of the number of ranks.
    """
    rows, rest = divmod(config.train.batch_size, ranks)
    if rest:
        raise UserError(f"train.batch_size = {config.train.batch_size} is not a multiple of the {ranks} ranks")
    return rows


def make_engine(
    config: EngineJob,
    tables: Sequence[Table],
    lookups: Sequence[Lookup],
    network: nn.Module,
    loss: StepLoss,
    world: World,
    alignment: Alignment | None = None,
    content: Sequence[ContentLayout] = (),
    averaged: bool = False,
    compiled: bool = False,
) -> HybridEngine:
    """Return sharded tables and a dense network with the optimizers of a job. Collective.

    Raises:
        UserError: the engine refuses a setting, with the reason.
    """
    if config.train.precision == "tf32" and world.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return HybridEngine(
        tables,
        lookups,
        network,
        table_optimizer=TableOptimizer(config.tables.optimizer, config.tables.learning_rate, config.tables.eps),
        dense_optimizer=DenseOptimizer(
            config.optimizer.learning_rate, config.optimizer.weight_decay, config.optimizer.betas
        ),
        deepspeed=dense_settings(config.train),
        loss=loss,
        batch_size=rows_per_rank(config, world.size),
        device=world.device,
        seed=config.run.seed,
        overlap=config.train.overlap,
        alignment=alignment,
        deduplicate=config.tables.deduplicate,
        deepspeed_file=config.train.deepspeed,
        content=content,
        averaged=averaged,
        compiler=INDUCTOR if compiled else None,
    )
