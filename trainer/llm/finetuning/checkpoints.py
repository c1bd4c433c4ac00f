"""Checkpoints of a fine-tuning run: the adapter and its optimizer state. The base model is not saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoint.manifest import ADAPTER, DatasetEntry, Manifest
from trainer.checkpoint.step_checkpoints import StepCheckpoints, StepIdentity
from trainer.config.finetune import FinetuneConfig
from trainer.console.errors import UserError
from trainer.runtime.distributed import World


class AdapterCheckpoints(StepCheckpoints):
    """Checkpoint store of an adapter.

    Args:
        directory: directory of the checkpoints, on a file system that all ranks share; created if it does not exist.
        config: the job.
        base: fingerprint of the base model.
        samples: paths and fingerprint of the tokenised training samples.
        world: ranks of the run.
    """

    def __init__(self, directory: Path, config: FinetuneConfig, base: str, samples: DatasetEntry, world: World) -> None:
        identity = StepIdentity(ADAPTER, config, config.run.seed, {"base": base}, samples, "adapter")
        super().__init__(directory, config.checkpoint, identity, world)

    def _refuse_other(self, directory: Path, manifest: Manifest, job: Mapping[str, Any]) -> None:
        if manifest.kind != ADAPTER or job.get("base") != self._identity.facts["base"]:
            raise UserError(
                f"{directory}: this checkpoint is of an adapter for another base model; choose another run.directory"
            )
        if manifest.dataset.fingerprint != self._identity.data.fingerprint:
            raise UserError(
                f"{directory}: this checkpoint was trained on other samples than {self._identity.data.path}; choose "
                "another run.directory"
            )
