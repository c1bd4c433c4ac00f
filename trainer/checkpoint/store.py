"""The checkpoint directory of one model, of any kind: schedule, background writes, search for the newest complete one.

The writing threads of the ranks communicate over a process group of their own, so that training and its collectives
continue during a write (``trainer.checkpoint.writer``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from trainer.checkpoint.manifest import (
    Manifest,
    NewerSchema,
    check_complete,
    check_files,
    list_checkpoints,
    read_manifest,
)
from trainer.checkpoint.writer import Save, clear
from trainer.config.sections import CheckpointConfig
from trainer.console.errors import UserError, is_lost_peer, one_line
from trainer.console.text_table import size_text
from trainer.runtime.distributed import World

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CheckpointStore:
    """Checkpoints of one model. The constructor and all methods but :meth:`is_due` and :meth:`check` are collective.

    Args:
        directory: of the checkpoints, on a file system that all ranks share; made if it does not exist.
        settings: schedule of the saves, and the number to keep.
        world: the ranks.
        after_save: called on the first rank with the directory of each complete checkpoint, by the writing thread.

    Attributes:
        stalls: seconds for which each save stopped training.
    """

    def __init__(
        self,
        directory: Path,
        settings: CheckpointConfig,
        world: World,
        after_save: Callable[[Path], None] = lambda directory: None,
    ) -> None:
        self._directory, self._settings, self._world, self._after_save = directory, settings, world, after_save
        group = dist.new_group(backend="gloo")
        assert group is not None
        self._group: dist.ProcessGroup = group
        self._writer: threading.Thread | None = None
        self._failure: Exception | None = None
        self._number = 0
        self._asked = time.monotonic()
        self.stalls: list[float] = []
        agreed(world, lambda: clear(directory))

    def is_due(self, step: int) -> bool:
        """True if a checkpoint is due after a step. The first rank decides; it is always False on the others."""
        if self._world.rank:
            return False
        seconds, steps = 60 * self._settings.every_minutes, self._settings.every_steps
        due = bool(steps and step % steps == 0) or bool(seconds and time.monotonic() - self._asked >= seconds)
        if due:
            self._asked = time.monotonic()
        return due

    def wait(self) -> None:
        """Wait for the running save.

        Raises:
            UserError: the save failed.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self.check()

    def check(self) -> None:
        """Raise the error of a failed background save; not collective.

        Raises:
            UserError: the reason of the failure.
        """
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Wait for the running save, and destroy the process group."""
        self.wait()
        dist.destroy_process_group(self._group)

    def _save(self, make_snapshot: Callable[[bool], Save], wait: bool) -> None:
        """Save a snapshot, in the background if the job's settings allow it and ``wait`` is False.

        Args:
            make_snapshot: called with True to copy the values, or with False to use those of the training.
            wait: return only when the checkpoint is on disk.
        """
        started = time.monotonic()
        self.wait()
        self._number += 1
        background = self._settings.background and not wait
        save = make_snapshot(background)
        if background:
            stall = f", training stopped for {time.monotonic() - started:.2f} s"
            self._writer = threading.Thread(
                target=self._write, args=(save, started, stall), name="checkpoint", daemon=True
            )
            self._writer.start()
        else:
            self._write(save, started, "")
            self.check()
        self.stalls.append(time.monotonic() - started)

    def _newest_whole(self) -> tuple[Path, Manifest] | None:
        candidates = agreed(self._world, lambda: list(reversed(list_checkpoints(self._directory))))
        for directory in candidates:
            problem, manifest = agreed(self._world, partial(_try_manifest, directory))
            if manifest is not None:
                problem = verify_together(directory, manifest, self._world)
                if problem is None:
                    return directory, manifest
            logger.info(f"{directory}: damaged, trying the checkpoint before it ({problem})")
        if candidates:
            raise UserError(
                f"{self._directory}: none of {len(candidates)} checkpoints is complete; remove them to train from the "
                "start"
            )
        return None

    def _write(self, save: Save, started: float, remark: str) -> None:
        try:
            directory, size = save.write()
        except UserError as error:
            self._failure = error
        except Exception as error:
            # Only the lost rank knows the reason, so the error is not replaced.
            lost = is_lost_peer(f"{type(error).__name__}: {error}")
            self._failure = (
                error if lost else UserError(f"{self._directory}: a checkpoint could not be written: {one_line(error)}")
            )
        else:
            logger.info(f"saved {directory}: {size_text(size)} in {time.monotonic() - started:.1f} s{remark}")
            if self._world.rank == 0:
                self._after_save(directory)


def verify_together(directory: Path, manifest: Manifest, world: World) -> str | None:
    """Read every file of a checkpoint once, a share on each rank, and return the first problem. Collective."""
    share = sorted(manifest.files)[world.rank :: world.size]
    found = world.agree(world.gather(check_files(directory, manifest, share))) or []
    return next((problems[0] for problems in found if problems), None)


def agreed(world: World, look: Callable[[], T]) -> T:
    """Return the first rank's view on every rank, since shared file systems show changes with different delays."""
    result: T | UserError | None = None
    if world.rank == 0:
        try:
            result = look()
        except UserError as error:
            result = error
    result = world.agree(result)
    if isinstance(result, UserError):
        raise result
    return result  # type: ignore[return-value]


def _try_manifest(directory: Path) -> tuple[str | None, Manifest | None]:
    """Return the problem of a checkpoint's manifest or ``None``, and the manifest.

    Raises:
        NewerSchema: a later version wrote it; falling back to an older checkpoint would undo its training.
    """
    try:
        manifest = read_manifest(directory)
    except NewerSchema:
        raise
    except UserError as error:
        return str(error), None
    problems = check_complete(directory, manifest)
    return (problems[0], None) if problems else (None, manifest)
