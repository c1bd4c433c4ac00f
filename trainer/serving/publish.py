"""Models for scoring while training goes on: checkpoints, exported under a name that always has the newest.

::

    RUN/published/step-00000120/    an exported model (trainer/serving/export.py)
    RUN/published/current           a link to the newest, replaced in one step

``limelight score RUN/published/current ...`` needs neither TorchRec nor DeepSpeed.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from trainer.config.ranker import JobConfig
from trainer.console.errors import UserError
from trainer.serving.export import export_checkpoint

logger = logging.getLogger(__name__)

FOLDER, CURRENT = "published", "current"


class Publisher:
    """Publishes checkpoints, no more often than asked for.

    Args:
        home: of the model.
        minutes: between two of them; 0 publishes none.
        keep: newest models to keep.
    """

    def __init__(self, home: Path, minutes: float, keep: int) -> None:
        self._home, self._seconds, self._keep = home / FOLDER, 60 * minutes, keep
        self._published_at: float | None = None

    def __call__(self, checkpoint: Path) -> None:
        """Publish a checkpoint if it is time; that it fails is told, and training goes on."""
        now = time.monotonic()
        if not self._seconds or (self._published_at is not None and now - self._published_at < self._seconds):
            return
        self._published_at = now
        model = self._home / checkpoint.name
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            if not model.exists():
                export_checkpoint(checkpoint, model)
            aside = self._home / f".{CURRENT}.{os.getpid()}"
            aside.unlink(missing_ok=True)
            aside.symlink_to(model.name)
            aside.replace(self._home / CURRENT)
            for old in sorted(self._home.glob("step-*"))[: -self._keep]:
                shutil.rmtree(old)
        except (OSError, UserError) as error:
            logger.info(f"{model}: could not be published ({error})")
        else:
            logger.info(f"published {model}")


def publisher(config: JobConfig, home: Path) -> Callable[[Path], None]:
    """What a job does with a checkpoint of the model in ``home`` once it is whole."""
    if config.stream is None:
        return lambda checkpoint: None
    return Publisher(home, config.stream.publish_minutes, config.stream.keep_published)
