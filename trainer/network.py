"""The dense network of a job."""

from __future__ import annotations

import torch

from modules.ranker import Ranker, RankerKind
from trainer.config import JobConfig
from trainer.data.features import FeatureMap


def build_ranker(config: JobConfig, features: FeatureMap, kind: RankerKind) -> Ranker:
    """The ranker over these features, with the initial values that ``run.seed`` gives."""
    torch.manual_seed(config.run.seed)
    model = config.model
    ranker = Ranker(
        behaviours=len(features.behaviours),
        lookups=features.lookups,
        dims={table.name: table.dim for table in features.tables},
        n_dense=features.n_dense,
        sequences=features.sequences,
        kind=kind,
        task_experts=model.task_experts,
        shared_experts=model.shared_experts,
        expert_layers=model.expert_layers,
        tower=model.tower,
        attention=model.attention,
        dropout=model.dropout,
    )
    ranker.start_at(torch.from_numpy(features.base_rates).float())
    return ranker
