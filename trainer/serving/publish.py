"""Publication of models during training: checkpoints are exported, and a link names the newest export.

::

    RUN/published/step-00000120/    an exported model (trainer/serving/export.py)
    RUN/published/current           a link to the newest one, replaced atomically

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
    """Publishes checkpoints, at most one per interval.

    Args:
        model_dir: directory of the model in the run.
        minutes: least time between two publications; 0 publishes nothing.
        keep: number of newest exports to keep.
    """

    def __init__(self, model_dir: Path, minutes: float, keep: int) -> None:
        self._directory, self._seconds, self._keep = model_dir / FOLDER, 60 * minutes, keep
        self._published_at: float | None = None

    def __call__(self, checkpoint: Path) -> None:
        """Publish a complete checkpoint if the interval has passed. A failure is logged and training continues."""
        now = time.monotonic()
        if not self._seconds or (self._published_at is not None and now - self._published_at < self._seconds):
            return
        self._published_at = now
        model = self._directory / checkpoint.name
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if not model.exists():
                export_checkpoint(checkpoint, model)
            tmp_path = self._directory / f".{CURRENT}.{os.getpid()}"
            tmp_path.unlink(missing_ok=True)
            # A link cannot be changed in place: a rename of a new one leaves no moment without a current model.
            tmp_path.symlink_to(model.name)
            tmp_path.replace(self._directory / CURRENT)
            for old in sorted(self._directory.glob("step-*"))[: -self._keep]:
                shutil.rmtree(old)
        except (OSError, UserError) as error:
            logger.info(f"{model}: could not be published ({error})")
        else:
            logger.info(f"published {model}")


def make_publisher(config: JobConfig, model_dir: Path) -> Callable[[Path], None]:
    """Return the function that publishes complete checkpoints of a model; without a stream it does nothing."""
    if config.stream is None:
        return lambda checkpoint: None
    return Publisher(model_dir, config.stream.publish_minutes, config.stream.keep_published)
