"""Builds the dense network of a job from its configuration and features."""

from __future__ import annotations

import torch

from modules.ranker import Ranker, RankerKind
from trainer.config.ranker import JobConfig
from trainer.data.features.dense_inputs import statistic_name
from trainer.data.features.feature_map import FeatureMap

_CANDIDATE = ("author", "item")


def build_ranker(config: JobConfig, features: FeatureMap, kind: RankerKind) -> Ranker:
    """Return the ranker over these features, with initial values from ``run.seed``."""
    torch.manual_seed(config.run.seed)
    model, content = config.model, features.layout.content
    ranker = Ranker(
        behaviours=len(features.behaviours),
        lookups=(*features.lookups, *features.content_lookups),
        dims={table.name: table.dim for table in features.tables} | {table.name: table.dim for table in content},
        n_dense=features.n_dense,
        sequences=features.sequences,
        kind=kind,
        task_experts=model.task_experts,
        shared_experts=model.shared_experts,
        expert_layers=model.expert_layers,
        dcn_layers=model.dcn_layers,
        dcn_rank=model.dcn_rank,
        tower=model.tower,
        attention_kind=model.attention_kind,
        attention=model.attention,
        compiled_attention=model.compiled_attention is not False,
        compiled_experts=model.compiled_experts is not False,
        heads=model.heads,
        head_dim=model.head_dim,
        query_ids=candidate_ids(config, features),
        query_dense=candidate_dense(features),
        dropout=model.dropout,
        content={table.name: table.width for table in content},
    )
    ranker.init_output_bias(torch.from_numpy(features.base_rates).float())
    return ranker


def candidate_ids(config: JobConfig, features: FeatureMap) -> dict[str, list[int]]:
    """Return lookup -> places of its ids that are features of the candidate's author or item."""
    names = (*features.codes.lookups, *(table.name for table in features.layout.content))
    return {"side": candidate_side(config, features), **{name: [0] for name in names}}


def candidate_side(config: JobConfig, features: FeatureMap) -> list[int]:
    """Return the places in lookup ``side`` of the ids that are features of the candidate's author or item."""
    included = [side for side in features.spec.side if side.name not in config.features.exclude]
    return [place for place, side in enumerate(included) if side.of in _CANDIDATE]


def candidate_dense(features: FeatureMap) -> list[int]:
    """Return the columns of the candidate's dense features: features and past rates of its author or item."""
    spec = features.spec
    named = {dense.name for dense in spec.dense if dense.of in _CANDIDATE}
    rates = tuple(f"{statistic_name(key)}:" for key in spec.statistics if set(key) <= set(_CANDIDATE))
    return [place for place, name in enumerate(features.dense_names) if name in named or name.startswith(rates)]
