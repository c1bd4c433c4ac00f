"""Choices of networks and tables that a job file names, in a module that does not import torch.

``limelight train`` reads the job file before it starts the ranks, and would otherwise load torch once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BackboneKind = Literal["mlp", "dcn", "deepfm", "autoint"]
"""Feature interaction of the staytime job: ``modules/staytime/backbones.py``."""

BaseKind = Literal["vr", "wlr", "d2q", "ndt", "pcr", "tpm"]
"""Base loss of the staytime job: ``modules/staytime/base_losses.py``."""

TextPooling = Literal["last", "mean", "query"]
"""Pooling of a text's token states: ``modules/text_pooling.py``."""

Evict = Literal["recency", "frequency", "both"]
"""Policy that chooses the id to evict from a dynamic table."""


@dataclass(frozen=True)
class Dynamic:
    """Admission and eviction of the ids of a dynamic table; see ``trainer.sparse.dynamic_ids``.

    Attributes:
        admit_after: number of training steps that must contain an id before it gets a row.
        evict: policy that chooses the id to evict.
    """

    admit_after: int
    evict: Evict
